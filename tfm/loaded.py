"""A trained model in the hands of its user: which object serves which shape, and how its texts were framed."""

from __future__ import annotations

from typing import Any

from tfm.config import Config
from tfm.encoder import Encoder
from tfm.generator import Generator
from tfm.models.build import Model
from tfm.special_ids import BOS, OURS, SpecialIds
from tfm.text.tokenizer import Tokenizers
from tfm.translator import Translator

Loaded = Translator | Generator | Encoder


def assemble(config: Config, model: Model, params: Any, tokenizers: Tokenizers,
             special: SpecialIds | None = None) -> Loaded:
  """What uses a model of this shape; `special` is that of the config's own training if None."""
  special = framing(config) if special is None else special
  if config.model.shape == 'encoder_decoder':
    return Translator(model, params, tokenizers, config.decoding, special)
  return (Generator if config.model.shape == 'decoder_only' else Encoder)(model, params, tokenizers, special)


def framing(config: Config) -> SpecialIds:
  """How texts are framed in the training of this config."""
  if config.model.shape == 'encoder_decoder':
    return OURS
  if config.model.shape == 'encoder_only':
    return SpecialIds(source_prefix=(BOS,))
  # A stream that was cut into blocks anywhere has no beginning.
  stream = config.data.packing == 'blocks' and config.data.documents == 'file'
  return SpecialIds(source_prefix=() if stream else (BOS,), source_suffix=())
