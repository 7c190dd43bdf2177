"""Tiny models of every family with random parameters, for all tests of tfm/analysis."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import ConvolutionalConfig, RecurrentConfig, TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.models.layout import to_layout

V = 11
SOURCE_BxS = np.array([[5, 6, 7, 8, 9, 2, 0, 0], [4, 9, 2, 0, 0, 0, 0, 0], [3, 8, 5, 5, 10, 4, 7, 2]])
TARGET_BxT = np.array([[1, 7, 10, 4, 6, 0], [1, 9, 6, 0, 0, 0], [1, 5, 5, 10, 8, 6]])

transformer = partial(TransformerConfig, d_model=16, d_ff=24, num_heads=4, dropout=0.0, norm='pre')
recurrent = partial(RecurrentConfig, d_model=16, d_hidden=12, dropout=0.0)
CONFIGS = {
    'encoder_decoder': transformer(encoder_layers=4, decoder_layers=4),
    'decoder_only': transformer(encoder_layers=0, decoder_layers=4, positions='rope', num_kv_heads=2),
    'encoder_only': transformer(encoder_layers=4, decoder_layers=0, norm='post'),
    'conformer': transformer(encoder_layers=4, decoder_layers=4, convolution='conformer'),
    'bahdanau': recurrent(encoder_layers=2),
    'luong': recurrent(query='current', input_feeding=True, score='general', readout='tanh', decoder_layers=2),
    'rnn_lm': recurrent(encoder_layers=0, decoder_layers=2),
    'conv_s2s': ConvolutionalConfig(d_model=16, d_hidden=12, encoder_layers=2, decoder_layers=3, dropout=0.0,
                                    max_positions=12),
}


@cache
def parameters(config):
  """Random parameters in the unrolled layout, none of them where it began, so that nothing is 0 or 1 by chance."""
  params = initialize(build_model(config, V, V), jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(tree, [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)])


def make_case(family: str, layout: str = 'unrolled', **changes):
  config = dataclasses.replace(CONFIGS[family], **changes)
  plain = {name: value for name, value in changes.items() if name not in ('remat', 'attention_backend')}
  params = to_layout(parameters(dataclasses.replace(CONFIGS[family], **plain)), layout)
  if layout == 'scanned':
    config = dataclasses.replace(config, scan_layers=True)
  sides = {'encoder_decoder': (SOURCE_BxS, TARGET_BxT), 'decoder_only': (TARGET_BxT,), 'encoder_only': (SOURCE_BxS,)}
  return build_model(config, V, V), params, tuple(map(jnp.asarray, sides[config.shape]))


@pytest.fixture(scope='session')
def case():
  """`case(family, layout, **changes)` -> (model, params, inputs): 11 words, width 16, 4 heads, 4 layers, 3 rows of 8
  source and 6 target tokens. Families are the keys of CONFIGS."""
  return make_case
