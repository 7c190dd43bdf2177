"""Convolution beside attention in the encoder (Gulati et al. 2020): the module, and the layers that have one.

Behind the depthwise convolution the paper has BatchNorm (Ioffe & Szegedy 2015). Its statistics are those of a batch,
padding included, so a sentence would depend on its company. Here it is a norm over the channels of one position, which
knows no batch: LayerNorm (Ba et al. 2016), or what `norm_type` says.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm.config import TransformerConfig
from tfm.models.layers import EncoderLayer, Tokens, split
from tfm.models.linear import linear
from tfm.models.norms import make_norm
from tfm.models.tap import Tap
from tfm.parallel.rules import constrain


class Depthwise(nn.Module):
  """y[s] = bias + sum over j < W of kernel[j] * x[s + j - (W - 1) / 2], channel by channel; x is 0 beyond both ends.

  W is `kernel_width`. x and y are BxSxD.
  """

  config: TransformerConfig

  def setup(self):
    c = self.config
    # A channel is a map of W positions to one, so its fan-in is W; the bound is Glorot's with W on both sides.
    self.kernel_WxD = self.param('kernel', nn.initializers.variance_scaling(1.0, 'fan_in', 'uniform'),
                                 (c.kernel_width, c.d_model))
    if c.biases in ('mlp', 'all'):
      self.bias_D = self.param('bias', nn.initializers.zeros_init(), (c.d_model,))

  def __call__(self, x_BxSxD):
    c, S = self.config, x_BxSxD.shape[1]
    beside = c.kernel_width // 2
    padded = jnp.pad(x_BxSxD, ((0, 0), (beside, beside), (0, 0)))
    # W shifted copies become one loop; XLA's grouped convolution takes three to five times as long on a CPU.
    y_BxSxD = sum(jax.lax.slice_in_dim(padded, j, j + S, axis=1) * self.kernel_WxD[j] for j in range(c.kernel_width))
    if c.biases in ('mlp', 'all'):
      y_BxSxD = y_BxSxD + self.bias_D
    return y_BxSxD.astype(c.dtype)


class Convolution(nn.Module):
  """The convolution module (section 2.2): pointwise with a gate (GLU, Dauphin et al. 2017), depthwise, norm, swish,
  pointwise. Its first norm and its dropout are those of the residual connection around it.

  Padding is 0 where neighbours see it, so a position becomes the same however much padding follows.
  """

  config: TransformerConfig

  def setup(self):
    c = self.config
    self.inner, self.gate, self.outer = (linear(c.d_model, c) for _ in range(3))
    self.depthwise, self.norm = Depthwise(c), make_norm(c)
    self.gated, self.mixed, self.act = Tap(), Tap(), Tap()

  def __call__(self, x_BxSxD, real_BxS):
    """BxSxD. `real_BxS` is bool: not padding."""
    gated_BxSxD = self.inner(x_BxSxD) * nn.sigmoid(self.gate(x_BxSxD))
    gated_BxSxD = constrain(jnp.where(real_BxS[..., None], gated_BxSxD, 0), 'batch', 'length', 'channels')
    mixed_BxSxD = self.mixed(self.depthwise(self.gated(gated_BxSxD)))
    act_BxSxD = self.act(constrain(nn.silu(self.norm(mixed_BxSxD)), 'batch', 'length', 'channels'))
    return self.outer(act_BxSxD)


class ConvolutionLayer(EncoderLayer):
  """A convolution before attention, after it, or in parallel with it, then the feed-forward network (section 3.4.2).

  In parallel both have one input (and one norm) and their outputs are added; the paper joins them side by side.
  """

  def setup(self):
    super().setup()
    c = self.config
    self.convolution = Convolution(c)
    if c.convolution != 'parallel':
      self.convolution_norm, self.resid_mid_conv = make_norm(c), Tap()
      if c.norm == 'sandwich':
        self.convolution_post_norm = make_norm(c)

  def __call__(self, x_BxSxD, dropout_key, tokens: Tokens):
    kind, keys = self.config.convolution, split(dropout_key, 5)

    def attend(y):
      z = self.attend(y, tokens, keys[0])
      return z + self.convolution(y, tokens.real_BxT) if kind == 'parallel' else z

    x = self.resid_pre(x_BxSxD)
    if kind == 'before':
      x = self.convolve(x, tokens, keys[4])
    x = self.resid_mid(self.residual('self_attention', x, attend, keys[1]))
    if kind == 'after':
      x = self.convolve(x, tokens, keys[4])
    return self.resid_post(self.feed_forward('mlp', x, tokens, keys[2:4])), None

  def convolve(self, x, tokens: Tokens, key):
    """The convolution with its skip connection."""
    return self.resid_mid_conv(self.residual('convolution', x, lambda y: self.convolution(y, tokens.real_BxT), key))


class ConformerLayer(ConvolutionLayer):
  """x + FFN / 2, + attention, + convolution, norm(x + FFN / 2), each sub-layer behind a norm (section 2.4, equation 1).

  The paper's network has feed_forward='silu', and dropout behind that activation too (section 2.3); positions are
  whatever the config says. What pre-norm has behind the last layer, one more norm, is there as well.
  """

  def setup(self):
    super().setup()
    c = self.config
    self.macaron_mlp, self.macaron_mlp_norm = type(self.mlp)(c), make_norm(c)
    self.block_norm, self.resid_mid_macaron = make_norm(c), Tap()

  def __call__(self, x_BxSxD, dropout_key, tokens: Tokens):
    keys = split(dropout_key, 7)
    x = self.resid_pre(x_BxSxD)
    x = self.resid_mid_macaron(self.feed_forward('macaron_mlp', x, tokens, keys[5:], weight=0.5))
    x = self.resid_mid(self.residual('self_attention', x, lambda y: self.attend(y, tokens, keys[0]), keys[1]))
    x = self.convolve(x, tokens, keys[4])
    x = self.block_norm(self.feed_forward('mlp', x, tokens, keys[2:4], weight=0.5))
    return self.resid_post(constrain(x, 'batch', 'length', 'embed')), None
