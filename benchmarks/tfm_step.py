"""tfm's training step as `train.py` runs it, on one batch and without a run folder."""

from __future__ import annotations

import time

import jax
import numpy as np

from tfm.config import Config
from tfm.models.build import build_model, initialize
from tfm.parallel.compile import jit_step, place_batch
from tfm.parallel.mesh import build_mesh
from tfm.parallel.rules import shardings
from tfm.training.host_memory import reuse_freed_memory
from tfm.training.step import new_state


class Training:
  """A model in training: what `tfm.training.loop` does before its first step and at each."""

  def __init__(self, config: Config, vocabulary: int):
    if config.training.reuse_memory:
      reuse_freed_memory()
    self.config = config
    self.model = build_model(config.model, vocabulary, vocabulary)
    self.mesh = build_mesh(config.mesh)
    key = jax.random.fold_in(jax.random.key(config.training.seed), 0)
    state = new_state(config, self.model, initialize(self.model, key))
    abstract = jax.eval_shape(lambda: state)
    self.state = jax.tree.map(jax.device_put, state, shardings(self.mesh, abstract))
    self.compiled = jit_step(config, self.model, self.mesh, abstract)

  def place(self, batch):
    return place_batch(batch, 0, len(batch[0]), self.mesh, self.config.model.shape)

  def compile(self, batch) -> jax.stages.Compiled:
    """Compile for this batch ahead of time; what is returned knows its memory."""
    with jax.set_mesh(self.mesh):
      self.compiled = self.compiled.lower(self.state, self.place(batch)).compile()
    return self.compiled

  def run(self, batch: tuple[np.ndarray | None, ...], count: int) -> list[float]:
    """The losses of `count` updates, nats per token; as in the loop they are read a step behind."""
    losses, pending = [], None
    for _ in range(count):
      placed = self.place(batch)
      with jax.set_mesh(self.mesh), jax.transfer_guard('disallow'):
        self.state, metrics = self.compiled(self.state, placed)
      if pending is not None:
        losses.append(_loss(pending))
      pending = metrics
    losses.append(_loss(pending))
    jax.block_until_ready(self.state)
    return losses

  def seconds(self, batch, count: int) -> float:
    """Seconds of an update, the mean of `count` in a row."""
    began = time.perf_counter()
    self.run(batch, count)
    return (time.perf_counter() - began) / count


def _loss(metrics) -> float:
  sums = jax.device_get(metrics.sums)
  return float(sums.loss) / float(sums.tokens)
