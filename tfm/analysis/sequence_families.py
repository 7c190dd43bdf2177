"""One small language model of each family, equal in parameters, for comparisons of what they can remember."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import jax

from tfm.config import ConfigError, ConvolutionalConfig, RecurrentConfig, TransformerConfig
from tfm.model_section import ModelSection
from tfm.models.build import Model, build_model, count_parameters, initialize

Family = Callable[[int], ModelSection]
"""Free width -> config. No family has positions of its own beyond what its structure or rotary attention gives."""


def recurrent(width: int, cell: str = 'tanh', d_model: int = 32) -> RecurrentConfig:
  return RecurrentConfig(encoder_layers=0, decoder_layers=1, d_model=d_model, d_hidden=width, cell=cell,
                         readout='linear', pad_id=None)


def convolutional(width: int, dilation: str = 'none', layers: int = 7, d_model: int = 32) -> ConvolutionalConfig:
  return ConvolutionalConfig(encoder_layers=0, decoder_layers=layers, d_model=d_model, d_hidden=width, kernel_width=3,
                             dilation=dilation, positions='none', max_positions=None, dropout=0.0, pad_id=None)


def transformer(width: int, layers: int = 2, d_model: int = 32, num_heads: int = 2) -> TransformerConfig:
  return TransformerConfig(encoder_layers=0, decoder_layers=layers, d_model=d_model, d_ff=width, num_heads=num_heads,
                           norm='pre', positions='rope', tying='none', dropout=0.0, pad_id=None)


FAMILIES: dict[str, Family] = {
    'tanh RNN': recurrent,
    'LSTM': partial(recurrent, cell='lstm'),
    'CNN': convolutional,
    'dilated CNN': partial(convolutional, dilation='doubling'),
    'Transformer': transformer,
}


@cache
def parameters_of(config: ModelSection, vocab_size: int) -> int:
  model = build_model(config, vocab_size, vocab_size)
  return count_parameters(jax.eval_shape(partial(initialize, model), jax.random.key(0)))


def matched(family: Family, parameters: int, vocab_size: int, tolerance: float = 0.05) -> Model:
  """The model of the family whose width brings it closest to `parameters`.

  Raises:
    ConfigError: none comes within `tolerance`.
  """
  def size(width):
    return parameters_of(family(width), vocab_size)

  low, high = 1, 2
  while size(high) < parameters:
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if size(middle) < parameters else (low, middle)
  width = min((low, high), key=lambda width: abs(size(width) - parameters))
  if abs(size(width) / parameters - 1) > tolerance:
    raise ConfigError(f'{family(width).kind}: no width gives {parameters} parameters within {tolerance:.0%}; the '
                      f'nearest is {width} with {size(width)}. Ask for more parameters.')
  return build_model(family(width), vocab_size, vocab_size)
