"""cuDNN's fused attention on NVIDIA GPUs (FlashAttention-2, Dao 2023), by JAX's public function.

That function turns a mask or a bias into an array of size T x S with a gradient, so neither is ever passed: what
cannot be said with causal, a window to the left and lengths is refused.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from tfm.attention.masks import AttentionMask

if TYPE_CHECKING:
  from tfm.attention.attend import Request

PLUGINS = 'jax_cuda12_plugin', 'jax_cuda13_plugin'


def supports(request: Request) -> str | None:
  """None, or why not, as the end of a sentence (reference/jax-stacks.md, section 3.5, and JAX's own checks)."""
  mask, capability = request.mask, _capability()
  width_limit = 256 if capability >= 9 else 128
  for condition, reason in (
      (request.platform != 'gpu', f'cuDNN runs on NVIDIA GPUs, not on {request.platform}'),
      (not any(map(importlib.util.find_spec, PLUGINS)), "this JAX has no CUDA; pip install 'tfm[cuda]'"),
      (capability < 8, f'it needs a GPU of compute capability 8.0 (Ampere) or later, not {capability}'),
      (request.needs_whole_pattern, request.needs_whole_pattern),
      (request.needs_own_softmax, request.needs_own_softmax),
      (request.dtype not in ('bfloat16', 'float16'),
       f"it computes in bfloat16 or float16, not {request.dtype}; set model.dtype='bfloat16'"),
      (request.value_width != request.width,
       f'values of width {request.value_width} must be as wide as keys, {request.width}'),
      (request.width % 8 or request.width > width_limit,
       f'the head width must be a multiple of 8 up to {width_limit} on this device, not {request.width}'),
      (mask.dense is not None, 'a dense mask would become a T x S bias'),
      (mask.query_segments_BxT is not None, 'it would attend across segments'),
      (mask.prefix_B is not None, 'it has no prefix mask'),
      (mask.positional and request.offset is None, 'the offset of the queries is known only when the program runs'),
      (mask.positional and request.offset != 0, 'its queries start at key 0, not further on'),
      (mask.causal and request.query_length != request.key_length,
       f'causal cuDNN kernels are only used for as many queries as keys, not {request.query_length} and '
       f'{request.key_length}, since versions differ in which corner they align'),
      (mask.window is not None and not mask.causal, 'it has windows only together with causal'),
      (mask.window is not None and mask.lengths_B is not None,
       'a query in the padding may have no key in its window, and what cuDNN makes of that is undefined'),
      (0 in (request.batch, request.query_length, request.key_length), 'there is nothing to attend to'),
      (request.context > 1, 'it cannot share out the sequence over the mesh axis context; use ring')):
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
) -> jax.Array:
  """As `dot_product.attend`, for requests that `supports` accepts."""
  (B, T), S = q_BxTxHxC.shape[:2], k_BxSxKxC.shape[1]
  mask = AttentionMask() if mask is None else mask
  lengths = {}
  if mask.lengths_B is not None:
    # A row without any key is given one, whose values are zeroed below: what cuDNN makes of none is not documented.
    lengths = dict(query_seq_lengths=jnp.full(B, T, jnp.int32),
                   key_value_seq_lengths=jnp.clip(mask.lengths_B, 1, S).astype(jnp.int32))
  z_BxTxHxC = jax.nn.dot_product_attention(
      q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, scale=scale, is_causal=mask.causal,
      # (left, right), both beside the query itself; 0 on the right, which an integer would not say.
      local_window_size=None if mask.window is None else (mask.window - 1, 0), implementation='cudnn', **lengths)
  if mask.lengths_B is None:
    return z_BxTxHxC
  return jnp.where((mask.lengths_B > 0)[:, None, None, None], z_BxTxHxC, jnp.zeros((), z_BxTxHxC.dtype))


def _capability() -> float:
  """Of the GPU that is here; Ampere's where the program is only lowered for one."""
  here = jax.devices()[0] if jax.default_backend() == 'gpu' else None
  return float(getattr(here, 'compute_capability', 8.0))
