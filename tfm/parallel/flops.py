"""Model FLOPs of a training step: the arithmetic that MFU is measured against."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tfm.config import TransformerConfig


@dataclass(frozen=True)
class ModelFlops:
  """FLOPs of the forward pass over a batch, by part; 2 for a multiplication and addition.

  The convention: matrix products only. A causal query is charged for the keys it may see, T (T + 1) / 2 of T x T
  (MaxText since its PR #1988; nanoGPT's 6N + 12LHQT charges all). Embedding look-ups are not counted, logits are, over
  the vocabulary without added rows. Padding counts like any token. The backward pass has two products for each one of
  the forward pass, so a step is 3 x forward; recomputation (`model.remat`) does not count, which makes it MFU, not HFU.
  """

  encoder_projections: float
  encoder_attention: float
  encoder_mlp: float
  decoder_projections: float
  """Of self- and cross-attention; the latter's keys and values are of S tokens."""
  decoder_attention: float
  cross_attention: float
  decoder_mlp: float
  logits: float

  @property
  def forward(self) -> float:
    return sum(getattr(self, part.name) for part in fields(self))

  @property
  def step(self) -> float:
    """Forward and backward."""
    return 3.0 * self.forward


def model_flops(config: TransformerConfig, target_vocab_size: int, rows: int, S: int, T: int,
                halve_causal: bool = True) -> ModelFlops:
  """Of one forward pass.

  Args:
    target_vocab_size: V; the source's costs nothing, it is only looked up.
    rows: B, of the whole batch.
    S: source tokens a row, padding included.
    T: labels a row (the decoder's positions), likewise.
    halve_causal: False charges all T x T scores of a causal layer, which the reference kernel does compute.
  """
  c = config
  widths = c.num_heads * (c.key_width + c.value_width)  # of queries and output, or of keys and values
  source, target = 2.0 * rows * S, 2.0 * rows * T  # FLOPs for each weight that all tokens pass
  seen = (T + 1) / 2 if halve_causal else T
  return ModelFlops(
      encoder_projections=c.encoder_layers * source * c.d_model * 2 * widths,
      encoder_attention=c.encoder_layers * source * S * widths,
      encoder_mlp=c.encoder_layers * source * 2 * c.d_model * c.d_ff,
      decoder_projections=c.decoder_layers * (3 * target + source) * c.d_model * widths,
      decoder_attention=c.decoder_layers * target * seen * widths,
      cross_attention=c.decoder_layers * target * S * widths,
      decoder_mlp=c.decoder_layers * target * 2 * c.d_model * c.d_ff,
      logits=target * c.d_model * target_vocab_size)
