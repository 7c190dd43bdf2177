"""What a decoding loop carries from one token to the next, and the protocol by which it talks to a model.

A model that can be decoded has three methods; the loops in this package see only the third, with parameters and
memory closed over:

  encode(source_BxS) -> memory                                   once per batch of sources
  init_cache(memory, length, rows_per_source) -> Cache           room for `length` tokens in R = B x M rows
  step(tokens_RxT, memory, cache) -> (logits_RxTxV, Cache)       float32 logits for the token after each of the T

`step` takes any T >= 1 (the loops here always T = 1, a prefill takes more); T steps of one token and one step of T
tokens give the same logits. The first token that goes in is BOS. Decoding one batch then reads

  def step(tokens_RxT, cache):
    return model.apply(params, tokens_RxT, memory, cache, method='step')

  cache = model.apply(params, memory, length, beam_size, method='init_cache')
  found = beam_search(step, cache, max_lengths_B, length, beam_size=beam_size)

Rows are hypothesis-major within a sentence: hypothesis m of sentence b is row b * M + m.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Cache:
  """The model's memory of the tokens it has read; what is inside `source` and `steps` is the model's own business."""

  index: jax.Array
  """int32 []: how many tokens have gone in, the same for every row; the next token's position."""
  source: Any
  """Pytree with one row per source sentence (leading axis B), e.g. keys and values of the memory. Never reordered."""
  steps: Any
  """Pytree that grows with the tokens; every leaf has leading axis R, e.g. keys and values of the self-attention."""

  def reorder(self, rows_R: jax.Array) -> Cache:
    """The cache whose row r continues what row `rows_R[r]` was, as beam search needs when hypotheses change place.

    Only `steps` moves: a hypothesis never leaves its sentence, so `source` stays as it is. Rows beyond the last are the
    last: to look for them costs more than to move the others.
    """
    return self.replace(steps=jax.tree.map(lambda leaf: jnp.take(leaf, rows_R, axis=0, mode='clip'), self.steps))


Step = Callable[[jax.Array, Cache], tuple[jax.Array, Cache]]
"""(tokens_RxT int32, cache) -> (logits_RxTxV float32, cache): the model as the decoding loops see it."""
