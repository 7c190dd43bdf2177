"""Lenses: what a model would say if it stopped after each layer.

The logit lens (nostalgebraist 2020) reads the residual stream of a middle layer with the last layer's norm and output
matrix. Where the stream turns on its way up, the tuned lens (Belrose et al. 2023) first brings it into the last layer's
basis, by one affine map for each layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tfm.analysis.engine import read


def last_stream(model) -> str:
  """The name of the residual streams that lead to the logits.

  Raises:
    ValueError: the model has none, as recurrent models.
  """
  if model.config.kind == 'recurrent':
    raise ValueError('A recurrent model has no residual stream from layer to layer; lenses need one.')
  return f"{'encoder' if model.config.shape == 'encoder_only' else 'decoder'}.layers.resid_post"


def to_logits(module, x_BxTxD: jax.Array) -> jax.Array:
  """A method for `apply`: the stream behind any layer of the last stack to logits, as if that layer were the last."""
  config = module.config
  if config.kind == 'convolutional':
    x_BxTxD = module.decoder.output_projection(x_BxTxD)
  elif config.shape == 'encoder_only' and config.norm != 'post':
    x_BxTxD = module.encoder_norm(x_BxTxD)  # an encoder's `unembed` wants states behind the norm
  return module.unembed(x_BxTxD)


@partial(jax.jit, static_argnames='model')
def unembed(model, params: Any, streams: jax.Array) -> jax.Array:
  """Residual streams, ...xBxTxD, to logits, ...xBxTxV float32: final norm and output matrix."""
  logits = model.apply({'params': params}, streams.reshape(-1, *streams.shape[-2:]), method=to_logits)
  return logits.reshape(*streams.shape[:-1], -1)


def logit_lens(model, params: Any, inputs: tuple) -> jax.Array:
  """Logits NxBxTxV after each layer; the last are those of the model."""
  name = last_stream(model)
  return unembed(model, params, read(model, params, inputs, name)[name])


@dataclass(frozen=True)
class TunedLens:
  """x_l -> x_l A_l + b_l for each layer but the last, which is read as it is."""

  maps_NxDxD: jax.Array
  shifts_NxD: jax.Array

  def __call__(self, model, params: Any, inputs: tuple) -> jax.Array:
    """Logits NxBxTxV after each layer, the last included."""
    name = last_stream(model)
    streams = read(model, params, inputs, name)[name]
    turned = jnp.einsum('nbtd,nde->nbte', streams[:-1], self.maps_NxDxD) + self.shifts_NxD[:, None, None]
    return unembed(model, params, jnp.concatenate([turned, streams[-1:]]))


def fit_tuned_lens(model, params: Any, batches, real=None, *, ridge: float = 1e-3, steps: int = 0,
                   learning_rate: float = 1e-3) -> TunedLens:
  """A tuned lens from passes: the least-squares map onto the last stream, then descent on KL(last || lens) if asked.

  Args:
    batches: inputs of passes, all of the same shapes if there are steps.
    real: for each a bool array BxT that is False at padding; None: all positions count.
    ridge: times the mean square of a stream, pulls the map towards the identity.
    steps, learning_rate: of Adam, each step one batch, in turn (Belrose et al. 2023, equation 3).
  """
  name = last_stream(model)
  # Of [x, 1]: the moments that the normal equations need, so that no stream is kept.
  square = cross = 0.0
  for i, inputs in enumerate(batches):
    streams = read(model, params, inputs, name)[name].astype(jnp.float32)
    weight = jnp.ones(streams.shape[1:3]) if real is None else real[i].astype(jnp.float32)
    x = jnp.concatenate([streams[:-1], jnp.ones((*streams[:-1].shape[:-1], 1))], axis=-1)
    square = square + jnp.einsum('nbtd,nbte,bt->nde', x, x, weight)
    cross = cross + jnp.einsum('nbtd,nbte,bt->nde', x, streams[-1][None] - streams[:-1], weight)
  D = cross.shape[-1]
  mean_square = jnp.trace(square[:, :D, :D], axis1=1, axis2=2) / D
  # What is solved for is the difference from the identity, so that the penalty is on that; the shift is free.
  penalty = ridge * mean_square[:, None, None] * jnp.diag(jnp.ones(D + 1).at[D].set(1e-6))
  change = jnp.linalg.solve(square + penalty, cross)
  lens = TunedLens(jnp.eye(D) + change[:, :D], change[:, D])
  return lens if not steps else _descend(lens, model, params, batches, real, steps, learning_rate)


def _descend(lens, model, params, batches, real, steps, learning_rate) -> TunedLens:
  optimizer = optax.adam(learning_rate)

  def loss(weights, inputs, weight_BxT):
    logits = TunedLens(*weights)(model, params, inputs)
    log_probs, target = jax.nn.log_softmax(logits[:-1]), jax.nn.log_softmax(logits[-1])
    kl_NxBxT = jnp.sum(jnp.exp(target) * (target - log_probs), axis=-1)
    return jnp.sum(kl_NxBxT * weight_BxT) / (kl_NxBxT.shape[0] * weight_BxT.sum())

  @jax.jit
  def step(weights, state, inputs, weight_BxT):
    gradient = jax.grad(loss)(weights, inputs, weight_BxT)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(weights, updates), state

  weights = lens.maps_NxDxD, lens.shifts_NxD
  state = optimizer.init(weights)
  for i in range(steps):
    inputs = batches[i % len(batches)]
    weight = jnp.ones(jnp.shape(inputs[-1])) if real is None else real[i % len(batches)].astype(jnp.float32)
    weights, state = step(weights, state, inputs, weight)
  return TunedLens(*weights)
