"""From a config to a model and its first parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tfm.model_section import ModelSection
from tfm.models.convolutional import ConvolutionalDecoderOnly, ConvolutionalEncoderDecoder
from tfm.models.decoder_only import DecoderOnly
from tfm.models.encoder_only import EncoderOnly
from tfm.models.ends import TokenEnds
from tfm.models.layout import to_layout
from tfm.models.recurrent import RecurrentDecoderOnly, RecurrentEncoderDecoder
from tfm.models.transformer import EncoderDecoder

CLASSES: dict[tuple[str, str], type[TokenEnds]] = {
    ('transformer', 'encoder_decoder'): EncoderDecoder,
    ('transformer', 'decoder_only'): DecoderOnly,
    ('transformer', 'encoder_only'): EncoderOnly,
    ('recurrent', 'encoder_decoder'): RecurrentEncoderDecoder,
    ('recurrent', 'decoder_only'): RecurrentDecoderOnly,
    ('convolutional', 'encoder_decoder'): ConvolutionalEncoderDecoder,
    ('convolutional', 'decoder_only'): ConvolutionalDecoderOnly,
}
"""(kind, shape) of a config -> its model."""

Model = TokenEnds
"""Under the protocol of `tfm.decoding.cache`, with `hidden` and `unembed` for training."""


def build_model(config: ModelSection, source_vocab_size: int, target_vocab_size: int) -> Model:
  """The model of `config`; one stack has one vocabulary, that of its own side."""
  sizes = {'encoder_decoder': (source_vocab_size, target_vocab_size), 'decoder_only': (target_vocab_size,),
           'encoder_only': (source_vocab_size,)}[config.shape]
  return CLASSES[config.kind, config.shape](config, *sizes)


def with_layout(model: Model, scan_layers: bool) -> Model:
  """The same model with its layers scanned or unrolled (see `tfm.models.layout` for the parameters)."""
  return model.clone(config=model.config.with_layout(scan_layers))


def initialize(model: Model, key: jax.Array) -> dict[str, Any]:
  """Fresh parameters. The layout does not change them: both come from the scanned initialisation, which compiles
  one layer instead of N."""
  return to_layout(_initialize(with_layout(model, True), key),
                   'scanned' if model.config.scan_layers else 'unrolled')


@partial(jax.jit, static_argnums=0)
def _initialize(scanned: Model, key: jax.Array) -> dict[str, Any]:
  ids_BxT = jnp.ones((1, 2), jnp.int32)
  return scanned.init(key, *[ids_BxT] * (2 if scanned.config.shape == 'encoder_decoder' else 1))['params']


def count_parameters(params: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))
