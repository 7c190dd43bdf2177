"""The language model without a state: the next token from the last n alone (Bengio et al. 2003)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm.models.cells import Maps
from tfm.models.dropout import dropout
from tfm.models.layers import split
from tfm.models.recurrent_stacks import Readout
from tfm.models.tap import Tap
from tfm.recurrent_config import RecurrentConfig


class WindowDecoder(nn.Module):
  """tanh layers over the embeddings of the last `order` tokens, side by side, the oldest first; 0 before the first.

  Under the interface of `RecurrentDecoder`: its state are the embeddings that the next token sees, Rx(order-1)xD.
  """

  config: RecurrentConfig

  def setup(self):
    c = self.config
    self.layers = [Maps(1, c.d_hidden, c.dtype) for _ in range(c.decoder_layers)]
    self.states = [Tap() for _ in range(c.decoder_layers)]
    self.readout = Readout(c)

  def empty_state(self, rows: int) -> jax.Array:
    return jnp.zeros((rows, self.config.order - 1, self.config.d_model), self.config.dtype)

  def __call__(self, x_RxTxD, past_RxPxD, read_RxT=None, dropout_key=None) -> tuple[jax.Array, jax.Array]:
    """What the output projection reads, RxTxD, and the state after the last token.

    Args:
      read_RxT: int32: how many tokens before each one belong to its text. None: as many as there are.
    """
    c, T = self.config, x_RxTxD.shape[1]
    seen_RxNxD = jnp.concatenate([past_RxPxD, x_RxTxD], axis=1)
    places = []
    for back in reversed(range(c.order)):
      first = c.order - 1 - back
      place_RxTxD = seen_RxNxD[:, first:first + T]
      places.append(place_RxTxD if read_RxT is None else jnp.where(read_RxT[..., None] >= back, place_RxTxD, 0))
    h = jnp.concatenate(places, axis=-1)
    keys = split(dropout_key, c.decoder_layers)
    for i, (layer, tap, key) in enumerate(zip(self.layers, self.states, keys)):
      h = tap(jnp.tanh(layer(dropout(h, c.dropout, key) if i else h)[..., 0, :]))
    return dropout(self.readout(h, None, x_RxTxD), c.dropout, keys[0]), seen_RxNxD[:, T:]
