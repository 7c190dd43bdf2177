"""Attention by its features (Brauwers & Frasincar 2021, arXiv 2203.14263, section 3.1).

More than one input (co-attention, rotatory), more than one level (hierarchical, attention-via-attention), more than one
representation. Every input has its own lengths, and nothing beyond them changes a context. What comes back is
(context, weights), with a name for every attention that took part.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm.attention import masks
from tfm.attention.alignments import AlignmentName, align, check_alignment
from tfm.attention.general import AttentionModule, AttentionParts, combine, mean
from tfm.attention.masks import AttentionMask
from tfm.section import require


class AlternatingCoAttention(nn.Module):
  """One input after the other (equations 7 to 9; Lu et al. 2016, section 3.3).

  The first is summed up without a query, that is the query for the second, and its context the query for the first
  again, with the same parameters plus a term for the query. The result is concat(c^(1), c^(2)).
  """

  parts: AttentionParts
  feature_widths: tuple[int, int]

  def setup(self):
    _check_once(self.parts, 'AlternatingCoAttention')
    require(self.parts.score == 'additive' and self.parts.centre_width is None,
            f"AlternatingCoAttention begins without a query, which score='{self.parts.score}' and a predicted centre "
            "cannot; choose score='additive' and another alignment.")
    first, second = self.feature_widths
    self.first = AttentionModule(self.parts, self.parts.value_width or second, first)
    self.second = AttentionModule(self.parts, self.parts.value_width or first, second)

  def __call__(self, first_BxSxF, second_BxSxF, first_lengths_B=None, second_lengths_B=None):
    """Context BxV and the weights of `start`, `second` and `first`, BxS."""
    first, second = self.first.prepare(first_BxSxF), self.second.prepare(second_BxSxF)
    first_mask, second_mask = _until(first_lengths_B), _until(second_lengths_B)
    start = self.first.attend(None, first, first_mask)
    on_second = self.second.attend(start.context_BxTxV, second, second_mask)
    on_first = self.first.attend(on_second.context_BxTxV, first, first_mask)
    return _joined(on_first, on_second), _weights(start=start, second=on_second, first=on_first)


class InteractiveCoAttention(nn.Module):
  """Each input with the mean key of the other as its query, at the same time (equations 10 and 11; Ma et al. 2017)."""

  parts: AttentionParts
  feature_widths: tuple[int, int]

  def setup(self):
    _check_once(self.parts, 'InteractiveCoAttention')
    first, second = self.feature_widths
    self.first = AttentionModule(self.parts, self.parts.key_width or second, first)
    self.second = AttentionModule(self.parts, self.parts.key_width or first, second)

  def __call__(self, first_BxSxF, second_BxSxF, first_lengths_B=None, second_lengths_B=None):
    """Context concat(c^(1), c^(2)), BxV, and the weights of `first` and `second`, BxS."""
    first_query, second_query = (
        mean(attention.project(features)[0], lengths_B)[:, None] for attention, features, lengths_B in (
            (self.second, second_BxSxF, second_lengths_B), (self.first, first_BxSxF, first_lengths_B)))
    on_first = self.first(first_query, first_BxSxF, _until(first_lengths_B))
    on_second = self.second(second_query, second_BxSxF, _until(second_lengths_B))
    return _joined(on_first, on_second), _weights(first=on_first, second=on_second)


class ParallelCoAttention(nn.Module):
  """Every pair of vectors has an affinity A_ij, from which both inputs get their scores; keys and values are features.

  Parameters: `affinity`, and with scores='additive' `first/kernel`, `second/kernel` and `first_output`,
  `second_output`.
  """

  feature_widths: tuple[int, int]
  affinity: Literal['bilinear', 'concatenated'] = 'bilinear'
  """'bilinear': A = tanh(K_1^T W_A K_2) (equation 12; Lu et al. 2016); 'concatenated': A_ij = w_A^T concat(k_i, k_j,
  k_i * k_j) (equation 13; Seo et al. 2017)."""
  scores: Literal['additive', 'max'] = 'additive'
  """'additive': w_1 act(W_2 K_2 A^T + W_1 K_1) (equations 14 and 15); 'max': max_j A_ij (equation 16)."""
  hidden_width: int | None = None
  """d_w of scores='additive'; None with 'max'."""
  alignment: AlignmentName = 'soft'
  output: Literal['concatenated', 'sum'] = 'concatenated'
  dtype: str = 'float32'

  def setup(self):
    check_alignment(self.alignment)
    require(self.alignment in ('soft', 'sparsemax', 'entmax15', 'hard'),
            f"ParallelCoAttention has no query and no output position, so alignment='{self.alignment}' has nothing to "
            "go by; choose 'soft', 'sparsemax', 'entmax15' or 'hard'.")
    first, second = self.feature_widths
    require(first == second or (self.affinity == 'bilinear' and self.output == 'concatenated'),
            f"affinity='{self.affinity}' with output='{self.output}' needs inputs of one width, not {first} and "
            f"{second}; choose 'bilinear' and 'concatenated'.")
    require((self.hidden_width is not None) == (self.scores == 'additive'),
            f"hidden_width is {self.hidden_width} with scores='{self.scores}'; 'additive' needs it, 'max' has no use "
            'for it.')
    xavier = nn.initializers.xavier_uniform()
    shape = (first, second) if self.affinity == 'bilinear' else (3, first)
    self.affinity_weight = self.param('affinity', xavier, shape)
    if self.scores == 'additive':
      W, vector = self.hidden_width, nn.initializers.normal(self.hidden_width**-0.5)
      self.first_kernel, self.second_kernel = (
          self.param(f'{name}_kernel', xavier, (width, W)) for name, width in (('first', first), ('second', second)))
      self.first_output, self.second_output = (
          self.param(f'{name}_output', vector, (W,)) for name in ('first', 'second'))

  def __call__(self, first_BxSxF, second_BxSxF, first_lengths_B=None, second_lengths_B=None):
    """Context BxV, and the weights of `first` and `second`, BxS, and `affinity`, BxS1xS2, 0 beyond the lengths."""
    first, second = first_BxSxF.astype(self.dtype), second_BxSxF.astype(self.dtype)
    real_first, real_second = (jnp.ones(x.shape[:2], bool) if lengths_B is None else
                               jnp.arange(x.shape[1]) < lengths_B[:, None]
                               for x, lengths_B in ((first, first_lengths_B), (second, second_lengths_B)))
    real_BxS1xS2 = real_first[:, :, None] & real_second[:, None, :]
    affinity_BxS1xS2 = jnp.where(real_BxS1xS2, self._affinity(first, second), 0)
    if self.scores == 'max':
      lowest = jnp.finfo(affinity_BxS1xS2.dtype).min
      shown = jnp.where(real_BxS1xS2, affinity_BxS1xS2, lowest)
      first_scores, second_scores = jnp.max(shown, axis=2), jnp.max(shown, axis=1)
    else:
      first_scores, second_scores = self._additive(first, second, affinity_BxS1xS2)
    weights = {name: align(self.alignment, scores[:, None], real[:, None]) for name, scores, real in (
        ('first', first_scores, real_first), ('second', second_scores, real_second))}
    contexts = [combine(weights['first'], first)[:, 0], combine(weights['second'], second)[:, 0]]
    context = sum(contexts) if self.output == 'sum' else jnp.concatenate(contexts, axis=-1)
    return context, {name: array[:, 0] for name, array in weights.items()} | {'affinity': affinity_BxS1xS2}

  def _affinity(self, first, second):
    weight = self.affinity_weight.astype(self.dtype)
    if self.affinity == 'bilinear':
      return jnp.tanh(jnp.einsum('bif,fg,bjg->bij', first, weight, second))
    # w_A^T concat(k_i, k_j, k_i * k_j), without ever holding the concatenation.
    return ((first @ weight[0])[:, :, None] + (second @ weight[1])[:, None, :]
            + jnp.einsum('bif,f,bjf->bij', first, weight[2], second))

  def _additive(self, first, second, affinity_BxS1xS2):
    first_BxS1xW, second_BxS2xW = (x @ kernel.astype(self.dtype) for x, kernel in (
        (first, self.first_kernel), (second, self.second_kernel)))
    hidden_first = jnp.tanh(affinity_BxS1xS2 @ second_BxS2xW + first_BxS1xW)
    hidden_second = jnp.tanh(jnp.swapaxes(affinity_BxS1xS2, 1, 2) @ first_BxS1xW + second_BxS2xW)
    exact = jnp.promote_types(self.dtype, jnp.float32)
    return (hidden_first.astype(exact) @ self.first_output.astype(exact),
            hidden_second.astype(exact) @ self.second_output.astype(exact))


class MultiGrainedCoAttention(nn.Module):
  """Coarse- and fine-grained co-attention side by side, their four contexts concatenated (Fan et al. 2018)."""

  coarse: InteractiveCoAttention
  fine: ParallelCoAttention

  def __call__(self, first_BxSxF, second_BxSxF, first_lengths_B=None, second_lengths_B=None):
    """Context BxV, and the weights of `coarse_first`, `coarse_second`, `fine_first`, ..."""
    inputs = first_BxSxF, second_BxSxF, first_lengths_B, second_lengths_B
    found = {'coarse': self.coarse(*inputs), 'fine': self.fine(*inputs)}
    return (jnp.concatenate([context for context, _ in found.values()], axis=-1),
            {f'{grain}_{name}': array for grain, (_, weights) in found.items() for name, array in weights.items()})


class RotatoryAttention(nn.Module):
  """A target, and what stands left and right of it, each the other's query (equations 17 to 20; Zheng & Xia 2018).

  The mean target asks both sides; each side's context then asks the target. The result is concat(r^l, r^r, r^lt, r^rt).
  Keys and values are the features. With more hops the two contexts of the target ask the sides again, with the same
  parameters (LCR-Rot-hop, Wallaart & Frasincar 2019).
  """

  parts: AttentionParts
  target_width: int
  left_width: int
  right_width: int
  hops: int = 1

  def setup(self):
    _check_once(self.parts, 'RotatoryAttention')
    require(self.parts.key_width is None and self.parts.value_width is None,
            'Rotatory attention has the features as keys and values; leave key_width and value_width out.')
    require(self.hops > 0, f'hops is {self.hops}; give 1 or more.')
    self.left = AttentionModule(self.parts, self.target_width, self.left_width)
    self.right = AttentionModule(self.parts, self.target_width, self.right_width)
    self.target_of_left = AttentionModule(self.parts, self.left_width, self.target_width)
    self.target_of_right = AttentionModule(self.parts, self.right_width, self.target_width)

  def __call__(self, target_BxSxF, left_BxSxF, right_BxSxF, target_lengths_B=None, left_lengths_B=None,
               right_lengths_B=None):
    """Context BxV, and the weights of `left`, `right`, `target_of_left` and `target_of_right` in the last hop."""
    target_mask = _until(target_lengths_B)
    ask_left = ask_right = mean(target_BxSxF, target_lengths_B)[:, None]
    for _ in range(self.hops):
      left = self.left(ask_left, left_BxSxF, _until(left_lengths_B))
      right = self.right(ask_right, right_BxSxF, _until(right_lengths_B))
      target_of_left = self.target_of_left(left.context_BxTxV, target_BxSxF, target_mask)
      target_of_right = self.target_of_right(right.context_BxTxV, target_BxSxF, target_mask)
      ask_left, ask_right = target_of_left.context_BxTxV, target_of_right.context_BxTxV
    return (_joined(left, right, target_of_left, target_of_right),
            _weights(left=left, right=right, target_of_left=target_of_left, target_of_right=target_of_right))


class AttentionViaAttention(nn.Module):
  """A query asks the words; with what it found, it asks the characters (Zhao & Zhang 2018): concat(c^(w), c^(c))."""

  parts: AttentionParts
  query_width: int
  word_width: int
  character_width: int

  def setup(self):
    self.words = AttentionModule(self.parts, self.query_width, self.word_width)
    self.characters = AttentionModule(self.parts, self.query_width + self.words.width, self.character_width)

  def __call__(self, query_BxTxQ, words_BxSxF, characters_BxSxF, word_lengths_B=None, character_lengths_B=None):
    """Context BxTxV, and the weights of `words` and `characters`, BxTxS."""
    words = self.words(query_BxTxQ, words_BxSxF, _until(word_lengths_B))
    query = jnp.concatenate([query_BxTxQ.astype(self.parts.dtype), words.context_BxTxV], axis=-1)
    characters = self.characters(query, characters_BxSxF, _until(character_lengths_B))
    return (jnp.concatenate([words.context_BxTxV, characters.context_BxTxV], axis=-1),
            {'words': words.weights, 'characters': characters.weights})


class HierarchicalAttention(nn.Module):
  """Words to sentences, sentences to a document, both without a query (Yang et al. 2016).

  `attend_words` and `attend_sentences` are methods of their own, for a model that encodes the sentences in between.
  """

  parts: AttentionParts
  feature_width: int
  sentence_width: int | None = None
  """Width of what `attend_sentences` is given; None: of what `attend_words` returns."""

  def setup(self):
    _check_once(self.parts, 'HierarchicalAttention')
    self.words = AttentionModule(self.parts, None, self.feature_width)
    self.sentences = AttentionModule(self.parts, None, self.sentence_width or self.words.width)

  def attend_words(self, features_BxPxSxF, lengths_BxP=None):
    """Of P sentences: BxPxV, and weights BxPxS."""
    B, P, S, F = features_BxPxSxF.shape
    lengths = None if lengths_BxP is None else lengths_BxP.reshape(B * P)
    found = self.words(None, features_BxPxSxF.reshape(B * P, S, F), _until(lengths))
    return found.context_BxTxV.reshape(B, P, -1), found.weights[:, 0].reshape(B, P, *found.weights.shape[2:])

  def attend_sentences(self, sentences_BxPxV, counts_B=None):
    """Of a document: BxV, and weights BxP."""
    found = self.sentences(None, sentences_BxPxV, _until(counts_B))
    return found.context_BxTxV[:, 0], found.weights[:, 0]

  def __call__(self, features_BxPxSxF, lengths_BxP=None):
    """Context BxV, and the weights of `words`, BxPxS, and `sentences`, BxP; sentences of length 0 are padding."""
    sentences_BxPxV, words = self.attend_words(features_BxPxSxF, lengths_BxP)
    counts_B = None if lengths_BxP is None else jnp.max(
        jnp.where(lengths_BxP > 0, jnp.arange(1, lengths_BxP.shape[1] + 1), 0), axis=1)
    context_BxV, sentences = self.attend_sentences(sentences_BxPxV, counts_B)
    return context_BxV, {'words': words, 'sentences': sentences}


class MultiRepresentational(nn.Module):
  """Several embeddings of a token mapped to one width and summed with weights of their own (equations 21 and 22).

  Kiela et al. 2018, "Dynamic Meta-Embeddings".
  """

  parts: AttentionParts
  embedding_widths: tuple[int, ...]
  width: int
  """d_t"""

  def setup(self):
    _check_once(self.parts, 'MultiRepresentational')
    self.projections = [nn.Dense(self.width, dtype=self.parts.dtype, name=f'projection_{i}')
                        for i in range(len(self.embedding_widths))]
    self.attention = AttentionModule(self.parts, None, self.width)

  def __call__(self, *embeddings_BxSxE):
    """Tokens BxSxV, and the weights of their `representations`, BxSxR."""
    if len(embeddings_BxSxE) != len(self.embedding_widths):
      raise ValueError(f'{len(embeddings_BxSxE)} embeddings were given, and embedding_widths has '
                       f'{len(self.embedding_widths)}; give one for each.')
    projected_BxSxRxD = jnp.stack([projection(x) for projection, x in zip(self.projections, embeddings_BxSxE)], axis=2)
    B, S, R, D = projected_BxSxRxD.shape
    found = self.attention(None, projected_BxSxRxD.reshape(B * S, R, D))
    return found.context_BxTxV.reshape(B, S, -1), {
        'representations': found.weights[:, 0].reshape(B, S, *found.weights.shape[2:])}


def _check_once(parts: AttentionParts, owner: str) -> None:
  """One look at the whole input: there is no output position to follow and nothing is drawn."""
  require(parts.alignment not in ('local_monotonic', 'hard_sampled'),
          f"alignment='{parts.alignment}' draws a sample or follows the output's position, and {owner} looks once at "
          'all of its input; choose another alignment.')


def _until(lengths_B: jax.Array | None) -> AttentionMask | None:
  return None if lengths_B is None else masks.lengths(lengths_B)


def _joined(*found) -> jax.Array:
  return jnp.concatenate([one.context_BxTxV[:, 0] for one in found], axis=-1)


def _weights(**found) -> dict[str, jax.Array]:
  return {name: one.weights[:, 0] for name, one in found.items()}
