"""Which query may attend to which key. Every mask of the package is made here.

A mask stays a small structured object (causal? key lengths? segments? a dense part?) until a kernel needs it as an
array, so that a kernel can use the structure. `True` means "may attend"; masks combine with `&`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class AttentionMask:
  """The conjunction of the conditions that are set."""

  causal: bool = struct.field(pytree_node=False, default=False)
  """Key s is visible to query t only if s <= t + offset (section 3.2.3 of Vaswani et al. 2017)."""
  window: int | None = struct.field(pytree_node=False, default=None)
  """Key s is visible to query t only if |t + offset - s| < window (with `causal`: the query and window - 1 before)."""
  offset: jax.Array | int | None = None
  """Position of query 0 on the key axis when queries continue a cached prefix, int32 scalar; None is 0, for certain:
  a number would be traced wherever the mask is an argument of a transformed function."""
  prefix_B: jax.Array | None = None
  """Keys before this position are exempt from `causal`: a prefix that is seen from both sides (prefix LM, T5)."""
  lengths_B: jax.Array | None = None
  """Keys at positions >= the row's length are padding."""
  query_segments_BxT: jax.Array | None = None
  """With the next: a query sees keys of its own segment only (several sentences packed in one row)."""
  key_segments_BxS: jax.Array | None = None
  """Set together with `query_segments_BxT`."""
  dense: jax.Array | None = None
  """Anything else: bool, broadcastable to BxHxTxS."""

  def __and__(self, other: AttentionMask) -> AttentionMask:
    if self.positional and other.positional and not _surely_equal(self.shift, other.shift):
      raise ValueError('Two causal or window masks with different offsets were combined; give both the same offset.')
    if self.query_segments_BxT is not None and other.query_segments_BxT is not None:
      raise ValueError('Two segment masks were combined; number the segments so that one mask says it.')
    if self.causal and other.causal:
      # (s <= t or s < p) and s <= t is the second alone.
      prefix_B = None if self.prefix_B is None or other.prefix_B is None else jnp.minimum(self.prefix_B, other.prefix_B)
    else:
      prefix_B = self.prefix_B if self.causal else other.prefix_B
    return AttentionMask(
        causal=self.causal or other.causal,
        window=_either(min, self.window, other.window),
        offset=self.offset if self.positional else other.offset,
        prefix_B=prefix_B,
        lengths_B=_either(jnp.minimum, self.lengths_B, other.lengths_B),
        query_segments_BxT=_either(None, self.query_segments_BxT, other.query_segments_BxT),
        key_segments_BxS=_either(None, self.key_segments_BxS, other.key_segments_BxS),
        dense=_either(jnp.logical_and, self.dense, other.dense))

  @property
  def shift(self) -> jax.Array | int:
    """`offset` as a number."""
    return 0 if self.offset is None else self.offset

  @property
  def positional(self) -> bool:
    """Whether it depends on where the query stands, so that `offset` matters."""
    return self.causal or self.window is not None

  def to_array(self, T: int, S: int) -> jax.Array | None:
    """bool, broadcastable to BxHxTxS; None if every query may attend to every key."""
    return self.block(jnp.arange(T), jnp.arange(S), self.query_segments_BxT, self.key_segments_BxS, self.dense)

  def block(self, queries_T: jax.Array, keys_S: jax.Array, query_segments_BxT: jax.Array | None = None,
            key_segments_BxS: jax.Array | None = None, dense: jax.Array | None = None) -> jax.Array | None:
    """`to_array` for some queries and keys: bool, broadcastable to BxHxTxS, or None.

    Args:
      queries_T, keys_S: their positions in the whole (queries before `offset` is added).
      query_segments_BxT, key_segments_BxS, dense: those parts of the mask, cut to these queries and keys by the caller.
    """
    at_T, parts = queries_T + self.shift, []
    if self.causal:
      seen = (keys_S[None, :] <= at_T[:, None])[None]
      if self.prefix_B is not None:
        seen = seen | (keys_S[None, None, :] < self.prefix_B[:, None, None])
      parts.append(seen[:, None])
    if self.window is not None:
      parts.append((jnp.abs(at_T[:, None] - keys_S[None, :]) < self.window)[None, None])
    if self.lengths_B is not None:
      parts.append((keys_S[None, :] < self.lengths_B[:, None])[:, None, None, :])
    if query_segments_BxT is not None:
      parts.append((query_segments_BxT[:, :, None] == key_segments_BxS[:, None, :])[:, None])
    if dense is not None:
      parts.append(dense)
    return functools.reduce(jnp.logical_and, parts) if parts else None


def everything() -> AttentionMask:
  return AttentionMask()


def causal(offset: jax.Array | int | None = None) -> AttentionMask:
  return AttentionMask(causal=True, offset=offset)


def window(width: int, offset: jax.Array | int | None = None) -> AttentionMask:
  """Keys less than `width` positions away, on both sides; `causal() & window(w)` is the usual sliding window."""
  if width < 1:
    raise ValueError(f'A window of {width} positions holds no key; give 1 or more.')
  return AttentionMask(window=width, offset=offset)


def prefix(lengths_B: jax.Array, offset: jax.Array | int | None = None) -> AttentionMask:
  """Causal, but for the first `lengths_B` keys of each row, which everybody sees."""
  return AttentionMask(causal=True, offset=offset, prefix_B=lengths_B)


def segments(query_segments_BxT: jax.Array, key_segments_BxS: jax.Array | None = None) -> AttentionMask:
  """Queries see keys with their own number; without `key_segments_BxS` keys have the queries' (self-attention)."""
  return AttentionMask(query_segments_BxT=query_segments_BxT,
                       key_segments_BxS=query_segments_BxT if key_segments_BxS is None else key_segments_BxS)


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


def _surely_equal(first: jax.Array | int, second: jax.Array | int) -> bool:
  return first is second or (isinstance(first, int) and isinstance(second, int) and first == second)


def _either(both, first: Any, second: Any) -> Any:
  if first is None or second is None:
    return second if first is None else first
  return both(first, second)
