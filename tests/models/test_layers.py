from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention import masks
from tfm.config import TransformerConfig
from tfm.models.feed_forward import FeedForward
from tfm.models.layers import DecoderLayer, EncoderLayer, Tokens, split
from tfm.models.multihead import MultiHeadAttention
from tfm.models.tap import Tap

B, T, S, D = 2, 4, 5, 16
X_BxTxD, MEMORY_BxSxD = (jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
                         for seed, shape in enumerate([(B, T, D), (B, S, D)]))
TOKENS, CROSS = Tokens(masks.causal()), masks.lengths(jnp.array([2, 5]))


def tiny_config(**changes) -> TransformerConfig:
  return TransformerConfig(**{**dict(d_model=D, d_ff=24, num_heads=2, dropout=0.0), **changes})


def make(kind: str, **changes):
  """The layer and what it is called with after the key."""
  if kind == 'encoder':
    return EncoderLayer(tiny_config(**changes)), (TOKENS,)
  return DecoderLayer(tiny_config(**changes)), (MEMORY_BxSxD, TOKENS, CROSS)


def normalized(params, x):
  x = np.asarray(x, np.float64)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return x * np.asarray(params['scale']) + np.asarray(params['bias'])


@pytest.mark.parametrize('norm', ['post', 'pre', 'sandwich'])
@pytest.mark.parametrize('kind', ['encoder', 'decoder'])
def test_sublayers_follow_each_other_as_in_figure_1(random_params, kind, norm):
  layer, rest = make(kind, norm=norm)
  variables = random_params(layer, X_BxTxD, None, *rest)
  params = variables['params']

  def run(name, module, *arguments):
    return module(layer.config).apply({'params': params[name]}, *[jnp.asarray(x, jnp.float32) if isinstance(
        x, np.ndarray) else x for x in arguments])

  sublayers = [('self_attention', lambda y: run('self_attention', MultiHeadAttention, y, y, TOKENS.mask))]
  if kind == 'decoder':
    sublayers += [('cross_attention', lambda y: run('cross_attention', MultiHeadAttention, y, MEMORY_BxSxD, CROSS))]
  sublayers += [('mlp', lambda y: run('mlp', FeedForward, y))]
  x = np.asarray(X_BxTxD)
  for name, sublayer in sublayers:
    norm_of = partial(normalized, params[f'{name}_norm'])
    if norm == 'sandwich':
      x = x + normalized(params[f'{name}_post_norm'], sublayer(norm_of(x)))
    else:
      x = norm_of(x + sublayer(x)) if norm == 'post' else x + sublayer(norm_of(x))
  np.testing.assert_allclose(layer.apply(variables, X_BxTxD, None, *rest)[0], x, atol=1e-5)
  endings = ('', '_norm', *['_post_norm'] * (norm == 'sandwich'))
  assert set(params) == {f'{name}{ending}' for name, _ in sublayers for ending in endings}


def test_a_decoder_without_an_encoder_has_no_cross_attention(random_params):
  layer = DecoderLayer(tiny_config(encoder_layers=0))
  variables = random_params(layer, X_BxTxD, None, None, TOKENS, None)
  same = EncoderLayer(layer.config)
  np.testing.assert_array_equal(layer.apply(variables, X_BxTxD, None, None, TOKENS, None)[0],
                                same.apply(variables, X_BxTxD, None, TOKENS)[0])


def test_one_key_splits_into_different_ones_and_no_key_into_none():
  assert split(None, 3) == [None, None, None]
  keys = split(jax.random.key(0), 5)
  assert len({tuple(np.asarray(jax.random.key_data(key))) for key in [*keys, jax.random.key(0)]}) == 6


def captured(layer, variables, key, rest):
  """Every tap, and the output of every sub-layer, by path."""
  wanted = (Tap, MultiHeadAttention, FeedForward)
  _, found = layer.apply(variables, X_BxTxD, key, *rest, mutable=['intermediates'],
                         capture_intermediates=lambda module, _: isinstance(module, wanted))
  flat = jax.tree_util.tree_flatten_with_path(found['intermediates'])[0]
  return {'/'.join(part.key for part in path if hasattr(part, 'key')).removesuffix('/__call__'): np.asarray(value)
          for path, value in flat}


# Where a rate first shows: what is computed before that place is untouched, down to the bit.
PLACES = [
    ('encoder', 'attention_dropout', 'self_attention/pattern', 'self_attention/z'),
    ('encoder', 'dropout', 'self_attention', 'resid_mid'),
    ('encoder', 'activation_dropout', 'mlp/act', 'mlp'),
    ('decoder', 'attention_dropout', 'self_attention/pattern', 'self_attention/z'),
    ('decoder', 'dropout', 'self_attention', 'resid_mid'),
    ('decoder', 'activation_dropout', 'mlp/act', 'mlp'),
]


@pytest.mark.parametrize('kind, rate, before, after', PLACES)
def test_each_dropout_acts_at_its_place(random_params, kind, rate, before, after):
  layer, rest = make(kind, norm='pre', **{rate: 0.4})
  variables = random_params(layer, X_BxTxD, None, *rest)
  without, with_dropout = (captured(layer, variables, key, rest) for key in (None, jax.random.key(0)))
  np.testing.assert_array_equal(without[before], with_dropout[before])
  assert np.abs(without[after] - with_dropout[after]).max() > 0.01
  if rate == 'attention_dropout' and kind == 'decoder':
    assert np.abs(without['cross_attention/z'] - with_dropout['cross_attention/z']).max() > 0.01


@pytest.mark.parametrize('kind', ['encoder', 'decoder'])
def test_residual_dropout_falls_on_the_output_of_every_sublayer(random_params, kind):
  layer, rest = make(kind, norm='pre', dropout=0.4)
  found = captured(layer, random_params(layer, X_BxTxD, None, *rest), jax.random.key(0), rest)
  stream = ['resid_pre', 'resid_mid', *['resid_mid_cross'] * (kind == 'decoder'), 'resid_post']
  sublayers = ['self_attention', *['cross_attention'] * (kind == 'decoder'), 'mlp']
  masks_ = []
  for before, after, sublayer in zip(stream, stream[1:], sublayers):
    added = found[after] - found[before]
    kept = np.abs(added) > 1e-6
    np.testing.assert_allclose(added, np.where(kept, found[sublayer] / 0.6, 0), atol=1e-5)
    assert abs(kept.mean() - 0.6) < 4 * (0.24 / kept.size)**0.5
    masks_.append(kept)
  for one, other in zip(masks_, masks_[1:]):
    assert not np.array_equal(one, other)
