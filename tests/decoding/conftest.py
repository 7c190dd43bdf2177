"""Toy models with a real cache: the logits depend on the source and, through a recurrent state, on the whole prefix."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from tfm.decoding.cache import Cache
from tfm.decoding.greedy import greedy_search
from tfm.special_ids import BOS

WIDTH = 8


@struct.dataclass
class Toy:
  """A random recurrent network: a pytree, so that a jitted search is compiled once for all weights."""

  weights: tuple
  eos: float
  """Added to the logit of EOS: sets how long outputs are."""
  vocabulary: int = struct.field(pytree_node=False)

  @staticmethod
  def make(vocabulary: int = 6, seed: int = 0, eos: float = 0.0) -> Toy:
    random = np.random.default_rng(seed)
    shapes = (vocabulary, WIDTH), (WIDTH, WIDTH), (WIDTH, vocabulary)
    embed_VxW, recur_WxW, out_WxV = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return Toy((embed_VxW, recur_WxW, out_WxV * np.float32(3 / WIDTH**0.5)), eos, vocabulary)

  def sources(self, batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(1000 + seed).standard_normal((batch, WIDTH)).astype(np.float32)

  def init_cache(self, source_BxW, rows_per_source: int = 1) -> Cache:
    rows = source_BxW.shape[0] * rows_per_source
    return Cache(index=jnp.int32(0), source=source_BxW, steps={'state': jnp.zeros((rows, WIDTH))})

  def step(self, tokens_RxT, cache: Cache):
    embed_VxW, recur_WxW, out_WxV = self.weights
    state_RxW = cache.steps['state']
    source_RxW = jnp.repeat(cache.source, state_RxW.shape[0] // cache.source.shape[0], axis=0)
    logits = []
    for t in range(tokens_RxT.shape[1]):
      # Sums, not matrix products: their rounding does not depend on the number of rows.
      recurred_RxW = (state_RxW[:, :, None] * recur_WxW).sum(1)
      state_RxW = jnp.tanh(recurred_RxW + jnp.asarray(embed_VxW)[tokens_RxT[:, t]] + source_RxW)
      logits.append((state_RxW[:, :, None] * out_WxV).sum(1))
    logits_RxTxV = jnp.stack(logits, axis=1).at[..., 2].add(self.eos)
    return logits_RxTxV, cache.replace(index=cache.index + tokens_RxT.shape[1], steps={'state': state_RxW})

  def log_probs(self, source_W, tokens) -> np.ndarray:
    """[len(tokens) + 1, V] float64: the model's log-probabilities of each next token, one sequence, nothing cached."""
    embed_VxW, recur_WxW, out_WxV = (np.asarray(weight, np.float64) for weight in self.weights)
    state_W, rows = np.zeros(WIDTH), []
    for token in [BOS, *tokens]:
      state_W = np.tanh(state_W @ recur_WxW + embed_VxW[token] + np.asarray(source_W, np.float64))
      logits_V = state_W @ out_WxV
      logits_V[2] += self.eos
      rows.append(logits_V - np.logaddexp.reduce(logits_V))
    return np.stack(rows)

  def log_prob(self, source_W, tokens) -> float:
    return float(sum(self.log_probs(source_W, tokens[:-1])[range(len(tokens)), list(tokens)])) if len(tokens) else 0.0


@pytest.fixture
def toy():
  """Makes models: `toy(vocabulary=..., seed=..., eos=...)`."""
  return Toy.make


@partial(jax.jit, static_argnames='length')
def _greedy(model, sources, limits_B, length, prefix_BxP=None, prefix_lengths_B=None):
  cache = model.init_cache(sources)
  return greedy_search(model.step, cache, limits_B, length, prefix_BxP, prefix_lengths_B)


@pytest.fixture
def greedy():
  """`greedy(model, sources, limits_B, length, prefix_BxP, prefix_lengths_B)`, compiled once per shape."""
  def search(model, sources, limits_B, *more):
    return jax.tree.map(np.asarray, _greedy(model, sources, np.asarray(limits_B), *more))

  return search
