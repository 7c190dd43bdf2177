"""Attention in memory linear in the length, on any platform: softmax over blocks of keys (Rabe & Staats 2021).

The forward pass keeps a running maximum and total per query; the backward pass recomputes each block's pattern from
the output and the log of the total (FlashAttention, Dao et al. 2022, algorithms 1 and 4). Nothing of size T x S is
ever held, and blocks that `causal` or `window` hide as a whole are skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from tfm.attention.dot_product import scores, sum_to_keys, weighted_sum
from tfm.attention.masks import AttentionMask

if TYPE_CHECKING:
  from tfm.attention.attend import Request

LOWEST = jnp.finfo(jnp.float32).min  # finite, so that a query without keys never makes inf - inf


def supports(request: Request) -> str | None:
  return request.needs_whole_pattern


def attend(
    q_BxTxHxC: jax.Array,
    k_BxSxKxC: jax.Array,
    v_BxSxKxC: jax.Array,
    mask: AttentionMask | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_H: jax.Array | None = None,
    query_block: int = 512,
    key_block: int = 512,
) -> jax.Array:
  """As `dot_product.attend`, with `query_block` x `key_block` scores (per row and head) at a time in memory.

  Queries and keys are padded to whole blocks inside. `scale` and `softcap` are Python numbers.
  """
  T, S = q_BxTxHxC.shape[1], k_BxSxKxC.shape[1]
  scale = q_BxTxHxC.shape[-1]**-0.5 if scale is None else float(scale)
  mask = AttentionMask() if mask is None else mask
  blocks = max(1, min(query_block, T)), max(1, min(key_block, S))
  softcap = None if softcap is None else float(softcap)
  return _attend(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask, sinks_H, scale, softcap, *blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _attend(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask, sinks_H, scale, softcap, query_block, key_block):
  return _forward(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask, sinks_H, scale, softcap, query_block, key_block)[0]


# In what follows N counts the blocks on the outside, T and S are the lengths of one block, and G = H / K.


def _forward(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask, sinks_H, scale, softcap, query_block, key_block):
  B, T, H, _ = q_BxTxHxC.shape
  S, K, V = v_BxSxKxC.shape[1:]
  seen, scores_of = _blockwise_mask(mask, T, S, H, K, scale, softcap, query_block, key_block)
  keys_values = _numbered(_split(k_BxSxKxC, key_block), _split(v_BxSxKxC, key_block))

  def attend_from(i_and_q):
    i, q_BxTxKxGxC = i_and_q

    def add_block(carry, block):
      j, k_BxSxKxC, v_BxSxKxC = block

      def add(carry):
        top_BxKxGxT, total_BxKxGxT, z_BxKxGxTxC = carry
        scores_BxKxGxTxS, allowed = scores_of(i, j, q_BxTxKxGxC, k_BxSxKxC)
        new_top_BxKxGxT = jnp.maximum(top_BxKxGxT, jnp.max(_only(allowed, scores_BxKxGxTxS, LOWEST), axis=-1))
        weights_BxKxGxTxS = _only(allowed, jnp.exp(scores_BxKxGxTxS - new_top_BxKxGxT[..., None]), 0.0)
        shrink_BxKxGxT = jnp.exp(top_BxKxGxT - new_top_BxKxGxT)
        z_of_block = weighted_sum(weights_BxKxGxTxS.astype(v_BxSxKxC.dtype), v_BxSxKxC, jnp.float32)
        return (new_top_BxKxGxT, total_BxKxGxT * shrink_BxKxGxT + jnp.sum(weights_BxKxGxTxS, axis=-1),
                z_BxKxGxTxC * shrink_BxKxGxT[..., None] + z_of_block)

      return _if(seen(i, j), add, lambda carry: carry, carry), None

    shape = (B, K, H // K, query_block)
    # A sink is a key that every query has seen before the first, with a weight of 1 at its own maximum.
    start = ((jnp.full(shape, LOWEST), jnp.zeros(shape)) if sinks_H is None else
             (jnp.broadcast_to(sinks_H.reshape(K, H // K, 1), shape), jnp.ones(shape)))
    start = (*start, jnp.zeros((*shape, V)))
    (top_BxKxGxT, total_BxKxGxT, z_BxKxGxTxC), _ = jax.lax.scan(add_block, start, keys_values)
    total_BxKxGxT = jnp.where(total_BxKxGxT == 0, 1.0, total_BxKxGxT)  # of a query that saw nothing z is 0 / 1
    z_BxTxKxGxC = jnp.moveaxis(z_BxKxGxTxC / total_BxKxGxT[..., None], 3, 1).astype(v_BxSxKxC.dtype)
    return z_BxTxKxGxC, top_BxKxGxT + jnp.log(total_BxKxGxT)

  queries = _numbered(_split(_grouped(q_BxTxHxC, K), query_block))
  z_NxBxTxKxGxC, log_total_NxBxKxGxT = jax.lax.map(attend_from, queries)
  z_BxTxHxC = _join(z_NxBxTxKxGxC, T).reshape(B, T, H, V)
  return z_BxTxHxC, (q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask, sinks_H, z_BxTxHxC, log_total_NxBxKxGxT)


def _backward(scale, softcap, query_block, key_block, saved, d_z_BxTxHxC):
  q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask, sinks_H, z_BxTxHxC, log_total_NxBxKxGxT = saved
  T, H = q_BxTxHxC.shape[1:3]
  S, K = k_BxSxKxC.shape[1:3]
  seen, scores_of = _blockwise_mask(mask, T, S, H, K, scale, softcap, query_block, key_block)
  # sum_s pattern * d_pattern = z . d_z, without the pattern
  dot_BxTxH = jnp.einsum('bthc,bthc->bth', z_BxTxHxC, d_z_BxTxHxC, preferred_element_type=jnp.float32)
  dot_NxBxTxKxG = _split(_grouped(dot_BxTxH[..., None], K)[..., 0], query_block)
  q_NxBxTxKxGxC, d_z_NxBxTxKxGxC = (_split(_grouped(x, K), query_block) for x in (q_BxTxHxC, d_z_BxTxHxC))
  queries = _numbered(q_NxBxTxKxGxC, d_z_NxBxTxKxGxC, dot_NxBxTxKxG, log_total_NxBxKxGxT)

  def to_keys(d_q_NxBxTxKxGxC, block):
    j, k_BxSxKxC, v_BxSxKxC = block

    def from_queries(d_k_and_d_v, block):
      i, q_BxTxKxGxC, d_z_BxTxKxGxC, dot_BxTxKxG, log_total_BxKxGxT = block

      def gradients():
        scores_BxKxGxTxS, allowed = scores_of(i, j, q_BxTxKxGxC, k_BxSxKxC)
        pattern_BxKxGxTxS = _only(allowed, jnp.exp(scores_BxKxGxTxS - log_total_BxKxGxT[..., None]), 0.0)
        d_pattern_BxKxGxTxS = scores(d_z_BxTxKxGxC, v_BxSxKxC)
        d_scores = pattern_BxKxGxTxS * (d_pattern_BxKxGxTxS - jnp.moveaxis(dot_BxTxKxG, 1, 3)[..., None]) * scale
        if softcap is not None:
          d_scores = d_scores * (1 - (scores_BxKxGxTxS / softcap)**2)  # of cap * tanh, from its value
        d_scores_BxKxGxTxS = d_scores.astype(q_BxTxHxC.dtype)
        return (jnp.moveaxis(weighted_sum(d_scores_BxKxGxTxS, k_BxSxKxC, jnp.float32), 3, 1),
                sum_to_keys(d_scores_BxKxGxTxS, q_BxTxKxGxC),
                sum_to_keys(pattern_BxKxGxTxS.astype(d_z_BxTxKxGxC.dtype), d_z_BxTxKxGxC))

      nothing = tuple(jnp.zeros(x.shape) for x in (q_BxTxKxGxC, k_BxSxKxC, v_BxSxKxC))
      d_q_BxTxKxGxC, d_k_BxSxKxC, d_v_BxSxKxC = _if(seen(i, j), gradients, lambda: nothing)
      return (d_k_and_d_v[0] + d_k_BxSxKxC, d_k_and_d_v[1] + d_v_BxSxKxC), d_q_BxTxKxGxC

    start = jnp.zeros(k_BxSxKxC.shape), jnp.zeros(v_BxSxKxC.shape)
    d_k_and_d_v, more_d_q_NxBxTxKxGxC = jax.lax.scan(from_queries, start, queries)
    return d_q_NxBxTxKxGxC + more_d_q_NxBxTxKxGxC, d_k_and_d_v

  d_q_NxBxTxKxGxC, (d_k_NxBxSxKxC, d_v_NxBxSxKxC) = jax.lax.scan(
      to_keys, jnp.zeros(q_NxBxTxKxGxC.shape), _numbered(_split(k_BxSxKxC, key_block), _split(v_BxSxKxC, key_block)))
  d_q_BxTxHxC = _join(d_q_NxBxTxKxGxC, T).reshape(q_BxTxHxC.shape)
  d_sinks_H = None
  if sinks_H is not None:
    pattern_NxBxKxGxT = jnp.exp(sinks_H.reshape(K, H // K, 1) - log_total_NxBxKxGxT)
    d_sinks_H = -jnp.einsum('nbkgt,nbtkg->kg', pattern_NxBxKxGxT, dot_NxBxTxKxG).reshape(H).astype(sinks_H.dtype)
  return (d_q_BxTxHxC.astype(q_BxTxHxC.dtype), _join(d_k_NxBxSxKxC, S).astype(k_BxSxKxC.dtype),
          _join(d_v_NxBxSxKxC, S).astype(v_BxSxKxC.dtype), None, d_sinks_H)


_attend.defvjp(_forward, _backward)


def _blockwise_mask(mask: AttentionMask, T: int, S: int, H: int, K: int, scale: float, softcap: float | None,
                    query_block: int, key_block: int) -> tuple[Callable, Callable]:
  """Two functions of the numbers of a query block i and a key block j.

  seen(i, j): False if by their positions alone none of these queries may see any of these keys.
  scores_of(i, j, q, k): their (capped) scores BxKxGxTxS in float32, and where they count (None: everywhere).
  """
  query_segments, key_segments, dense = (
      _pad_axis(mask.query_segments_BxT, 1, query_block), _pad_axis(mask.key_segments_BxS, 1, key_block), mask.dense)
  if dense is not None:
    dense = dense.reshape((1,) * (4 - dense.ndim) + dense.shape)
    dense = dense if dense.shape[2] == 1 else _pad_axis(dense, 2, query_block)
    dense = dense if dense.shape[3] == 1 else _pad_axis(dense, 3, key_block)

  def seen(i, j):
    first_query, first_key = i * query_block + mask.shift, j * key_block
    last_query, last_key = first_query + query_block - 1, first_key + key_block - 1
    conditions = []
    if mask.causal:
      past = first_key <= last_query
      conditions.append(past if mask.prefix_B is None else past | (first_key < jnp.max(mask.prefix_B)))
    if mask.window is not None:
      conditions.append((first_query - last_key < mask.window) & (first_key - last_query < mask.window))
    return functools.reduce(jnp.logical_and, conditions) if conditions else None

  def scores_of(i, j, q_BxTxKxGxC, k_BxSxKxC):
    scores_BxKxGxTxS = scale * scores(q_BxTxKxGxC, k_BxSxKxC)
    if softcap is not None:
      scores_BxKxGxTxS = softcap * jnp.tanh(scores_BxKxGxTxS / softcap)
    keys_S = j * key_block + jnp.arange(key_block)
    allowed = mask.block(
        i * query_block + jnp.arange(query_block), keys_S, _cut(query_segments, 1, i, query_block),
        _cut(key_segments, 1, j, key_block), _cut(_cut(dense, 2, i, query_block), 3, j, key_block))
    if S % key_block:
      real = (keys_S < S)[None, None, None]
      allowed = real if allowed is None else allowed & real
    if allowed is not None:
      heads = (1, 1) if allowed.shape[1] == 1 else (K, H // K)
      allowed = allowed.reshape(allowed.shape[0], *heads, *allowed.shape[2:])
    return scores_BxKxGxTxS, allowed

  return seen, scores_of


def _if(condition, then: Callable, otherwise: Callable, *arguments):
  return then(*arguments) if condition is None else jax.lax.cond(condition, then, otherwise, *arguments)


def _only(allowed, x: jax.Array, instead: float) -> jax.Array:
  return x if allowed is None else jnp.where(allowed, x, instead)


def _grouped(x_BxTxHxC: jax.Array, K: int) -> jax.Array:
  B, T, H, C = x_BxTxHxC.shape
  return x_BxTxHxC.reshape(B, T, K, H // K, C)


def _numbered(*x_Nx: jax.Array) -> tuple[jax.Array, ...]:
  return (jnp.arange(x_Nx[0].shape[0]), *x_Nx)


def _split(x_BxT: jax.Array, block: int) -> jax.Array:
  """B x T x ... cut along T into whole blocks, zeros at the end: N x B x block x ..."""
  x_BxT = _pad_axis(x_BxT, 1, block)
  return jnp.moveaxis(x_BxT.reshape(x_BxT.shape[0], x_BxT.shape[1] // block, block, *x_BxT.shape[2:]), 1, 0)


def _join(x_NxBxT: jax.Array, T: int) -> jax.Array:
  """The inverse of `_split`, without the zeros."""
  N, B, block, *rest = x_NxBxT.shape
  return jnp.moveaxis(x_NxBxT, 0, 1).reshape(B, N * block, *rest)[:, :T]


def _pad_axis(x: jax.Array | None, axis: int, multiple: int) -> jax.Array | None:
  if x is None or x.shape[axis] % multiple == 0:
    return x
  return jnp.pad(x, [(0, -x.shape[axis] % multiple if axis == at else 0) for at in range(x.ndim)])


def _cut(x: jax.Array | None, axis: int, number, block: int) -> jax.Array | None:
  """One block along an axis; all of it if there is nothing to cut."""
  return x if x is None or x.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(x, number * block, block, axis)
