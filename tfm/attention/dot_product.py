"""Scaled dot-product attention (Vaswani et al. 2017, equation 1), over heads (section 3.2.2)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tfm.attention.masks import AttentionMask


def attend(
    q_BxTxHxC: jax.Array,
    k_BxSxKxC: jax.Array,
    v_BxSxKxC: jax.Array,
    mask: AttentionMask | None = None,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    tap: Callable[[str, jax.Array], jax.Array] = lambda name, value: value,
) -> jax.Array:
  """softmax(Q K^T * scale + bias) V, the exact reference: scores and pattern are materialised.

  Args:
    q_BxTxHxC: queries.
    k_BxSxKxC, v_BxSxKxC: keys and values; H must be a multiple of K, and each key/value head serves H / K query heads
      in a row (grouped-query attention). Values may be of another width than keys; it is the width of the output.
    mask: who may attend to whom; None is everybody.
    bias: added to the scaled scores, broadcastable to BxHxTxS.
    scale: 1 / sqrt(C) if None.
    dropout: applied to the pattern.
    tap: sees `scores`, `pattern` (both float32, BxHxTxS) and `z` (BxTxHxC) and returns what to go on with.

  Returns:
    BxTxHxC in the type of the values. A query that may attend to nothing gets exactly 0, and so do its gradients.

  Raises:
    ValueError: if H is not a multiple of K.
  """
  B, T, H, C = q_BxTxHxC.shape
  S, K = k_BxSxKxC.shape[1:3]
  if H % K:
    raise ValueError(f'{H} query heads cannot share {K} key/value heads; make the first a multiple of the second.')
  scale = C**-0.5 if scale is None else scale
  q_BxTxKxGxC = q_BxTxHxC.reshape(B, T, K, H // K, C)
  scores_BxKxGxTxS = jnp.einsum('btkgc,bskc->bkgts', q_BxTxKxGxC, k_BxSxKxC, preferred_element_type=jnp.float32)
  scores_BxHxTxS = scores_BxKxGxTxS.reshape(B, H, T, S) * scale
  if bias is not None:
    scores_BxHxTxS = scores_BxHxTxS + bias
  allowed = None if mask is None else mask.to_array(T, S)
  if allowed is not None:
    # Finite, not -inf: a row without any key must give 0 and not NaN, in the gradient too.
    scores_BxHxTxS = jnp.where(allowed, scores_BxHxTxS, jnp.finfo(jnp.float32).min)
  scores_BxHxTxS = tap('scores', scores_BxHxTxS)
  pattern_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1)
  if allowed is not None:
    pattern_BxHxTxS = jnp.where(allowed, pattern_BxHxTxS, 0.0)
  pattern_BxHxTxS = tap('pattern', pattern_BxHxTxS)
  if dropout is not None:
    pattern_BxHxTxS = dropout(pattern_BxHxTxS)
  pattern_BxKxGxTxS = pattern_BxHxTxS.reshape(B, K, H // K, T, S).astype(v_BxSxKxC.dtype)
  z_BxTxKxGxC = jnp.einsum('bkgts,bskc->btkgc', pattern_BxKxGxTxS, v_BxSxKxC)
  return tap('z', z_BxTxKxGxC.reshape(B, T, H, v_BxSxKxC.shape[-1]))
