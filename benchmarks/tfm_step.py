"""tfm's training step as `train.py` runs it, on one batch and without a run folder."""

from __future__ import annotations

import time
from functools import partial

import jax
import numpy as np

from tfm.config import Config
from tfm.models.build import build_model
from tfm.parallel.compile import jit_step, place_batch
from tfm.parallel.mesh import build_mesh
from tfm.parallel.rules import shardings
from tfm.training.host_memory import reuse_freed_memory
from tfm.training.step import fresh_state


class Training:
  """A model in training on `batch`: what `tfm.training` does before its first step and at each."""

  def __init__(self, config: Config, vocabulary: int, batch: tuple[np.ndarray | None, ...]):
    if config.training.reuse_memory:
      reuse_freed_memory()
    self.config, self.batch = config, batch
    self.model, self.mesh = build_model(config.model, vocabulary, vocabulary), build_mesh(config.mesh)
    abstract = jax.eval_shape(partial(fresh_state, config, self.model))
    placed = shardings(self.mesh, abstract)
    self.step = jit_step(config, self.model, self.mesh, abstract)
    self.state = jax.tree.map(jax.device_put, fresh_state(config, self.model), placed)
    with jax.set_mesh(self.mesh):
      self.memory = self.step.lower(self.state, self._place()).compile().memory_analysis()  # what `run` will call

  def _place(self):
    return place_batch(self.batch, 0, len(self.batch[0]), self.mesh, self.config.model.shape)

  def run(self, count: int) -> list[float]:
    """The losses of `count` updates, nats per token; as in the loop they are read a step behind."""
    losses, pending = [], None
    for _ in range(count):
      placed = self._place()
      with jax.set_mesh(self.mesh), jax.transfer_guard('disallow'):
        self.state, metrics = self.step(self.state, placed)
      if pending is not None:
        losses.append(_loss(pending))
      pending = metrics
    losses.append(_loss(pending))
    jax.block_until_ready(self.state)
    return losses

  def seconds(self, count: int) -> float:
    """Seconds of an update, the mean of `count` in a row."""
    began = time.perf_counter()
    self.run(count)
    return (time.perf_counter() - began) / count


def _loss(metrics) -> float:
  sums = jax.device_get(metrics.sums)
  return float(sums.loss) / float(sums.tokens)
