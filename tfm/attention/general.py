"""The general attention model (Brauwers & Frasincar 2021, arXiv 2203.14263, equations 1 to 4).

Features F give keys and values, a query gives every key a score, an alignment turns scores into weights, and the
context is the weighted sum of the values. `AttentionParts` says which score and which alignment; the letters of the
shapes are in `score_functions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from tfm.attention.alignments import AlignmentName, PredictedCentre, align, check_alignment, hard_sampled
from tfm.attention.masks import AttentionMask
from tfm.attention.score_functions import Score, ScoreName, check_score
from tfm.section import Section, require

WITH_CENTRE = 'local_predictive', 'local_window'


@dataclass(frozen=True)
class AttentionParts(Section):
  """What an attention module is made of, whatever it is used for."""

  score: ScoreName = 'additive'
  """How well a key answers the query (table 2)."""
  alignment: AlignmentName = 'soft'
  """How scores become weights (section 3.2.2); 'soft_per_feature' is multi-dimensional attention (section 3.2.3)."""
  key_width: int | None = None
  """d_k of K = W_K F (equation 1); None: the keys are the features."""
  value_width: int | None = None
  """d_v of V = W_V F (equation 1); None: the values are the features."""
  hidden_width: int | None = None
  """d_w of the additive score; None with others."""
  activation: str = 'tanh'
  """act of the additive and the activated general score."""
  window: float | None = None
  """D of local alignment; None with others."""
  centre_width: int | None = None
  """d_p of a predicted centre (equation 28); None with others, and where the centre is given by the caller."""
  dtype: Literal['float32', 'bfloat16', 'float64'] = 'float32'
  """Type of the computation; scores and weights are float32 at least."""

  def __post_init__(self):
    check_score(self.score)
    check_alignment(self.alignment)
    super().__post_init__()

  def check(self):
    is_local = self.alignment.startswith('local')
    require((self.window is not None) == is_local,
            f"window is {self.window} with alignment='{self.alignment}'; local alignment needs it, others have no use "
            'for it.')
    require(self.centre_width is None or self.alignment in WITH_CENTRE,
            f"centre_width has no effect with alignment='{self.alignment}'; leave it out, or choose one of "
            f'{", ".join(WITH_CENTRE)}.')
    require(self.alignment != 'soft_per_feature' or self.score == 'additive',
            f"alignment='soft_per_feature' needs a score for every feature, and score='{self.score}' is one number; "
            "choose score='additive'.")
    require((self.hidden_width is not None) == (self.score == 'additive'),
            f"hidden_width is {self.hidden_width} with score='{self.score}'; 'additive' needs it, others have no use "
            'for it.')
    for name in ('key_width', 'value_width', 'hidden_width', 'window', 'centre_width'):
      value = getattr(self, name)
      require(value is None or value > 0, f'{name} is {value}; give a number above 0.')


@struct.dataclass
class Source:
  """What can be attended to: computed once, read at every step of a decoder."""

  prepared_BxSx: jax.Array
  """What the score needs of the keys (`Score.prepare`)."""
  values_BxSxV: jax.Array


@struct.dataclass
class Attended:
  """What attention found, and where."""

  context_BxTxV: jax.Array
  weights: jax.Array
  """BxTxS, or BxTxSxV for 'soft_per_feature'; a head axis after B where there are heads."""
  log_probability_BxT: jax.Array | None = None
  """Of the sample that 'hard_sampled' drew, for REINFORCE; None with others."""


class AttentionModule(nn.Module):
  """c = sum_l a_l v_l, a = align(e), e_l = score(q, k_l), K = W_K F, V = W_V F (equations 1 to 4).

  Parameters, as far as the parts have them: `key/kernel` FxK, `value/kernel` FxV, `score/...`, `centre/...`.
  """

  parts: AttentionParts
  query_width: int | None
  """Q; None: there never is a query (equation 33)."""
  feature_width: int
  """Width of the features that the keys come from."""
  value_feature_width: int | None = None
  """Width of other features that the values come from; None: the same."""

  def setup(self):
    p = self.parts
    require(p.centre_width is None or self.query_width is not None,
            f"alignment='{p.alignment}' predicts its centre from the query, and there is none; give query_width.")
    if p.key_width is not None:
      self.key = matrix(p.key_width, p.dtype)
    if p.value_width is not None:
      self.value = matrix(p.value_width, p.dtype)
    self.score = Score(p.score, self.query_width, p.key_width or self.feature_width, p.hidden_width,
                       self.width if p.alignment == 'soft_per_feature' else None, p.activation, p.dtype)
    if p.centre_width is not None:
      self.centre = PredictedCentre(self.query_width, p.centre_width, p.dtype)

  @property
  def width(self) -> int:
    """V, of the context."""
    return self.parts.value_width or self.value_feature_width or self.feature_width

  def project(self, features_BxSxF: jax.Array, value_features_BxSxF: jax.Array | None = None):
    """Keys BxSxK and values BxSxV (equation 1).

    Raises:
      ValueError: there are not as many values as keys.
    """
    values_BxSxF = features_BxSxF if value_features_BxSxF is None else value_features_BxSxF
    if features_BxSxF.shape[:2] != values_BxSxF.shape[:2]:
      raise ValueError(f'{features_BxSxF.shape[1]} keys in {features_BxSxF.shape[0]} rows cannot have '
                       f'{values_BxSxF.shape[1]} values in {values_BxSxF.shape[0]}; give every key one value.')
    p = self.parts
    return (features_BxSxF.astype(p.dtype) if p.key_width is None else self.key(features_BxSxF),
            values_BxSxF.astype(p.dtype) if p.value_width is None else self.value(values_BxSxF))

  def prepare(self, features_BxSxF: jax.Array, value_features_BxSxF: jax.Array | None = None) -> Source:
    keys_BxSxK, values_BxSxV = self.project(features_BxSxF, value_features_BxSxF)
    return Source(self.score.prepare(keys_BxSxK), values_BxSxV)

  def attend(self, query_BxTxQ: jax.Array | None, source: Source, mask: AttentionMask | None = None, *,
             centre_BxT: jax.Array | None = None, key: jax.Array | None = None,
             tap: Callable[[str, jax.Array], jax.Array] = lambda name, value: value) -> Attended:
    """
    Args:
      query_BxTxQ: None leaves the query out of the score; T is then 1.
      mask: who may attend to whom, one for all heads; None is everybody.
      centre_BxT: of local alignment, where it is not t and not predicted here.
      key: for hard alignment that samples.
      tap: sees `scores` (before the mask), `pattern` and `z`, and returns what to go on with.
    """
    p = self.parts
    scores = tap('scores', self.score(query_BxTxQ, source.prepared_BxSx))
    T, S = scores.shape[1:3]
    if p.centre_width is not None:
      if centre_BxT is not None:
        raise ValueError('The centre is given, and centre_width has it predicted as well; leave one of them out.')
      if query_BxTxQ is None:
        raise ValueError(f"Alignment '{p.alignment}' predicts its centre from the query; give one.")
      centre_BxT = self.centre(query_BxTxQ, row_lengths(mask, S))
    allowed_BxTxS = for_one_head(None if mask is None else mask.to_array(T, S))
    weights, log_probability_BxT = weigh(p, scores, allowed_BxTxS, centre_BxT, key)
    weights = tap('pattern', weights)
    return Attended(tap('z', combine(weights, source.values_BxSxV)), weights, log_probability_BxT)

  def __call__(self, query_BxTxQ: jax.Array | None, features_BxSxF: jax.Array, mask: AttentionMask | None = None, *,
               value_features_BxSxF: jax.Array | None = None, **options) -> Attended:
    """`attend` to features; `options` are its."""
    return self.attend(query_BxTxQ, self.prepare(features_BxSxF, value_features_BxSxF), mask, **options)


def matrix(width: int, dtype: str) -> nn.Dense:
  """A linear map without a bias, such as W_K."""
  return nn.Dense(width, use_bias=False, dtype=dtype, kernel_init=nn.initializers.xavier_uniform())


def weigh(parts: AttentionParts, scores: jax.Array, allowed_BxTxS: jax.Array | None, centre_BxT: jax.Array | None,
          key: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
  """Weights of the scores (equation 3), and the log-probability of a sample."""
  if parts.alignment == 'hard_sampled' and key is not None:
    return hard_sampled(scores, allowed_BxTxS, key)
  return align(parts.alignment, scores, allowed_BxTxS, centre_BxT=centre_BxT, window=parts.window, key=key), None


def combine(weights: jax.Array, values_BxSxV: jax.Array) -> jax.Array:
  """sum_l a_l v_l (equation 4), or with a weight for every feature (equation 30): BxTxV, in the type of the values."""
  which = 'bts,bsv->btv' if weights.ndim == 3 else 'btsv,bsv->btv'
  return jnp.einsum(which, weights.astype(values_BxSxV.dtype), values_BxSxV)


def mean(features_BxSxF: jax.Array, lengths_B: jax.Array | None = None) -> jax.Array:
  """Over the positions of each row, BxF: a query or a first context without weights (equations 10 and 17)."""
  if lengths_B is None:
    return jnp.mean(features_BxSxF, axis=1)
  real_BxSx1 = (jnp.arange(features_BxSxF.shape[1]) < lengths_B[:, None])[..., None]
  total_BxF = jnp.sum(jnp.where(real_BxSx1, features_BxSxF, 0), axis=1)
  return total_BxF / jnp.maximum(lengths_B, 1)[:, None].astype(features_BxSxF.dtype)


def row_lengths(mask: AttentionMask | None, S: int) -> jax.Array | int:
  return S if mask is None or mask.lengths_B is None else mask.lengths_B


def for_one_head(allowed: jax.Array | None) -> jax.Array | None:
  """A mask that is broadcastable to BxHxTxS, to BxTxS."""
  if allowed is None or allowed.ndim < 4:
    return allowed
  if allowed.shape[1] != 1:
    raise ValueError(f'The mask is for {allowed.shape[1]} heads, and there is one; give one for all, or use MultiHead.')
  return allowed[:, 0]
