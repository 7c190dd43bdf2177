"""tfm: the Transformer, for those who read it, train it and take it apart.

Shape letters, used as name suffixes everywhere (`scores_BxHxTxS`):

  B  batch                    T  target or query length     S  source or key length
  D  model width              H  query heads                K  key/value heads
  C  head width               F  feed-forward width         V  vocabulary
  N  layers                   M  beam                       R  rows of a decoding batch, B x M

Importing `tfm` is light: the names below are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = '0.1.0'

_HOME = {
    'Config': 'tfm.config',
    'ConfigError': 'tfm.config',
    'DataConfig': 'tfm.config',
    'DecodingConfig': 'tfm.config',
    'OptimizerConfig': 'tfm.config',
    'TokenizerConfig': 'tfm.config',
    'TrainingConfig': 'tfm.config',
    'TransformerConfig': 'tfm.config',
    'MeshConfig': 'tfm.config',
    'EncoderDecoder': 'tfm.models.transformer',
    'DecoderOnly': 'tfm.models.decoder_only',
    'EncoderOnly': 'tfm.models.encoder_only',
    'Encoder': 'tfm.pipeline',
    'Generation': 'tfm.pipeline',
    'Generator': 'tfm.pipeline',
    'load': 'tfm.pipeline',
    'Translation': 'tfm.pipeline',
    'Translator': 'tfm.pipeline',
    'train': 'tfm.training.loop',
}

__all__ = [*_HOME, '__version__']

if TYPE_CHECKING:
  from tfm.config import (
    Config,
    ConfigError,
    DataConfig,
    DecodingConfig,
    MeshConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
    TransformerConfig,
  )
  from tfm.models.decoder_only import DecoderOnly
  from tfm.models.encoder_only import EncoderOnly
  from tfm.models.transformer import EncoderDecoder
  from tfm.pipeline import Encoder, Generation, Generator, Translation, Translator, load
  from tfm.training.loop import train


def __getattr__(name: str):
  if name not in _HOME:
    raise AttributeError(f"module 'tfm' has no attribute '{name}'")
  return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
  return sorted(__all__)
