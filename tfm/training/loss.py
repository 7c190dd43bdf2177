"""Cross-entropy with label smoothing (Vaswani et al. 2017, section 5.4; Szegedy et al. 2016, section 7)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

CHUNK_LOGITS = 2**22
"""Logits computed at a time by `chunked_token_sums`: 16 MiB in float32, about what a last-level cache holds."""


@struct.dataclass
class Sums:
  """Sums over the target tokens of a batch; whoever wants a mean divides once, at the end. float32 scalars."""

  loss: jax.Array
  """With label smoothing: what is minimised, nats."""
  nll: jax.Array
  """Without: -log p(token), nats; to be read, it carries no gradient."""
  correct: jax.Array
  """Tokens whose most probable prediction was right."""
  tokens: jax.Array
  """Target tokens that count (padding does not)."""

  def __add__(self, other: Sums) -> Sums:
    return jax.tree.map(jnp.add, self, other)


def token_sums(logits_BxTxV: jax.Array, labels_BxT: jax.Array, weights_BxT: jax.Array, smoothing: float) -> Sums:
  """Loss sums of a batch.

  The smoothed target distribution is (1 - e) one-hot + e / V, uniform over the whole vocabulary, the right token
  included: Szegedy's form and PyTorch's. (fairseq and Flax WMT give e / (V - 1) to the wrong tokens only, OpenNMT
  e / (V - 2).) Its least value is the entropy of that distribution, not 0; `nll` is comparable across conventions.

  Args:
    logits_BxTxV: float32.
    labels_BxT: int32 ids.
    weights_BxT: 1 for a token that counts, 0 for padding, whose logits have no say, not even as NaN.
    smoothing: e.
  """
  loss_BxT, nll_BxT, hits_BxT = _losses(logits_BxTxV, labels_BxT, smoothing)
  return Sums(*(jnp.sum(jnp.where(weights_BxT == 0, 0.0, value_BxT * weights_BxT))
                for value_BxT in (loss_BxT, nll_BxT, hits_BxT, jnp.ones_like(loss_BxT))))


def chunked_token_sums(unembed: Callable[[Any, jax.Array], jax.Array], params: Any, hidden_BxTxD: jax.Array,
                       labels_BxT: jax.Array, weights_BxT: jax.Array, smoothing: float, vocab_size: int) -> Sums:
  """`token_sums(unembed(params, hidden), ...)` without the logits of the whole batch ever existing.

  The rows are cut into chunks whose logits fit a CPU's cache; each chunk's gradient is taken right after its loss,
  while its logits are there, so nothing is computed twice (forward-mode bookkeeping: the loss is a plain sum, hence
  the gradient is known up to the factor that arrives in the backward pass).
  """
  B, T = labels_BxT.shape
  chunks = next(n for n in range(1, B + 1) if B % n == 0 and (n == B or B * T * vocab_size // n <= CHUNK_LOGITS))
  if chunks == 1:
    return token_sums(unembed(params, hidden_BxTxD), labels_BxT, weights_BxT, smoothing)
  pieces = jax.tree.map(lambda x: x.reshape((chunks, B // chunks) + x.shape[1:]), (labels_BxT, weights_BxT))

  def of_chunk(params, hidden, labels, weights):
    sums = token_sums(unembed(params, hidden), labels, weights, smoothing)
    return sums.loss, sums

  @jax.custom_vjp
  def total(params, hidden_BxTxD):
    return forward(params, hidden_BxTxD)[0]

  def forward(params, hidden_BxTxD):
    def add(carry, piece):
      (_, sums), (d_params, d_hidden) = jax.value_and_grad(of_chunk, (0, 1), has_aux=True)(params, *piece)
      return jax.tree.map(jnp.add, carry, (sums, d_params)), d_hidden

    zero = (Sums(*[jnp.float32(0)] * 4), jax.tree.map(jnp.zeros_like, params))
    hidden = hidden_BxTxD.reshape((chunks, B // chunks) + hidden_BxTxD.shape[1:])
    (sums, d_params), d_hidden = jax.lax.scan(add, zero, (hidden, *pieces))
    return sums, (d_params, d_hidden.reshape(hidden_BxTxD.shape))

  def backward(gradients, cotangent: Sums):
    return jax.tree.map(lambda g: g * cotangent.loss.astype(g.dtype), gradients)

  total.defvjp(forward, backward)
  return total(params, hidden_BxTxD)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _losses(logits_BxTxV, labels_BxT, smoothing):
  """(smoothed loss, nll, 1 where the right token is the most probable), each BxT; the first carries the gradient."""
  return _losses_forward(logits_BxTxV, labels_BxT, smoothing)[0]


def _losses_forward(logits_BxTxV, labels_BxT, smoothing):
  lse_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
  right_BxT = jnp.take_along_axis(logits_BxTxV, labels_BxT[..., None], axis=-1)[..., 0]
  nll_BxT = lse_BxT - right_BxT
  hits_BxT = (right_BxT >= jnp.max(logits_BxTxV, axis=-1)).astype(jnp.float32)  # cheaper than an argmax over V
  # -sum_v q_v log p_v with q as above, without ever building the V-wide q.
  loss_BxT = (1.0 - smoothing) * nll_BxT + smoothing * (lse_BxT - jnp.mean(logits_BxTxV, axis=-1))
  return (loss_BxT, nll_BxT, hits_BxT), (logits_BxTxV, labels_BxT, lse_BxT)


def _losses_backward(smoothing, residuals, cotangents):
  # d loss / d logits = p - q, in one fused pass; what autodiff makes of the gather above is a scatter.
  logits_BxTxV, labels_BxT, lse_BxT = residuals
  V = logits_BxTxV.shape[-1]
  onehot_BxTxV = jax.lax.broadcasted_iota(labels_BxT.dtype, logits_BxTxV.shape, 2) == labels_BxT[..., None]
  q_BxTxV = jnp.where(onehot_BxTxV, 1.0 - smoothing + smoothing / V, smoothing / V)
  scale_BxTx1 = cotangents[0][..., None]
  p_BxTxV = jnp.exp(logits_BxTxV - lse_BxT[..., None])
  return jnp.where(scale_BxTx1 == 0, 0.0, (p_BxTxV - q_BxTxV) * scale_BxTx1), None


_losses.defvjp(_losses_forward, _losses_backward)
