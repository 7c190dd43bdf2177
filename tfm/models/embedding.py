"""Ids to vectors, and vectors to logits through the same matrix (Vaswani et al. 2017, section 3.4)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class Embedding(nn.Module):
  """A V x D table, N(0, 1/D): rows have length about 1, and about sqrt(D) once scaled by sqrt(D)."""

  vocab_size: int
  d_model: int
  dtype: str

  def setup(self):
    self.table = self.param('table', nn.initializers.normal(self.d_model**-0.5), (self.vocab_size, self.d_model))

  def __call__(self, ids_BxT: jax.Array) -> jax.Array:
    """Rows of the table, BxTxD."""
    return jnp.take(self.table, ids_BxT, axis=0, mode='clip').astype(self.dtype)

  def logits(self, x_BxTxD: jax.Array) -> jax.Array:
    """x table^T, BxTxV, accumulated and returned in float32."""
    table = self.table.astype(self.dtype)
    return jnp.einsum('btd,vd->btv', x_BxTxD.astype(self.dtype), table, preferred_element_type=jnp.float32)
