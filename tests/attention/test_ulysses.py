"""Ulysses attention is the reference, with two all-to-alls and without gathering the sequence."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from tfm.attention import dot_product, masks, ring, ulysses
from tfm.attention.attend import AttentionError, Request
from tfm.parallel.mesh import AXES

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason='needs 8 devices: tests/test_multi_device.py has them')
B, T, C = 2, 16, 4
PACKED = jnp.array([[0] * 3 + [1] * 6 + [2] * 7, [0] * 16])
HEADED_DENSE = jnp.asarray(np.random.default_rng(2).random((1, 8, T, T)) < 0.5)


def mesh(context, tensor=1, data=1):
  shape = data, 1, 1, tensor, context
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:math.prod(shape)])


def draw(S=T, H=8, K=8, value_width=C):
  random = np.random.default_rng(0)
  return [jnp.asarray(random.standard_normal(shape), jnp.float32)
          for shape in ((B, T, H, C), (B, S, K, C), (B, S, K, value_width))]


def compiled(attend, arguments, mask):
  """(output, gradients of queries, keys and values), and the text of the compiled program."""
  weights = np.random.default_rng(1).standard_normal((*arguments[0].shape[:3], arguments[2].shape[-1]))

  def total(q, k, v, mask):
    z_BxTxHxC = attend(q, k, v, mask, scale=0.7)
    return jnp.sum(z_BxTxHxC * weights), z_BxTxHxC

  def run(*arguments):
    gradients, z_BxTxHxC = jax.grad(total, (0, 1, 2), has_aux=True)(*arguments)
    return z_BxTxHxC, *gradients

  program = jax.jit(run).lower(*arguments, mask).compile()
  return program(*arguments, mask), program.as_text()


EIGHT, FOUR_BY_TWO, TWO_BY_TWO_BY_TWO = dict(context=8), dict(context=4, tensor=2), dict(context=2, tensor=2, data=2)
CASES = {
    'everything, wide values': (EIGHT, None, dict(value_width=7)),
    'lengths, an empty row, across': (EIGHT, masks.lengths(jnp.array([0, 11])), dict(S=24)),
    'causal, key heads for every other device': (EIGHT, masks.causal(), dict(K=4)),
    'causal, one key head a device': (FOUR_BY_TWO, masks.causal(), dict(H=16, K=8)),
    'causal window, one key head for all': (FOUR_BY_TWO, masks.causal() & masks.window(3), dict(K=2)),
    'causal, continued, across': (TWO_BY_TWO_BY_TWO, masks.causal(8), dict(S=24)),
    'dense, by head': (TWO_BY_TWO_BY_TWO, masks.dense(HEADED_DENSE), {}),
    'dense, of two dimensions': (TWO_BY_TWO_BY_TWO, masks.dense(HEADED_DENSE[0, 0]), {}),
    'all at once': (TWO_BY_TWO_BY_TWO, masks.prefix(jnp.array([3, 9])) & masks.segments(PACKED)
                    & masks.lengths(jnp.array([11, 15])), dict(K=6, H=12)),
}


@pytest.mark.parametrize('case, long', [*((case, False) for case in CASES), ('all at once', True),
                                        ('causal, one key head a device', True)])
def test_ulysses_is_the_reference(case, long, monkeypatch):
  if long:  # the blockwise kernel instead of the exact one
    monkeypatch.setattr(ulysses, 'LONG', 1)
  axes, mask, shapes = CASES[case]
  arguments, devices = draw(**shapes), mesh(**axes)
  wanted, _ = compiled(dot_product.attend, arguments, mask)
  with jax.set_mesh(devices):
    sharded = [jax.device_put(x, NamedSharding(devices, ring.HEADED)) for x in arguments]
    got, text = compiled(ulysses.attend, sharded, mask)
  for ours, theirs in zip(got, wanted):
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
  assert 'all-to-all' in text and 'all-gather' not in text
  if case.startswith('lengths'):
    for nothing in got:
      np.testing.assert_array_equal(nothing[0], 0)


@pytest.mark.parametrize('H, K, length, wanted, sentence', [
    (8, 8, T, {}, None),
    (8, 2, T, {}, None),
    (4, 4, T, {}, '2 heads of a device cannot be shared out over the 4 devices of the mesh axis context'),
    (8, 8, 18, {}, '18 queries and 18 keys .* multiple of 4'),
    (8, 1, T, {}, '1 key/value heads .* mesh axis tensor'),
    (8, 8, T, dict(needs_pattern=True), 'pattern'),
    (8, 8, T, dict(softcap=True), 'no cap'),
    (8, 8, T, dict(sinks=True), 'no sinks'),
])
def test_what_it_cannot_do_is_refused_with_a_reason(H, K, length, wanted, sentence):
  q, k = (jax.ShapeDtypeStruct((B, length, heads, C), jnp.float32) for heads in (H, K))
  with jax.set_mesh(mesh(**FOUR_BY_TWO)):
    reason = ulysses.supports(Request.of(q, k, k, **wanted))
  assert reason is None if sentence is None else re.search(sentence, reason)


def test_a_call_that_it_does_not_support_is_an_error():
  with pytest.raises(AttentionError, match='Ulysses attention cannot do no mask in float32 on .*jax.set_mesh'):
    ulysses.attend(*draw())
