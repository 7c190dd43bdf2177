from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.models.tap import Tap

V, L = 17, 3
IDS_BxT = np.array([[1, 7, 11, 4, 16], [1, 9, 3, 0, 0]])
LENGTHS = (5, 3)
CONFIG = TransformerConfig(encoder_layers=2, decoder_layers=0, d_model=16, d_ff=24, num_heads=2, token_types=2)


def made(random_params, **changes):
  model = build_model(dataclasses.replace(CONFIG, **changes), V, V)
  return model, random_params(model, IDS_BxT)


@pytest.mark.parametrize('norm', ['post', 'pre', 'sandwich'])
def test_its_states_are_those_of_the_encoder_in_an_encoder_decoder(random_params, norm):
  model, variables = made(random_params, norm=norm, token_types=0)
  both = build_model(dataclasses.replace(model.config, decoder_layers=1, tying='none'), V, V)
  memory = both.apply({'params': variables['params']}, IDS_BxT, method='encode')
  found = model.apply(variables, IDS_BxT, method='encode')
  np.testing.assert_array_equal(found.states_BxSxD, memory.states_BxSxD)
  np.testing.assert_array_equal(found.mask.lengths_B, LENGTHS)
  np.testing.assert_array_equal(model.apply(variables, IDS_BxT, method='hidden'), found.states_BxSxD)


def test_every_kind_of_token_has_an_embedding(random_params):
  model, variables = made(random_params)
  types_BxT = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])

  def embedded(*types):
    _, found = model.apply(variables, IDS_BxT, *types, mutable=['intermediates'],
                           capture_intermediates=lambda module, _: isinstance(module, Tap))
    return np.asarray(found['intermediates']['source_embed']['__call__'][0])

  table = np.asarray(variables['params']['token_types']['table'])
  np.testing.assert_allclose(embedded(types_BxT) - embedded(), table[types_BxT] - table[0], atol=1e-6)
  without, params = made(random_params, token_types=0)
  with pytest.raises(ValueError, match='model.token_types is 0; leave them out'):
    without.apply(params, IDS_BxT, types_BxT)


@pytest.mark.parametrize('pooler', [False, True])
@pytest.mark.parametrize('pooling', ['first', 'mean'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_sentence_is_its_first_token_or_the_mean_over_its_tokens(random_params, pooling, pooler, dtype):
  model, variables = made(random_params, pooling=pooling, pooler=pooler, num_labels=L, norm='pre', dtype=dtype)
  params = jax.tree.map(np.asarray, variables['params'])
  states = np.asarray(model.apply(variables, IDS_BxT, method='hidden'), np.float64)
  expected = np.stack([row[0] if pooling == 'first' else row[:n].mean(0) for row, n in zip(states, LENGTHS)])
  if pooler:
    expected = np.tanh(expected @ params['pooler']['kernel'] + params['pooler']['bias'])
  tolerance = 1e-5 if dtype == 'float32' else 0.03
  found = model.apply(variables, IDS_BxT, method='embed')
  np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=tolerance)
  classes = expected @ params['classifier']['kernel'] + params['classifier']['bias']
  found = model.apply(variables, IDS_BxT, method='classify')
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, classes, atol=2 * tolerance)


def test_no_classes_no_classification(random_params):
  model, variables = made(random_params)
  assert 'classifier' not in variables['params'] and 'pooler' not in variables['params']
  with pytest.raises(ValueError, match='model.num_labels is 0'):
    model.apply(variables, IDS_BxT, method='classify')


@pytest.mark.parametrize('scan_layers', [False, True])
def test_its_parameters_come_to_be_with_the_heads(scan_layers):
  model = build_model(dataclasses.replace(CONFIG, pooler=True, num_labels=L, norm='pre', scan_layers=scan_layers,
                                          output_transform=True, output_bias=True), V, V)
  shapes = jax.eval_shape(partial(initialize, model), jax.random.key(0))
  assert set(shapes) == {'source_embedding', 'encoder', 'encoder_norm', 'token_types', 'pooler', 'classifier',
                         'output_transform', 'output_norm', 'output_bias'}
