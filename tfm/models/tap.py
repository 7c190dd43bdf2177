"""A named place where a value can be read or replaced."""

from __future__ import annotations

import flax.linen as nn
import jax


class Tap(nn.Module):
  """The identity. It exists to carry a name: `capture_intermediates` reads it, and it vanishes from compiled code.

  Names are the same in the encoder, the decoder and cross-attention: embed, resid_pre, resid_mid, resid_mid_cross,
  resid_post, scores, pattern, z, act; with a convolution also resid_mid_conv, resid_mid_macaron, gated, mixed; of a
  recurrent cell states.
  """

  def __call__(self, x: jax.Array) -> jax.Array:
    return x
