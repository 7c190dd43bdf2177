"""Kernels in Pallas: on a TPU splash attention (`jax.experimental.pallas.ops.tpu`), on a GPU those of `pallas_gpu`.

Splash attention is JAX's sparse flash kernel. Causal and window masks are known when it is made and hidden blocks cost
nothing; lengths and segments become segment ids. Of a query without any key the kernel makes a mean of values, which is
set to 0 afterwards.
"""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp

from tfm.attention import pallas_gpu
from tfm.attention.attend import Request
from tfm.attention.masks import AttentionMask
from tfm.attention.sharded import WHOLE, mask_specs, sharded_refusal

BLOCKS = 512, 256, 128
"""Queries and keys at a time: the largest that divides both lengths (a TPU register is 128 wide)."""


def supports(request: Request) -> str | None:
  """None, or why not, as the end of a sentence."""
  if request.platform == 'gpu':
    return pallas_gpu.supports(request)
  mask, T, S = request.mask, request.query_length, request.key_length
  for condition, reason in (
      (request.platform != 'tpu', f'its kernels are for GPUs or for TPUs, not for {request.platform}'),
      (importlib.util.find_spec('jax.experimental.pallas.ops.tpu.splash_attention') is None,
       'this JAX has no splash attention; install jax>=0.10,<0.12'),
      (request.needs_whole_pattern, request.needs_whole_pattern),
      (request.sinks, 'sinks are not passed on to it'),
      (request.dtype not in ('bfloat16', 'float32'), f'it computes in bfloat16 or float32, not {request.dtype}'),
      (not T or not S or T % BLOCKS[-1] or S % BLOCKS[-1],
       f'{T} queries and {S} keys must be multiples of {BLOCKS[-1]}'),
      (request.width % 64 or request.value_width % 64,
       f'head widths must be multiples of 64, not {request.width} and {request.value_width}'),
      (mask.dense is not None, 'its masks are known when it is compiled; say it with causal, window or segments'),
      (mask.prefix_B is not None, 'it has no prefix mask'),
      (mask.positional and request.offset is None, 'the offset of the queries is known only when the program runs'),
      (mask.positional and not _every_query_has_a_key(mask, request.offset or 0, T, S),
       'by position alone some queries have no key, which it leaves undefined'),
      (mask.lengths_B is not None and mask.query_segments_BxT is not None,
       'lengths and segments both need its segment ids; number the padding as a segment of its own instead'),
      (request.context > 1, 'it cannot share out the sequence over the mesh axis context; use ring'),
      (request.partitioned, sharded_refusal(request) if request.partitioned else None)):
    if condition:
      return reason
  return None


def attend(
    q_BxTxHxC: jax.Array,
    k_BxSxKxC: jax.Array,
    v_BxSxKxC: jax.Array,
    mask: AttentionMask | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
  """As `dot_product.attend`, for requests that `supports` accepts. `interpret` runs the kernel without a TPU."""
  request = Request.of(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask)
  if request.platform == 'gpu':
    return pallas_gpu.attend(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask, scale=scale, partitioned=request.partitioned,
                             interpret=interpret)
  mask = AttentionMask() if mask is None else mask
  here = functools.partial(_attend_here, scale, softcap, int(mask.shift), interpret)
  mask = mask.replace(offset=None)  # an argument of a transformed function would be traced
  if request.partitioned:
    # The compiler cannot cut a kernel, so each device is given its rows and heads.
    here = jax.shard_map(here, in_specs=(WHOLE, WHOLE, WHOLE, mask_specs(mask, sequence=None)), out_specs=WHOLE,
                         check_vma=False)
  return here(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask)


def _attend_here(scale, softcap, offset, interpret, q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash  # experimental, so only when it is used

  mask = mask.replace(offset=offset)
  B, T, H, C = q_BxTxHxC.shape
  S = k_BxSxKxC.shape[1]
  block = next(block for block in BLOCKS if T % block == S % block == 0)
  sizes = splash.BlockSizes(
      block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
      block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block)
  kernel = splash.make_splash_mha(
      splash.MultiHeadMask([_static_mask(splash, mask, T, S)] * H), block_sizes=sizes, head_shards=1, q_seq_shards=1,
      attn_logits_soft_cap=softcap, interpret=interpret)
  segments = _segments(mask, B, T, S)
  # The kernel has no scale of its own.
  q_BxTxHxC = (q_BxTxHxC * (C**-0.5 if scale is None else scale)).astype(q_BxTxHxC.dtype)
  q_BxHxTxC, k_BxKxSxC, v_BxKxSxC = (jnp.swapaxes(x, 1, 2) for x in (q_BxTxHxC, k_BxSxKxC, v_BxSxKxC))
  z_BxHxTxC = jax.vmap(kernel)(q_BxHxTxC, k_BxKxSxC, v_BxKxSxC, segments and splash.SegmentIds(*segments))
  z_BxTxHxC = jnp.swapaxes(z_BxHxTxC, 1, 2).astype(v_BxSxKxC.dtype)
  if segments is None:
    return z_BxTxHxC
  seen_BxT = _sees_something(mask.replace(lengths_B=None), *segments)
  return jnp.where(seen_BxT[:, :, None, None], z_BxTxHxC, jnp.zeros((), z_BxTxHxC.dtype))


def _static_mask(splash, mask: AttentionMask, T: int, S: int):
  """`causal` and `window` as the kernel's mask; its window counts the keys beside the query's own."""
  if mask.window is not None:
    sides = mask.window - 1, 0 if mask.causal else mask.window - 1
    return splash.LocalMask((T, S), sides, int(mask.shift))
  return splash.CausalMask((T, S), int(mask.shift)) if mask.causal else splash.FullMask((T, S))


def _every_query_has_a_key(mask: AttentionMask, offset: int, T: int, S: int) -> bool:
  return (not mask.causal or offset >= 0) and (mask.window is None or (
      T - 1 + offset - mask.window < S - 1 and offset + (0 if mask.causal else mask.window - 1) >= 0))


def _segments(mask: AttentionMask, B: int, T: int, S: int) -> tuple[jax.Array, jax.Array] | None:
  """int32 BxT and BxS: a query sees keys of its number. Keys beyond the length are a segment that no query is in."""
  if mask.query_segments_BxT is not None:
    return mask.query_segments_BxT.astype(jnp.int32), mask.key_segments_BxS.astype(jnp.int32)
  if mask.lengths_B is not None:
    return jnp.zeros((B, T), jnp.int32), (jnp.arange(S) >= mask.lengths_B[:, None]).astype(jnp.int32)
  return None


def _sees_something(mask: AttentionMask, query_segments_BxT: jax.Array, key_segments_BxS: jax.Array) -> jax.Array:
  """bool BxT, some queries at a time: T x S comparisons for all heads together, but never in memory."""
  (B, T), S = query_segments_BxT.shape, key_segments_BxS.shape[1]

  def some(queries_and_segments):
    queries_T, segments_BxT = queries_and_segments
    return jnp.any(mask.block(queries_T, jnp.arange(S), segments_BxT, key_segments_BxS), axis=-1)[:, 0]

  blocks = T // BLOCKS[-1]
  seen_NxBxT = jax.lax.map(some, (jnp.arange(T).reshape(blocks, -1),
                                  jnp.moveaxis(query_segments_BxT.reshape(B, blocks, -1), 1, 0)))
  return jnp.moveaxis(seen_NxBxT, 0, 1).reshape(B, T)
