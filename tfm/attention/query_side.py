"""Attention by its queries (Brauwers & Frasincar 2021, arXiv 2203.14263, section 3.3).

A basic query comes from outside, such as a decoder's state: `AttentionModule` alone. Here are the other types
(specialized, self-attentive) and more than one query (heads, hops, capsules).
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from tfm.attention import masks
from tfm.attention.alignments import PredictedCentre
from tfm.attention.general import Attended, AttentionModule, AttentionParts, combine, matrix, mean, row_lengths, weigh
from tfm.attention.masks import AttentionMask
from tfm.attention.score_functions import Score
from tfm.section import require


class SelfAttentive(nn.Module):
  """The query is the features' own (section 3.3.1).

  'constant': none at all, which only the additive score can do without (equation 33). 'learned': a vector of weights
  (equation 34). 'features': one for every feature vector, Q = W_Q F (equation 35), whose context replaces it (update
  'context', equation 36) or is added to it and normed (update 'add_norm', equation 37).
  """

  parts: AttentionParts
  feature_width: int
  query: Literal['constant', 'learned', 'features']
  update: Literal['context', 'add_norm'] = 'context'
  query_width: int | None = None
  """Q of 'learned' and 'features'; None is the width of the keys."""

  def setup(self):
    require(self.update == 'context' or self.query == 'features',
            f"update='{self.update}' renews every feature vector, and query='{self.query}' gives one context for all; "
            "choose query='features'.")
    require(self.query != 'constant' or self.query_width is None,
            "query_width has no effect with query='constant', which has no query; leave it out.")
    width = self.query_width or self.parts.key_width or self.feature_width
    self.attention = AttentionModule(self.parts, None if self.query == 'constant' else width, self.feature_width)
    require(self.update == 'context' or self.attention.width == self.feature_width,
            f"update='add_norm' adds contexts of width {self.attention.width} to features of width "
            f'{self.feature_width}; set value_width to that of the features.')
    if self.query == 'learned':
      self.learned_Q = self.param('query', nn.initializers.normal(width**-0.5), (width,))
    if self.query == 'features':
      self.query_matrix = matrix(width, self.parts.dtype)
    if self.update == 'add_norm':
      self.norm = nn.LayerNorm(dtype=self.parts.dtype)

  def __call__(self, features_BxSxF: jax.Array, mask: AttentionMask | None = None, **options) -> Attended:
    """One context (T is 1), or with query='features' new features (T is S).

    `options` are those of `AttentionModule.attend`.
    """
    query = None
    if self.query == 'learned':
      query = jnp.broadcast_to(self.learned_Q, (features_BxSxF.shape[0], 1, *self.learned_Q.shape))
    if self.query == 'features':
      query = self.query_matrix(features_BxSxF)
    found = self.attention(query, features_BxSxF, mask, **options)
    if self.update == 'context':
      return found
    return found.replace(context_BxTxV=self.norm(features_BxSxF.astype(self.parts.dtype) + found.context_BxTxV))


class Specialized(nn.Module):
  """The query is made of another input: its mean (as in equation 11), or what self-attention finds in it."""

  parts: AttentionParts
  feature_width: int
  other_width: int
  query: Literal['mean', 'context'] = 'mean'

  def setup(self):
    width = self.other_width
    if self.query == 'context':
      self.other = SelfAttentive(self.parts, self.other_width, 'constant')
      width = self.parts.value_width or width
    self.attention = AttentionModule(self.parts, width, self.feature_width)

  def __call__(self, other_BxSxF: jax.Array, features_BxSxF: jax.Array, mask: AttentionMask | None = None,
               other_lengths_B: jax.Array | None = None, **options) -> Attended:
    if self.query == 'mean':
      query_Bx1xQ = mean(other_BxSxF, other_lengths_B)[:, None]
    else:
      other_mask = None if other_lengths_B is None else masks.lengths(other_lengths_B)
      query_Bx1xQ = self.other(other_BxSxF, other_mask).context_BxTxV
    return self.attention(query_Bx1xQ, features_BxSxF, mask, **options)


class MultiHead(nn.Module):
  """c = W_O concat(c^(1), ..., c^(H)); head j has W_q^(j) q, W_K^(j) F and W_V^(j) F (equations 38 to 40).

  With score='scaled' and alignment='soft' it is the Transformer's, with the same parameters under the same names. Score
  and centre have parameters of each head's own, stacked along the first axis.
  """

  parts: AttentionParts
  """With the widths of one head in key_width and value_width."""
  num_heads: int
  output_width: int
  query_head_width: int | None = None
  """d_q of a head; None is key_width."""

  def setup(self):
    p, H = self.parts, self.num_heads
    require(p.key_width is not None and p.value_width is not None,
            f'key_width is {p.key_width} and value_width {p.value_width}; every head has matrices of its own, so give '
            'both.')
    xavier = nn.initializers.xavier_uniform()

    def heads(width):
      return nn.DenseGeneral((H, width), use_bias=False, dtype=p.dtype, kernel_init=xavier)

    def for_each_head(module, *methods):
      return nn.vmap(module, variable_axes={'params': 0}, split_rngs={'params': True}, axis_size=H, methods=methods)

    width = self.query_head_width or p.key_width
    self.query, self.key, self.value = heads(width), heads(p.key_width), heads(p.value_width)
    self.output = nn.DenseGeneral(self.output_width, axis=(-2, -1), use_bias=False, dtype=p.dtype, kernel_init=xavier)
    self.score = for_each_head(Score, 'prepare', '__call__')(
        p.score, width, p.key_width, p.hidden_width,
        p.value_width if p.alignment == 'soft_per_feature' else None, p.activation, p.dtype)
    if p.centre_width is not None:
      self.centre = nn.vmap(PredictedCentre, variable_axes={'params': 0}, split_rngs={'params': True}, axis_size=H,
                            in_axes=(0, None))(width, p.centre_width, p.dtype)

  def __call__(self, query_BxTxQ: jax.Array, features_BxSxF: jax.Array, mask: AttentionMask | None = None, *,
               centre_BxT: jax.Array | None = None, key: jax.Array | None = None,
               tap=lambda name, value: value) -> Attended:
    """`AttentionModule.attend` with weights (and taps) BxHxTxS, and BxTx of the output width."""
    p, H = self.parts, self.num_heads
    (B, T), S = query_BxTxQ.shape[:2], features_BxSxF.shape[1]
    q_HxBxTxQ, k_HxBxSxK, v_HxBxSxV = (jnp.moveaxis(projected, 2, 0) for projected in (
        self.query(query_BxTxQ), self.key(features_BxSxF), self.value(features_BxSxF)))
    scores = self.score(q_HxBxTxQ, self.score.prepare(k_HxBxSxK))
    scores = jnp.moveaxis(tap('scores', jnp.moveaxis(scores, 0, 1)), 1, 0)
    centre, per_head = (None, None) if centre_BxT is None else (centre_BxT, None)
    if p.centre_width is not None:
      if centre_BxT is not None:
        raise ValueError('The centre is given, and centre_width has it predicted as well; leave one of them out.')
      centre, per_head = self.centre(q_HxBxTxQ, row_lengths(mask, S)), 0
    allowed = None if mask is None else mask.to_array(T, S)
    if allowed is not None:
      allowed = jnp.moveaxis(jnp.broadcast_to(allowed, (B, H, T, S)), 1, 0)
    keys = None if key is None else jax.random.split(key, H)
    axes = (0, None if allowed is None else 0, per_head, None if keys is None else 0)
    weights, log_probability = jax.vmap(lambda *arrays: weigh(p, *arrays), in_axes=axes)(scores, allowed, centre, keys)
    weights = jnp.moveaxis(tap('pattern', jnp.moveaxis(weights, 0, 1)), 1, 0)
    z_BxTxHxV = tap('z', jnp.moveaxis(jax.vmap(combine)(weights, v_HxBxSxV), 0, 2))
    # One draw for all heads is as likely as the product of theirs.
    log_probability_BxT = None if log_probability is None else jnp.sum(log_probability, axis=0)
    return Attended(self.output(z_BxTxHxV), jnp.moveaxis(weights, 0, 1), log_probability_BxT)


class MultiHop(nn.Module):
  """q^(s+1) = transform(q^(s), c^(s)); c^(s+1) attends with concat(q^(s+1), c^(s)) (equations 41 and 42).

  The first context is the mean of the values, without weights. With `shared` every hop has the same parameters (Tran &
  Niederée 2018), else its own, as the Transformer's layers.
  """

  parts: AttentionParts
  query_width: int
  feature_width: int
  hops: int
  shared: bool = True
  transform: Literal['none', 'linear'] = 'linear'
  """'none': the query stays; 'linear': tanh(W concat(q, c) + b)."""

  def setup(self):
    require(self.hops > 0, f'hops is {self.hops}; give 1 or more.')
    context_width = self.parts.value_width or self.feature_width
    count = 1 if self.shared else self.hops
    self.attention = [AttentionModule(self.parts, self.query_width + context_width, self.feature_width)
                      for _ in range(count)]
    if self.transform == 'linear':
      self.next_query = [nn.Dense(self.query_width, dtype=self.parts.dtype) for _ in range(count)]

  def __call__(self, query_BxTxQ: jax.Array, features_BxSxF: jax.Array, mask: AttentionMask | None = None,
               **options) -> tuple[Attended, ...]:
    """What every hop found; the last one is the result. `options` are `AttentionModule.attend`'s."""
    query_BxTxQ, found = query_BxTxQ.astype(self.parts.dtype), []
    for hop in range(self.hops):
      attention = self.attention[0 if self.shared else hop]
      source = attention.prepare(features_BxSxF)
      if hop == 0:
        lengths_B = None if mask is None else mask.lengths_B
        context_BxTxV = jnp.broadcast_to(mean(source.values_BxSxV, lengths_B)[:, None],
                                         (*query_BxTxQ.shape[:2], attention.width))
      if self.transform == 'linear':
        next_query = self.next_query[0 if self.shared else hop]
        query_BxTxQ = jnp.tanh(next_query(jnp.concatenate([query_BxTxQ, context_BxTxV], axis=-1)))
      found.append(attention.attend(jnp.concatenate([query_BxTxQ, context_BxTxV], axis=-1), source, mask, **options))
      context_BxTxV = found[-1].context_BxTxV
    return tuple(found)


@struct.dataclass
class Capsuled:
  """For each of L classes."""

  logits_BxL: jax.Array
  """Of p_c."""
  probabilities_BxL: jax.Array
  """p_c (equation 44)."""
  representations_BxLxV: jax.Array
  """r_c (equation 45)."""
  weights: jax.Array
  """Where the class looked: BxLxS, or BxLxSxV for 'soft_per_feature'."""


class Capsules(nn.Module):
  """A query for every class: e_cl = q_c^T k_l, p_c = sigmoid(w_c^T c_c + b_c), r_c = p_c c_c (equations 43 to 45).

  Wang et al. 2018, "Sentiment Analysis by Capsules". Any other score may stand for q_c^T k_l.
  """

  parts: AttentionParts
  feature_width: int
  classes: int
  query_width: int | None = None
  """None is the width of the keys."""

  def setup(self):
    width = self.query_width or self.parts.key_width or self.feature_width
    self.attention = AttentionModule(self.parts, width, self.feature_width)
    V = self.attention.width
    self.query_LxQ = self.param('query', nn.initializers.normal(width**-0.5), (self.classes, width))
    self.weight_LxV = self.param('weight', nn.initializers.normal(V**-0.5), (self.classes, V))
    self.bias_L = self.param('bias', nn.initializers.zeros_init(), (self.classes,))

  def __call__(self, features_BxSxF: jax.Array, mask: AttentionMask | None = None, **options) -> Capsuled:
    query_BxLxQ = jnp.broadcast_to(self.query_LxQ, (features_BxSxF.shape[0], *self.query_LxQ.shape))
    found = self.attention(query_BxLxQ, features_BxSxF, mask, **options)
    context_BxLxV = found.context_BxTxV
    logits_BxL = jnp.einsum('blv,lv->bl', context_BxLxV, self.weight_LxV.astype(context_BxLxV.dtype)) + self.bias_L
    probabilities_BxL = jax.nn.sigmoid(logits_BxL)
    return Capsuled(logits_BxL, probabilities_BxL,
                    probabilities_BxL[..., None].astype(context_BxLxV.dtype) * context_BxLxV, found.weights)


def capsule_loss(found: Capsuled, features_BxSxF: jax.Array, label_B: jax.Array,
                 lengths_B: jax.Array | None = None) -> jax.Array:
  """The joint loss of capsules, B: probability of the class, and likeness of its representation to the mean feature.

  Both are hinges, max(0, 1 + sum_c y_c p_c) and max(0, 1 + sum_c y_c f^T r_c), y_c = -1 for the label and 1 for the
  other classes (Wang et al. 2018).

  Raises:
    ValueError: values are not as wide as features, so their product is not defined.
  """
  V, F = found.representations_BxLxV.shape[-1], features_BxSxF.shape[-1]
  if V != F:
    raise ValueError(f'Representations of width {V} cannot be compared with features of width {F}; leave value_width '
                     'out, or set it to that of the features.')
  sign_BxL = 1 - 2 * jax.nn.one_hot(label_B, found.probabilities_BxL.shape[1], dtype=found.probabilities_BxL.dtype)
  likeness_BxL = jnp.einsum('bf,blf->bl', mean(features_BxSxF, lengths_B), found.representations_BxLxV)
  return sum(jax.nn.relu(1 + jnp.sum(sign_BxL * what_BxL, axis=1))
             for what_BxL in (found.probabilities_BxL, likeness_BxL))
