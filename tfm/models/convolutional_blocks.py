"""The two stacks of ConvS2S (Gehring et al. 2017, figure 1)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from tfm.attention.attend import attend
from tfm.attention.masks import AttentionMask
from tfm.convolutional_config import ConvolutionalConfig
from tfm.models.convolution import GatedConvolution, Linear
from tfm.models.dropout import dropout
from tfm.models.layers import split
from tfm.models.multihead import KeysValues
from tfm.models.tap import Tap
from tfm.parallel.rules import constrain


@struct.dataclass
class Attended:
  """What all attentions of the decoder look at: they have no projections of keys and values of their own."""

  source: KeysValues
  """Keys z and values z + e, BxSx1xD."""
  mask: AttentionMask
  """Of the source."""


def join(config: ConvolutionalConfig, x: jax.Array, y: jax.Array) -> jax.Array:
  """x + y, by default times sqrt(0.5): of the variance of each, if both have the same (section 3.4)."""
  return (x + y) * jnp.asarray(0.5**0.5, x.dtype) if config.scale_residuals else x + y


def only(real_BxS: jax.Array | None, x_BxSxD: jax.Array) -> jax.Array:
  """Zeros in the place of padding."""
  return x_BxSxD if real_BxS is None else jnp.where(real_BxS[..., None], x_BxSxD, 0)


class SourceAttention(nn.Module):
  """One step of multi-step attention (section 3.3): c = S sqrt(1/S) sum_j a_j (z_j + e_j), a = softmax(d . z), with
  d = W h + b + g, and W_o c + b_o joined to h. S is the number of source tokens, padding not counted (section 3.4)."""

  config: ConvolutionalConfig

  def setup(self):
    c = self.config
    self.query_projection = Linear(c, c.d_hidden, c.d_model)
    self.output_projection = Linear(c, c.d_model, c.d_hidden)
    self.scores, self.pattern, self.z = Tap(), Tap(), Tap()

  @property
  def reads_pattern(self) -> bool:
    """Whether somebody asked to see or to replace what only a kernel that holds the pattern can show."""
    return self.is_mutable_collection('intermediates') or any(
        self.has_variable('taps', name) for name in ('scores', 'pattern'))

  def __call__(self, h_RxTxF, g_RxTxD, attended: Attended) -> jax.Array:
    """RxTxF; R is a multiple of the number of sources, whose rows follow one another (beams)."""
    c, keys_BxSx1xD = self.config, attended.source.keys_BxSxKxC
    (B, S), (R, T) = keys_BxSx1xD.shape[:2], h_RxTxF.shape[:2]
    d_RxTxD = join(c, self.query_projection(h_RxTxF), g_RxTxD)
    # The beams of a sentence become queries of one row: its keys are read once, not M times.
    z_BxTx1xD = attend(
        d_RxTxD.reshape(B, R // B * T, 1, c.d_model), keys_BxSx1xD, attended.source.values_BxSxKxC, attended.mask,
        scale=1.0, backend='reference' if self.is_initializing() else c.attention_backend,
        tap=lambda name, value: getattr(self, name)(value), needs_pattern=self.reads_pattern)
    allowed = attended.mask.to_array(1, S)
    count = jnp.float32(S) if allowed is None else jnp.sum(allowed, axis=-1, keepdims=True, dtype=jnp.float32)
    c_BxTx1xD = z_BxTx1xD * jnp.sqrt(count).astype(z_BxTx1xD.dtype)
    return join(c, h_RxTxF, self.output_projection(c_BxTx1xD.reshape(R, T, c.d_model)))


class EncoderLayer(nn.Module):
  """A gated convolution that sees both sides, and the way around it."""

  config: ConvolutionalConfig
  layer: int

  def setup(self):
    self.convolution = GatedConvolution(self.config, self.layer, causal=False)
    self.resid_pre, self.act, self.resid_post = Tap(), Tap(), Tap()

  def __call__(self, x_BxSxF, real_BxS, dropout_key):
    x_BxSxF = self.resid_pre(x_BxSxF)
    input_BxSxF = only(real_BxS, dropout(x_BxSxF, self.config.dropout, dropout_key))
    y_BxSxF = self.act(self.convolution(input_BxSxF))
    return self.resid_post(constrain(join(self.config, x_BxSxF, y_BxSxF), 'batch', 'length', 'embed'))


class DecoderLayer(nn.Module):
  """A gated convolution over what is behind, attention to the source where there is one, and the way around both."""

  config: ConvolutionalConfig
  layer: int

  def setup(self):
    c = self.config
    self.convolution = GatedConvolution(c, self.layer, causal=True)
    self.resid_pre, self.act, self.resid_post = Tap(), Tap(), Tap()
    if c.encoder_layers:
      self.cross_attention = SourceAttention(c)

  def __call__(self, x_BxTxF, g_BxTxD, attended: Attended | None, segments_BxT, dropout_key):
    """All T positions at once (teacher forcing)."""
    x_BxTxF = self.resid_pre(x_BxTxF)
    y_BxTxF = self.convolution(dropout(x_BxTxF, self.config.dropout, dropout_key), segments_BxT)
    return self._finish(x_BxTxF, y_BxTxF, g_BxTxD, attended)

  def step(self, x_RxTxF, past_RxPxF, g_RxTxD, attended: Attended | None):
    """T new tokens: their states, and the inputs that the convolution needs for the next ones."""
    x_RxTxF = self.resid_pre(x_RxTxF)
    y_RxTxF, past_RxPxF = self.convolution.extend(x_RxTxF, past_RxPxF)
    return self._finish(x_RxTxF, y_RxTxF, g_RxTxD, attended), past_RxPxF

  def _finish(self, x, y, g, attended):
    y = self.act(y)
    if attended is not None:
      y = self.cross_attention(y, g, attended)
    return self.resid_post(constrain(join(self.config, x, y), 'batch', 'length', 'embed'))


class EncoderStack(nn.Module):
  """Embeddings e to z, both BxSxD; between, states of width F."""

  config: ConvolutionalConfig

  def setup(self):
    c = self.config
    self.input_projection = Linear(c, c.d_model, c.d_hidden, 1 - c.dropout)
    self.layers = [EncoderLayer(c, i) for i in range(c.encoder_layers)]
    self.output_projection = Linear(c, c.d_hidden, c.d_model)

  def __call__(self, e_BxSxD, real_BxS=None, dropout_key=None):
    x_BxSxF = self.input_projection(e_BxSxD)
    for layer, key in zip(self.layers, split(dropout_key, self.config.encoder_layers)):
      x_BxSxF = layer(x_BxSxF, real_BxS, key)
    return only(real_BxS, self.output_projection(x_BxSxF))


class DecoderStack(nn.Module):
  """Embeddings g to the states that predict, both BxTxD; between, states of width F. Without an encoder `attended` is
  None."""

  config: ConvolutionalConfig

  def setup(self):
    c = self.config
    self.input_projection = Linear(c, c.d_model, c.d_hidden, 1 - c.dropout)
    self.layers = [DecoderLayer(c, i) for i in range(c.decoder_layers)]
    self.output_projection = Linear(c, c.d_hidden, c.d_model)

  def __call__(self, g_BxTxD, attended: Attended | None, segments_BxT=None, dropout_key=None):
    *keys, last_key = split(dropout_key, self.config.decoder_layers + 1)
    x_BxTxF = self.input_projection(g_BxTxD)
    for layer, key in zip(self.layers, keys):
      x_BxTxF = layer(x_BxTxF, g_BxTxD, attended, segments_BxT, key)
    return dropout(self.output_projection(x_BxTxF), self.config.dropout, last_key)

  def step(self, g_RxTxD, steps, attended: Attended | None):
    """T new tokens after those whose traces are in `steps`: their states and the new traces."""
    x_RxTxF, grown = self.input_projection(g_RxTxD), []
    for layer, past_RxPxF in zip(self.layers, steps):
      x_RxTxF, past_RxPxF = layer.step(x_RxTxF, past_RxPxF, g_RxTxD, attended)
      grown.append(past_RxPxF)
    return self.output_projection(x_RxTxF), tuple(grown)


def empty_steps(config: ConvolutionalConfig, rows: int) -> tuple[jax.Array, ...]:
  """Last inputs of the convolution of every decoder layer, of no token yet; their number does not grow with tokens."""
  widths = ((config.kernel_width - 1) * config.dilation_of(i) for i in range(config.decoder_layers))
  return tuple(jnp.zeros((rows, width, config.d_hidden), config.dtype) for width in widths)
