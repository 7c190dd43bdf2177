"""From a config to a model and its first parameters."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tfm.config import TransformerConfig
from tfm.models.decoder_only import DecoderOnly
from tfm.models.encoder_only import EncoderOnly
from tfm.models.layout import to_layout
from tfm.models.transformer import EncoderDecoder

Model = EncoderDecoder | DecoderOnly | EncoderOnly


def build_model(config: TransformerConfig, source_vocab_size: int, target_vocab_size: int) -> Model:
  """The model of `config.shape`; one stack has one vocabulary, that of its own side."""
  if config.shape == 'encoder_decoder':
    return EncoderDecoder(config, source_vocab_size, target_vocab_size)
  return EncoderOnly(config, source_vocab_size) if config.shape == 'encoder_only' else (
      DecoderOnly(config, target_vocab_size))


def with_layout(model: Model, scan_layers: bool) -> Model:
  """The same model with its layers scanned or unrolled (see `tfm.models.layout` for the parameters)."""
  return model.clone(config=dataclasses.replace(model.config, scan_layers=scan_layers))


def initialize(model: Model, key: jax.Array) -> dict[str, Any]:
  """Fresh parameters. The layout does not change them: both come from the scanned initialisation, which compiles
  one layer instead of N."""
  scanned = with_layout(model, True)
  ids_BxT = jnp.ones((1, 2), jnp.int32)
  sides = 2 if isinstance(model, EncoderDecoder) else 1

  @partial(jax.jit)
  def init(key):
    return scanned.init(key, *[ids_BxT] * sides)['params']

  return to_layout(init(key), 'scanned' if model.config.scan_layers else 'unrolled')


def count_parameters(params: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))
