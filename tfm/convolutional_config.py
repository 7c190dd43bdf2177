"""The model's section of the config for convolutional models (Gehring et al. 2017, Dauphin et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from tfm.model_section import ModelSection, Shape
from tfm.section import require, require_fraction, require_positive


class ReceptiveField(NamedTuple):
  """How many positions reach a state by convolutions alone."""

  encoder: int | None
  """Centred: the position itself, and half of the others on each side. None: there is no encoder."""
  decoder: int
  """The position itself and those before it."""


@dataclass(frozen=True)
class ConvolutionalConfig(ModelSection):
  """ConvS2S; defaults are the model of "Convolutional Sequence to Sequence Learning" (Gehring et al. 2017, section 4.2)
  for English-Romanian, 20 + 20 layers of 512.

  With `encoder_layers=0` it is the decoder alone, without attention: a language model of gated convolutions (Dauphin et
  al. 2017).
  """

  kind = 'convolutional'

  encoder_layers: int = 20
  """Convolutions of the encoder (section 3.2); 0: there is none, the model is decoder-only."""
  decoder_layers: int = 20
  """Convolutions of the decoder, each with an attention of its own (section 3.3)."""
  d_model: int = 512
  """D, width of the embeddings, and of queries, keys and values."""
  d_hidden: int = 512
  """F, width of the states between convolutions."""
  kernel_width: int = 3
  """k, inputs of a convolution: odd where there is an encoder, which looks as far to the left as to the right."""
  dilation: Literal['none', 'doubling'] = 'none'
  """Distance of the inputs of a convolution: 1, or 2^l in layer l = 0, 1, ..., so that few layers see far (van den Oord
  et al. 2016, section 2.1; Kalchbrenner et al. 2016). The paper has 'none'."""

  positions: Literal['learned', 'none'] = 'learned'
  """'learned': a vector for each position is added to the embeddings (section 3.1)."""
  max_positions: int | None = 1024
  """Rows of the learned position table; None without one: there is no limit."""
  weight_norm: bool = True
  """Direction and length of the weights of each output are parameters of their own (Salimans & Kingma 2016), in all
  linear maps but the embeddings and the output projection (section 4.2)."""
  scale_residuals: bool = True
  """Multiply every sum of two values by sqrt(0.5), to keep its variance (section 3.4)."""
  scale_encoder_gradient: bool = True
  """Divide the gradient that reaches the encoder by its number of attentions (section 3.4)."""

  tying: Literal['none', 'inputs', 'target', 'all'] = 'none'
  """Shared matrices: 'target' target embedding = output projection; 'inputs' source = target embedding; 'all' the
  three. The language model has one embedding, and 'target' and 'all' share it with the output."""
  output_bias: bool = True
  """A bias for every token of the vocabulary (section 3.1, b_o)."""
  dropout: float = 0.1
  """On the embeddings, the input of every convolution and the decoder's output (section 4.2)."""
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  """Type of the computation; parameters, softmax, logits and loss are float32 always."""
  vocab_multiple: int = 1
  """Rows of the embedding tables are rounded up to a multiple of this; the rows beyond the vocabulary are never
  predicted."""
  pad_id: int | None = 0
  """Id of padding, always on the right; None: the vocabulary has none."""

  def check(self):
    require_positive(self, 'decoder_layers', 'd_model', 'd_hidden', 'kernel_width', 'vocab_multiple')
    require(self.encoder_layers >= 0, f'model.encoder_layers is {self.encoder_layers}; give 0 or more.')
    require_fraction('dropout', self.dropout)
    require(self.encoder_layers == 0 or self.kernel_width % 2 == 1,
            f'kernel_width is {self.kernel_width}, but an encoder looks as far to the left as to the right; give an '
            'odd number.')
    require(self.dilation == 'none' or self.kernel_width > 1,
            f"dilation='{self.dilation}' has no effect with kernel_width=1; choose 'none' or a wider kernel.")
    require(self.positions == 'none' or (self.max_positions or 0) > 0,
            "positions='learned' needs a table size: set max_positions to the longest sequence in tokens.")
    require(self.positions == 'learned' or self.max_positions is None,
            "max_positions has no effect with positions='none'; set it to None or choose positions='learned'.")
    if self.shape == 'decoder_only':
      require(self.tying != 'inputs', "tying='inputs' shares two embeddings, but a model that is decoder-only has one; "
                                      "choose 'none' or 'all'.")
      require(self.scale_encoder_gradient, 'scale_encoder_gradient=False has no effect without an encoder; remove it.')

  @property
  def shape(self) -> Shape:
    return 'encoder_decoder' if self.encoder_layers else 'decoder_only'

  @property
  def cross_attention_shape(self) -> tuple[int, int] | None:
    return (self.decoder_layers, 1) if self.encoder_layers else None

  def dilation_of(self, layer: int) -> int:
    """Distance of neighbouring inputs of the convolution of layer 0, 1, ..."""
    return 2**layer if self.dilation == 'doubling' else 1

  @property
  def receptive_field(self) -> ReceptiveField:
    def reach(layers):
      return 1 + (self.kernel_width - 1) * sum(map(self.dilation_of, range(layers)))

    return ReceptiveField(reach(self.encoder_layers) if self.encoder_layers else None, reach(self.decoder_layers))
