from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention import blockwise, dot_product, masks

SMALL = partial(blockwise.attend, query_block=4, key_block=3)


CAP_AND_SINKS = dict(softcap=0.8, sinks_H=jnp.array([0.5, -3.0, 2.0, 0.0]))


def test_it_is_the_reference_forward_and_backward(case, law):
  law.agree(SMALL, *case)


def test_with_a_cap_and_sinks_too(case, law):
  law.agree(SMALL, *case, **CAP_AND_SINKS)
  law.agree(SMALL, *case, sinks_H=-CAP_AND_SINKS['sinks_H'])


def test_sinks_far_above_and_far_below_all_scores(law):
  law.agree(SMALL, law.draw(), masks.causal(-2), sinks_H=jnp.array([1e4, -1e4, 80.0, -80.0]))


@pytest.mark.parametrize('blocks', [(1, 1), (7, 10), (512, 512), (2, 100)])
def test_the_blocks_do_not_matter(blocks, law):
  mask = masks.causal(2) & masks.lengths(jnp.array([0, 8]))
  law.agree(partial(blockwise.attend, query_block=blocks[0], key_block=blocks[1]), law.draw(), mask, scale=0.3)


def test_no_queries_and_no_keys(law):
  for more in ({}, CAP_AND_SINKS):
    law.agree(SMALL, law.draw(T=0), masks.causal(), **more)
    law.agree(SMALL, law.draw(S=0), masks.causal(), **more)


@pytest.mark.parametrize('mask, hidden', [
    (masks.causal(), slice(9, None)), (masks.window(2), slice(9, None)),
    (masks.window(2, offset=6), slice(0, 3))])
def test_blocks_that_positions_hide_are_never_computed(mask, hidden, law):
  """NaN would come through a block that is computed and then masked, since 0 x NaN is NaN."""
  q, k, v, d_z = law.draw(T=6, S=12)
  # Queries 0 to 5, and in the last case 6 to 11, whose window begins at key 5.
  found = law.results(SMALL, q, k.at[:, hidden].set(jnp.nan), v.at[:, hidden].set(jnp.nan), d_z, mask)
  for one, other in zip(found, law.results(dot_product.attend, q, k, v, d_z, mask)):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_it_can_be_mapped_over_rows_with_offsets_of_their_own(law):
  q, k, v, _ = law.draw()
  offsets_B = jnp.array([0, 3])
  mapped = jax.vmap(lambda q, k, v, offset: SMALL(q[None], k[None], v[None], masks.causal(offset))[0])
  for b in range(2):
    alone = dot_product.attend(q[b:b + 1], k[b:b + 1], v[b:b + 1], masks.causal(int(offsets_B[b])))
    np.testing.assert_allclose(mapped(q, k, v, offsets_B)[b], alone[0], atol=1e-5)


def test_bfloat16_is_the_float32_result_rounded(law):
  arrays = law.draw(dtype=jnp.bfloat16)
  found = law.results(SMALL, *arrays, masks.causal(2), **CAP_AND_SINKS)
  exact = law.results(dot_product.attend, *(x.astype(jnp.float32) for x in arrays), masks.causal(2), **CAP_AND_SINKS)
  assert [x.dtype for x in found] == [jnp.bfloat16] * 4 + [jnp.float32]
  for one, other in zip(found, exact):
    np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.04)


def test_bfloat16_is_summed_in_float32(law):
  """The mean of a thousand equal values: a bfloat16 sum stops growing at 256."""
  q, k, v, _ = law.draw(T=2, S=1000, dtype=jnp.bfloat16)
  z = blockwise.attend(jnp.zeros_like(q), k, jnp.ones_like(v), query_block=2, key_block=1)
  np.testing.assert_array_equal(z.astype(jnp.float32), 1.0)


def test_memory_is_linear_in_the_length():
  def temporary(attend, T):
    x = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
    step = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, masks.causal())**2), (0, 1, 2)))
    return step.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

  attend = partial(blockwise.attend, query_block=64, key_block=64)
  assert temporary(attend, 4096) < 4.5 * temporary(attend, 1024)
  assert temporary(attend, 4096) < 4096**2  # a quarter of one float32 T x S
  assert temporary(dot_product.attend, 4096) > 4096**2 * 4  # so the measure sees them
