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
    softcap: float | None = None,
    sinks_H: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    tap: Callable[[str, jax.Array], jax.Array] = lambda name, value: value,
) -> jax.Array:
  """softmax(Q K^T * scale + bias) V, the exact reference: scores and pattern are materialised.

  Args:
    q_BxTxHxC: queries.
    k_BxSxKxC, v_BxSxKxC: keys and values; H must be a multiple of K, and each key/value head serves H / K query heads
      in a row (grouped-query attention). Values may be of another width than keys; it is the width of the output.
    mask: who may attend to whom; None is everybody.
    bias: added to the scaled (and capped) scores, broadcastable to BxHxTxS.
    scale: 1 / sqrt(C) if None.
    softcap: scaled scores become softcap * tanh(scores / softcap), before bias and mask (Gemma 2, 2024).
    sinks_H: a float32 score for each head that joins the softmax as one more key without a value, so that a pattern may
      sum to less than 1 (Xiao et al. 2023, section 3.3; gpt-oss, 2025).
    dropout: applied to the pattern.
    tap: sees `scores` (capped, biased, masked), `pattern` (both float32, BxHxTxS, without the sinks) and `z` (BxTxHxC)
      and returns what to go on with.

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
  scores_BxKxGxTxS = scores(q_BxTxKxGxC, k_BxSxKxC)
  scores_BxHxTxS = scores_BxKxGxTxS.reshape(B, H, T, S) * scale
  if softcap is not None:
    scores_BxHxTxS = softcap * jnp.tanh(scores_BxHxTxS / softcap)
  if bias is not None:
    scores_BxHxTxS = scores_BxHxTxS + bias
  allowed = None if mask is None else mask.to_array(T, S)
  if allowed is not None:
    # Finite, not -inf: a row without any key must give 0 and not NaN, in the gradient too.
    scores_BxHxTxS = jnp.where(allowed, scores_BxHxTxS, jnp.finfo(jnp.float32).min)
  scores_BxHxTxS = tap('scores', scores_BxHxTxS)
  pattern_BxHxTxS = _softmax(scores_BxHxTxS, sinks_H)
  if allowed is not None:
    pattern_BxHxTxS = jnp.where(allowed, pattern_BxHxTxS, 0.0)
  pattern_BxHxTxS = tap('pattern', pattern_BxHxTxS)
  if dropout is not None:
    pattern_BxHxTxS = dropout(pattern_BxHxTxS)
  pattern_BxKxGxTxS = pattern_BxHxTxS.reshape(B, K, H // K, T, S).astype(v_BxSxKxC.dtype)
  z_BxTxKxGxC = jnp.moveaxis(weighted_sum(pattern_BxKxGxTxS, v_BxSxKxC), 3, 1)
  return tap('z', z_BxTxKxGxC.reshape(B, T, H, v_BxSxKxC.shape[-1]))


# Written out, because `einsum` puts keys and values first: then scores and pattern, which are T x S, are transposed on
# their way out and in (half of the time at 2,048 tokens on a CPU).


def scores(q_BxTxKxGxC: jax.Array, k_BxSxKxC: jax.Array) -> jax.Array:
  """q . k, BxKxGxTxS in float32."""
  return jax.lax.dot_general(jnp.moveaxis(q_BxTxKxGxC, 1, 3), jnp.swapaxes(k_BxSxKxC, 1, 2),
                             (((4,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def weighted_sum(pattern_BxKxGxTxS: jax.Array, v_BxSxKxC: jax.Array, preferred_element_type=None) -> jax.Array:
  """pattern v, BxKxGxTxC."""
  return jax.lax.dot_general(pattern_BxKxGxTxS, jnp.swapaxes(v_BxSxKxC, 1, 2), (((4,), (2,)), ((0, 1), (0, 1))),
                             preferred_element_type=preferred_element_type)


def sum_to_keys(pattern_BxKxGxTxS: jax.Array, x_BxTxKxGxC: jax.Array) -> jax.Array:
  """What the queries' x bring to each key, BxSxKxC in float32; the pattern is not transposed for it."""
  found_BxKxCxS = jax.lax.dot_general(jnp.moveaxis(x_BxTxKxGxC, 1, 3), pattern_BxKxGxTxS,
                                      (((2, 3), (2, 3)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
  return jnp.transpose(found_BxKxCxS, (0, 3, 1, 2))


def _softmax(scores_BxHxTxS: jax.Array, sinks_H: jax.Array | None) -> jax.Array:
  if sinks_H is None:
    return jax.nn.softmax(scores_BxHxTxS, axis=-1)
  sinks_Hx1x1 = sinks_H[:, None, None]
  top_BxHxTx1 = jax.lax.stop_gradient(jnp.maximum(
      jnp.max(scores_BxHxTxS, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min), sinks_Hx1x1))
  weights_BxHxTxS = jnp.exp(scores_BxHxTxS - top_BxHxTx1)
  return weights_BxHxTxS / (jnp.sum(weights_BxHxTxS, axis=-1, keepdims=True) + jnp.exp(sinks_Hx1x1 - top_BxHxTx1))
