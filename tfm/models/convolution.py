"""What convolutional models are made of: the gated convolution, and linear maps with weights of the same kind."""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm.convolutional_config import ConvolutionalConfig


class Weights(nn.Module):
  """A kernel whose last axis numbers the outputs, and a bias; weight-normalised where the config says so."""

  config: ConvolutionalConfig

  def _make(self, shape: tuple[int, ...], variance: float) -> None:
    """N(0, variance / n) for n inputs of an output, and biases 0 (Gehring et al. 2017, section 3.5)."""
    kernel = self.param('kernel', nn.initializers.normal((variance / math.prod(shape[:-1]))**0.5), shape)
    if self.config.weight_norm:
      # w = g v / |v| (Salimans & Kingma 2016, equation 2); g begins as |v|, so that at first w is v.
      length_G = jnp.linalg.norm(kernel.reshape(-1, shape[-1]), axis=0)
      kernel = kernel * (self.param('scale', lambda _: length_G) / length_G)
    self.kernel = kernel.astype(self.config.dtype)
    self.bias_G = self.param('bias', nn.initializers.zeros_init(), shape[-1:]).astype(self.config.dtype)


class Linear(Weights):
  """x W + b."""

  inputs: int
  outputs: int
  kept: float = 1.0
  """Part of its inputs that dropout before it keeps: p of section 3.5."""

  def setup(self):
    self._make((self.inputs, self.outputs), self.kept)

  def __call__(self, x: jax.Array) -> jax.Array:
    return x @ self.kernel + self.bias_G


class GatedConvolution(Weights):
  """v(W [x_1, ..., x_k] + b) with v([A B]) = A * sigmoid(B) (Gehring et al. 2017, section 3.2; Dauphin et al. 2017,
  equation 1): as many outputs as inputs, F, and as many positions, zeros standing for those beyond the ends.

  Causal: the last of the k inputs is at the position of the output. Else the middle one is.
  """

  layer: int
  causal: bool

  def setup(self):
    c = self.config
    # What a gate lets through has about a quarter of the variance (section 3.5 and appendix A).
    self._make((c.kernel_width, c.d_hidden, 2 * c.d_hidden), 4 * (1 - c.dropout))

  @property
  def dilation(self) -> int:
    return self.config.dilation_of(self.layer)

  @property
  def reach(self) -> int:
    """How far the first input is from the last."""
    return (self.config.kernel_width - 1) * self.dilation

  def __call__(self, x_BxTxF: jax.Array, segments_BxT: jax.Array | None = None) -> jax.Array:
    """BxTxF.

    Args:
      segments_BxT: int32, where a row holds several texts: an input of another segment counts as 0.
    """
    before = self.reach if self.causal else self.reach // 2
    margin = (before, self.reach - before)
    x_BxPxF = jnp.pad(x_BxTxF, ((0, 0), margin, (0, 0)))
    if segments_BxT is None:
      return self._within(x_BxPxF)
    segments_BxP = jnp.pad(segments_BxT, ((0, 0), margin))
    return glu(self._segmented(x_BxPxF, segments_BxP, segments_BxT) + self.bias_G)

  def extend(self, x_RxTxF: jax.Array, past_RxPxF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Causal outputs RxTxF of T inputs after the last P = `reach` ones, and the new last ones (section 3.3)."""
    x_RxQxF = jnp.concatenate([past_RxPxF, x_RxTxF], axis=1)
    return self._within(x_RxQxF), x_RxQxF[:, x_RxTxF.shape[1]:]

  def _within(self, x_BxPxF):
    """Outputs where all k inputs are there."""
    # Forward and backward a quarter faster than one matrix product over k shifted copies (CPU, 256x16x256 -> 512).
    y_BxTxG = jax.lax.conv_general_dilated(x_BxPxF, self.kernel, (1,), 'VALID', rhs_dilation=(self.dilation,),
                                           dimension_numbers=('NWC', 'WIO', 'NWC'))
    return glu(y_BxTxG + self.bias_G)

  def _segmented(self, x_BxPxF, segments_BxP, segments_BxT):
    """The same as k matrix products, since what counts as 0 depends on the output too."""
    T = segments_BxT.shape[1]

    def product(i):
      at = slice(i * self.dilation, i * self.dilation + T)
      same_BxTx1 = (segments_BxP[:, at] == segments_BxT)[..., None]
      return jnp.where(same_BxTx1, x_BxPxF[:, at], 0) @ self.kernel[i]

    return sum(product(i) for i in range(self.config.kernel_width))


def glu(y_BxTxG: jax.Array) -> jax.Array:
  """A * sigmoid(B) of [A B] (Dauphin et al. 2017)."""
  a_BxTxF, b_BxTxF = jnp.split(y_BxTxG, 2, axis=-1)
  return a_BxTxF * nn.sigmoid(b_BxTxF)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
  """x, with derivatives multiplied by `factor`."""
  return x


@scale_gradient.defjvp
def _scale_tangent(factor, primals, tangents):
  return primals[0], tangents[0] * factor
