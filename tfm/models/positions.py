"""Positional information added to embeddings (Vaswani et al. 2017, section 3.5)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


def sinusoidal(positions_T: jax.Array, d_model: int) -> jax.Array:
  """PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos of the same: the paper's interleaved form. TxD."""
  # Not the concatenated halves of tensor2tensor and fairseq: same information, other columns.
  frequency = 10000.0 ** (-jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model)
  angles = positions_T.astype(jnp.float32)[:, None] * frequency
  return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(-1, d_model)


class LearnedPositions(nn.Module):
  """One trained vector per position (Table 3, row E)."""

  max_positions: int
  d_model: int

  @nn.compact
  def __call__(self, positions_T: jax.Array) -> jax.Array:
    table = self.param('table', nn.initializers.normal(self.d_model**-0.5), (self.max_positions, self.d_model))
    return jnp.take(table, positions_T, axis=0, mode='clip')
