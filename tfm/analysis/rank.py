"""How near a sequence is to rank 1, and the sum over paths that a network of attention alone is (Dong et al. 2021)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def residual(x_TxD: jax.Array) -> jax.Array:
  """res(X) = X - 1 x^T, with the mean token for x, as the paper's code has it. Axes may stand in front."""
  return x_TxD - jnp.mean(x_TxD, axis=-2, keepdims=True)


def composite_norm(x_TxD: jax.Array) -> jax.Array:
  """||X||_{1,inf} = sqrt(||X||_1 ||X||_inf): the largest column sum times the largest row sum (section 2)."""
  absolute = jnp.abs(x_TxD)
  return jnp.sqrt(absolute.sum(-2).max(-1) * absolute.sum(-1).max(-1))


def rank_residual(x_TxD: jax.Array) -> jax.Array:
  """r = ||res(X)|| / ||X||: 0 when all tokens are the same. In float32 it cannot fall below 2.5e-7; the doubly
  exponential collapse of attention alone needs float64 to be seen."""
  return composite_norm(residual(x_TxD)) / composite_norm(x_TxD)


def paths(heads_NxHxTxT: jax.Array, weights_NxHxDxD: jax.Array, x_TxD: jax.Array, *,
          skip: bool) -> dict[tuple[int | None, ...], jax.Array]:
  """The output of N layers of attention without MLP, norm and bias, as a sum over paths (theorem 2.1 and section 3.1).

  A path takes one head in every layer, P_N ... P_1 X W_1 ... W_N, or with skip connections none (None).

  Args:
    heads_NxHxTxT: patterns of that very pass.
    weights_NxHxDxD: W_V W_O of each head.

  Returns:
    TxD for each of the H^N, or (H + 1)^N, paths.
  """
  N, H = heads_NxHxTxT.shape[:2]
  found = {}
  for path in itertools.product([*([None] if skip else []), *range(H)], repeat=N):
    y_TxD = x_TxD
    for layer, head in enumerate(path):
      if head is not None:
        y_TxD = heads_NxHxTxT[layer, head] @ y_TxD @ weights_NxHxDxD[layer, head]
    found[path] = y_TxD
  return found


def by_length(found: dict[tuple[int | None, ...], jax.Array]) -> list[Sequence[jax.Array]]:
  """The outputs of the paths that pass k heads, for each k."""
  length = len(next(iter(found)))
  return [[y for path, y in found.items() if sum(head is not None for head in path) == k] for k in range(length + 1)]
