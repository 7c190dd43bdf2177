"""Groups of rows times matrices of their own: against a loop over groups, whatever the sizes and the blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.models import grouped

SIZES = [(3, 0, 5, 4), (0, 0, 12, 0), (1, 1, 1, 9), (12, 0, 0, 0), (0, 0, 0, 12), (2, 3, 1, 0), (0, 0, 0, 0)]


def arrays(sizes, dtype=jnp.float32):
  x, kernel, dy = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(
      [(12, 5), (4, 5, 7), (12, 7)]))
  return x, kernel, dy.at[sum(sizes):].set(0)  # what has no group has no say


def by_hand(x, kernel, dy, sizes):
  y, dx, dkernel, start = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(kernel.shape), 0
  for e, size in enumerate(sizes):
    own = slice(start, start + size)
    y[own], dx[own], dkernel[e] = x[own] @ kernel[e], dy[own] @ kernel[e].T, x[own].T @ dy[own]
    start += size
  return y[:start], dx[:start], dkernel


@pytest.mark.parametrize('sizes', SIZES)
@pytest.mark.parametrize('block', [1, 2, 256])
def test_the_product_and_its_gradients_are_those_of_a_loop_over_groups(sizes, block, monkeypatch):
  monkeypatch.setattr(grouped, 'BLOCK', block)
  x, kernel, dy = arrays(sizes)
  y, vjp = jax.vjp(lambda x, kernel: grouped.grouped_matmul(x, kernel, jnp.array(sizes)), x, kernel)
  dx, dkernel = vjp(dy)
  rows = sum(sizes)
  for found, expected in zip((y[:rows], dx[:rows], dkernel), by_hand(*map(np.asarray, (x, kernel, dy)), sizes)):
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize('sizes', SIZES)
def test_the_kernel_of_other_platforms_agrees(sizes):
  x, kernel, dy = arrays(sizes)
  rows, sizes = sum(sizes), jnp.array(sizes)
  np.testing.assert_allclose(jax.lax.ragged_dot(x, kernel, sizes)[:rows],
                             grouped.grouped_matmul(x, kernel, sizes)[:rows], atol=1e-5)
  for found, expected in zip(grouped._ragged_gradients(x, kernel, sizes, dy), grouped._gradients(x, kernel, sizes, dy)):
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradients_in_bfloat16_are_added_up_in_float32(monkeypatch):
  monkeypatch.setattr(grouped, 'BLOCK', 1)
  x, kernel, dy = jnp.ones((600, 1), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16), jnp.ones((600, 1), jnp.bfloat16)
  found = grouped._gradients(x, kernel, jnp.array([600]), dy)[1]
  assert found.dtype == jnp.bfloat16 and abs(float(found[0, 0, 0]) - 600) <= 2  # bfloat16 counts by ones to 256


def test_it_lowers_for_accelerators_without_the_loop():
  x, kernel, dy = arrays((3, 0, 5, 4))
  step = jax.jit(jax.grad(lambda kernel, x: grouped.grouped_matmul(x, kernel, jnp.array((3, 0, 5, 4))).sum()))
  for platform, loops in (('cpu', True), ('tpu', False), ('cuda', False)):
    text = step.trace(kernel, x).lower(lowering_platforms=(platform,)).as_text()
    assert ('stablehlo.while' in text) is loops, platform
    assert ('ragged_dot' in text) is not loops, platform
