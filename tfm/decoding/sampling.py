"""Sampling: the next token is drawn from the model's distribution, tempered and truncated as wished."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tfm.decoding.cache import Cache, Step
from tfm.decoding.loop import IMPOSSIBLE, Choose, Decoded, autoregress, highest
from tfm.special_ids import OURS, SpecialIds


def sample(step: Step, cache: Cache, max_lengths_B: jax.Array, length: int, keys_B: jax.Array,
           temperature: jax.Array | float = 1.0, top_k: int = 0, top_p: jax.Array | float = 1.0,
           prefix_BxP: jax.Array | None = None, prefix_lengths_B: jax.Array | None = None,
           special: SpecialIds = OURS, first_B: jax.Array | None = None) -> Decoded:
  """Draws one output per row.

  Token t of a row uses the random bits of fold_in(key of the row, t) and nothing else, so a sentence's sample depends
  neither on the batch it is in nor on the length of a forced prefix. The log-probabilities returned are the model's
  own: not tempered, not truncated.

  Args:
    keys_B: typed keys (`jax.random.key`), one per row; `sentence_keys` makes them.
    temperature: above 0; the log-probabilities are divided by it. Towards 0 it becomes greedy search.
    top_k: draw from exactly the k most probable tokens (ties at the k-th: lowest ids stay); 0 means from all. Static.
    top_p: draw from the smallest set of most probable tokens whose probability, tempered and renormalised over the
      top k, reaches p; 0 < p <= 1 (Holtzman et al. 2020, section 3.1). 1 means from all.

  The other arguments are those of `tfm.decoding.loop.autoregress`. For several outputs per sentence, give each its row:
  `init_cache` with rows_per_source = num and the limits repeated num times.

  Raises:
    ValueError: temperature, top_k or top_p out of range (where known before compilation), or keys of the wrong shape.
  """
  _check(keys_B, max_lengths_B.shape[0], temperature, top_k, top_p)

  choose = drawing(keys_B, temperature, top_k, top_p)
  return autoregress(step, cache, choose, max_lengths_B, length, prefix_BxP, prefix_lengths_B, special, first_B)[0]


def drawing(keys_B: jax.Array, temperature: jax.Array | float, top_k: int, top_p: jax.Array | float,
            first: jax.Array | int = 0) -> Choose:
  """The `Choose` of sampling; `first` is the number of the first token (of each row, maybe) where a text is written
  in pieces."""

  def draw(log_probs_BxV: jax.Array, t: jax.Array) -> jax.Array:
    truncated_BxV = truncate(log_probs_BxV / temperature, top_k, top_p)
    keys_at_t_B = jax.vmap(jax.random.fold_in)(keys_B, jnp.broadcast_to(t + first, keys_B.shape).astype(jnp.uint32))
    gumbel_BxV = jax.vmap(lambda key: jax.random.gumbel(key, truncated_BxV.shape[1:]))(keys_at_t_B)
    return highest(truncated_BxV + gumbel_BxV)  # the maximum of log p + Gumbel noise is distributed as p

  return draw


def truncate(logits_BxV: jax.Array, top_k: int = 0, top_p: jax.Array | float = 1.0) -> jax.Array:
  """The same logits with `IMPOSSIBLE` outside the top k and, of these, outside the nucleus of probability p."""
  vocabulary = logits_BxV.shape[-1]
  if top_k == 0 and isinstance(top_p, (int, float)) and top_p >= 1.0:
    return logits_BxV
  # top_k puts the lower id first among equals, and always returns exactly so many.
  sorted_BxK, ids_BxK = jax.lax.top_k(logits_BxV, min(top_k or vocabulary, vocabulary))
  probs_BxK = jax.nn.softmax(sorted_BxK, axis=-1)
  # A token is needed if those before it have not reached p; the first always is.
  keep_BxK = (jnp.cumsum(probs_BxK, axis=-1) - probs_BxK < top_p).at[:, 0].set(True)
  rows_Bx1 = jnp.arange(logits_BxV.shape[0])[:, None]
  keep_BxV = jnp.zeros(logits_BxV.shape, bool).at[rows_Bx1, ids_BxK].set(keep_BxK)
  return jnp.where(keep_BxV, logits_BxV, IMPOSSIBLE)


def sentence_keys(key: jax.Array, sentences_B: jax.Array, num: int = 1) -> jax.Array:
  """Typed keys [B x num] for `num` samples of each sentence, numbered as in the whole input and not in its batch.

  Sample m of sentence i always has the same key, whichever batch it falls into and however many samples are drawn.
  """
  def of_sentence(sentence: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, sentence), jnp.arange(num))

  return jax.vmap(of_sentence)(jnp.asarray(sentences_B)).reshape(-1)


def _check(keys_B: jax.Array, rows: int, temperature: jax.Array | float, top_k: int, top_p: jax.Array | float) -> None:
  if not jnp.issubdtype(keys_B.dtype, jax.dtypes.prng_key) or keys_B.shape != (rows,):
    raise ValueError(f'keys_B has shape {keys_B.shape} and type {keys_B.dtype}; give one jax.random.key per row: '
                     f'shape ({rows},), for instance from sentence_keys.')
  if isinstance(temperature, (int, float)) and not temperature > 0:
    raise ValueError(f'temperature is {temperature}; give a number above 0, or use greedy_search.')
  if top_k < 0:
    raise ValueError(f'top_k is {top_k}; give 1 or more, or 0 to draw from all tokens.')
  if isinstance(top_p, (int, float)) and not 0 < top_p <= 1:
    raise ValueError(f'top_p is {top_p}; give a probability above 0 and at most 1 (1: draw from all tokens).')
