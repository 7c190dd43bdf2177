from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.models.layout import to_layout
from tfm.models.positions import positions_in_segments

V, T = 17, 6
IDS_BxT = np.array([[1, 7, 11, 4, 16, 5], [1, 9, 3, 8, 0, 0]])
CONFIG = TransformerConfig(encoder_layers=0, decoder_layers=2, d_model=16, d_ff=24, num_heads=2, norm='pre',
                           positions='learned', max_positions=8)


@pytest.fixture
def made(random_params):
  model = build_model(CONFIG, V, V)
  return model, random_params(model, IDS_BxT)


def test_it_is_the_decoder_alone(made):
  model, variables = made
  assert set(variables['params']) == {'target_embedding', 'target_positions', 'decoder', 'decoder_norm'}
  assert set(variables['params']['decoder']['layers_0']) == {'self_attention', 'self_attention_norm', 'mlp', 'mlp_norm'}
  assert jax.tree.map(jnp.shape, variables['params']) == jax.tree.map(
      jnp.shape, jax.eval_shape(partial(initialize, model), jax.random.key(0)))


def test_it_is_a_decoder_whose_cross_attention_says_nothing(made, random_params):
  """With W^O of cross-attention 0, the encoder-decoder of the same parameters is the decoder-only model."""
  model, variables = made
  both = build_model(dataclasses.replace(CONFIG, encoder_layers=1), V, V)
  params = random_params(both, np.ones((2, 3), int), IDS_BxT)['params']
  for name, layer in variables['params']['decoder'].items():
    params['decoder'][name] |= layer
    params['decoder'][name]['cross_attention']['output']['kernel'] *= 0
  params |= {name: value for name, value in variables['params'].items() if name != 'decoder'}
  np.testing.assert_allclose(jax.jit(both.apply)({'params': params}, np.ones((2, 3), int), IDS_BxT),
                             jax.jit(model.apply)(variables, IDS_BxT), atol=2e-6)


def test_texts_packed_in_a_row_are_as_if_alone(made):
  model, variables = made
  first, second = IDS_BxT[:1, :4], IDS_BxT[1:, :2]
  packed = jax.jit(model.apply)(variables, np.concatenate([first, second], axis=1), np.array([[5, 5, 5, 5, 2, 2]]))
  alone = jax.jit(lambda: (model.apply(variables, first), model.apply(variables, second)))()
  np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=2e-6)


def test_positions_begin_anew_in_every_segment():
  segments_BxT = jnp.array([[1, 1, 1, 2, 2, 0], [3, 4, 4, 4, 4, 4]])
  np.testing.assert_array_equal(positions_in_segments(segments_BxT), [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])


@pytest.mark.parametrize('positions', ['learned', 'rope', 'alibi', 'relative'])
def test_compiled_steps_of_scanned_layers_equal_teacher_forcing(random_params, positions):
  """Also with a window: the position at which a step begins is known only when it runs."""
  config = dataclasses.replace(CONFIG, positions=positions, max_positions=8 if positions == 'learned' else None,
                               window=3, num_kv_heads=1, scan_layers=True)
  model = build_model(config, V, V)
  variables = random_params(model, IDS_BxT)
  whole_BxTxV = jax.jit(model.apply)({'params': to_layout(variables['params'], 'scanned')}, IDS_BxT)
  cache = model.apply(variables, 2, 7, method='init_cache')
  step, logits = jax.jit(partial(model.apply, method='step')), []
  for t in range(0, T, 2):
    two_BxTxV, cache = step(variables, IDS_BxT[:, t:t + 2], cache)
    logits.append(two_BxTxV)
  assert step._cache_size() == 1
  np.testing.assert_allclose(jnp.concatenate(logits, axis=1), whole_BxTxV, atol=1e-5)


def test_unembedding_what_is_hidden_gives_the_logits(made):
  model, variables = made
  hidden = model.apply(variables, IDS_BxT, method='hidden')
  np.testing.assert_array_equal(model.apply(variables, hidden, method='unembed'), model.apply(variables, IDS_BxT))
