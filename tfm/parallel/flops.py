"""Model FLOPs of a training step: the arithmetic that MFU is measured against."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tfm.config import TransformerConfig


@dataclass(frozen=True)
class ModelFlops:
  """FLOPs of the forward pass over a batch, by part; 2 for a multiplication and addition.

  The convention: matrix products and convolutions only. A causal query is charged for the keys it may see, T (T + 1) /
  2 of T x T (MaxText since its PR #1988; nanoGPT's 6N + 12LHQT charges all). Embedding look-ups are not counted,
  logits are, over the vocabulary without added rows. Padding counts like any token. The backward pass has two products
  for each one of the forward pass, so a step is 3 x forward; recomputation (`model.remat`) does not count, which makes
  it MFU, not HFU.
  """

  encoder_projections: float
  encoder_attention: float
  encoder_convolution: float
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


def model_flops(config: TransformerConfig, vocab_size: int, rows: int, S: int, T: int,
                halve_causal: bool = True) -> ModelFlops:
  """Of one forward pass.

  Args:
    vocab_size: V, of the output; an embedding that is only looked up costs nothing.
    rows: B, of the whole batch.
    S: source tokens a row, padding included; of no account without an encoder.
    T: labels a row (the decoder's positions), likewise.
    halve_causal: False charges all T x T scores of a causal layer, and all S x S of a window, which the reference
      kernel does compute.
  """
  c = config
  cross = c.decoder_layers if c.encoder_layers else 0
  source, target = 2.0 * rows * S, 2.0 * rows * T  # FLOPs for each weight that all tokens pass
  heads = c.num_heads * (c.key_width + c.value_width)
  queries = c.d_model * heads  # and output
  keys = c.d_model * c.key_heads * (c.key_width + c.value_width)  # and values
  mlp = c.d_model * (c.d_ff * (3 if c.gated else 2) * (c.experts_per_token if c.experts else 1) + c.experts)
  convolution = c.d_model * (3 * c.d_model + c.kernel_width) if c.convolution != 'none' else 0
  output = c.d_model * (vocab_size + (c.d_model if c.output_transform else 0))
  return ModelFlops(
      encoder_projections=c.encoder_layers * source * (queries + keys),
      encoder_attention=c.encoder_layers * source * _seen(S, c.window, False, halve_causal) * heads,
      encoder_convolution=c.encoder_layers * source * convolution,
      encoder_mlp=c.encoder_layers * source * mlp * (2 if c.convolution == 'conformer' else 1),
      decoder_projections=c.decoder_layers * target * (queries + keys) + cross * (target * queries + source * keys),
      decoder_attention=c.decoder_layers * target * _seen(T, c.window, True, halve_causal) * heads,
      cross_attention=cross * target * S * heads,
      decoder_mlp=c.decoder_layers * target * mlp,
      logits=(target if c.decoder_layers else source) * output)


def _seen(length: int, window: int | None, causal: bool, only: bool) -> float:
  """Keys that a query of `length` sees on average; all of them unless `only` those are charged."""
  if not only or (window is None and not causal):
    return length
  before = sum(min(t + 1, window or length) for t in range(length)) / length if length else 0.0
  return before if causal else min(2 * before - 1, length)
