"""How much of the past reaches the last state of a language model, by the Jacobian with respect to its embeddings.

Any decoder-only model of `tfm.models.build` will do: nothing but `hidden` and the name of its embedding is used.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tfm.models.build import Model
from tfm.models.embedding import Embedding


def last_state_jacobian(model: Model, params: Any, ids_T: jax.Array) -> jax.Array:
  """d hidden[T - 1] / d embedding[t], W x T x D; W is the width of what `unembed` reads.

  Raises:
    ValueError: the model has an encoder, or `ids_T` is not one sequence.
  """
  if model.config.shape != 'decoder_only':
    raise ValueError(f'This model is {model.config.shape.replace("_", "-")}, but only a decoder-only one reads a '
                     'past; set encoder_layers=0.')
  if ids_T.ndim != 1:
    raise ValueError(f'ids_T has shape {ids_T.shape}; give one sequence of ids.')

  def last(nudge_TxD):
    def intercept(call, args, kwargs, context):
      value, module = call(*args, **kwargs), context.module
      if isinstance(module, Embedding) and context.method_name == '__call__' and module.name == 'target_embedding':
        return value + nudge_TxD.astype(value.dtype)
      return value

    with nn.intercept_methods(intercept):
      return model.apply({'params': params}, ids_T[None], method='hidden')[0, -1]

  return jax.jacrev(last)(jnp.zeros((ids_T.shape[0], model.config.d_model)))


@jax.jit(static_argnums=0)
def gradient_norms(model: Model, params: Any, ids_BxT: jax.Array) -> jax.Array:
  """g[d] = mean over sequences of the Frobenius norm of d hidden[T - 1] / d embedding[T - 1 - d], for d = 0 ... T - 1.

  Raises:
    ValueError: see `last_state_jacobian`.
  """
  jacobian_BxWxTxD = jax.vmap(lambda ids_T: last_state_jacobian(model, params, ids_T))(ids_BxT)
  return jnp.mean(jnp.linalg.norm(jacobian_BxWxTxD, axis=(1, 3)), axis=0)[::-1]


def receptive_field(model: Model, params: Any, ids_T: jax.Array) -> int:
  """How many of the last positions of `ids_T`, its own included, the last state depends on: the zeros of the Jacobian
  are exact where no path leads. T means that it reaches as far as the sequence does, or further.

  Raises:
    ValueError: see `last_state_jacobian`; or the last state depends on nothing.
  """
  jacobian_WxTxD = jax.jit(lambda params: last_state_jacobian(model, params, ids_T))(params)
  reached_T = np.flatnonzero(np.any(np.asarray(jacobian_WxTxD) != 0, axis=(0, 2)))
  if not reached_T.size:
    raise ValueError('The last state depends on no embedding; are all parameters zero?')
  return ids_T.shape[0] - int(reached_T[0])


def log_slope(distances, values) -> float:
  """Slope of log10(value) against distance, by least squares: decades a step.

  Raises:
    ValueError: a value is not above 0, or there are fewer than two.
  """
  values = np.asarray(values, np.float64)
  if values.size < 2 or not (values > 0).all():
    raise ValueError('A slope of logarithms needs two values or more, all above 0.')
  return float(np.polyfit(np.asarray(distances, np.float64), np.log10(values), 1)[0])
