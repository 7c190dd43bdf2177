"""Greedy search: always the most probable next token."""

from __future__ import annotations

import jax

from tfm.decoding.cache import Cache, Step
from tfm.decoding.loop import Decoded, autoregress, highest
from tfm.special_ids import OURS, SpecialIds


def greedy_search(step: Step, cache: Cache, max_lengths_B: jax.Array, length: int,
                  prefix_BxP: jax.Array | None = None, prefix_lengths_B: jax.Array | None = None,
                  special: SpecialIds = OURS, first_B: jax.Array | None = None) -> Decoded:
  """The output in which every token is the most probable one after those before it; ties go to the lowest id.

  One row per sentence (`init_cache` with rows_per_source 1). The arguments are those of
  `tfm.decoding.loop.autoregress`.
  """
  return autoregress(step, cache, most_probable, max_lengths_B, length, prefix_BxP, prefix_lengths_B, special,
                     first_B)[0]


def most_probable(log_probs_BxV: jax.Array, t: jax.Array) -> jax.Array:
  """The `Choose` of greedy search."""
  del t
  return highest(log_probs_BxV)
