"""How information can have flowed through all layers, read from attention patterns (Abnar & Zuidema 2020).

Both take the skip connection for half of what a layer passes on: A_l = (mean over heads of the pattern + I) / 2. They
know nothing of values and MLPs, so they say where information could have come from, not what it did.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

SCALE = 2**20
"""Capacities of the flow are whole numbers to the algorithm; one unit is this part of 1."""


def with_skip(patterns_NxHxTxT: jax.Array) -> jax.Array:
  """A_l of every layer, NxTxT; rows sum to 1."""
  mean = jnp.mean(patterns_NxHxTxT, axis=-3)
  mixed = (mean + jnp.eye(mean.shape[-1])) / 2
  return mixed / mixed.sum(-1, keepdims=True)


def rollout(patterns_NxHxTxT: jax.Array) -> jax.Array:
  """TxT: row t is how the last layer's position t is made of the input positions, A_N ... A_1 (section 3). Rows sum to
  1. Further axes may stand in front of N."""
  layers = with_skip(patterns_NxHxTxT)
  found = layers[..., 0, :, :]
  for i in range(1, layers.shape[-3]):
    found = layers[..., i, :, :] @ found
  return found


def cross_rollout(encoder_NxHxSxS: jax.Array, decoder_NxHxTxT: jax.Array, cross_NxHxTxS: jax.Array) -> jax.Array:
  """TxS: how much of the decoder's last layer at position t comes from source position s.

  In every decoder layer half stays, a quarter comes from other targets and a quarter from the source: the skip
  connections of both attentions halve what was there. What came in at one layer is mixed by those above.
  """
  source_SxS = rollout(encoder_NxHxSxS)
  self_NxTxT = with_skip(decoder_NxHxTxT)
  found_TxS = jnp.zeros((cross_NxHxTxS.shape[-2], cross_NxHxTxS.shape[-1]))
  for mixing_TxT, cross_HxTxS in zip(self_NxTxT, cross_NxHxTxS):
    found_TxS = (mixing_TxT @ found_TxS + jnp.mean(cross_HxTxS, axis=0) @ source_SxS) / 2
  return found_TxS


def flow(patterns_NxHxTxT: np.ndarray) -> np.ndarray:
  """TxT: the greatest flow from the input position of a column to the last layer's position of a row, where A_l are
  capacities (section 3). One problem of maximum flow for each pair: for texts of some tens of tokens."""
  from scipy.sparse import csr_array
  from scipy.sparse.csgraph import maximum_flow
  layers_NxTxT = np.asarray(with_skip(jnp.asarray(patterns_NxHxTxT)))
  N, T, _ = layers_NxTxT.shape
  capacities = np.zeros(((N + 1) * T,) * 2, np.int32)
  for i, layer_TxT in enumerate(layers_NxTxT):
    capacities[i * T:(i + 1) * T, (i + 1) * T:(i + 2) * T] = np.rint(layer_TxT.T * SCALE)
  graph = csr_array(capacities)
  return np.array([[maximum_flow(graph, s, N * T + t).flow_value for s in range(T)] for t in range(T)]) / SCALE
