"""From a config to a model and its first parameters."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm.config import TransformerConfig
from tfm.models.layout import to_layout
from tfm.models.transformer import EncoderDecoder


def build_model(config: TransformerConfig, source_vocab_size: int, target_vocab_size: int) -> EncoderDecoder:
  return EncoderDecoder(config, source_vocab_size, target_vocab_size)


def with_layout(model: nn.Module, scan_layers: bool) -> nn.Module:
  """The same model with its layers scanned or unrolled (see `tfm.models.layout` for the parameters)."""
  return model.clone(config=dataclasses.replace(model.config, scan_layers=scan_layers))


def initialize(model: EncoderDecoder, key: jax.Array) -> dict[str, Any]:
  """Fresh parameters. The layout does not change them: both come from the scanned initialisation, which compiles
  one layer instead of N."""
  scanned = with_layout(model, True)
  ids_BxT = jnp.ones((1, 2), jnp.int32)

  @partial(jax.jit)
  def init(key):
    return scanned.init(key, ids_BxT, ids_BxT)['params']

  return to_layout(init(key), 'scanned' if model.config.scan_layers else 'unrolled')


def count_parameters(params: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))
