"""Cross-entropy with label smoothing (Vaswani et al. 2017, section 5.4; Szegedy et al. 2016, section 7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from tfm.parallel.mesh import BATCH_AXES


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


def token_sums(logits_BxTxV: jax.Array, labels_BxT: jax.Array, weights_BxT: jax.Array, smoothing: float,
               vocab_size: int | None = None) -> Sums:
  """Loss sums of a batch.

  The smoothed target distribution is (1 - e) one-hot + e / V, uniform over the whole vocabulary, the right token
  included: Szegedy's form and PyTorch's. (fairseq and Flax WMT give e / (V - 1) to the wrong tokens only, OpenNMT
  e / (V - 2).) Its least value is the entropy of that distribution, not 0; `nll` is comparable across conventions.

  Args:
    logits_BxTxV: float32.
    labels_BxT: int32 ids.
    weights_BxT: 1 for a token that counts, 0 for padding, whose logits have no say, not even as NaN.
    smoothing: e.
    vocab_size: V, where the logits have more columns than that; those beyond are not part of the vocabulary.
  """
  vocab_size = logits_BxTxV.shape[-1] if vocab_size is None else vocab_size
  loss_BxT, nll_BxT, hits_BxT = _losses(logits_BxTxV, labels_BxT, smoothing, vocab_size)
  return Sums(*(jnp.sum(jnp.where(weights_BxT == 0, 0.0, value_BxT * weights_BxT))
                for value_BxT in (loss_BxT, nll_BxT, hits_BxT, jnp.ones_like(loss_BxT))))


def chunked_token_sums(unembed: Callable[[Any, jax.Array], jax.Array], params: Any, hidden_BxTxD: jax.Array,
                       labels_BxT: jax.Array, weights_BxT: jax.Array, smoothing: float, vocab_size: int) -> Sums:
  """`token_sums(unembed(params, hidden), ...)` without the logits of the whole batch ever existing.

  The rows are cut into chunks (`most_logits`); each chunk's gradient is taken right after its loss,
  while its logits are there, so nothing is computed twice (forward-mode bookkeeping: the loss is a plain sum, hence
  the gradient is known up to the factor that arrives in the backward pass). On a mesh every device cuts its own rows
  and positions, and gradients are added up once, after the last chunk.

  Args:
    unembed: (params, hidden) -> logits.
    params: what `unembed` reads, and no more.
    hidden_BxTxD, labels_BxT, weights_BxT, smoothing, vocab_size: see `token_sums`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(name for name in (*BATCH_AXES, 'context')
               if mesh.shape.get(name, 1) > 1 and name not in mesh.manual_axes)
  shards = math.prod(mesh.shape[name] for name in axes)
  B = labels_BxT.shape[0] // math.prod(mesh.shape[name] for name in axes if name in BATCH_AXES)
  logits, most = labels_BxT.size * vocab_size // shards, most_logits(params)
  chunks = next(n for n in range(1, B + 1) if B % n == 0 and (n == B or logits // n <= most))
  if chunks == 1:
    return token_sums(unembed(params, hidden_BxTxD), labels_BxT, weights_BxT, smoothing, vocab_size)

  def of_chunk(params, hidden, labels, weights):
    sums = token_sums(unembed(params, hidden), labels, weights, smoothing, vocab_size)
    return sums.loss, sums

  def of_rows(params, *arrays):
    """Sums and gradients of the rows given: all of them, or those of one device."""
    def add(carry, piece):
      (_, sums), (d_params, d_hidden) = jax.value_and_grad(of_chunk, (0, 1), has_aux=True)(params, *piece)
      return jax.tree.map(jnp.add, carry, (sums, d_params)), d_hidden

    zero = (Sums(*[jnp.float32(0)] * 4), jax.tree.map(jnp.zeros_like, params))
    pieces = [array.reshape((chunks, -1) + array.shape[1:]) for array in arrays]
    totals, d_hidden = jax.lax.scan(add, zero, tuple(pieces))
    sums, d_params = jax.lax.psum(totals, axes) if axes else totals
    return sums, d_params, d_hidden.reshape(arrays[0].shape)

  if axes:
    rows = PartitionSpec(tuple(name for name in axes if name in BATCH_AXES) or None,
                         'context' if 'context' in axes else None)
    whole = PartitionSpec()
    of_rows = jax.shard_map(of_rows, in_specs=(whole, rows, rows, rows), out_specs=(whole, whole, rows),
                            axis_names=set(axes), check_vma=False)

  @jax.custom_vjp
  def total(params, hidden_BxTxD):
    return of_rows(params, hidden_BxTxD, labels_BxT, weights_BxT)[0]

  def forward(params, hidden_BxTxD):
    sums, *gradients = of_rows(params, hidden_BxTxD, labels_BxT, weights_BxT)
    return sums, tuple(gradients)

  def backward(gradients, cotangent: Sums):
    return jax.tree.map(lambda g: g * cotangent.loss.astype(g.dtype), gradients)

  total.defvjp(forward, backward)
  return total(params, hidden_BxTxD)


def most_logits(params: Any) -> int:
  """How many logits to compute at a time: 16 MiB in float32, about what a last-level cache holds, but no fewer than
  twice the weights. Every chunk adds a gradient as large as those to the sum, and a product of few rows is slow: with
  32,000 words of width 512 and 800 tokens, chunks no larger than the cache make a step of 2 + 2 layers 1.7 times as
  long."""
  return max(2**22, 2 * sum(leaf.size for leaf in jax.tree.leaves(params)))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _losses(logits_BxTxV, labels_BxT, smoothing, vocab_size):
  """(smoothed loss, nll, 1 where the right token is the most probable), each BxT; the first carries the gradient."""
  return _losses_forward(logits_BxTxV, labels_BxT, smoothing, vocab_size)[0]


def _losses_forward(logits_BxTxV, labels_BxT, smoothing, vocab_size):
  parts = _parts(logits_BxTxV)
  top_BxT = reduce(jnp.maximum, [jnp.max(part, axis=-1) for part in parts])
  lse_BxT = reduce(jnp.logaddexp, [jax.nn.logsumexp(part, axis=-1) for part in parts])
  if jax.sharding.get_abstract_mesh().shape.get('tensor', 1) > 1:  # a gather would bring all columns to every device
    right_BxT = jnp.sum(jnp.where(_onehot(logits_BxTxV, labels_BxT), logits_BxTxV, 0.0), axis=-1)
  else:
    right_BxT = jnp.take_along_axis(logits_BxTxV, labels_BxT[..., None], axis=-1)[..., 0]
  nll_BxT = lse_BxT - right_BxT
  hits_BxT = (right_BxT >= top_BxT).astype(jnp.float32)  # cheaper than an argmax over V
  loss_BxT = nll_BxT
  if smoothing:  # -sum_v q_v log p_v with q as above, without ever building the V-wide q
    mean_BxT = sum(jnp.sum(part, axis=-1) for part in _parts(_real(logits_BxTxV, vocab_size))) / vocab_size
    loss_BxT = (1.0 - smoothing) * nll_BxT + smoothing * (lse_BxT - mean_BxT)
  return (loss_BxT, nll_BxT, hits_BxT), (logits_BxTxV, labels_BxT, lse_BxT)


def _losses_backward(smoothing, vocab_size, residuals, cotangents):
  # d loss / d logits = p - q, in one fused pass; what autodiff makes of the gather above is a scatter.
  logits_BxTxV, labels_BxT, lse_BxT = residuals
  uniform = smoothing / vocab_size
  q_BxTxV = _real(jnp.where(_onehot(logits_BxTxV, labels_BxT), 1.0 - smoothing + uniform, uniform), vocab_size)
  scale_BxTx1 = cotangents[0][..., None]
  p_BxTxV = jnp.exp(logits_BxTxV - lse_BxT[..., None])
  return jnp.where(scale_BxTx1 == 0, 0.0, (p_BxTxV - q_BxTxV) * scale_BxTx1), None


def _parts(values_BxTxV) -> list[jax.Array]:
  """The values in parts of at most 2^15 columns on a CPU, where XLA takes four times as long for each term of a sum of
  exponentials with more: a step with GPT-2's vocabulary and width 128 has 0.9 of the time so."""
  if jax.default_backend() != 'cpu' or jax.sharding.get_abstract_mesh().shape.get('tensor', 1) > 1:
    return [values_BxTxV]
  V = values_BxTxV.shape[-1]
  width = -(-V // -(-V // 2**15))
  return [values_BxTxV[..., i:i + width] for i in range(0, V, width)]


def _onehot(logits_BxTxV, labels_BxT):
  return jax.lax.broadcasted_iota(labels_BxT.dtype, logits_BxTxV.shape, 2) == labels_BxT[..., None]


def _real(values_BxTxV, vocab_size):
  """The values, 0 in the columns beyond the vocabulary."""
  if values_BxTxV.shape[-1] == vocab_size:
    return values_BxTxV
  return jnp.where(jax.lax.broadcasted_iota(jnp.int32, values_BxTxV.shape, 2) < vocab_size, values_BxTxV, 0.0)


_losses.defvjp(_losses_forward, _losses_backward)
