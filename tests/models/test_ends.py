"""Both ends against the same sums in numpy, for one shape; the others inherit them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import TransformerConfig
from tfm.models.build import build_model
from tfm.models.positions import sinusoidal
from tfm.models.tap import Tap

V, T, D = 17, 5, 16
IDS_BxT = np.array([[1, 7, 11, 4, 16], [1, 9, 3, 0, 0]])
DECODER = dict(encoder_layers=0, decoder_layers=1, d_model=D, d_ff=8, num_heads=2, norm_epsilon=0.1)
ENCODER = {**DECODER, 'encoder_layers': 1, 'decoder_layers': 0}


def made(random_params, **changes):
  model = build_model(TransformerConfig(**changes), V, V)
  return model, random_params(model, IDS_BxT)


def layer_norm(params, x):
  x = np.asarray(x, np.float64)
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * params['scale'] + params['bias']


@pytest.mark.parametrize('changes', [
    dict(), dict(scale_embeddings=False), dict(embedding_norm=True), dict(positions='sinusoidal_halves'),
    dict(positions='learned', max_positions=9), dict(positions='learned', max_positions=9, position_offset=2),
    *[dict(positions=kind) for kind in ('rope', 'alibi', 'relative', 'none')]], ids=str)
def test_the_first_residual_stream(random_params, changes):
  model, variables = made(random_params, **DECODER, **changes)
  c, params = model.config, variables['params']
  expected = (4.0 if c.scale_embeddings else 1.0) * np.asarray(params['target_embedding']['table'])[IDS_BxT]  # sqrt(16)
  if c.positions == 'learned':
    expected = expected + np.asarray(params['target_positions']['table'])[c.position_offset:][:T]
  elif c.positions.startswith('sinusoidal'):
    expected = expected + np.asarray(sinusoidal(jnp.arange(T), D, halves=c.positions == 'sinusoidal_halves'))
  if c.embedding_norm:
    expected = layer_norm(params['target_embedding_norm'], expected)
  _, found = model.apply(variables, IDS_BxT, mutable=['intermediates'],
                         capture_intermediates=lambda module, _: isinstance(module, Tap))
  np.testing.assert_allclose(found['intermediates']['target_embed']['__call__'][0], expected, atol=2e-6)
  assert ('target_positions' in params) == (c.positions == 'learned')


@pytest.mark.parametrize('changes', [
    DECODER, {**DECODER, 'tying': 'none'}, {**DECODER, 'norm': 'pre'}, {**DECODER, 'norm': 'sandwich'},
    {**DECODER, 'output_bias': True, 'vocab_multiple': 4}, {**DECODER, 'scale_output': True},
    {**DECODER, 'logit_softcap': 2.0, 'output_bias': True}, {**DECODER, 'biases': 'none'},
    {**ENCODER, 'output_transform': True, 'tying': 'none', 'output_bias': True, 'scale_output': True},
    {**ENCODER, 'output_transform': True, 'biases': 'mlp', 'feed_forward': 'silu', 'logit_softcap': 2.0}], ids=str)
def test_the_logits(random_params, changes):
  model, variables = made(random_params, **changes)
  c, params = model.config, jax.tree.map(np.asarray, variables['params'])
  x = state_BxTxD = np.random.default_rng(1).standard_normal((2, T, D)).astype(np.float32)
  if c.norm != 'post':
    x = layer_norm(params['decoder_norm'], x)
  if c.output_transform:
    y = x @ params['output_transform']['kernel'] + params['output_transform']['bias']
    x = layer_norm(params['output_norm'], np.maximum(y, 0) if c.feed_forward == 'relu' else y / (1 + np.exp(-y)))
  if c.scale_output:
    x = x / 4.0
  table = params['output' if c.tying == 'none' else 'target_embedding' if c.decoder_layers else 'source_embedding']
  logits = x @ table['table'].T + params.get('output_bias', 0) if c.biases != 'none' else x @ table['table'].T
  if c.logit_softcap:
    logits = 2.0 * np.tanh(logits / 2.0)
  found_BxTxV = model.apply(variables, state_BxTxD, method='unembed')
  np.testing.assert_allclose(found_BxTxV[..., :V], logits[..., :V], atol=1e-5)
  assert (found_BxTxV[..., V:] < -1e38).all() and found_BxTxV.shape[-1] == (20 if c.vocab_multiple == 4 else V)
  assert ('output_bias' in params) == c.output_bias
  # What `unembed` is said to read is what it reads.
  read = {name: variables['params'][name] for name in model.unembed_parameters}
  np.testing.assert_array_equal(model.apply({'params': read}, state_BxTxD, method='unembed'), found_BxTxV)
  for name in read:
    with pytest.raises(Exception, match='scope|param'):
      model.apply({'params': {other: read[other] for other in read if other != name}}, state_BxTxD, method='unembed')


def test_padding_is_what_the_config_says(random_params):
  for pad_id, real in ((0, IDS_BxT != 0), (3, IDS_BxT != 3), (None, np.ones((2, T), bool))):
    model, variables = made(random_params, **ENCODER, pad_id=pad_id)
    np.testing.assert_array_equal(model.apply(variables, IDS_BxT, method='real'), real)
    mask = model.apply(variables, jnp.asarray(IDS_BxT), method='padding_mask')
    lengths = None if mask.lengths_B is None else mask.lengths_B.tolist()
    assert lengths == {0: [5, 3], 3: [5, 5], None: None}[pad_id]


def test_a_text_longer_than_the_table_of_positions_is_refused(random_params):
  fields = {**DECODER, 'positions': 'learned', 'max_positions': 7, 'position_offset': 2}
  model, variables = made(random_params, **fields)
  with pytest.raises(ValueError, match='6 target positions exceed the learned table of model.max_positions=7, which '
                                       'has room for 5'):
    model.apply(variables, np.ones((1, 6), int))
  with pytest.raises(ValueError, match='9 target positions exceed'):
    model.apply(variables, 2, 9, method='init_cache')
