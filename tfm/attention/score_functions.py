"""Score functions: how well a key answers a query (Brauwers & Frasincar 2021, arXiv 2203.14263, table 2).

The survey's vectors are columns, ours are rows: its W_1 q is our query @ kernel with kernel = W_1^T. Letters, here and
in the other files of the survey's model: Q query width (d_q), K key width (d_k), V value width (d_v), W hidden width
(d_w). Every score is float32, or float64 if the arrays are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm.section import require

ScoreName = Literal['additive', 'multiplicative', 'scaled', 'general', 'biased_general', 'activated_general', 'cosine',
                    'euclidean']
SCORES: tuple[str, ...] = get_args(ScoreName)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'tanh': jnp.tanh, 'relu': jax.nn.relu, 'sigmoid': jax.nn.sigmoid, 'gelu': jax.nn.gelu, 'identity': lambda x: x}

SAME_WIDTH = 'multiplicative', 'scaled', 'cosine', 'euclidean'
"""Scores that compare query and key feature by feature, without a matrix between them."""
ACTIVATED = 'additive', 'activated_general'


def additive(query_BxTxQ: jax.Array | None, keys_BxSxK: jax.Array, query_kernel_QxW: jax.Array | None,
             key_kernel_KxW: jax.Array, bias_W: jax.Array, output: jax.Array, activation: str = 'tanh') -> jax.Array:
  """w^T act(W_1 q + W_2 k + b) (equation 6; Bahdanau et al. 2015).

  Args:
    query_BxTxQ: None leaves its term out (equations 7 and 33), and T is 1.
    output: w, of shape W, or W_d, of shape WxV, for a score of every feature (equation 31; Shen et al. 2018).

  Returns:
    BxTxS, or BxTxSxV.
  """
  query_BxTxW = None if query_BxTxQ is None else query_BxTxQ @ query_kernel_QxW
  return _additive(query_BxTxW, keys_BxSxK @ key_kernel_KxW + bias_W, output, activation)


def multiplicative(query_BxTxK: jax.Array, keys_BxSxK: jax.Array) -> jax.Array:
  """q^T k (Luong et al. 2015, 'dot'), BxTxS."""
  return jnp.einsum('btk,bsk->bts', query_BxTxK, keys_BxSxK, preferred_element_type=_exact(keys_BxSxK))


def scaled(query_BxTxK: jax.Array, keys_BxSxK: jax.Array) -> jax.Array:
  """q^T k / sqrt(d_k) (Vaswani et al. 2017, equation 1), BxTxS."""
  return multiplicative(query_BxTxK, keys_BxSxK) * keys_BxSxK.shape[-1]**-0.5


def general(query_BxTxQ: jax.Array, keys_BxSxK: jax.Array, weight_KxQ: jax.Array) -> jax.Array:
  """k^T W q (Luong et al. 2015), BxTxS."""
  return multiplicative(query_BxTxQ, keys_BxSxK @ weight_KxQ)


def biased_general(query_BxTxQ: jax.Array, keys_BxSxK: jax.Array, weight_KxQ: jax.Array,
                   bias_K: jax.Array) -> jax.Array:
  """k^T (W q + b) (Sordoni et al. 2016), BxTxS."""
  return _biased(query_BxTxQ, _with_bias(keys_BxSxK, weight_KxQ, bias_K))


def activated_general(query_BxTxQ: jax.Array, keys_BxSxK: jax.Array, weight_KxQ: jax.Array, bias: jax.Array,
                      activation: str = 'tanh') -> jax.Array:
  """act(k^T W q + b) with one number b (Ma et al. 2017), BxTxS."""
  return ACTIVATIONS[activation](general(query_BxTxQ, keys_BxSxK, weight_KxQ) + bias)


def cosine(query_BxTxK: jax.Array, keys_BxSxK: jax.Array) -> jax.Array:
  """The cosine of the angle between q and k, a similarity (Graves et al. 2014), BxTxS; 0 where one of them is 0."""
  return multiplicative(_unit(query_BxTxK), _unit(keys_BxSxK))


def euclidean(query_BxTxK: jax.Array, keys_BxSxK: jax.Array) -> jax.Array:
  """-||q - k||, the other similarity, BxTxS; its gradient is 0 where q = k."""
  dtype = _exact(keys_BxSxK)
  difference_BxTxSxK = query_BxTxK[:, :, None].astype(dtype) - keys_BxSxK[:, None].astype(dtype)
  return -_length(difference_BxTxSxK)


class Score(nn.Module):
  """A score function with its parameters.

  `prepare` does what depends on the keys alone (W_2 k + b, k^T W, k / ||k||), once for a source, so that a recurrent
  decoder does not repeat it every step. What it returns is one array whose first two axes are B and S.

  Parameters, as far as the kind has them: `query_kernel` QxW, `key_kernel` KxW, `bias` W and `output` W or WxV of the
  additive one; `weight` KxQ and `bias` K or () of the general ones.

  Raises:
    ConfigError: when it is built, where the fields do not go together.
  """

  kind: ScoreName
  query_width: int | None
  """Q; None: there is no query at all (self-attentive, equation 33), which only 'additive' knows."""
  key_width: int
  """K"""
  width: int | None = None
  """W of 'additive'; None with others."""
  dimensions: int | None = None
  """V, for a score of every feature of the values (equation 31), which only 'additive' has; None: one score."""
  activation: str = 'tanh'
  """Of 'additive' and 'activated_general': a name in ACTIVATIONS."""
  dtype: str = 'float32'
  """Type of the computation."""

  def __post_init__(self):
    kind = check_score(self.kind)
    is_additive = kind == 'additive'
    require(is_additive or self.query_width is not None,
            f"Score '{kind}' compares keys with a query; give query_width, or choose 'additive', which can do without.")
    require((self.width is not None) == is_additive,
            f"Score '{kind}' has width={self.width}; 'additive' needs one for its hidden layer, others have none.")
    require(self.dimensions is None or is_additive,
            f"Score '{kind}' is one number; only 'additive' gives one for every feature, so leave dimensions out.")
    require(kind not in SAME_WIDTH or self.query_width == self.key_width,
            f"Score '{kind}' needs queries as wide as keys, not {self.query_width} and {self.key_width}; choose "
            "'general', which has a matrix between them, or change a width.")
    require(self.activation in ACTIVATIONS,
            f"There is no activation '{self.activation}'; choose one of {', '.join(ACTIVATIONS)}.")
    require(self.activation == 'tanh' or kind in ACTIVATED,
            f"Score '{kind}' has no activation; leave it out or choose one of {', '.join(ACTIVATED)}.")
    super().__post_init__()

  def setup(self):
    xavier, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros_init()
    Q, K, W = self.query_width, self.key_width, self.width
    if self.kind == 'additive':
      self.query_kernel = None if Q is None else self.param('query_kernel', xavier, (Q, W))
      self.key_kernel, self.bias = self.param('key_kernel', xavier, (K, W)), self.param('bias', zeros, (W,))
      shape = (W,) if self.dimensions is None else (W, self.dimensions)
      self.output = self.param('output', nn.initializers.normal(W**-0.5), shape)
    elif self.kind in ('general', 'biased_general', 'activated_general'):
      self.weight = self.param('weight', xavier, (K, Q))
      if self.kind != 'general':
        self.bias = self.param('bias', zeros, (K,) if self.kind == 'biased_general' else ())

  def prepare(self, keys_BxSxK: jax.Array) -> jax.Array:
    """BxSx..., in the type of the computation."""
    keys_BxSxK = keys_BxSxK.astype(self.dtype)
    match self.kind:
      case 'additive':
        return keys_BxSxK @ self._typed(self.key_kernel) + self._typed(self.bias)
      case 'general' | 'activated_general':
        return keys_BxSxK @ self._typed(self.weight)
      case 'biased_general':
        return _with_bias(keys_BxSxK, self._typed(self.weight), self._typed(self.bias))
      case 'cosine':
        return _unit(keys_BxSxK)
    return keys_BxSxK

  def __call__(self, query_BxTxQ: jax.Array | None, prepared_BxSx: jax.Array) -> jax.Array:
    """Scores BxTxS, or BxTxSxV with `dimensions`, float32.

    Args:
      query_BxTxQ: None leaves the query's term out; T is then 1.
      prepared_BxSx: from `prepare`.

    Raises:
      ValueError: there is no query and the score cannot do without, or there is one and it has no matrix for it.
    """
    if query_BxTxQ is None:
      if self.kind != 'additive':
        raise ValueError(f"Score '{self.kind}' compares keys with a query; give one, or choose 'additive'.")
      return _additive(None, prepared_BxSx, self._typed(self.output), self.activation)
    if self.query_width is None:
      raise ValueError('This score was built without a query; give query_width, or pass None.')
    query_BxTxQ = query_BxTxQ.astype(self.dtype)
    match self.kind:
      case 'additive':
        return _additive(query_BxTxQ @ self._typed(self.query_kernel), prepared_BxSx, self._typed(self.output),
                         self.activation)
      case 'scaled':
        return scaled(query_BxTxQ, prepared_BxSx)
      case 'biased_general':
        return _biased(query_BxTxQ, prepared_BxSx)
      case 'activated_general':
        return ACTIVATIONS[self.activation](multiplicative(query_BxTxQ, prepared_BxSx) + self.bias)
      case 'cosine':
        return multiplicative(_unit(query_BxTxQ), prepared_BxSx)
      case 'euclidean':
        return euclidean(query_BxTxQ, prepared_BxSx)
    return multiplicative(query_BxTxQ, prepared_BxSx)

  def _typed(self, parameter: jax.Array) -> jax.Array:
    return parameter.astype(self.dtype)


def check_score(name: str) -> str:
  """The name; `ConfigError` if there is no such score."""
  require(name in SCORES, f"There is no score '{name}'; choose one of {', '.join(SCORES)}.")
  return name


def _additive(query_BxTxW, keys_BxSxW, output, activation):
  hidden_BxTxSxW = keys_BxSxW[:, None] if query_BxTxW is None else query_BxTxW[:, :, None] + keys_BxSxW[:, None]
  return jnp.einsum('btsw,w...->bts...', ACTIVATIONS[activation](hidden_BxTxSxW), output,
                    preferred_element_type=_exact(keys_BxSxW))


def _with_bias(keys_BxSxK, weight_KxQ, bias_K):
  """k^T W and, as one more feature, k^T b."""
  return jnp.concatenate([keys_BxSxK @ weight_KxQ, (keys_BxSxK @ bias_K)[..., None]], axis=-1)


def _biased(query_BxTxQ, prepared_BxSxQ1):
  bias_Bx1xS = prepared_BxSxQ1[:, None, :, -1]
  return multiplicative(query_BxTxQ, prepared_BxSxQ1[..., :-1]) + bias_Bx1xS.astype(_exact(bias_Bx1xS))


def _unit(x):
  length = _length(x.astype(_exact(x)))[..., None]
  return (x / jnp.where(length > 0, length, 1.0)).astype(x.dtype)


def _length(x):
  """Of vectors, with a gradient of 0 (not NaN) at 0."""
  square = jnp.sum(x**2, axis=-1)
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _exact(x: jax.Array):
  return jnp.promote_types(x.dtype, jnp.float32)
