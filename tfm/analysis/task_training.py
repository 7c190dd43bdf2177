"""Train a language model on a task of `tfm.analysis.memory_tasks`, and read its accuracy off distance by distance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tfm.analysis.memory_tasks import Task
from tfm.models.build import Model, initialize


@dataclass(frozen=True)
class Effort:
  """How long and on how much a model is trained."""

  steps: int
  rows: int
  """Fresh sequences a step."""
  learning_rate: float = 3e-3
  """Highest; it warms up over a tenth of the steps and falls to 0 by a cosine."""


def adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
  """What the experiments train with: the rate warms up over a tenth of the steps and falls to 0 by a cosine; gradients
  are clipped to a norm of 1."""
  schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 10), steps)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))


class Curve(NamedTuple):
  """What was asked and answered at every distance; index is the distance."""

  right: np.ndarray
  asked: np.ndarray

  def at(self, distance: int) -> float:
    """Accuracy at `distance` up to an eighth more (few are asked at each), NaN where nothing was asked."""
    window = slice(distance, distance + max(1, distance // 8))
    asked = self.asked[window].sum()
    return float(self.right[window].sum() / asked) if asked else float('nan')

  @property
  def overall(self) -> float:
    return float(self.right.sum() / self.asked.sum())

  def error(self, distance: int) -> float:
    """Standard error of `at` for answers that are right half of the time."""
    asked = self.asked[distance:distance + max(1, distance // 8)].sum()
    return float(0.5 / np.sqrt(asked)) if asked else float('nan')


def train(model: Model, task: Task, effort: Effort, key: jax.Array) -> tuple[Any, np.ndarray]:
  """Parameters after `effort.steps` steps of Adam, and the loss of every step; clipped to a gradient norm of 1.

  A pure function of the key, which gives the first parameters and every batch.
  """
  optimizer, step = _step(model, task, effort)
  start_key, data_key = jax.random.split(key)
  params = initialize(model, start_key)
  state, losses = (params, optimizer.init(params)), []
  # A step a call, not one scan over the steps: on a CPU XLA's convolutions inside a loop are several times slower.
  for step_key in jax.random.split(data_key, effort.steps):
    state, loss = step(state, step_key)
    losses.append(loss)
  return state[0], np.asarray(jnp.stack(losses))


@cache
def _step(model: Model, task: Task, effort: Effort):
  """The optimizer and a training step, compiled once for all seeds."""
  optimizer = adam(effort.learning_rate, effort.steps)

  @jax.jit
  def step(state, key):
    params, moments = state
    loss, gradient = jax.value_and_grad(_loss)(params, model, task.draw(key, effort.rows))
    updates, moments = optimizer.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments), loss

  return optimizer, step


def _loss(params, model, drawn):
  """Mean cross-entropy of the answers that are asked for."""
  logits_BxTxV = model.apply({'params': params}, drawn.ids_BxT)
  nll_BxT = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, drawn.answers_BxT)
  asked_BxT = drawn.distance_BxT > 0
  return jnp.sum(jnp.where(asked_BxT, nll_BxT, 0.0)) / jnp.maximum(jnp.sum(asked_BxT), 1)


def accuracy_curve(model: Model, params: Any, task: Task, key: jax.Array, rows: int, batches: int = 1) -> Curve:
  """Right answers (the most likely id of all) on `batches` x `rows` fresh sequences, by distance 0 ... T."""
  counts = [_count(model, task, rows, params, each) for each in jax.random.split(key, batches)]
  right, asked = (np.sum([np.asarray(count[i]) for count in counts], axis=0) for i in (0, 1))
  return Curve(right, asked)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _count(model: Model, task: Task, rows: int, params, key):
  drawn = task.draw(key, rows)
  right_BxT = jnp.argmax(model.apply({'params': params}, drawn.ids_BxT), axis=-1) == drawn.answers_BxT
  asked_BxT = drawn.distance_BxT > 0
  zeros = jnp.zeros(task.length + 1, jnp.int32)
  return zeros.at[drawn.distance_BxT].add(right_BxT & asked_BxT), zeros.at[drawn.distance_BxT].add(asked_BxT)


def half_distance(distances, accuracies, chance: float) -> float | None:
  """d_50: where accuracy above chance has fallen to half of what is possible, between distances by the logarithm; None
  if it never does. Below the first distance it is the first distance: the model may remember even less."""
  halfway = (1 + chance) / 2
  for i, accuracy in enumerate(accuracies):
    if accuracy < halfway:
      if i == 0:
        return float(distances[0])
      share = (accuracies[i - 1] - halfway) / (accuracies[i - 1] - accuracy)
      return float(distances[i - 1] * (distances[i] / distances[i - 1])**share)
  return None
