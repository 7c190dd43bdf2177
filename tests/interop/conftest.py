from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tfm.config import Config, DataConfig, TokenizerConfig, TransformerConfig
from tfm.interop.release import Release
from tfm.models.build import initialize
from tfm.models.layout import to_layout
from tfm.text.tokenizer import train_tokenizers

TINY = TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=16, d_ff=24, num_heads=4, dropout=0.0)
PAIRED = DataConfig(max_length=32)
TEXT = DataConfig(corpus='text', source=None, target=None, limit=None, held_out=None, root='.', train='a.txt',
                  validation='b.txt', max_length=32)
PAIRS = [('a man is walking his dog', 'ein Mann geht mit seinem Hund'), ('two dogs', 'zwei Hunde'),
         ('a dog sees two men', 'ein Hund sieht zwei Männer')] * 3


@pytest.fixture(scope='session')
def tokenizers():
  return train_tokenizers(TokenizerConfig(kind='bpe', vocab_size=280), PAIRS)


@pytest.fixture
def make_release(tokenizers):
  """`make_release(norm='pre', ...)`: a tiny model with random weights, those too that begin as 0 or 1."""

  def make(pair=tokenizers, **changes) -> Release:
    model = dataclasses.replace(TINY, **changes)
    config = Config(model=model, data=PAIRED if model.shape == 'encoder_decoder' else TEXT,
                    tokenizer=TokenizerConfig(extra_ids=int(model.shape == 'encoder_only')))
    release = Release(config, {}, pair, (pair.source.vocab_size, pair.target.vocab_size))
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda key: initialize(release.model, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal((leaf.ndim == 1) * 0.5, 0.3, leaf.shape).astype(np.float32), abstract)
    layout = 'scanned' if changes.get('scan_layers') else 'unrolled'
    return dataclasses.replace(release, params=to_layout(params, layout))

  return make
