"""The feed-forward network: two linear maps with an activation between (Vaswani et al. 2017, equation 2), or gated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import numpy as np

from tfm.config import TransformerConfig
from tfm.models.dropout import dropout
from tfm.models.linear import linear
from tfm.models.tap import Tap
from tfm.parallel.rules import constrain


def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x) (Hendrycks & Gimpel 2016), by erf and not, as in JAX, by erfc, which costs a CPU several times as much."""
  return 0.5 * x * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'relu': nn.relu,
    'gelu': gelu, 'gelu_tanh': partial(nn.gelu, approximate=True), 'silu': nn.silu,
    'swiglu': nn.silu, 'geglu': gelu, 'geglu_tanh': partial(nn.gelu, approximate=True),
}
"""The activation, or that of the gate (Shazeer 2020), by the config's name."""


class FeedForward(nn.Module):
  """act(x W_1 + b_1) W_2 + b_2 (equation 2); gated: (act(x W_g) * x W_1) W_2."""

  config: TransformerConfig

  def setup(self):
    c = self.config
    self.inner, self.outer = linear(c.d_ff, c), linear(c.d_model, c)
    if c.gated:
      self.gate = linear(c.d_ff, c)
    self.act = Tap()

  def __call__(self, x_BxTxD, dropout_key=None):
    c, activation = self.config, ACTIVATIONS[self.config.feed_forward]
    inner_BxTxF = self.inner(x_BxTxD)
    act_BxTxF = activation(self.gate(x_BxTxD)) * inner_BxTxF if c.gated else activation(inner_BxTxF)
    act_BxTxF = self.act(constrain(act_BxTxF, 'batch', 'length', 'mlp'))
    return self.outer(dropout(act_BxTxF, c.activation_dropout, dropout_key))
