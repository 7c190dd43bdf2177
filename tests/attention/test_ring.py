"""Ring attention is the reference, on whatever mesh, with equal work and without gathering the sequence."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tfm.attention import dot_product, masks, ring
from tfm.attention.attend import AttentionError, Request
from tfm.parallel.mesh import AXES

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason='needs 8 devices: tests/test_multi_device.py has them')
B, T, C = 2, 32, 4
PACKED = jnp.array([[0] * 7 + [1] * 12 + [2] * 13, [0] * 32])


def mesh(context, tensor=1, data=1):
  shape = data, 1, 1, tensor, context
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:math.prod(shape)])


def draw(T=T, S=T, H=2, K=2, value_width=C, dtype=jnp.float32):
  random = np.random.default_rng(0)
  return [jnp.asarray(random.standard_normal(shape), dtype)
          for shape in ((B, T, H, C), (B, S, K, C), (B, S, K, value_width))]


def compiled(attend, arguments, mask, **options):
  """(output, gradients of queries, keys and values), and the text of the compiled program."""
  weights = np.random.default_rng(1).standard_normal((*arguments[0].shape[:3], arguments[2].shape[-1]))

  def total(q, k, v, mask):
    z_BxTxHxC = attend(q, k, v, mask, **options)
    return jnp.sum(z_BxTxHxC * weights), z_BxTxHxC

  def run(*arguments):
    gradients, z_BxTxHxC = jax.grad(total, (0, 1, 2), has_aux=True)(*arguments)
    return z_BxTxHxC, *gradients

  program = jax.jit(run).lower(*arguments, mask).compile()
  return program(*arguments, mask), program.as_text()


def on(devices, arguments):
  return [jax.device_put(x, NamedSharding(devices, ring.HEADED)) for x in arguments]


@pytest.fixture
def short_blocks(monkeypatch):
  """So that even a short piece is several blocks."""
  monkeypatch.setattr(ring, 'LONGEST_BLOCK', 4)
  monkeypatch.setattr(ring, 'SHORTEST_BLOCK', 1)


EIGHT, FOUR_BY_TWO, TWO_BY_TWO_BY_TWO = dict(context=8), dict(context=4, tensor=2), dict(context=2, tensor=2, data=2)
CASES = {
    'everything, wide values': (EIGHT, None, dict(value_width=7)),
    'causal, one key head': (EIGHT, masks.causal(), dict(K=1)),
    'causal, an odd ring': (dict(context=3), masks.causal(), dict(T=36, S=36)),
    'causal, one device': (dict(context=1), masks.causal(), {}),
    'causal, continued, across': (FOUR_BY_TWO, masks.causal(8), dict(T=16, S=24)),
    'causal, some see nothing': (TWO_BY_TWO_BY_TWO, masks.causal(-5), {}),
    'lengths, an empty row': (EIGHT, masks.lengths(jnp.array([0, 19])), {}),
    'lengths, across': (TWO_BY_TWO_BY_TWO, masks.lengths(jnp.array([0, 11])), dict(T=16, S=24)),
    'segments, across': (TWO_BY_TWO_BY_TWO, masks.segments(PACKED[:, 8:24], PACKED), dict(T=16)),
    'window, causal': (EIGHT, masks.causal() & masks.window(6), {}),
    'prefix': (TWO_BY_TWO_BY_TWO, masks.prefix(jnp.array([3, 21])), {}),
    'segments, causal': (FOUR_BY_TWO, masks.causal() & masks.segments(PACKED), {}),
    'all at once': (TWO_BY_TWO_BY_TWO, masks.prefix(jnp.array([3, 21])) & masks.segments(PACKED)
                    & masks.lengths(jnp.array([13, 30])) & masks.window(9), dict(H=4)),
}


@pytest.mark.usefixtures('short_blocks')
@pytest.mark.parametrize('case', CASES)
def test_ring_is_the_reference(case):
  axes, mask, shapes = CASES[case]
  arguments, devices = draw(**shapes), mesh(**axes)
  wanted, _ = compiled(dot_product.attend, arguments, mask, scale=0.7)
  with jax.set_mesh(devices):
    got, text = compiled(ring.attend, on(devices, arguments), mask, scale=0.7)
  for ours, theirs in zip(got, wanted):
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
  if axes['context'] > 1:
    assert 'collective-permute' in text
  assert 'all-gather' not in text
  if mask is not None:
    z, d_q, d_k, d_v = (np.asarray(x) for x in got)
    T, S = z.shape[1], d_k.shape[1]
    allowed_BxTxS = np.broadcast_to(mask.to_array(T, S), (B, 1, T, S))[:, 0]
    blind_BxT, unseen_BxS = ~allowed_BxTxS.any(axis=2), ~allowed_BxTxS.any(axis=1)
    for nothing in (z[blind_BxT], d_q[blind_BxT], d_k[unseen_BxS], d_v[unseen_BxS]):
      np.testing.assert_array_equal(nothing, 0)


@pytest.mark.usefixtures('short_blocks')
def test_bfloat16_is_summed_in_float32():
  devices, mask = mesh(**EIGHT), masks.causal()
  wanted, _ = compiled(dot_product.attend, draw(), mask)
  with jax.set_mesh(devices):
    got, _ = compiled(ring.attend, on(devices, draw(dtype=jnp.bfloat16)), mask)
  for ours, theirs in zip(got, wanted):
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.04, rtol=0.04)


def test_it_stands_in_a_scan_of_checkpointed_layers():
  def layers(attend):
    def layer(x, _):
      return attend(x, x, x, masks.causal()), None
    return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer), x, length=2)[0]))))

  x, devices = draw()[0], mesh(**FOUR_BY_TWO)
  wanted = layers(dot_product.attend)(x)
  with jax.set_mesh(devices):
    np.testing.assert_allclose(layers(ring.attend)(*on(devices, [x])), wanted, atol=1e-5)


def test_what_nobody_may_see_is_not_computed():
  """A product with a NaN is NaN even where the pattern is 0, unless the block is skipped."""
  q, k, v = draw()
  devices = mesh(**EIGHT)
  with jax.set_mesh(devices):
    z = jax.jit(ring.attend)(*on(devices, [q, k, v.at[:, T // 2:].set(jnp.nan)]), masks.causal())
    assert np.isfinite(z[:, :T // 2]).all() and np.isnan(z[:, T // 2:]).all()
    z = jax.jit(ring.attend)(*on(devices, [q, k, v.at[:, T // 2:].set(jnp.nan)]), masks.lengths(jnp.array([3, 16])))
    assert np.isfinite(z).all()


@pytest.mark.parametrize('devices', [2, 3, 4, 8])
def test_a_causal_mask_gives_every_device_the_same_work(devices):
  length = 24 * 256
  pairs_by_step = ring.blocks_computed(masks.causal(), length, devices)
  for pairs in (pairs_by_step.sum(axis=1), *pairs_by_step.T):
    assert pairs.max() <= 1.05 * pairs.min()
  natural = ring.blocks_computed(masks.causal(), length, devices, zigzag=False).sum(axis=1)
  assert natural.max() > 1.2 * natural.mean()


@pytest.mark.usefixtures('short_blocks')
@pytest.mark.parametrize('mask', [masks.causal(), masks.causal() & masks.window(6), masks.window(3)])
@pytest.mark.parametrize('zigzag', [False, True])
def test_exactly_the_blocks_with_something_to_see_are_computed(mask, zigzag):
  allowed_TxT = np.asarray(mask.to_array(64, 64))[0, 0]
  blocks = allowed_TxT.reshape(16, 4, 16, 4).any(axis=(1, 3)).sum()
  assert ring.blocks_computed(mask, 64, 4, zigzag=zigzag).sum() == blocks


def test_memory_is_linear_in_the_length():
  def temporary_bytes(length):
    x = jax.ShapeDtypeStruct((1, length, 1, C), jnp.float32, sharding=NamedSharding(devices, ring.HEADED))
    program = jax.jit(jax.grad(lambda q, k, v: ring.attend(q, k, v, masks.causal()).sum(), (0, 1, 2)))
    return program.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

  devices = mesh(context=2)
  with jax.set_mesh(devices):
    assert temporary_bytes(8192) < 2.1 * temporary_bytes(4096)


def request(T=T, S=T, H=4, K=2, rows=B, mask=None, **wanted):
  shapes = (rows, T, H, C), (rows, S, K, C), (rows, S, K, C)
  return Request.of(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes), mask, **wanted)


@pytest.mark.parametrize('of, sentence', [
    (dict(), None),
    (dict(mask=masks.causal() & masks.window(2) & masks.lengths(jnp.array([1, 2]))), None),
    (dict(T=30), '30 queries and 32 keys .* multiple of 4'),
    (dict(T=36, S=36), None),
    (dict(T=36, S=36, mask=masks.causal()), '36 queries and 36 keys .* multiple of 8'),
    (dict(T=4 * 1021, S=4 * 1021), 'pieces of 1021 positions .* multiple of 256'),
    (dict(K=1), '1 key/value heads .* 2 devices of the mesh axis tensor'),
    (dict(K=3), '4 query heads cannot share 3'),
    (dict(mask=masks.dense(jnp.ones((T, T), bool))), 'T x S'),
    (dict(bias=True), 'bias'),
    (dict(softcap=True), 'no cap'),
    (dict(sinks=True), 'no sinks'),
    (dict(dropout=True), 'dropout'),
    (dict(needs_pattern=True), 'pattern'),
])
def test_what_it_cannot_do_is_refused_with_a_reason(of, sentence):
  with jax.set_mesh(mesh(**FOUR_BY_TWO)):
    reason = ring.supports(request(**of))
  if sentence is None:
    assert reason is None
  else:
    assert re.search(sentence, reason)


def test_a_mesh_that_does_not_fit_is_refused_with_a_reason():
  assert 'jax.set_mesh' in ring.supports(request())
  with pytest.raises(AttentionError, match='jax.set_mesh'):
    ring.attend(*draw())
  with jax.set_mesh(mesh(**TWO_BY_TWO_BY_TWO)):
    assert '3 rows cannot be shared out over 2 devices' in ring.supports(request(rows=3))
    reasons = []
    inside = jax.shard_map(lambda x: (reasons.append(ring.supports(request())), x)[1], in_specs=PartitionSpec('data'),
                           out_specs=PartitionSpec('data'))
    jax.eval_shape(inside, jnp.zeros(2))
    assert 'manual' in reasons[0]
