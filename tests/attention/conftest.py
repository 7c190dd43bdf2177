"""The requests that every kernel is compared on with the reference, forward and backward."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention import dot_product, masks

B, T, S, H, K, C = 2, 7, 10, 4, 2, 4
RANDOM = np.random.default_rng(0)
DENSE = jnp.asarray(RANDOM.random((B, H, T, S)) < 0.4)
QUERY_SEGMENTS, KEY_SEGMENTS = jnp.array([[1, 1, 2, 2, 2, 3, 9], [4] * 7]), jnp.array([[1] * 4 + [2] * 3 + [3] * 3] * 2)
EMPTY_AND_PART = jnp.array([0, 8])

# name -> mask, or (mask, changes to the shapes)
CASES = {
    'no mask': None,
    'causal': masks.causal(),
    'continued': masks.causal(3),
    'continued, known when it runs': masks.causal(jnp.int32(3)),
    'queries before the first key': masks.causal(-2),
    'lengths, one of them 0': masks.lengths(EMPTY_AND_PART),
    'segments, some without keys': masks.segments(QUERY_SEGMENTS, KEY_SEGMENTS),
    'window': masks.window(2),
    'window beyond the keys': (masks.window(2, offset=6), dict(S=5)),
    'causal window': masks.causal() & masks.window(3),
    'prefix': masks.prefix(jnp.array([0, 9])),
    'dense': masks.dense(DENSE),
    'dense for all heads': masks.dense(DENSE[:, :1]),
    'dense of keys only': masks.dense(DENSE[0, 0, 0]),
    'causal, lengths and segments': masks.causal(1) & masks.lengths(EMPTY_AND_PART) & masks.segments(
        QUERY_SEGMENTS, KEY_SEGMENTS),
    'prefix, window and dense': masks.prefix(jnp.array([2, 9])) & masks.window(4) & masks.dense(DENSE),
    'one key head': (masks.causal(), dict(K=1)),
    'as many key heads': (masks.lengths(EMPTY_AND_PART), dict(K=4)),
    'wide values': (masks.causal(), dict(value_width=6)),
    'one query': (masks.causal(5) & masks.lengths(EMPTY_AND_PART), dict(T=1)),
    'one key': (None, dict(S=1)),
    'square': (masks.causal(), dict(T=8, S=8)),
}


def draw(T=T, S=S, H=H, K=K, C=C, value_width=C, dtype=jnp.float32, batch=B):
  """Queries, keys, values and a gradient of the output, all random."""
  random = np.random.default_rng(1)
  shapes = (batch, T, H, C), (batch, S, K, C), (batch, S, K, value_width), (batch, T, H, value_width)
  return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def results(attend, q, k, v, d_z, mask, sinks_H=None, **options):
  """Output and gradients of queries, keys, values and sinks, compiled; the mask's arrays are traced."""
  # jit would trace an offset that is a number, too.
  static = {} if mask is None or not isinstance(mask.offset, int) else dict(offset=mask.offset)

  def run(q, k, v, d_z, mask, sinks):
    mask = None if mask is None else mask.replace(**static)
    z, pull = jax.vjp(lambda q, k, v, sinks: attend(q, k, v, mask, **sinks, **options), q, k, v, sinks)
    d_q, d_k, d_v, d_sinks = pull(d_z)
    return z, d_q, d_k, d_v, *d_sinks.values()

  return jax.jit(run)(q, k, v, d_z, mask, {} if sinks_H is None else dict(sinks_H=sinks_H))


def alone(q, k, mask) -> tuple[np.ndarray, np.ndarray]:
  """Queries that see no key, BxTxH, and keys that no query sees, BxSxK: their outputs and gradients must be 0."""
  (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
  array = None if mask is None else mask.to_array(T, S)
  sees_BxHxTxS = np.broadcast_to(True if array is None else array, (B, H, T, S))
  seen_BxKxS = sees_BxHxTxS.any(2).reshape(B, K, H // K, S).any(2)
  return ~np.moveaxis(sees_BxHxTxS.any(3), 1, 2), ~np.moveaxis(seen_BxKxS, 1, 2)


@pytest.fixture(params=CASES)
def case(request):
  """(arrays, mask) of every request in turn."""
  entry = CASES[request.param]
  mask, shape = entry if isinstance(entry, tuple) else (entry, {})
  return draw(**shape), mask


@pytest.fixture
def law():
  """What the kernels' tests share: draw, results, and the comparison with the reference."""
  def agree(attend, arrays, mask, atol=1e-5, **options):
    common = {name: value for name, value in options.items() if name in ('scale', 'softcap', 'sinks_H')}
    expected = results(dot_product.attend, *arrays, mask, **common)
    found = results(attend, *arrays, mask, **options)
    for name, one, other in zip(('z', 'd_q', 'd_k', 'd_v', 'd_sinks'), found, expected):
      assert one.dtype == other.dtype
      np.testing.assert_allclose(np.float32(one), np.float32(other), atol=atol, err_msg=name)
    blind_BxTxH, unseen_BxSxK = alone(*arrays[:2], mask)
    for one, without in zip(found, (blind_BxTxH, blind_BxTxH, unseen_BxSxK, unseen_BxSxK)):
      np.testing.assert_array_equal(np.asarray(one)[without], 0)

  return types.SimpleNamespace(draw=draw, results=results, agree=agree)
