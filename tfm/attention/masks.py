"""Which query may attend to which key. Every mask of the package is made here.

A mask stays a small structured object (causal? key lengths? a dense part?) until a kernel needs it as an array, so
that a kernel can use the structure. `True` means "may attend"; masks combine with `&`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class AttentionMask:
  """The conjunction of the conditions that are set."""

  causal: bool = struct.field(pytree_node=False, default=False)
  """Key s is visible to query t only if s <= t + offset (section 3.2.3 of Vaswani et al. 2017)."""
  offset: jax.Array | int = 0
  """Position of query 0 on the key axis; above 0 when queries continue a cached prefix. int32 scalar."""
  lengths_B: jax.Array | None = None
  """Keys at positions >= the row's length are padding."""
  dense: jax.Array | None = None
  """Anything else: bool, broadcastable to BxHxTxS."""

  def __and__(self, other: AttentionMask) -> AttentionMask:
    if self.causal and other.causal and self.offset is not other.offset:
      raise ValueError('Two causal masks with different offsets were combined; combine one causal mask with others.')
    first, second = self.lengths_B, other.lengths_B
    lengths_B = jnp.minimum(first, second) if first is not None and second is not None else (
        second if first is None else first)
    dense = self.dense & other.dense if self.dense is not None and other.dense is not None else (
        other.dense if self.dense is None else self.dense)
    return AttentionMask(self.causal or other.causal, self.offset if self.causal else other.offset, lengths_B, dense)

  def to_array(self, T: int, S: int) -> jax.Array | None:
    """bool, broadcastable to BxHxTxS; None if every query may attend to every key."""
    parts = []
    if self.causal:
      parts.append((jnp.arange(S)[None, :] <= jnp.arange(T)[:, None] + self.offset)[None, None])
    if self.lengths_B is not None:
      parts.append((jnp.arange(S)[None, :] < self.lengths_B[:, None])[:, None, None, :])
    if self.dense is not None:
      parts.append(self.dense)
    if not parts:
      return None
    array = parts[0]
    for part in parts[1:]:
      array = array & part
    return array


def everything() -> AttentionMask:
  return AttentionMask()


def causal(offset: jax.Array | int = 0) -> AttentionMask:
  return AttentionMask(causal=True, offset=offset)


def lengths(lengths_B: jax.Array) -> AttentionMask:
  """Keys beyond each row's length are padding (padding on the right)."""
  return AttentionMask(lengths_B=lengths_B)


def dense(array: jax.Array) -> AttentionMask:
  """An arbitrary bool array, broadcastable to BxHxTxS."""
  return AttentionMask(dense=array)


def padding(ids_BxS: jax.Array, pad_id: int) -> AttentionMask:
  """Lengths read off right-padded ids: one past the last id that is not padding; 0 for an empty row."""
  positions = jnp.arange(1, ids_BxS.shape[1] + 1)
  return lengths(jnp.max(jnp.where(ids_BxS != pad_id, positions, 0), axis=1, initial=0))
