"""DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509): sequence-sharded outside, head-sharded inside.

One all-to-all over the mesh axis `context` gives each device the whole sequence of some of its heads, where any
attention will do; another brings the result back. Less traffic than the ring, but no more devices than heads, and
each device must hold the sequence.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tfm.attention import blockwise, dot_product, masks
from tfm.attention.attend import AttentionError, Request
from tfm.attention.masks import AttentionMask
from tfm.attention.sharded import BATCH, CONTEXT, HEADED, HEADS, context_size, mask_specs, sharded_refusal

LONG = 2048
"""From this many keys on, the scores are not held in whole."""


def attend(
    q_BxTxHxC: jax.Array,
    k_BxSxKxC: jax.Array,
    v_BxSxKxC: jax.Array,
    mask: AttentionMask | None = None,
    *,
    scale: float | None = None,
) -> jax.Array:
  """`tfm.attention.dot_product.attend` over a mesh: under `jax.set_mesh`, with T and S sharded over `context`.

  Key/value heads too few for the devices are repeated to their least common multiple, before they travel.

  Returns:
    BxTxHxC in the type of the values, sharded like the queries.

  Raises:
    AttentionError: with the reason of `supports`.
  """
  request = Request.of(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask)
  reason = supports(request)
  if reason is not None:
    raise AttentionError(f'Ulysses attention cannot do {request}: {reason}.')
  mask = masks.everything() if mask is None else mask
  if mask.dense is not None:
    mask = mask.replace(dense=mask.dense.reshape((1,) * (4 - mask.dense.ndim) + mask.dense.shape))
  # No sum is hidden in the transposed program (every array that has a gradient is sharded over every axis), so the
  # check of replication has nothing to find.
  return jax.shard_map(functools.partial(_attend_here, scale), in_specs=(HEADED, HEADED, HEADED, _specs(mask)),
                       out_specs=HEADED, check_vma=False)(
      q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask.replace(offset=jnp.asarray(mask.shift)))


def supports(request: Request) -> str | None:
  """None if `attend` can honour the request on the mesh that is set, or why not, as the end of a sentence."""
  reason = sharded_refusal(request) or request.needs_own_softmax
  if reason is not None:
    return reason
  T, S, n = request.query_length, request.key_length, context_size()
  if T % n or S % n:
    return (f'{T} queries and {S} keys cannot be shared out over the {n} devices of the mesh axis {CONTEXT}; make '
            f'data.width_multiple a multiple of {n}')
  heads = request.heads // jax.sharding.get_abstract_mesh().shape[HEADS]
  if heads % n:
    return (f'{heads} heads of a device cannot be shared out over the {n} devices of the mesh axis {CONTEXT}; make '
            f'them a multiple, or use ring attention')
  return None


def _attend_here(scale, q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask):
  """One device's part; T and S are its share of the sequence, H and K its share of the heads by `tensor`."""
  devices, K = context_size(), k_BxSxKxC.shape[2]
  k_BxSxKxC, v_BxSxKxC = (jnp.repeat(x, devices // math.gcd(K, devices), axis=2) for x in (k_BxSxKxC, v_BxSxKxC))
  q_BxTxHxC, k_BxSxKxC, v_BxSxKxC = (jax.lax.all_to_all(x, CONTEXT, split_axis=2, concat_axis=1, tiled=True)
                                     for x in (q_BxTxHxC, k_BxSxKxC, v_BxSxKxC))
  attend_here = blockwise.attend if k_BxSxKxC.shape[1] >= LONG else dot_product.attend
  z_BxTxHxC = attend_here(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask, scale=scale)
  return jax.lax.all_to_all(z_BxTxHxC, CONTEXT, split_axis=1, concat_axis=2, tiled=True)


def _specs(mask: AttentionMask) -> AttentionMask:
  """Each device needs the whole sequence of its rows, and of a dense part what is for its heads."""
  specs = mask_specs(mask, sequence=None)
  if mask.dense is None:
    return specs
  B, H = mask.dense.shape[:2]
  return specs.replace(dense=PartitionSpec(BATCH if B > 1 else None, (HEADS, CONTEXT) if H > 1 else None))
