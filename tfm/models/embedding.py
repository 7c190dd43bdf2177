"""Ids to vectors, and vectors to logits through the same matrix (Vaswani et al. 2017, section 3.4)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm.models.linear import as_rows
from tfm.parallel.rules import constrain


class Embedding(nn.Module):
  """A V x D table, N(0, 1/D): rows have length about 1, and about sqrt(D) once scaled by sqrt(D). With `unit` N(0, 1),
  for logits that are divided by sqrt(D) (T5).

  V is `vocab_size` rounded up to a multiple of `vocab_multiple`, so that devices can share the table out. No id is
  ever that of an added row, and its logit is the least number there is.
  """

  vocab_size: int
  d_model: int
  dtype: str
  vocab_multiple: int = 1
  unit: bool = False

  def setup(self):
    normal = nn.initializers.normal(1.0 if self.unit else self.d_model**-0.5)
    table = self.param('table', normal, (self.rows, self.d_model))
    # Gathered along the width before it is used: looking up slices of rows would scatter a batch over all devices.
    self.table = constrain(table, 'vocab', 'embed')

  @property
  def rows(self) -> int:
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  def __call__(self, ids_BxT: jax.Array) -> jax.Array:
    """Rows of the table, BxTxD."""
    return jnp.take(self.table, ids_BxT, axis=0, mode='clip').astype(self.dtype)

  def logits(self, x_BxTxD: jax.Array, bias_V: jax.Array | None = None, softcap: float | None = None) -> jax.Array:
    """x table^T + bias, BxTxV, accumulated and returned in float32; with `softcap` cap * tanh(logits / cap)."""
    rows = as_rows(x_BxTxD.astype(self.dtype))
    logits = jax.lax.dot_general(rows, self.table.astype(self.dtype), (((rows.ndim - 1,), (1,)), ((), ())),
                                 preferred_element_type=jnp.float32)
    logits_BxTxV = constrain(logits.reshape(*x_BxTxD.shape[:-1], -1), 'batch', 'length', 'vocab')
    if bias_V is not None:
      logits_BxTxV = logits_BxTxV + bias_V
    if softcap is not None:
      logits_BxTxV = softcap * jnp.tanh(logits_BxTxV / softcap)
    if self.rows == self.vocab_size:
      return logits_BxTxV
    return jnp.where(jnp.arange(self.rows) < self.vocab_size, logits_BxTxV, jnp.finfo(jnp.float32).min)
