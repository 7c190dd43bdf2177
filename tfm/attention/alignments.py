"""Alignments: from scores to attention weights (Brauwers & Frasincar 2021, arXiv 2203.14263, section 3.2.2).

All take scores_BxTxS and a mask, bool, broadcastable to them (True = may attend; None: all), and return weights of the
same shape, in the type of the scores. A row without a key that it may attend to gets weights 0, with gradients 0.
Positions are counted from 0.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm.section import require

AlignmentName = Literal['soft', 'sparsemax', 'entmax15', 'hard', 'hard_sampled', 'local_monotonic', 'local_predictive',
                        'local_window', 'soft_per_feature']
ALIGNMENTS: tuple[str, ...] = get_args(AlignmentName)

LOCAL = 'local_monotonic', 'local_predictive', 'local_window'
HARD = 'hard', 'hard_sampled'


def soft(scores_BxTxS: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """a_l = exp(e_l) / sum_j exp(e_j), also called global (equation 25)."""
  return _softmax(scores_BxTxS, mask, axis=-1)


def soft_per_feature(scores_BxTxSxV: jax.Array, mask_BxTxS: jax.Array | None = None) -> jax.Array:
  """A softmax over positions for every feature of the values, BxTxSxV (equation 32; Shen et al. 2018)."""
  return _softmax(scores_BxTxSxV, None if mask_BxTxS is None else mask_BxTxS[..., None], axis=-2)


def sparsemax(scores_BxTxS: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """The point of the simplex next to the scores: most weights are exactly 0 (Martins & Astudillo 2016, algorithm 1)."""
  return _entmax(2.0, scores_BxTxS, mask)


def entmax15(scores_BxTxS: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """1.5-entmax, between softmax and sparsemax, exact (Peters, Niculae & Martins 2019, algorithm 2)."""
  return _entmax(1.5, scores_BxTxS, mask)


def hard(scores_BxTxS: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
  """One position alone, with the gradient of `soft` (the straight-through estimator, Bengio et al. 2013).

  Args:
    key: draws m ~ Multinomial(a) as in equation 26, by Gumbel noise on the scores; None takes the greatest score.
  """
  noise = 0.0 if key is None else jax.random.gumbel(key, scores_BxTxS.shape, scores_BxTxS.dtype)
  soft_BxTxS = soft(scores_BxTxS, mask)
  # The difference is exactly 0, so the weights are exactly 0 and 1.
  return _one_hot_of_top(scores_BxTxS + noise, mask) + (soft_BxTxS - jax.lax.stop_gradient(soft_BxTxS))


def hard_sampled(scores_BxTxS: jax.Array, mask: jax.Array | None, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """m ~ Multinomial(a), one-hot without a gradient, and log a_m, whose gradient REINFORCE multiplies by the reward.

  Equation 26 (Xu et al. 2015, section 4.1; Williams 1992).

  Returns:
    sample BxTxS; log-probability BxT, 0 for a row without keys.
  """
  sample_BxTxS = jax.lax.stop_gradient(hard(scores_BxTxS, mask, key))
  logs_BxTxS = jax.nn.log_softmax(_masked(scores_BxTxS, mask), axis=-1)
  return sample_BxTxS, jnp.sum(jnp.where(sample_BxTxS > 0, logs_BxTxS, 0.0), axis=-1)


def local(scores_BxTxS: jax.Array, mask: jax.Array | None, *, centre_BxT: jax.Array, window: float,
          gaussian: bool) -> jax.Array:
  """A softmax over the keys of [p - D, p + D] (equation 27; Luong et al. 2015, section 3.2).

  Args:
    centre_BxT: p, on the axis of keys, counted from 0; broadcastable.
    window: D.
    gaussian: multiply the weights by exp(-(l - p)^2 / (2 sigma^2)), sigma = D / 2, and leave it at that: they sum to
      less than 1 (equation 29).
  """
  _require_window(window)
  distance_BxTxS = jnp.arange(scores_BxTxS.shape[-1]) - jnp.asarray(centre_BxT, scores_BxTxS.dtype)[..., None]
  inside_BxTxS = jnp.abs(distance_BxTxS) <= window
  weights_BxTxS = soft(scores_BxTxS, inside_BxTxS if mask is None else inside_BxTxS & mask)
  return weights_BxTxS * jnp.exp(-distance_BxTxS**2 / (2 * (window / 2)**2)) if gaussian else weights_BxTxS


def local_monotonic(scores_BxTxS: jax.Array, mask: jax.Array | None = None, *, window: float,
                    centre_BxT: jax.Array | None = None) -> jax.Array:
  """`local` around p = t without the Gaussian; `centre_BxT` says which t the queries have, if not 0, 1, 2, ..."""
  centre_BxT = jnp.arange(scores_BxTxS.shape[-2])[None] if centre_BxT is None else centre_BxT
  return local(scores_BxTxS, mask, centre_BxT=centre_BxT, window=window, gaussian=False)


def local_predictive(scores_BxTxS: jax.Array, mask: jax.Array | None = None, *, centre_BxT: jax.Array,
                     window: float) -> jax.Array:
  """`local` around a centre that was predicted (equation 28), with the Gaussian."""
  return local(scores_BxTxS, mask, centre_BxT=centre_BxT, window=window, gaussian=True)


class PredictedCentre(nn.Module):
  """p = S sigmoid(w_p^T tanh(W_p q)) (equation 28; Luong et al. 2015, equation 9).

  S is the length of the row itself, not of the padded batch, so that padding does not move the centre.
  """

  query_width: int
  width: int
  """Of the hidden layer, d_p."""
  dtype: str = 'float32'

  def setup(self):
    self.kernel = self.param('kernel', nn.initializers.xavier_uniform(), (self.query_width, self.width))
    self.output = self.param('output', nn.initializers.normal(self.width**-0.5), (self.width,))

  def __call__(self, query_BxTxQ: jax.Array, lengths_B: jax.Array | int) -> jax.Array:
    """Centre BxT, float32."""
    hidden_BxTxW = jnp.tanh(query_BxTxQ.astype(self.dtype) @ self.kernel.astype(self.dtype))
    logit_BxT = jnp.einsum('btw,w->bt', hidden_BxTxW, self.output.astype(self.dtype),
                           preferred_element_type=jnp.promote_types(self.dtype, jnp.float32))
    return jnp.asarray(lengths_B)[..., None] * jax.nn.sigmoid(logit_BxT)


def align(kind: AlignmentName, scores: jax.Array, mask: jax.Array | None = None, *,
          centre_BxT: jax.Array | None = None, window: float | None = None, key: jax.Array | None = None) -> jax.Array:
  """Weights of the alignment with this name, in the shape of the scores (BxTxSxV for 'soft_per_feature').

  Args:
    centre_BxT, window: for the local ones; only 'local_monotonic' has a centre of its own (t).
    key: for 'hard_sampled', of which this returns the sample alone, and for 'hard', which then samples too.

  Raises:
    ConfigError: there is no such alignment.
    ValueError: an argument is missing, or is given to an alignment that has no use for it.
  """
  check_alignment(kind)
  dimensions = 4 if kind == 'soft_per_feature' else 3
  if scores.ndim != dimensions:
    raise ValueError(f"Alignment '{kind}' takes scores with {dimensions} axes, not {scores.ndim}; choose "
                     f"'{'soft' if dimensions == 4 else 'soft_per_feature'}', or other scores.")
  for name, given, kinds in (('centre_BxT', centre_BxT, LOCAL), ('window', window, LOCAL), ('key', key, HARD)):
    if given is not None and kind not in kinds:
      raise ValueError(f"Alignment '{kind}' has no use for {name}; leave it out, or choose {' or '.join(kinds)}.")
  needed = {'hard_sampled': ('key', key), 'local_predictive': ('centre_BxT', centre_BxT),
            'local_window': ('centre_BxT', centre_BxT)}
  if kind in needed and needed[kind][1] is None:
    raise ValueError(f"Alignment '{kind}' needs {needed[kind][0]}; give it.")
  if kind in LOCAL and window is None:
    raise ValueError(f"Alignment '{kind}' needs window, how many positions it sees on each side; give it.")
  match kind:
    case 'hard':
      return hard(scores, mask, key)
    case 'hard_sampled':
      return hard_sampled(scores, mask, key)[0]
    case 'local_monotonic':
      return local_monotonic(scores, mask, centre_BxT=centre_BxT, window=window)
    case 'local_predictive':
      return local_predictive(scores, mask, centre_BxT=centre_BxT, window=window)
    case 'local_window':
      return local(scores, mask, centre_BxT=centre_BxT, window=window, gaussian=False)
  plain = {'soft': soft, 'sparsemax': sparsemax, 'entmax15': entmax15, 'soft_per_feature': soft_per_feature}
  return plain[kind](scores, mask)


def check_alignment(name: str) -> str:
  """The name; `ConfigError` if there is no such alignment."""
  require(name != 'reinforced',
          "Alignment 'reinforced' (Shen et al. 2018) lets an agent with a reward of its own choose the keys, and there "
          "is no such agent here; choose 'hard_sampled', which REINFORCE can train, or 'sparsemax'.")
  require(name in ALIGNMENTS,
          f"There is no alignment '{name}'; choose one of {', '.join(ALIGNMENTS)}.")
  return name


def _require_window(window: float) -> None:
  if not window > 0:
    raise ValueError(f'A window of {window} positions on each side has no width; give a number above 0.')


def _masked(scores, mask):
  """Finite, not -inf: a row without any key must give 0 and not NaN, in the gradient too."""
  return scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


def _shown(weights, mask):
  return weights if mask is None else jnp.where(mask, weights, 0.0)


def _softmax(scores, mask, axis):
  return _shown(jax.nn.softmax(_masked(scores, mask), axis=axis), mask)


def _one_hot_of_top(scores, mask):
  top = jnp.argmax(_masked(scores, mask), axis=-1)
  return _shown(jax.nn.one_hot(top, scores.shape[-1], dtype=scores.dtype), mask)


def _entmax(alpha, scores, mask):
  """Weights [(alpha - 1) e - tau]_+ ^ (1 / (alpha - 1)) with the tau that makes them sum to 1."""
  scaled = (alpha - 1) * _masked(scores, mask)
  # tau is above top - 1, so what lies lower has weight 0 wherever it is: cut, and squares cannot overflow.
  z = jnp.maximum(scaled - jax.lax.stop_gradient(jnp.max(scaled, axis=-1, keepdims=True)), -4.0)
  return _shown(_simplex(alpha, z), mask)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _simplex(alpha, z):
  ordered = -jnp.sort(-z, axis=-1)
  count = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)  # of the support, if it ended here
  mean = jnp.cumsum(ordered, axis=-1) / count
  if alpha == 2.0:
    tau = mean - 1 / count
  else:
    spread = jnp.cumsum(ordered**2, axis=-1) - count * mean**2
    tau = mean - jnp.sqrt(jnp.maximum((1 - spread) / count, 0.0))
  last = jnp.sum(ordered > tau, axis=-1, keepdims=True) - 1
  root = jnp.maximum(z - jnp.take_along_axis(tau, last, axis=-1), 0.0)
  return root if alpha == 2.0 else root**2


@_simplex.defjvp
def _simplex_jvp(alpha, primals, tangents):
  """J = diag(s) - s s^T / sum(s), s = p^(2 - alpha), over the support; times what z = (alpha - 1) e left out."""
  p, (d_z,) = _simplex(alpha, *primals), tangents
  s = (p > 0).astype(p.dtype) if alpha == 2.0 else jnp.sqrt(p)
  return p, s * (d_z - jnp.sum(s * d_z, axis=-1, keepdims=True) / jnp.sum(s, axis=-1, keepdims=True)) / (alpha - 1)
