"""Attention on GPUs as three Pallas kernels, compiled by Triton: FlashAttention-2 (Dao 2023, algorithms 1 and 2).

JAX's own `jax.experimental.pallas.ops.gpu.attention` takes one array of segments for queries and keys alike, so it
can say neither lengths, which queries in the padding still see, nor cross-attention; hence kernels of our own.
Positions are known when the kernel is made and hidden blocks are skipped; lengths and segments become segments.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from tfm.attention.masks import AttentionMask
from tfm.attention.sharded import WHOLE, mask_specs, sharded_refusal

if TYPE_CHECKING:
  from tfm.attention.attend import Request

BLOCK = 64
"""Queries and keys at a time; half of it for the widest heads, so that an Ampere GPU can hold them."""
WIDEST = {'bfloat16': 256, 'float16': 256, 'float32': 128}
"""The types it computes in, and the widest heads in each."""
TOO_OLD = '5.', '6.', '7.'
"""Compute capabilities that Triton in JAX does not compile for."""
PADDING = jnp.iinfo(jnp.int32).min
"""The segment of keys in the padding."""
LOWEST = -1e30  # finite, so that a query without keys never makes inf - inf


def supports(request: Request) -> str | None:
  """None, or why not, as the end of a sentence."""
  mask, widest = request.mask, max(request.width, request.value_width)
  for condition, reason in (
      (importlib.util.find_spec('jax.experimental.pallas.triton') is None,
       'this JAX has no Pallas for Triton; install jax>=0.10,<0.12'),
      (_capability().startswith(TOO_OLD), f'it needs a GPU of compute capability 8.0 or later, not {_capability()}'),
      (request.needs_whole_pattern, request.needs_whole_pattern),
      (request.needs_own_softmax, request.needs_own_softmax),
      (request.dtype not in WIDEST, f'it computes in {", ".join(WIDEST)}, not in {request.dtype}'),
      (widest > WIDEST.get(request.dtype, widest),
       f'heads may be up to {WIDEST.get(request.dtype)} wide in {request.dtype}, not {widest}'),
      (mask.dense is not None, 'a dense mask would be an array of T x S'),
      (mask.prefix_B is not None, 'it has no prefix mask'),
      (mask.positional and request.offset is None, 'the offset of the queries is known only when the program runs'),
      (0 in (request.batch, request.query_length, request.key_length), 'there is nothing to attend to'),
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
    partitioned: bool = False,
    interpret: bool = False,
) -> jax.Array:
  """As `dot_product.attend`, for requests that `supports` accepts. `interpret` runs the kernels without a GPU."""
  mask = AttentionMask() if mask is None else mask
  scale = q_BxTxHxC.shape[-1]**-0.5 if scale is None else float(scale)
  here = functools.partial(_attend_here, scale, int(mask.shift), interpret)
  mask = mask.replace(offset=None)  # an argument of a transformed function would be traced
  if partitioned:
    # The compiler cannot cut a kernel, so each device is given its rows and heads.
    here = jax.shard_map(here, in_specs=(WHOLE, WHOLE, WHOLE, mask_specs(mask, sequence=None)), out_specs=WHOLE,
                         check_vma=False)
  return here(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask)


@dataclass(frozen=True)
class Plan:
  """What the kernels know when they are made."""

  scale: float
  """With log2(e) in it, since a GPU has an instruction for powers of 2."""
  offset: int
  """Position of query 0 on the key axis."""
  before: int | None
  """A query sees that many keys before its position (None: all of them) ..."""
  after: int | None
  """... and that many behind it."""
  many_queries: int
  """At a time in the forward pass."""
  queries: int
  """At a time in the backward pass."""
  keys: int
  interpret: bool

  def allowed(self, queries_T, keys_S, query_segments_T, key_segments_S):
    """bool TxS, or None if every query sees every key."""
    ahead_TxS, parts = keys_S[None, :] - queries_T[:, None] - self.offset, []
    parts += [] if self.before is None else [ahead_TxS >= -self.before]
    parts += [] if self.after is None else [ahead_TxS <= self.after]
    parts += [] if key_segments_S is None else [query_segments_T[:, None] == key_segments_S[None, :]]
    return functools.reduce(jnp.logical_and, parts) if parts else None

  def key_blocks(self, block, queries: int, S: int):
    """First and one past the last block of keys that one of the `queries` of a block may see."""
    start = block * queries + self.offset
    return _blocks(start, queries, self.before, self.after, self.keys, S)

  def query_blocks(self, block, T: int):
    """The same of the queries that may see one of the keys of a block."""
    start = block * self.keys - self.offset
    return _blocks(start, self.keys, self.after, self.before, self.queries, T)


def _attend_here(scale, offset, interpret, q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask):
  (B, T, _, C), S, V = q_BxTxHxC.shape, k_BxSxKxC.shape[1], v_BxSxKxC.shape[-1]
  block = BLOCK if 2 * max(C, V) <= WIDEST[q_BxTxHxC.dtype.name] else BLOCK // 2
  reach = None if mask.window is None else mask.window - 1
  plan = Plan(scale * math.log2(math.e), offset, before=reach, after=0 if mask.causal else reach,
              many_queries=min(2 * block, _power_of_2(T)), queries=min(block, _power_of_2(T)),
              keys=min(block, _power_of_2(S)), interpret=interpret)
  segments = _segments(mask, B, T, S, padded=S % plan.keys)
  if segments is not None:
    segments = _pad(segments[0], plan.many_queries), _pad(segments[1], plan.keys, PADDING)
  q, k, v = (_pad(_pad(x, block), _power_of_2(x.shape[-1]), axis=3) for x, block in (
      (q_BxTxHxC, plan.many_queries), (k_BxSxKxC, plan.keys), (v_BxSxKxC, plan.keys)))
  return _attend(q, k, v, segments, plan)[:, :T, :, :V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, segments, plan):
  return _forward(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, segments, plan)[0]


def _forward(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, segments, plan):
  (B, T, H, _), V = q_BxTxHxC.shape, v_BxSxKxC.shape[-1]
  z_BxTxHxC, log_total_BxHxT = _call(
      _forward_kernel, plan, 'forward', plan.many_queries, None, (q_BxTxHxC,), (k_BxSxKxC, v_BxSxKxC), segments, (),
      [jax.ShapeDtypeStruct((B, T, H, V), v_BxSxKxC.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)])
  return z_BxTxHxC, (q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, segments, z_BxTxHxC, log_total_BxHxT)


def _backward(plan, kept, d_z_BxTxHxC):
  q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, segments, z_BxTxHxC, log_total_BxHxT = kept
  (B, _, H, _), (S, K, V) = q_BxTxHxC.shape, v_BxSxKxC.shape[1:]
  mean_BxHxT = jnp.einsum('bthc,bthc->bht', z_BxTxHxC, d_z_BxTxHxC, preferred_element_type=jnp.float32)
  arguments = (q_BxTxHxC, d_z_BxTxHxC), (k_BxSxKxC, v_BxSxKxC), segments, (log_total_BxHxT, mean_BxHxT)
  [d_q_BxTxHxC] = _call(_query_kernel, plan, 'queries', plan.queries, None, *arguments, [q_BxTxHxC])
  # Of each query head; those that share a key head are added up here, so that no two programs write to one place.
  gradients = _call(_key_kernel, plan, 'keys', None, plan.keys, *arguments,
                    [jax.ShapeDtypeStruct((B, S, H, width), jnp.float32) for width in (k_BxSxKxC.shape[-1], V)])
  d_k_BxSxKxC, d_v_BxSxKxC = (
      jnp.sum(d.reshape(B, S, K, H // K, -1), axis=3).astype(k_BxSxKxC.dtype) for d in gradients)
  return d_q_BxTxHxC, d_k_BxSxKxC, d_v_BxSxKxC, None


_attend.defvjp(_forward, _backward)


def _call(kernel, plan: Plan, name: str, queries: int | None, keys: int | None, of_queries, of_keys, segments,
          numbers_BxHxT, outputs):
  """Runs a kernel for each block of `queries`, or else of `keys`, of each head of each row; the other axis is whole."""
  from jax.experimental import pallas as pl  # experimental, so only when it is used
  from jax.experimental.pallas import triton

  (B, T, H, _), (S, K) = of_queries[0].shape, of_keys[0].shape[1:3]

  def spec(x, block, share=1):
    """One head (one for `share` query heads), and one block or all of the sequence, of BxTxHxC, BxHxT or BxT."""
    size, ndim = block or x.shape[2 if len(x.shape) == 3 else 1], len(x.shape)

    def place(i, b, h):
      i, h = i if block else 0, jax.lax.div(h, share)
      return {4: (b, i, h, 0), 3: (b, h, i), 2: (b, i)}[ndim]

    return pl.BlockSpec({4: (None, size, None, x.shape[-1]), 3: (None, None, size), 2: (None, size)}[ndim], place)

  query_segments, key_segments = (None, None) if segments is None else segments
  inputs = [*((x, queries) for x in of_queries), *((x, keys, H // K) for x in of_keys), (query_segments, queries),
            (key_segments, keys), *((x, queries) for x in numbers_BxHxT)]
  wide = max(x.shape[-1] for x in (*of_queries, *of_keys)) > 64
  return pl.pallas_call(
      functools.partial(kernel, plan), grid=(T // queries if queries else S // keys, B, H),
      in_specs=[None if x is None else spec(x, *rest) for x, *rest in inputs],
      out_specs=[spec(x, queries or keys) for x in outputs],
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
      compiler_params=triton.CompilerParams(num_warps=8 if wide else 4, num_stages=2), interpret=plan.interpret,
      name=f'attention_{name}')(*(x for x, *_ in inputs))


def _forward_kernel(plan, q_ref, k_ref, v_ref, query_segments_ref, key_segments_ref, z_ref, log_total_ref):
  q_TxC, V, T = q_ref[...], v_ref.shape[-1], plan.many_queries
  program, queries_T, query_segments_T = _program(T, query_segments_ref)

  def add_block(block, carry):
    top_T, total_T, z_TxC = carry
    here, keys_S = _positions(block, plan.keys)
    scores_TxS = _scores(plan, q_TxC, k_ref[here, :], queries_T, keys_S, query_segments_T,
                         _some(key_segments_ref, here))
    new_top_T = jnp.maximum(top_T, jnp.max(scores_TxS, axis=1))
    weights_TxS = jnp.exp2(scores_TxS - new_top_T[:, None])
    shrink_T = jnp.exp2(top_T - new_top_T)
    z_of_block_TxC = _dot(weights_TxS.astype(v_ref.dtype), v_ref[here, :])
    return new_top_T, total_T * shrink_T + jnp.sum(weights_TxS, axis=1), z_TxC * shrink_T[:, None] + z_of_block_TxC

  start = jnp.full(T, LOWEST, jnp.float32), jnp.zeros(T, jnp.float32), jnp.zeros((T, V), jnp.float32)
  top_T, total_T, z_TxC = jax.lax.fori_loop(*plan.key_blocks(program, T, k_ref.shape[0]), add_block, start)
  total_T = jnp.where(total_T == 0, 1.0, total_T)
  z_ref[...] = (z_TxC / total_T[:, None]).astype(z_ref.dtype)
  log_total_ref[...] = top_T + jnp.log2(total_T)


def _query_kernel(plan, q_ref, d_z_ref, k_ref, v_ref, query_segments_ref, key_segments_ref, log_total_ref, mean_ref,
                  d_q_ref):
  q_TxC, d_z_TxC, log_total_T, mean_T = q_ref[...], d_z_ref[...], log_total_ref[...], mean_ref[...]
  program, queries_T, query_segments_T = _program(plan.queries, query_segments_ref)

  def add_block(block, d_q_TxC):
    here, keys_S = _positions(block, plan.keys)
    k_SxC = k_ref[here, :]
    scores_TxS = _scores(plan, q_TxC, k_SxC, queries_T, keys_S, query_segments_T, _some(key_segments_ref, here))
    pattern_TxS = jnp.exp2(scores_TxS - log_total_T[:, None])
    d_scores_TxS = pattern_TxS * (_dot(d_z_TxC, v_ref[here, :].T) - mean_T[:, None])
    return d_q_TxC + _dot(d_scores_TxS.astype(k_SxC.dtype), k_SxC)

  blocks = plan.key_blocks(program, plan.queries, k_ref.shape[0])
  d_q_TxC = jax.lax.fori_loop(*blocks, add_block, jnp.zeros(q_TxC.shape, jnp.float32))
  d_q_ref[...] = (d_q_TxC * (plan.scale / math.log2(math.e))).astype(d_q_ref.dtype)


def _key_kernel(plan, q_ref, d_z_ref, k_ref, v_ref, query_segments_ref, key_segments_ref, log_total_ref, mean_ref,
                d_k_ref, d_v_ref):
  k_SxC, v_SxC = k_ref[...], v_ref[...]
  program, keys_S, key_segments_S = _program(plan.keys, key_segments_ref)

  def add_block(block, carry):
    d_k_SxC, d_v_SxC = carry
    here, queries_T = _positions(block, plan.queries)
    q_TxC, d_z_TxC = q_ref[here, :], d_z_ref[here, :]
    scores_TxS = _scores(plan, q_TxC, k_SxC, queries_T, keys_S, _some(query_segments_ref, here), key_segments_S)
    pattern_TxS = jnp.exp2(scores_TxS - log_total_ref[here][:, None])
    d_scores_TxS = pattern_TxS * (_dot(d_z_TxC, v_SxC.T) - mean_ref[here][:, None])
    return (d_k_SxC + _dot(d_scores_TxS.astype(q_TxC.dtype).T, q_TxC),
            d_v_SxC + _dot(pattern_TxS.astype(d_z_TxC.dtype).T, d_z_TxC))

  start = jnp.zeros(k_SxC.shape, jnp.float32), jnp.zeros(v_SxC.shape, jnp.float32)
  d_k_SxC, d_v_SxC = jax.lax.fori_loop(*plan.query_blocks(program, q_ref.shape[0]), add_block, start)
  d_k_ref[...] = d_k_SxC * (plan.scale / math.log2(math.e))
  d_v_ref[...] = d_v_SxC


def _scores(plan, q_TxC, k_SxC, queries_T, keys_S, query_segments_T, key_segments_S):
  """Scores times log2(e), float32; -inf where a query may not look."""
  scores_TxS = _dot(q_TxC, k_SxC.T) * plan.scale
  allowed = plan.allowed(queries_T, keys_S, query_segments_T, key_segments_S)
  return scores_TxS if allowed is None else jnp.where(allowed, scores_TxS, -jnp.inf)


def _program(size: int, segments_ref):
  """The block of this program, its positions, and its segments if there are any."""
  from jax.experimental import pallas as pl

  block = pl.program_id(0)
  return block, block * size + jnp.arange(size), None if segments_ref is None else segments_ref[...]


def _positions(block, size: int):
  from jax.experimental import pallas as pl

  return pl.ds(block * size, size), block * size + jnp.arange(size)


def _some(ref, here):
  return None if ref is None else ref[here]


def _dot(one, other):
  return jax.lax.dot(one, other, preferred_element_type=jnp.float32)


def _blocks(start, size: int, before: int | None, after: int | None, block: int, length: int):
  """The blocks of an axis, from and to, that hold something from `before` before `start` to `after` behind its end."""
  first = 0 if before is None else jax.lax.div(jnp.maximum(start - before, 0), block)
  if after is None:
    return first, length // block
  return first, jnp.minimum(jax.lax.div(jnp.maximum(start + size + after + block - 1, 0), block), length // block)


def _segments(mask: AttentionMask, B: int, T: int, S: int, padded: bool) -> tuple[jax.Array, jax.Array] | None:
  """int32 BxT and BxS: a query sees keys of its number. Keys beyond the length are a segment that no query is in."""
  segments = mask.query_segments_BxT, mask.key_segments_BxS
  if segments[0] is None:
    if mask.lengths_B is None and not padded:
      return None
    segments = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
  query_segments_BxT, key_segments_BxS = (x.astype(jnp.int32) for x in segments)
  if mask.lengths_B is not None:
    key_segments_BxS = jnp.where(jnp.arange(S) < mask.lengths_B[:, None], key_segments_BxS, PADDING)
  return query_segments_BxT, key_segments_BxS


def _pad(array: jax.Array, multiple: int, value: int = 0, axis: int = 1) -> jax.Array:
  padding = [(0, 0)] * array.ndim
  padding[axis] = 0, -array.shape[axis] % multiple
  return jnp.pad(array, padding, constant_values=value)


def _power_of_2(size: int) -> int:
  """Of at least 16, which tensor cores ask for."""
  return max(16, 1 << (size - 1).bit_length())


def _capability() -> str:
  """Of the GPU that is here; Ampere's where the program is only lowered for one."""
  here = jax.devices()[0] if jax.default_backend() == 'gpu' else None
  return str(getattr(here, 'compute_capability', '8.0'))
