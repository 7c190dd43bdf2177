"""Ring Attention (Liu et al. 2023, arXiv 2310.01889): a sequence too long for one device, shared out over several.

Every device keeps its queries; keys and values go round the mesh axis `context`, and each device folds what it holds
into an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). Scores exist only block by block, forward and
backward, so memory is linear in the length and falls with the number of devices.

Under a causal mask the device with the last queries would have most of the work. So the sequence is dealt in zigzag
(Llama 3, arXiv 2407.21783, section 3.3.2): of 2n pieces, device d gets d and 2n - 1 - d. Of its four pairs of pieces it
then computes 3 when it holds its own keys and 2 at every other step, 2n + 1 in all, whatever d is. Outside of this file
the sequence is in its natural order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from tfm.attention import masks
from tfm.attention.attend import AttentionError, Request
from tfm.attention.dot_product import scores, sum_to_keys, weighted_sum
from tfm.attention.masks import AttentionMask
from tfm.attention.sharded import BATCH, CONTEXT, HEADED, HEADS, context_size, mask_specs, sharded_refusal

LSE = PartitionSpec(CONTEXT, BATCH, HEADS)
"""How the log-sum-exp of the scores, NxBxKxGxT, does: in the order of the blocks, from forward to backward."""
LONGEST_BLOCK, SHORTEST_BLOCK = 256, 64
LOWEST = float(np.finfo(np.float32).min)


def attend(
    q_BxTxHxC: jax.Array,
    k_BxSxKxC: jax.Array,
    v_BxSxKxC: jax.Array,
    mask: AttentionMask | None = None,
    *,
    scale: float | None = None,
) -> jax.Array:
  """`tfm.attention.dot_product.attend` over a mesh: under `jax.set_mesh`, with T and S sharded over `context`.

  Returns:
    BxTxHxC in the type of the values, sharded like the queries; softmax and sums are float32. A query that may attend
    to nothing gets exactly 0, and so do its gradients.

  Raises:
    AttentionError: with the reason of `supports`.
  """
  request = Request.of(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask)
  reason = supports(request)
  if reason is not None:
    raise AttentionError(f'Ring attention cannot do {request}: {reason}.')
  mask = masks.everything() if mask is None else mask
  T, S = q_BxTxHxC.shape[1], k_BxSxKxC.shape[1]
  deal = Deal.of(T, S, devices=context_size(), zigzag=_balances(mask, T, S))
  scale = q_BxTxHxC.shape[-1]**-0.5 if scale is None else float(scale)
  return _attend(deal, scale, q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask.replace(offset=jnp.asarray(mask.shift)))


def supports(request: Request) -> str | None:
  """None if `attend` can honour the request on the mesh that is set, or why not, as the end of a sentence."""
  reason = sharded_refusal(request) or request.needs_own_softmax
  if reason is not None:
    return reason
  if request.mask is not None and request.mask.dense is not None:
    return 'it never holds a T x S array; say the mask with causal, window, prefix, lengths or segments'
  T, S, n = request.query_length, request.key_length, context_size()
  pieces = n * (2 if _balances(request.mask, T, S) else 1)
  if T % pieces or S % pieces:
    return (f'{T} queries and {S} keys cannot be cut into {pieces} equal pieces for the {n} devices of the mesh axis '
            f'{CONTEXT}; make data.width_multiple a multiple of {pieces}')
  for length in (T // pieces, S // pieces):
    if length > LONGEST_BLOCK and _block(length) < SHORTEST_BLOCK:
      return (f'pieces of {length} positions have no divisor from {SHORTEST_BLOCK} to {LONGEST_BLOCK} to be worked off '
              f'in; make data.width_multiple a multiple of {pieces * SHORTEST_BLOCK}')
  return None


def blocks_computed(mask: AttentionMask, T: int, devices: int, *, zigzag: bool | None = None) -> np.ndarray:
  """Pairs of blocks each device computes at each step of the ring, by the kernel's own test: int, devices x steps.

  `zigzag` is the kernel's own choice if None.
  """
  deal = Deal.of(T, T, devices=devices, zigzag=_balances(mask, T, T) if zigzag is None else zigzag)
  starts = [np.asarray(deal.starts(device, deal.key_piece, deal.key_block)) for device in range(devices)]
  return np.array([[np.sum(_visible(deal, mask, starts[device][:, None], starts[device - step]))
                    for step in range(devices)] for device in range(devices)])


class Deal(NamedTuple):
  """How the sequence is dealt to the devices: in pieces, and these in blocks whose scores exist at one time."""

  devices: int
  zigzag: bool
  query_piece: int
  key_piece: int
  query_block: int
  key_block: int

  @classmethod
  def of(cls, T: int, S: int, *, devices: int, zigzag: bool) -> Deal:
    query_piece, key_piece = (length // (devices * (2 if zigzag else 1)) for length in (T, S))
    return cls(devices, zigzag, query_piece, key_piece, _block(query_piece), _block(key_piece))

  def starts(self, device: jax.Array | int, piece: int, block: int) -> jax.Array:
    """Positions at which a device's blocks start: int32, N."""
    if self.zigzag:
      # The even one of pieces d and 2n - 1 - d comes first, because that is how `routes` delivers them.
      last = 2 * self.devices - 1
      even = jnp.where(device % 2 == 0, device, last - device)
      held = jnp.stack([even, last - even])
    else:
      held = jnp.asarray(device)[None]
    return (held[:, None] * piece + jnp.arange(0, piece, block)).reshape(-1)

  @property
  def routes(self) -> list[list[tuple[int, int]]]:
    """From natural order to zigzag: where each device's first half goes, then its second (both are permutations)."""
    last = 2 * self.devices - 1
    return [[(device, min(2 * device + half, last - 2 * device - half)) for device in range(self.devices)]
            for half in (0, 1)]

  def enter(self, x_BxTx: jax.Array | None, block: int) -> jax.Array | None:
    """A device's slice of the sequence -> its blocks, NxBxTx..., in zigzag if that is the deal."""
    if x_BxTx is None:
      return None
    if self.zigzag:
      x_BxTx = jnp.concatenate([jax.lax.ppermute(half, CONTEXT, route)
                                for half, route in zip(jnp.split(x_BxTx, 2, axis=1), self.routes)], axis=1)
    B, T = x_BxTx.shape[:2]
    return jnp.moveaxis(x_BxTx.reshape(B, T // block, block, *x_BxTx.shape[2:]), 1, 0)

  def leave(self, x_NxBxTx: jax.Array) -> jax.Array:
    """The inverse of `enter`."""
    N, B, T = x_NxBxTx.shape[:3]
    x_BxTx = jnp.moveaxis(x_NxBxTx, 0, 1).reshape(B, N * T, *x_NxBxTx.shape[3:])
    if not self.zigzag:
      return x_BxTx
    return jnp.concatenate([jax.lax.ppermute(half, CONTEXT, [(to, origin) for origin, to in route])
                            for half, route in zip(jnp.split(x_BxTx, 2, axis=1), self.routes)], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(deal, scale, q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask):
  return _forward(deal, scale, q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask)[0]


# The vjp is defined around shard_map, not inside: no derivative is ever taken through it, hence check_vma=False.
def _forward(deal, scale, q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask):
  z_BxTxHxC, lse_NxBxKxGxT = jax.shard_map(
      functools.partial(_forward_here, deal, scale), in_specs=(HEADED, HEADED, HEADED, mask_specs(mask)),
      out_specs=(HEADED, LSE), check_vma=False)(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask)
  return z_BxTxHxC, (q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask, z_BxTxHxC, lse_NxBxKxGxT)


def _backward(deal, scale, kept, d_z_BxTxHxC):
  mask = kept[3]
  gradients = jax.shard_map(
      functools.partial(_backward_here, deal, scale),
      in_specs=(HEADED, HEADED, HEADED, mask_specs(mask), HEADED, LSE, HEADED), out_specs=(HEADED, HEADED, HEADED),
      check_vma=False)(*kept, d_z_BxTxHxC)
  return *gradients, None


_attend.defvjp(_forward, _backward)


def _forward_here(deal, scale, q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask):
  """One device's part: z_BxTxHxC and lse_NxBxKxGxT."""
  here = jax.lax.axis_index(CONTEXT)
  (B, T, H, _), (K, value_width) = q_BxTxHxC.shape, v_BxSxKxC.shape[2:]
  queries, held = _queries(deal, here, q_BxTxHxC, K, mask), _keys(deal, k_BxSxKxC, v_BxSxKxC, mask)
  shape_NxBxKxGxT = (T // deal.query_block, B, K, H // K, deal.query_block)
  sums = (jnp.zeros((*shape_NxBxKxGxT, value_width), jnp.float32), jnp.full(shape_NxBxKxGxT, LOWEST, jnp.float32),
          jnp.zeros(shape_NxBxKxGxT, jnp.float32))

  def step(carry, number):
    held, sums = carry
    coming = _pass_on(deal, held)  # asked for first, so that it travels while this device computes
    keys = _starts_of_keys(deal, here - number), *held

    def fold(sums, query, key):
      z_BxKxGxTxC, highest_BxKxGxT, sum_BxKxGxT = sums
      scores_BxKxGxTxS, allowed = _scores(scale, mask, query, key)
      new_BxKxGxT = jnp.maximum(highest_BxKxGxT, jnp.where(allowed, scores_BxKxGxTxS, LOWEST).max(-1))
      pattern_BxKxGxTxS = jnp.where(allowed, jnp.exp(scores_BxKxGxTxS - new_BxKxGxT[..., None]), 0.0)
      shrink_BxKxGxT = jnp.exp(highest_BxKxGxT - new_BxKxGxT)
      z_BxKxGxTxC = z_BxKxGxTxC * shrink_BxKxGxT[..., None] + _weighted_sum(pattern_BxKxGxTxS, key[2])
      return z_BxKxGxTxC, new_BxKxGxT, sum_BxKxGxT * shrink_BxKxGxT + pattern_BxKxGxTxS.sum(-1)

    def for_query(_, query_and_sums):
      query, sums = query_and_sums

      def for_key(sums, key):
        return jax.lax.cond(_visible(deal, mask, query[0], key[0]), lambda: fold(sums, query, key), lambda: sums), None

      return None, jax.lax.scan(for_key, sums, keys)[0]

    return (coming, jax.lax.scan(for_query, None, (queries, sums))[1]), None

  (_, sums), _ = jax.lax.scan(step, (held, sums), jnp.arange(deal.devices))
  z_NxBxKxGxTxC, highest_NxBxKxGxT, sum_NxBxKxGxT = sums
  sum_NxBxKxGxT = jnp.where(sum_NxBxKxGxT == 0, 1.0, sum_NxBxKxGxT)  # a query without any key: 0 / 1
  z_NxBxKxGxTxC = (z_NxBxKxGxTxC / sum_NxBxKxGxT[..., None]).astype(v_BxSxKxC.dtype)
  z_BxTxKxGxC = deal.leave(jnp.moveaxis(z_NxBxKxGxTxC, 4, 2))
  return z_BxTxKxGxC.reshape(B, T, H, value_width), highest_NxBxKxGxT + jnp.log(sum_NxBxKxGxT)


def _backward_here(deal, scale, q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask, z_BxTxHxC, lse_NxBxKxGxT, d_z_BxTxHxC):
  """A second turn of the ring (Liu et al., appendix A): gradients of keys and values travel with them, and home."""
  here, K = jax.lax.axis_index(CONTEXT), k_BxSxKxC.shape[2]
  # Sum over keys of pattern * d_pattern, by the identity of FlashAttention (arXiv 2205.14135, appendix B.2).
  mean_BxTxHx1 = jnp.sum(z_BxTxHxC.astype(jnp.float32) * d_z_BxTxHxC.astype(jnp.float32), -1, keepdims=True)
  queries = (*_queries(deal, here, q_BxTxHxC, K, mask), _blocks_of_heads(deal, d_z_BxTxHxC, K),
             _blocks_of_heads(deal, mean_BxTxHx1, K), lse_NxBxKxGxT)
  held = _keys(deal, k_BxSxKxC, v_BxSxKxC, mask)
  d_q, d_k, d_v = (jnp.zeros(x.shape, jnp.float32) for x in (queries[1], *held[:2]))

  def step(carry, number):
    held, d_held, d_q_N = carry
    coming = _pass_on(deal, held)
    keys = _starts_of_keys(deal, here - number), *held

    def fold(d_key, d_q_BxTxKxGxC, query, key):
      (d_k_BxSxKxC, d_v_BxSxKxC), (d_z, mean_BxTxKxGx1, lse_BxKxGxT), (k, v) = d_key, query[3:], key[1:3]
      scores_BxKxGxTxS, allowed = _scores(scale, mask, query, key)
      pattern_BxKxGxTxS = jnp.where(allowed, jnp.exp(scores_BxKxGxTxS - lse_BxKxGxT[..., None]), 0.0)
      d_pattern_BxKxGxTxS = scores(d_z.astype(v.dtype), v)
      mean_BxKxGxTx1 = jnp.moveaxis(mean_BxTxKxGx1, 1, 3)
      d_scores_BxKxGxTxS = pattern_BxKxGxTxS * (d_pattern_BxKxGxTxS - mean_BxKxGxTx1) * scale
      d_key = (d_k_BxSxKxC + sum_to_keys(d_scores_BxKxGxTxS.astype(query[1].dtype), query[1]),
               d_v_BxSxKxC + sum_to_keys(pattern_BxKxGxTxS.astype(d_z.dtype), d_z))
      return d_key, d_q_BxTxKxGxC + jnp.moveaxis(_weighted_sum(d_scores_BxKxGxTxS, k), 3, 1)

    def for_key(d_q_N, key_and_gradients):
      key, d_key = key_and_gradients

      def for_query(d_key, query_and_gradient):
        query, d_q = query_and_gradient
        return jax.lax.cond(_visible(deal, mask, query[0], key[0]), lambda: fold(d_key, d_q, query, key),
                            lambda: (d_key, d_q))

      d_key, d_q_N = jax.lax.scan(for_query, d_key, (queries, d_q_N))
      return d_q_N, d_key

    d_q_N, d_held = jax.lax.scan(for_key, d_q_N, (keys, d_held))
    return (coming, _pass_on(deal, d_held), d_q_N), None

  (_, (d_k, d_v), d_q), _ = jax.lax.scan(step, (held, (d_k, d_v), d_q), jnp.arange(deal.devices))
  return tuple(deal.leave(gradient).reshape(x.shape).astype(x.dtype)
               for gradient, x in ((d_q, q_BxTxHxC), (d_k, k_BxSxKxC), (d_v, v_BxSxKxC)))


def _queries(deal, here, q_BxTxHxC, K, mask):
  """A device's queries in blocks: where each starts, the queries, their segments."""
  return (deal.starts(here, deal.query_piece, deal.query_block), _blocks_of_heads(deal, q_BxTxHxC, K),
          deal.enter(mask.query_segments_BxT, deal.query_block))


def _blocks_of_heads(deal, x_BxTxHxC, K):
  B, T, H, C = x_BxTxHxC.shape
  return deal.enter(x_BxTxHxC.reshape(B, T, K, H // K, C), deal.query_block)


def _keys(deal, k_BxSxKxC, v_BxSxKxC, mask):
  """What goes round, in blocks: keys, values, and the segments of the keys."""
  return tuple(deal.enter(x, deal.key_block) for x in (k_BxSxKxC, v_BxSxKxC, mask.key_segments_BxS))


def _starts_of_keys(deal, device):
  return deal.starts(device % deal.devices, deal.key_piece, deal.key_block)


def _pass_on(deal, held):
  """To the next device; n times in a turn, so that after it everything is home again."""
  return jax.lax.ppermute(held, CONTEXT, [(device, (device + 1) % deal.devices) for device in range(deal.devices)])


def _scores(scale, mask, query, key):
  """Scaled scores_BxKxGxTxS of a block of queries (start, q, segments, ...) and of keys, and where they count."""
  (first_query, q_BxTxKxGxC, query_segments_BxT), (first_key, k_BxSxKxC, _, key_segments_BxS) = query[:3], key
  scores_BxKxGxTxS = scores(q_BxTxKxGxC.astype(k_BxSxKxC.dtype), k_BxSxKxC) * scale
  T, S = scores_BxKxGxTxS.shape[-2:]
  allowed_Bx1xTxS = mask.block(first_query + jnp.arange(T), first_key + jnp.arange(S), query_segments_BxT,
                               key_segments_BxS)
  return scores_BxKxGxTxS, True if allowed_Bx1xTxS is None else allowed_Bx1xTxS[:, :, None]


def _visible(deal, mask, first_query, first_key):
  """Whether any query of a block may attend to any key of another, as far as positions and lengths tell."""
  first, last = first_query + mask.shift, first_query + mask.shift + deal.query_block - 1
  visible = True
  if mask.causal:
    visible = first_key <= last
    if mask.prefix_B is not None:
      visible = visible | (first_key < mask.prefix_B.max())
  if mask.window is not None:
    visible = visible & (first_key - last < mask.window) & (first - (first_key + deal.key_block - 1) < mask.window)
  if mask.lengths_B is not None:
    visible = visible & (first_key < mask.lengths_B.max())
  return visible


def _weighted_sum(pattern_BxKxGxTxS, x_BxSxKxC):
  """The sum in float32, the factors in the type that was given (the pattern may be float32)."""
  return weighted_sum(pattern_BxKxGxTxS.astype(x_BxSxKxC.dtype), x_BxSxKxC, jnp.float32)


def _balances(mask: AttentionMask | None, T: int, S: int) -> bool:
  """Whether to deal in zigzag: where later queries see more keys."""
  return mask is not None and mask.causal and T == S


def _block(piece: int) -> int:
  """The longest block that a piece can be cut into without a rest."""
  return max(length for length in range(1, min(piece, LONGEST_BLOCK) + 1) if piece % length == 0)
