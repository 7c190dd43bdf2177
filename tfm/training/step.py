"""The training step: a pure function (state, batch) -> (state, metrics)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from tfm.config import Config
from tfm.models.build import Model, initialize
from tfm.training.ema import first_average, next_average
from tfm.training.loss import Sums
from tfm.training.objectives import Batch, batch_sums
from tfm.training.optimizer import build_optimizer
from tfm.training.schedule import learning_rate


@struct.dataclass
class TrainState:
  """All that changes while training; the data position is `step`."""

  step: jax.Array
  """Updates made so far, int32."""
  params: Any
  opt_state: Any
  key: jax.Array
  """Typed key from which every step folds its own; it never changes."""
  ema: Any = None
  """Moving average of `params` (`optimizer.ema_decay`); None where there is none."""

  @property
  def served_params(self) -> Any:
    """The weights to validate and to use: the average, where there is one."""
    return self.params if self.ema is None else self.ema


@struct.dataclass
class StepMetrics:
  """What one update leaves behind; sums over the whole batch, float32 scalars."""

  sums: Sums
  grad_norm: jax.Array
  learning_rate: jax.Array


def new_state(config: Config, model: Model, params: Any) -> TrainState:
  optimizer = build_optimizer(config.optimizer, config.model.d_model, config.training.steps)
  key = jax.random.fold_in(jax.random.key(config.training.seed), 1)  # 0 is the key of the initialisation
  ema = None if config.optimizer.ema_decay is None else first_average(params)
  return TrainState(jnp.int32(0), params, optimizer.init(params), key, ema)


def fresh_state(config: Config, model: Model) -> TrainState:
  """What a run begins with where nothing is restored."""
  key = jax.random.fold_in(jax.random.key(config.training.seed), 0)
  return new_state(config, model, initialize(model, key))


def build_step(config: Config, model: Model,
               axis_name: str | None = None) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
  """The step of this config, not yet compiled.

  Args:
    axis_name: of a `pmap` over rows of the batch, whose devices add up their sums; each then draws its own dropout.
      None where the batch is one array, on however many devices.
  """
  optimizer = build_optimizer(config.optimizer, config.model.d_model, config.training.steps)
  rate = learning_rate(config.optimizer, config.model.d_model, config.training.steps)
  smoothing, micro = config.optimizer.label_smoothing, config.training.accumulate

  def loss_of(params, batch, key):
    sums = batch_sums(model, params, batch, smoothing, key if config.model.uses_dropout else None)
    return sums.loss, sums

  def gradient_sums(params, batch, key):
    (_, sums), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, batch, key)
    return gradients, sums

  def accumulated(params, batch, key):
    """The same sums from `micro` slices of the rows, one after another."""
    # Every micro-th row, so that each slice has rows of every device.
    slices = jax.tree.map(lambda rows: rows.reshape((-1, micro) + rows.shape[1:]).swapaxes(0, 1), batch)

    def add(total, numbered):
      index, piece = numbered
      return jax.tree.map(jnp.add, total, gradient_sums(params, piece, jax.random.fold_in(key, index))), None

    zeros = jax.tree.map(jnp.zeros_like, (params, Sums(*[jnp.float32(0)] * 4)))
    return jax.lax.scan(add, zeros, (jnp.arange(micro), slices))[0]

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    key = jax.random.fold_in(state.key, state.step)
    if axis_name is not None:
      key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    gradients, sums = (gradient_sums if micro == 1 else accumulated)(state.params, batch, key)
    if axis_name is not None:
      gradients, sums = jax.lax.psum((gradients, sums), axis_name)
    tokens, norm = jnp.maximum(sums.tokens, 1.0), _norm(gradients)
    metrics = StepMetrics(sums, norm / tokens, rate(state.step))
    if jax.default_backend() == 'cpu':
      # No update may begin before the last gradient is there. Otherwise XLA, whose threads on a CPU take programs in
      # any order, first copies every weight that it is about to overwrite (190 MB at Transformer-base, 3 % of a step).
      tokens += 0.0 * norm
    # By the target tokens of the whole batch, however it was cut. A factor and no divisor: XLA computes a product again
    # at each of its uses, a quotient once, to be written and read (a sixth of the update at Transformer-base).
    per_token = 1.0 / tokens
    gradients = jax.tree.map(lambda g: g * per_token, gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else next_average(state.ema, params, state.step, config.optimizer.ema_decay)
    return TrainState(state.step + 1, params, opt_state, state.key, ema), metrics

  return step


def _norm(gradients: Any) -> jax.Array:
  """Their Euclidean norm. On a single device small ones are joined: each sum by itself is one program more to compile
  (157 of the 253 arrays of Transformer-base are biases and scales: a ninth of the time to compile its step)."""
  if jax.sharding.get_abstract_mesh().size > 1:  # which may have cut them
    return optax.tree.norm(gradients)
  leaves, most = jax.tree.leaves(gradients), 2**14
  small = [leaf.reshape(-1) for leaf in leaves if leaf.size <= most]
  large = [leaf for leaf in leaves if leaf.size > most]
  return optax.tree.norm([*large, jnp.concatenate(small)] if small else large)
