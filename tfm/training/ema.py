"""Exponential moving average of the weights, which validates better than they do (Polyak & Juditsky 1992)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def first_average(params: Any) -> Any:
  """A copy: the step donates the average and the weights apart from each other."""
  return jax.tree.map(jnp.copy, params)


def next_average(average: Any, params: Any, step: jax.Array, decay: float) -> Any:
  """The average after the weights of update `step` (counted from 0): d * average + (1 - d) * params.

  d is min(decay, (1 + step) / (10 + step)), so that a young average forgets the first weights
  (tf.train.ExponentialMovingAverage with num_updates).
  """
  d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda a, p: d * a + (1.0 - d) * p, average, params)
