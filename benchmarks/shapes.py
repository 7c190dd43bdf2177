"""The training steps that are measured: models, batches and settings, the same for every engine. No framework here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tfm.config import Config, OptimizerConfig, TransformerConfig
from tfm.recipe import read_recipe

# Marian's parts, of which nn.Transformer has the like, so that all engines can have the same weights.
_MARIAN = dict(biases='all', positions='sinusoidal_halves', norm_epsilon=1e-5)


@dataclass(frozen=True)
class Shape:
  """A model on batches of `rows` texts of `length` tokens, on either side where there are two."""

  model: TransformerConfig
  vocabulary: int
  rows: int
  length: int

  def config(self, dropout: float) -> Config:
    """What tfm trains: Adam at a constant rate with label smoothing 0.1; a language model as its recipe says."""
    model = dataclasses.replace(self.model, dropout=dropout)
    if model.shape == 'encoder_decoder':
      return Config(model=model, optimizer=OptimizerConfig(schedule='constant', learning_rate=1e-4, warmup_steps=0))
    recipe, _ = read_recipe(Path(__file__).parents[1] / 'configs' / 'shakespeare_char.py')
    data = dataclasses.replace(recipe.data, max_length=self.length, tokens_per_batch=self.rows * self.length)
    # nanoGPT begins to warm up at rate 0 and others do not: a constant rate, so that losses can be compared.
    optimizer = dataclasses.replace(recipe.optimizer, schedule='constant', warmup_steps=0, final_fraction=0.0)
    return dataclasses.replace(recipe, model=model, data=data, optimizer=optimizer)

  def batch(self, padded: bool) -> tuple[np.ndarray, np.ndarray]:
    """Source and target (one longer than what is said of it), or twice the text: random ids, padding 0 on the right.

    Padded rows have half of the length to all of it.
    """
    rng = np.random.default_rng(0)
    sides = [rng.integers(4, self.vocabulary, (self.rows, self.length + more), np.int32) for more in (0, 1)]
    if padded:
      lengths = rng.integers(self.length // 2, self.length + 1, self.rows)
      for side, more in zip(sides, (0, 1)):
        side[np.arange(self.length + more) >= (lengths + more)[:, None]] = 0
    return (sides[1], sides[1]) if self.model.shape == 'decoder_only' else tuple(sides)


def _language_model(layers: int, width: int, heads: int, length: int) -> TransformerConfig:
  recipe, _ = read_recipe(Path(__file__).parents[1] / 'configs' / 'shakespeare_char.py')
  return dataclasses.replace(recipe.model, decoder_layers=layers, d_model=width, d_ff=4 * width, num_heads=heads,
                             max_positions=length)


SHAPES = {
    'base': Shape(TransformerConfig(6, 6, 512, 2048, 8, **_MARIAN), 8000, 25, 32),
    'base_scanned': Shape(TransformerConfig(6, 6, 512, 2048, 8, scan_layers=True, **_MARIAN), 8000, 25, 32),
    'tiny': Shape(TransformerConfig(4, 4, 128, 256, 4, **_MARIAN), 8000, 128, 32),
    'nanogpt': Shape(_language_model(4, 128, 4, 64), 65, 12, 64),
    'small': Shape(TransformerConfig(1, 1, 32, 64, 2, **_MARIAN), 100, 4, 8),
    'small_gpt': Shape(_language_model(1, 32, 2, 16), 65, 4, 16),
}
"""base and tiny: encoder-decoders with one tied vocabulary. nanogpt: its recipe for a CPU, with its 65 letters."""
