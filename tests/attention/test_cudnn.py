from __future__ import annotations

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention import cudnn, dot_product, masks
from tfm.attention.attend import Request, choose, for_platform

LENGTHS = masks.lengths(jnp.array([3, 0]))
CUDA = any(map(importlib.util.find_spec, cudnn.PLUGINS))
ON_GPU = jax.default_backend() == 'gpu'


def shapes(T=64, S=64, H=4, K=2, C=64, value_width=None, dtype='bfloat16'):
  widths = (T, H, C), (S, K, C), (S, K, value_width or C)
  return [jax.ShapeDtypeStruct((2, *shape), jnp.dtype(dtype)) for shape in widths]


@pytest.fixture
def with_cuda(monkeypatch):
  """As on a machine with JAX for CUDA, whose GPU is elsewhere."""
  monkeypatch.setattr(cudnn, 'PLUGINS', ('jax',))
  with for_platform('gpu'):
    yield


@pytest.mark.parametrize('mask, shape', [
    (None, {}), (masks.causal(), {}), (LENGTHS, dict(T=5, S=7)), (masks.causal() & LENGTHS, {}),
    (masks.causal() & masks.window(3), dict(dtype='float16')), (None, dict(T=2048, S=2048, K=4))])
def test_what_it_can_do(mask, shape, with_cuda):
  assert cudnn.supports(Request.of(*shapes(**shape), mask)) is None


@pytest.mark.parametrize('reason, mask, shape, more', [
    ('bfloat16 or float16, not float32', None, dict(dtype='float32'), {}),
    ('multiple of 8 up to 128 on this device, not 12', None, dict(C=12), {}),
    ('multiple of 8 up to 128 on this device, not 136', None, dict(C=136), {}),
    ('values of width 32 must be as wide as keys, 64', None, dict(value_width=32), {}),
    ('T x S bias', masks.dense(jnp.ones((64, 64), bool)), {}, {}),
    ('across segments', masks.segments(jnp.ones((2, 64), int)), {}, {}),
    ('no prefix', masks.prefix(jnp.array([1, 2])), {}, {}),
    ('only when the program runs', masks.causal(jnp.int32(0)), {}, {}),
    ('start at key 0', masks.causal(2), {}, {}),
    ('as many queries as keys, not 32 and 64', masks.causal(), dict(T=32), {}),
    ('windows only together with causal', masks.window(3), {}, {}),
    ('no key in its window', masks.causal() & masks.window(3) & LENGTHS, {}, {}),
    ('nothing to attend to', None, dict(S=0), {}),
    ('no dropout', None, {}, dict(dropout=True)),
    ('no gradient for a bias', None, {}, dict(bias=True)),
    ('no cap on the scores', None, {}, dict(softcap=True)),
    ('no sinks in its softmax', None, {}, dict(sinks=True)),
    ('never holds the scores', None, {}, dict(needs_pattern=True)),
])
def test_what_it_cannot_do_it_refuses_with_the_reason(reason, mask, shape, more, with_cuda):
  assert reason in cudnn.supports(Request.of(*shapes(**shape), mask, **more))


def test_it_needs_cuda_and_a_gpu(monkeypatch):
  with for_platform('tpu'):
    assert 'NVIDIA GPUs, not on tpu' in cudnn.supports(Request.of(*shapes()))
  monkeypatch.setattr(cudnn, 'PLUGINS', ('no_such_plugin',))
  with for_platform('gpu'):
    assert "pip install 'tfm[cuda]'" in cudnn.supports(Request.of(*shapes()))
    assert choose(Request.of(*shapes(T=2048, S=2048))) == 'blockwise'


def test_auto_takes_it_on_a_gpu(with_cuda):
  assert choose(Request.of(*shapes(T=1024, S=1024), masks.causal())) == 'cudnn'
  assert choose(Request.of(*shapes(T=64, S=64), masks.causal())) == 'reference'


@pytest.mark.parametrize('mask', [None, masks.causal(), LENGTHS, masks.causal() & LENGTHS,
                                  masks.causal() & masks.window(3)])
def test_it_says_the_same_to_the_public_function(mask, monkeypatch, law):
  """The same arguments to the same function, by XLA instead of cuDNN: on any machine, empty rows included."""
  public = jax.nn.dot_product_attention

  def by_xla(*arguments, implementation, **options):
    assert implementation == 'cudnn'
    return public(*arguments, implementation='xla', **options)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', by_xla)
  law.agree(cudnn.attend, law.draw(T=8, S=8), mask)


@pytest.mark.skipif(not CUDA, reason='needs JAX for CUDA (pip install jax[cuda13]); a GPU is not needed')
@pytest.mark.parametrize('mask', [None, masks.causal(), LENGTHS, masks.causal() & masks.window(3)])
def test_it_is_lowered_for_a_gpu_that_is_elsewhere(mask):
  step = jax.jit(jax.grad(lambda q, k, v: jnp.sum(cudnn.attend(q, k, v, mask).astype(jnp.float32)), (0, 1, 2)))
  assert 'fmhaSoftmaxBackward' in step.trace(*shapes()).lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.skipif(not ON_GPU, reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('mask', [None, masks.causal(), LENGTHS, masks.causal() & LENGTHS,
                                  masks.causal() & masks.window(3)])
def test_it_is_the_reference_on_a_gpu(mask, law):
  arrays = law.draw(T=64, S=64, C=64, dtype=jnp.bfloat16)
  if reason := cudnn.supports(Request.of(*arrays[:3], mask)):
    pytest.skip(reason)
  law.agree(cudnn.attend, arrays, mask, atol=0.05)
  found = law.results(partial(cudnn.attend, scale=0.3), *arrays, mask)
  expected = law.results(partial(dot_product.attend, scale=0.3), *arrays, mask)
  np.testing.assert_allclose(found[0].astype(jnp.float32), expected[0].astype(jnp.float32), atol=0.05)
