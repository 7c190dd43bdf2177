from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention import masks, pallas, pallas_gpu
from tfm.attention.attend import BACKENDS, AttentionError, Request, attend, choose, for_platform
from tfm.parallel.mesh import AXES

RANDOM = np.random.default_rng(0)
T, S = 50, 70
LENGTHS = masks.lengths(jnp.array([37, 0]))
# Queries of segment 0 find no key, keys of segment 3 no query.
SEGMENTS = masks.segments(jnp.asarray(RANDOM.integers(0, 3, (2, T))), jnp.asarray(RANDOM.integers(1, 4, (2, S))))
# Of several blocks each, the last of them not full.
BLOCKS = {
    'no mask': None,
    'causal': masks.causal(),
    'further on': masks.causal(31),
    'queries before the first key': masks.causal(-20),
    'window': masks.window(9, offset=5),
    'window beyond the keys': masks.window(9, offset=60),
    'causal window in lengths': masks.causal(20) & masks.window(18, offset=20) & LENGTHS,
    'causal, lengths and segments': masks.causal(3) & LENGTHS & SEGMENTS,
}
interpreted = partial(pallas_gpu.attend, interpret=True)


def shapes(T=T, S=S, C=64, value_width=64, dtype='bfloat16', batch=2):
  widths = (T, 4, C), (S, 2, C), (S, 2, value_width)
  return [jax.ShapeDtypeStruct((batch, *shape), jnp.dtype(dtype)) for shape in widths]


def test_it_is_the_reference_forward_and_backward(case, law):
  """By Pallas' interpreter, which needs no GPU."""
  arrays, mask = case
  with for_platform('gpu'):
    reason = pallas_gpu.supports(Request.of(*arrays[:3], mask))
  if reason:
    pytest.skip(reason)
  law.agree(interpreted, arrays, mask, scale=0.3)


@pytest.mark.parametrize('name', BLOCKS)
def test_it_is_the_reference_over_several_blocks(name, law, monkeypatch):
  monkeypatch.setattr(pallas_gpu, 'BLOCK', 16)
  law.agree(interpreted, law.draw(T=T, S=S, C=20, value_width=12), BLOCKS[name])


@pytest.mark.parametrize('dtype, atol', [('bfloat16', 0.06), ('float16', 0.01)])
def test_it_is_near_the_reference_in_16_bits(dtype, atol, law):
  law.agree(interpreted, law.draw(T=20, S=20, C=32, dtype=jnp.dtype(dtype)), masks.causal() & LENGTHS, atol=atol)


@pytest.mark.parametrize('name, dtype', [*((name, 'bfloat16') for name in BLOCKS), ('causal', 'float16'),
                                         ('causal', 'float32')])
def test_it_is_lowered_for_a_gpu_that_is_elsewhere(name, dtype):
  def step(q, k, v):
    return jnp.sum(attend(q, k, v, BLOCKS[name], backend='pallas').astype(jnp.float32))

  with for_platform('gpu'):
    program = jax.jit(jax.grad(step, (0, 1, 2))).trace(*shapes(dtype=dtype)).lower(lowering_platforms=('cuda',))
  assert program.as_text().count('@__gpu$xla.gpu.triton') == 3  # forward, queries' gradient, keys' and values' gradient


def test_blocks_that_are_hidden_are_not_visited():
  plan = pallas_gpu.Plan(1.0, 0, None, 0, many_queries=32, queries=16, keys=16, interpret=True)
  assert [tuple(map(int, plan.key_blocks(block, 32, 96))) for block in range(3)] == [(0, 2), (0, 4), (0, 6)]
  assert [tuple(map(int, plan.query_blocks(block, 96))) for block in range(3)] == [(0, 6), (1, 6), (2, 6)]


@pytest.mark.parametrize('reason, mask, shape, more', [
    ('not in float64', None, dict(dtype='float64'), {}),
    ('up to 256 wide in bfloat16, not 257', None, dict(C=257), {}),
    ('up to 128 wide in float32, not 129', None, dict(value_width=129, dtype='float32'), {}),
    ('array of T x S', masks.dense(jnp.ones((T, S), bool)), {}, {}),
    ('no prefix', masks.prefix(jnp.array([1, 2])), {}, {}),
    ('only when the program runs', masks.causal(jnp.int32(0)), {}, {}),
    ('nothing to attend to', None, dict(S=0), {}),
    ('no dropout', None, {}, dict(dropout=True)),
    ('no gradient for a bias', None, {}, dict(bias=True)),
    ('no cap on the scores', None, {}, dict(softcap=True)),
    ('no sinks in its softmax', None, {}, dict(sinks=True)),
    ('never holds the scores', None, {}, dict(needs_pattern=True)),
])
def test_what_it_cannot_do_it_refuses_with_the_reason(reason, mask, shape, more):
  with for_platform('gpu'), jax.enable_x64(True):
    request = Request.of(*shapes(**shape), mask, **more)
    assert reason in pallas.supports(request)
    with pytest.raises(AttentionError, match=reason):
      choose(request, 'pallas')


def test_it_refuses_old_gpus_and_a_jax_without_triton(monkeypatch):
  with for_platform('gpu'):
    request = Request.of(*shapes())
    assert pallas_gpu.supports(request) is None
    monkeypatch.setattr(pallas_gpu, '_capability', lambda: '7.5')
    assert 'capability 8.0 or later, not 7.5' in pallas_gpu.supports(request)
    monkeypatch.setattr(pallas_gpu.importlib.util, 'find_spec', lambda name: None)
    assert 'no Pallas for Triton' in pallas_gpu.supports(request)


def test_it_refuses_what_a_mesh_cannot_share_out():
  def reason(sizes, names=AXES):
    mesh = jax.sharding.AbstractMesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))
    with for_platform('gpu'), jax.sharding.use_abstract_mesh(mesh):
      return pallas.supports(Request.of(*shapes()))

  assert reason((2, 1, 1, 1, 1)) is None
  assert 'there is no mesh with the axes' in reason((2,), ('data',))
  assert '2 rows cannot be shared out over 4 devices' in reason((2, 1, 2, 1, 1))
  assert '2 key/value heads cannot be shared out over 4 devices' in reason((1, 1, 1, 4, 1))
  assert 'use ring' in reason((1, 1, 1, 1, 2))


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('backend', ['blockwise', 'cudnn', 'pallas'])
@pytest.mark.parametrize('name', BLOCKS)
def test_every_backend_is_the_reference_on_a_gpu(name, backend, law):
  """With as many key heads, shared ones and a single wide one, in every type that the backend takes."""
  ran = 0
  for dtype, atol in (('bfloat16', 0.1), ('float16', 0.02), ('float32', 0.02)):  # float32 is TensorFloat-32 on a GPU
    for shape in (dict(K=4, C=64), dict(K=2, C=64), dict(K=1, C=128), dict(K=2, C=20)):
      arrays = law.draw(T=T, S=S, value_width=shape['C'], dtype=jnp.dtype(dtype), **shape)
      if (reason := BACKENDS[backend].supports(Request.of(*arrays[:3], BLOCKS[name]))) is None:
        law.agree(partial(attend, backend=backend), arrays, BLOCKS[name], atol=atol)
        ran += 1
  if not ran:
    pytest.skip(reason)
