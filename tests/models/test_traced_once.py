from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest

from tfm.models.multihead import MultiHeadAttention
from tfm.models.tap import Tap

CHANGES = {
    'published': {},
    'dropout': dict(dropout=0.2, attention_dropout=0.3, activation_dropout=0.4),
    'rope': dict(norm='pre', positions='rope'),
    'relative': dict(norm='sandwich', positions='relative'),
    'remat': dict(norm='pre', remat='full'),
    'conformer': dict(norm='pre', convolution='conformer'),
    'experts': dict(norm='pre', experts=2, biases='none'),
}


def value_and_gradients(model, params, ids):
  def loss(params):
    return (model.apply({'params': params}, *ids, dropout_key=jax.random.key(3))**2).sum()

  return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


@pytest.mark.parametrize('changes', CHANGES.values(), ids=CHANGES)
def test_a_kept_trace_computes_what_each_layer_computes_in_its_place(tiny, ids, in_place, changes):
  model, variables = tiny(**changes)
  found = value_and_gradients(model, variables['params'], ids)
  with in_place():
    expected = value_and_gradients(model, variables['params'], ids)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


def traced(tiny, ids, traces, layers) -> int:
  """How many layers are traced for one pass through `layers` of the encoder and as many of the decoder."""
  traces()
  model, variables = tiny(encoder_layers=layers, decoder_layers=layers)
  calls = []

  def counted(key, shape, rate):
    calls.append(shape)
    return jax.numpy.ones(shape, bool)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('tfm.models.dropout.keep_mask', counted)
    jax.eval_shape(partial(model.apply, variables, *ids, dropout_key=jax.random.key(0)))
  return len(calls)


def test_the_number_of_layers_does_not_lengthen_tracing(tiny, ids, traces):
  tiny = partial(tiny, dropout=0.1)
  assert traced(tiny, ids, traces, 1) == traced(tiny, ids, traces, 4) == 2 + 2 + 3  # embeddings, encoder, decoder


def test_another_mask_shape_or_config_is_another_trace(tiny, ids, in_place):
  """What a trace was made for is all that tells two apart: nothing is taken for another."""
  source_BxS, target_BxT = ids
  for changes in ({}, dict(norm='pre'), dict(positions='rope'), dict(attention_scale=0.1)):
    model, variables = tiny(**changes)
    for rows in (1, 3):
      found = jax.jit(model.apply)(variables, source_BxS[:rows], target_BxT[:rows])
      with in_place():
        expected = jax.jit(lambda *inputs, model=model: model.apply(*inputs))(
            variables, source_BxS[:rows], target_BxT[:rows])
      np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_not_traced_is_computed_operation_by_operation(tiny, ids, in_place):
  model, variables = tiny()
  found = model.apply(variables, *ids)
  with in_place():
    np.testing.assert_array_equal(found, model.apply(variables, *ids))


def test_who_looks_on_sees_every_layer_although_a_trace_was_kept(tiny, ids):
  model, variables = tiny()
  expected = jax.jit(partial(model.apply))(variables, *ids)  # now there is a trace
  seen = set()

  def interceptor(call, args, kwargs, context):
    seen.add('.'.join(context.module.path))
    return call(*args, **kwargs)

  with nn.intercept_methods(interceptor):
    found = jax.jit(partial(model.apply))(variables, *ids)
  layers = {f'{stack}.layers_{i}.resid_post' for stack in ('encoder', 'decoder') for i in range(2)}
  assert layers <= seen
  np.testing.assert_allclose(found, expected, atol=1e-5)
  _, captured = model.apply(variables, *ids, capture_intermediates=lambda module, _: isinstance(module, Tap))
  assert all('resid_post' in captured['intermediates'][stack][f'layers_{i}']
             for stack in ('encoder', 'decoder') for i in range(2))


def test_a_collection_of_one_layer_reaches_that_layer(tiny, ids):
  """Only the layer that has variables besides weights is called in its place, and reads them there."""
  model, variables = tiny()
  taps = {'decoder': {'layers_1': {'self_attention': {'scores': 1.0}}}}
  reads, read = MultiHeadAttention.reads_pattern.fget, {}

  def reads_pattern(attention):
    return read.setdefault('/'.join(attention.path), reads(attention))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(MultiHeadAttention, 'reads_pattern', property(reads_pattern))
    jax.eval_shape(partial(model.apply, {**variables, 'taps': taps}), *ids)
  assert [path for path, found in read.items() if found] == ['decoder/layers_1/self_attention']
