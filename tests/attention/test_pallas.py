from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention import masks, pallas
from tfm.attention.attend import Request, attend, for_platform
from tfm.parallel.mesh import AXES

T, S = 128, 256
LENGTHS = masks.lengths(jnp.array([5, 0]))
RANDOM = np.random.default_rng(0)
# Queries of segment 0 find no key, keys of segment 3 no query.
SEGMENTS = masks.segments(jnp.asarray(RANDOM.integers(0, 3, (2, T))), jnp.asarray(RANDOM.integers(1, 4, (2, S))))
CASES = {
    'no mask': None,
    'continued, lengths, one of them 0': masks.causal(3) & LENGTHS,
    'window': masks.window(3, offset=130),
    'causal window in segments': masks.causal(4) & masks.window(7, offset=4) & SEGMENTS,
}


def shapes(T=T, S=S, C=64, value_width=64, dtype='bfloat16'):
  widths = (T, 2, C), (S, 1, C), (S, 1, value_width)
  return [jax.ShapeDtypeStruct((2, *shape), jnp.dtype(dtype)) for shape in widths]


@pytest.mark.parametrize('case', CASES)
def test_it_is_the_reference_forward_and_backward(case, law):
  """By Pallas' interpreter, which needs no TPU."""
  arrays = law.draw(T=T, S=S, H=2, K=1, C=64, value_width=128 if case == 'window' else 64)
  law.agree(partial(pallas.attend, interpret=True), arrays, CASES[case], scale=0.1)
  law.agree(partial(pallas.attend, interpret=True), arrays, CASES[case], scale=0.1, softcap=0.8)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('dtype, softcap', [('float32', None), ('bfloat16', None), ('bfloat16', 50.0)])
def test_it_is_lowered_for_a_tpu_that_is_elsewhere(case, dtype, softcap):
  def step(q, k, v):
    return jnp.sum(attend(q, k, v, CASES[case], softcap=softcap, backend='pallas').astype(jnp.float32))

  with for_platform('tpu'):
    program = jax.jit(jax.grad(step, (0, 1, 2))).trace(*shapes(dtype=dtype)).lower(lowering_platforms=('tpu',))
  assert program.as_text().count('tpu_custom_call') >= 3  # forward, queries' gradient, keys' and values' gradient


@pytest.mark.parametrize('reason, mask, shape, more', [
    ('bfloat16 or float32, not float16', None, dict(dtype='float16'), {}),
    ('130 queries and 256 keys must be multiples of 128', None, dict(T=130), {}),
    ('128 queries and 0 keys must be multiples of 128', None, dict(S=0), {}),
    ('multiples of 64, not 32 and 64', None, dict(C=32), {}),
    ('known when it is compiled', masks.dense(jnp.ones((T, S), bool)), {}, {}),
    ('no prefix', masks.prefix(jnp.array([1, 2])), {}, {}),
    ('only when the program runs', masks.causal(jnp.int32(0)), {}, {}),
    ('some queries have no key', masks.causal(-1), {}, {}),
    ('some queries have no key', masks.window(3, offset=131), {}, {}),
    ('some queries have no key', masks.window(3, offset=-3), {}, {}),
    ('both need its segment ids', LENGTHS & SEGMENTS, {}, {}),
    ('no dropout', None, {}, dict(dropout=True)),
    ('no gradient for a bias', None, {}, dict(bias=True)),
    ('sinks are not passed on', None, {}, dict(sinks=True)),
    ('never holds the scores', None, {}, dict(needs_pattern=True)),
])
def test_what_it_cannot_do_it_refuses_with_the_reason(reason, mask, shape, more):
  with for_platform('tpu'):
    assert reason in pallas.supports(Request.of(*shapes(**shape), mask, **more))


def test_it_refuses_exactly_the_positions_that_leave_a_query_without_keys():
  for offset in range(-5, 140, 3):
    for mask in (masks.causal(offset), masks.window(4, offset), masks.causal(offset) & masks.window(4, offset)):
      complete = bool(np.asarray(mask.to_array(T, S)).any(-1).all())
      with for_platform('tpu'):
        assert (pallas.supports(Request.of(*shapes(), mask)) is None) == complete, (offset, mask)


def test_it_refuses_what_a_mesh_cannot_share_out_and_other_platforms():
  def reason(sizes, names=AXES):
    mesh = jax.sharding.AbstractMesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))
    with for_platform('tpu'), jax.sharding.use_abstract_mesh(mesh):
      return pallas.supports(Request.of(*shapes()))

  assert reason((2, 1, 1, 1, 1)) is None
  assert 'there is no mesh with the axes' in reason((2,), ('data',))
  assert '2 rows cannot be shared out over 4 devices' in reason((2, 1, 2, 1, 1))
  assert '1 key/value heads cannot be shared out over 2 devices' in reason((1, 1, 1, 2, 1))
  assert 'use ring' in reason((1, 1, 1, 1, 2))
  with for_platform('cpu'):
    assert 'for GPUs or for TPUs, not for cpu' in pallas.supports(Request.of(*shapes()))
