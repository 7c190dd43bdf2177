from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm.attention.attend
from tfm.attention import dot_product, masks
from tfm.attention.attend import BACKENDS, AttentionError, Request, attend, choose, for_platform
from tfm.config import TransformerConfig
from tfm.errors import UserError
from tfm.models.multihead import MultiHeadAttention


def request_of(T=4096, S=4096, dtype='float32', mask=None, platform='cpu', **more) -> Request:
  def shape(length):
    return jax.ShapeDtypeStruct((2, length, 4, 64), jnp.dtype(dtype))

  options = 'bias', 'softcap', 'sinks', 'dropout', 'needs_pattern'
  described = {name: more.pop(name) for name in options if name in more}
  with for_platform(platform):
    return dataclasses.replace(Request.of(shape(T), shape(S), shape(S), mask, **described), **more)


class Stub:
  """A backend that says what it is told and marks its output."""

  def __init__(self, reason=None):
    self.reason = reason

  def supports(self, request):
    return self.reason or request.needs_whole_pattern

  def attend(self, q, k, v, mask, *, scale):
    return jnp.full((*q.shape[:3], v.shape[-1]), 7.0)


@pytest.fixture(autouse=True)
def said(caplog):
  """What is logged, as if nothing had been logged before."""
  tfm.attention.attend._say_once.cache_clear()
  caplog.set_level(logging.DEBUG, 'tfm')
  return caplog


@pytest.mark.parametrize('request_, name', [
    (request_of(T=512, S=512), 'reference'),
    (request_of(T=1023, S=1024), 'reference'),
    (request_of(T=1024, S=1024), 'blockwise'),
    (request_of(dropout=True), 'reference'),
    (request_of(bias=True), 'reference'),
    (request_of(needs_pattern=True), 'reference'),
    (request_of(platform='tpu'), 'pallas'),
    (request_of(T=256, S=256, platform='tpu'), 'reference'),
    (request_of(T=2050, platform='tpu'), 'blockwise'),
    (request_of(platform='gpu'), 'blockwise'),  # float32
    (request_of(softcap=True, sinks=True), 'blockwise'),
    (request_of(softcap=True, platform='tpu'), 'pallas'),
    (request_of(sinks=True, platform='tpu'), 'blockwise'),
])
def test_auto_takes_the_first_that_can_do_it(request_, name):
  assert choose(request_) == name


def test_a_sequence_that_is_shared_out_goes_round_the_ring(monkeypatch, said):
  monkeypatch.setitem(BACKENDS, 'ring', Stub())
  mesh = jax.sharding.AbstractMesh((2,), ('context',), axis_types=(jax.sharding.AxisType.Auto,))
  with jax.sharding.use_abstract_mesh(mesh):
    request_ = request_of(T=4, S=4)
  assert request_.context == 2 and request_.partitioned
  assert choose(request_) == 'ring' and choose(request_of(T=4, S=4)) == 'reference'
  assert not [record for record in said.records if record.levelno == logging.WARNING]


def test_where_the_ring_cannot_the_reference_is_taken_with_a_warning(monkeypatch, said):
  monkeypatch.setitem(BACKENDS, 'ring', Stub('it has no dropout'))
  for _ in range(2):
    assert choose(request_of(T=4, S=4, context=2)) == 'reference'
  assert [(record.levelname, record.getMessage()) for record in said.records] == [
      ('WARNING', 'attention: reference for no mask in float32 on cpu; not ring: it has no dropout')]


def test_a_choice_is_logged_once_for_each_kind_of_request(said):
  for T in (4096, 8192):
    choose(request_of(T=T))
  choose(request_of(mask=masks.causal(3) & masks.lengths(jnp.array([1, 2]))))
  choose(request_of(dropout=True))
  choose(request_of(T=8, S=8, softcap=True, sinks=True))
  assert [(record.levelname, record.getMessage()) for record in said.records] == [
      ('INFO', 'attention: blockwise for no mask in float32 on cpu'),
      ('INFO', 'attention: blockwise for causal + lengths + offset in float32 on cpu'),
      ('INFO', 'attention: reference for dropout in float32 on cpu; not blockwise: it has no dropout on the pattern'),
      ('DEBUG', 'attention: reference for softcap + sinks in float32 on cpu')]


@pytest.mark.parametrize('backend, more, sentence', [
    ('blockwise', dict(dropout=True), "'blockwise' cannot do dropout in float32 on cpu: it has no dropout on the pat"),
    ('blockwise', dict(needs_pattern=True), 'never holds the scores and the pattern'),
    ('blockwise', dict(bias=True), 'no gradient for a bias'),
    ('cudnn', {}, 'NVIDIA GPUs, not on cpu; choose .auto. or .reference.'),
    ('pallas', {}, 'for TPUs, not for cpu'),
    ('flash', {}, "no attention backend 'flash'; choose 'auto' or one of reference, blockwise, cudnn, pallas, ring"),
])
def test_an_explicit_backend_that_cannot_is_an_error_with_the_reason(backend, more, sentence):
  with pytest.raises(AttentionError, match=sentence):
    choose(request_of(**more), backend)
  assert issubclass(AttentionError, UserError)


def test_ring_and_ulysses_are_known_and_refuse_without_a_mesh():
  for backend in ('ring', 'ulysses'):
    with pytest.raises(AttentionError, match=f"'{backend}' cannot do .*mesh"):
      choose(request_of(), backend)


def test_what_is_asked_reaches_the_kernel_and_z_its_tap(law, monkeypatch):
  q, k, v, _ = law.draw()
  mask = masks.causal(2) & masks.lengths(jnp.array([4, 9]))
  asked = dict(scale=0.3, softcap=0.2, sinks_H=jnp.array([0.5, -3.0, 2.0, 0.0]))
  expected = dot_product.attend(q, k, v, mask, **asked)
  assert np.abs(expected - dot_product.attend(q, k, v, mask, scale=0.3)).max() > 0.1
  for backend in ('auto', 'reference', 'blockwise'):
    seen = {}

    def keep_and_double(name, value, seen=seen):
      seen[name] = value
      return value * (2 if name == 'z' else 1)

    z = attend(q, k, v, mask, **asked, backend=backend, tap=keep_and_double)
    assert list(seen) == (['z'] if backend == 'blockwise' else ['scores', 'pattern', 'z'])
    np.testing.assert_array_equal(z, 2 * seen['z'])
    np.testing.assert_allclose(attend(q, k, v, mask, **asked, backend=backend), expected, atol=1e-5)
    np.testing.assert_allclose(seen['z'], expected, atol=1e-5)
  monkeypatch.setitem(BACKENDS, 'cudnn', Stub())
  np.testing.assert_array_equal(attend(q, k, v, backend='cudnn'), 7.0)
  bias = jnp.arange(10.0)
  np.testing.assert_array_equal(attend(q, k, v, bias=bias, dropout=lambda x: x / 2),
                                dot_product.attend(q, k, v, bias=bias, dropout=lambda x: x / 2))


def test_heads_that_cannot_share_are_refused(law):
  with pytest.raises(AttentionError, match='4 query heads cannot share 3'):
    attend(*law.draw(K=3)[:3], backend='blockwise')


def test_a_request_says_what_is_known_before_the_program_runs():
  assert request_of(mask=masks.causal(2)).offset == request_of(mask=masks.causal(np.int64(2))).offset == 2
  assert request_of(mask=masks.causal(jnp.int32(2))).offset is None
  with for_platform('tpu'):
    assert request_of(platform='gpu').platform == 'gpu'
    assert Request.of(*[jnp.zeros((1, 1, 1, 1))] * 3).platform == 'tpu'
  mixed = Request.of(jnp.zeros((1, 1, 1, 1)), *[jnp.zeros((1, 1, 1, 1), jnp.bfloat16)] * 2)
  assert (mixed.platform, mixed.dtype) == (jax.default_backend(), 'float32/bfloat16')


# -- in the model --


def model(**changes):
  module = MultiHeadAttention(TransformerConfig(d_model=8, num_heads=2, **changes))
  x_BxTxD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)
  params = module.init(jax.random.key(0), x_BxTxD, x_BxTxD, masks.causal())
  return module, params, x_BxTxD


def test_the_model_calls_the_backend_of_its_config(monkeypatch):
  module, params, x_BxTxD = model()
  expected = module.apply(params, x_BxTxD, x_BxTxD, masks.causal())
  module, _, _ = model(attention_backend='blockwise')
  np.testing.assert_allclose(module.apply(params, x_BxTxD, x_BxTxD, masks.causal()), expected, atol=1e-6)
  monkeypatch.setitem(BACKENDS, 'blockwise', Stub())
  assert np.abs(module.apply(params, x_BxTxD, x_BxTxD, masks.causal()) - expected).max() > 1
  monkeypatch.setitem(BACKENDS, 'cudnn', Stub('no'))
  module, _, _ = model(attention_backend='cudnn')  # initialising asks no kernel
  with pytest.raises(AttentionError, match='cannot do causal'):
    module.apply(params, x_BxTxD, x_BxTxD, masks.causal())
  memory = module.apply(params, x_BxTxD, method='keys_values').cached  # nor does a step of decoding
  module.apply(params, x_BxTxD[:, :1], memory, 0, masks.causal(0), method='extend')


def test_asking_for_the_pattern_selects_the_reference(monkeypatch):
  monkeypatch.setattr(tfm.attention.attend, 'LONG', 1)
  monkeypatch.setattr(tfm.attention.attend, 'SHORT', 1)
  module, params, x_BxTxD = model()
  arguments = x_BxTxD, x_BxTxD, masks.causal()
  plain = module.apply(params, *arguments)
  found, read = module.apply(params, *arguments, mutable=['intermediates'], capture_intermediates=True)
  pattern_BxHxTxS, = read['intermediates']['pattern']['__call__']
  np.testing.assert_allclose(pattern_BxHxTxS.sum(-1), 1, atol=1e-6)
  np.testing.assert_allclose(found, plain, atol=1e-6)
  monkeypatch.setitem(BACKENDS, 'blockwise', Stub())
  assert np.abs(module.apply(params, *arguments) - plain).max() > 1
  for name, edited in (('pattern', True), ('scores', True), ('z', False)):
    same = np.allclose(module.apply({**params, 'taps': {name: {}}}, *arguments), plain, atol=1e-6)
    assert same == edited
  module, _, _ = model(attention_backend='blockwise')
  with pytest.raises(AttentionError, match='never holds the scores and the pattern'):
    module.apply(params, *arguments, mutable=['intermediates'])
