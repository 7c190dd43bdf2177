"""Word alignment: links from attention or from gradients, and how far they are from gold links.

A link is a pair (source word, target word), counted from 0. A pattern has a target token a row and a source token a
column; `<s>` and `</s>` are no words, so their rows and columns are cut off before links are taken.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tfm.models.embedding import Embedding

Link = tuple[int, int]
Indexing = Literal['output', 'input']
INDEXINGS: tuple[Indexing, ...] = ('output', 'input')


def alignment_error_rate(found: Sequence[Collection[Link]], sure: Sequence[Collection[Link]],
                         possible: Sequence[Collection[Link]] | None = None) -> float:
  """AER = 1 - (|A & S| + |A & P|) / (|A| + |S|), from 0 to 1 (Och & Ney 2003).

  Args:
    found: A, the links of every sentence.
    sure: S, links that must be there.
    possible: P, links that may be there; S must be among them. None: P is S.

  Raises:
    ValueError: the lists are not as long as one another, a sure link is not possible, or there are no links at all.
  """
  possible = sure if possible is None else possible
  if not len(found) == len(sure) == len(possible):
    raise ValueError(f'There are links of {len(found)} sentences, sure ones of {len(sure)} and possible ones of '
                     f'{len(possible)}; give one set for each sentence.')
  hits = total = 0
  for number, (a, s, p) in enumerate(zip(map(set, found), map(set, sure), map(set, possible))):
    if not s <= p:
      raise ValueError(f'Sentence {number} has the sure link {min(s - p)}, which is not among the possible ones; add '
                       'it there.')
    hits += len(a & s) + len(a & p)
    total += len(a) + len(s)
  if not total:
    raise ValueError('There are no links, neither found nor sure, so there is no rate of error; give sentences with '
                     'links.')
  return 1 - hits / total


def attention_correctness(patterns: Sequence[np.ndarray], gold: Sequence[Collection[Link]]) -> float:
  """Mean over the target words that have a link of AC = sum of a_i for i in G, the weight on their gold source words
  (Liu et al. 2017; Brauwers & Frasincar 2021, equation 46).

  Args:
    patterns: of every sentence, words as TxS; rows sum to 1.

  Raises:
    ValueError: no sentence has a link, or there are not as many sets of links as patterns.
  """
  if len(patterns) != len(gold):
    raise ValueError(f'There are {len(patterns)} patterns and links of {len(gold)} sentences; give one set for each.')
  linked = sum(len({j for _, j in links}) for links in gold)
  if not linked:
    raise ValueError('No target word has a gold link, so there is no weight to look at; give sentences with links.')
  return float(sum(pattern_TxS[j, i] for pattern_TxS, links in zip(patterns, gold) for i, j in links) / linked)


# -- from patterns to links -------------------------------------------------------------------------------------------


def rows_of_words(pattern_TxS: np.ndarray, tokens: int, indexing: Indexing) -> np.ndarray:
  """The rows that stand for the first `tokens` target tokens, of a pattern (..., T, S) of teacher forcing.

  Row t is the step that reads token t of <s> y_0 y_1 ... and predicts y_t. 'output': row t stands for y_t, which it
  predicts. 'input': row t + 1 stands for y_t, which it reads (Shift-Att, Chen et al. 2020).

  Raises:
    ValueError: there are not rows enough; 'input' needs the step that reads the last word too.
  """
  first = {'output': 0, 'input': 1}[indexing]
  if pattern_TxS.shape[-2] < first + tokens:
    raise ValueError(f"{tokens} target tokens need {first + tokens} rows with indexing='{indexing}', the pattern has "
                     f'{pattern_TxS.shape[-2]}; read it with <s> and all tokens as input.')
  return pattern_TxS[..., first:first + tokens, :]


def word_starts(tokens: Sequence[str]) -> np.ndarray:
  """Where words begin among the tokens of `Tokenizer.tokens`: the first, and those with a space before them."""
  return np.array([place for place, token in enumerate(tokens) if place == 0 or token.startswith('▁')], int)


def word_pattern(pattern_TxS: np.ndarray, source_tokens: Sequence[str], target_tokens: Sequence[str],
                 indexing: Indexing) -> np.ndarray:
  """A pattern (..., T, S) of teacher forcing as one of words: the greatest weight between any two tokens of them.

  Args:
    source_tokens, target_tokens: of `Tokenizer.tokens`, without special ones, at the start of the columns and of the
      rows that `rows_of_words` takes by `indexing`.
  """
  if not source_tokens or not target_tokens:
    raise ValueError(f'{len(source_tokens)} source and {len(target_tokens)} target tokens have no pattern of words; '
                     'give sentences with text on both sides.')
  rows = rows_of_words(pattern_TxS, len(target_tokens), indexing)[..., :len(source_tokens)]
  rows = np.maximum.reduceat(rows, word_starts(target_tokens), axis=-2)
  return np.maximum.reduceat(rows, word_starts(source_tokens), axis=-1)


def links_of(pattern_TxS: np.ndarray) -> frozenset[Link]:
  """Every target word with the source word of the greatest weight in its row; of equals the first."""
  if not pattern_TxS.size:
    return frozenset()
  return frozenset((int(i), j) for j, i in enumerate(pattern_TxS.argmax(axis=-1)))


def error_table(patterns: Sequence[np.ndarray], gold: Sequence[Collection[Link]]) -> np.ndarray:
  """AER of every head, NxH, with the mean of a layer's heads in a last column, Nx(H+1).

  Args:
    patterns: of every sentence, words as NxHxTxS.
  """
  with_mean = [np.concatenate([pattern, pattern.mean(axis=1, keepdims=True)], axis=1) for pattern in patterns]
  N, H = with_mean[0].shape[:2]
  return np.array([[alignment_error_rate([links_of(pattern[n, h]) for pattern in with_mean], gold) for h in range(H)]
                   for n in range(N)])


# -- without attention ------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames='model')
def saliency(model, params, source_BxS: jax.Array, target_BxT: jax.Array) -> jax.Array:
  """|d log p(y_t) / d x_s|, BxTxS float32, of every encoder-decoder, whether it attends to its source or not.

  x_s is the row of the embedding table that the encoder reads at s, y_t the token that position t predicts:
  target_BxT[:, t + 1]. So there are T - 1 rows, and they are indexed by output. The length is the Euclidean one (Li et
  al. 2016 look at the gradient of classifiers; Ding et al. 2019, for translation, at its product with the embedding).
  Rows of padding mean nothing; its columns are 0.

  Args:
    model: an encoder-decoder (static).
    source_BxS, target_BxT: int32 ids; targets begin with <s>, padding is on the right.
  """
  inputs_BxT, labels_BxT = target_BxT[:, :-1], target_BxT[:, 1:]

  def log_prob(nudge_BxSxD):

    def nudged(call, args, kwargs, context):
      value = call(*args, **kwargs)
      # While encoding only the source is looked up, also where both languages share a table.
      if isinstance(context.module, Embedding) and context.method_name == '__call__':
        return value + nudge_BxSxD.astype(value.dtype)
      return value

    with nn.intercept_methods(nudged):
      memory = model.apply({'params': params}, source_BxS, method='encode')
    logits_BxTxV = model.apply({'params': params}, inputs_BxT, memory, method='decode')
    log_prob_BxTxV = jax.nn.log_softmax(logits_BxTxV)
    # Sentences do not meet, so the gradient of the sum over them is that of each.
    return jnp.take_along_axis(log_prob_BxTxV, labels_BxT[..., None], axis=-1)[..., 0].sum(axis=0)

  nudge_BxSxD = jnp.zeros((*source_BxS.shape, model.config.d_model))
  _, pull_back = jax.vjp(log_prob, nudge_BxSxD)
  (gradient_TxBxSxD,) = jax.vmap(pull_back)(jnp.eye(labels_BxT.shape[1]))
  return jnp.swapaxes(jnp.linalg.norm(gradient_TxBxSxD, axis=-1), 0, 1)


# -- controls ---------------------------------------------------------------------------------------------------------


def diagonal_links(source_words: int, target_words: int) -> frozenset[Link]:
  """Every target word with the source word at the same part of the sentence."""
  return frozenset(((2 * j + 1) * source_words // (2 * target_words), j) for j in range(target_words))


def uniform_links(source_words: int, target_words: int, rng: np.random.Generator) -> frozenset[Link]:
  """What a uniform pattern says, where every source word is the greatest one: any of them."""
  return frozenset((int(i), j) for j, i in enumerate(rng.integers(source_words, size=target_words)))


def shuffled_rows(pattern_TxS: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """The rows of (..., T, S) in an order drawn at random, the same for all heads: each keeps its shape and loses its
  target word."""
  return pattern_TxS[..., rng.permutation(pattern_TxS.shape[-2]), :]
