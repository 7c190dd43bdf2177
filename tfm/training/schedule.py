"""Learning rate as a function of the step (Vaswani et al. 2017, section 5.3, equation 3, and the other usual ones)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tfm.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, d_model: int, total_steps: int) -> Callable[[jax.Array], jax.Array]:
  """The rate of the update that is made after `count` others (so the first has count 0)."""
  warmup = config.warmup_steps

  def noam(step):
    return d_model**-0.5 * jnp.minimum(step**-0.5, step * warmup**-1.5)

  def warmed_up(after: Callable[[jax.Array], jax.Array]):
    def rate(step):
      return jnp.where(step < warmup, step / max(warmup, 1), after(step))
    return rate

  def done(step):
    """0 at the end of the warm-up, 1 at the last step."""
    return jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)

  def falling(share):
    """From 1 to `final_fraction` as `share` goes from 1 to 0."""
    return config.final_fraction + (1.0 - config.final_fraction) * share

  def decayed(step):
    """1 until the last `decay_fraction` of the steps, then down to 0 in a straight line."""
    length = max(min(config.decay_fraction * total_steps, total_steps - warmup), 1)
    return jnp.clip((total_steps - step) / length, 0.0, 1.0)

  shapes = {
      'noam': noam,
      'constant': warmed_up(jnp.ones_like),
      'linear': warmed_up(lambda step: falling(1.0 - done(step))),
      'cosine': warmed_up(lambda step: falling(0.5 + 0.5 * jnp.cos(jnp.pi * done(step)))),
      'wsd': warmed_up(lambda step: falling(decayed(step))),
      'rsqrt': warmed_up(lambda step: (step / warmup) ** -0.5),
  }
  shape = shapes[config.schedule]
  return lambda count: config.learning_rate * shape(jnp.asarray(count, jnp.float32) + 1.0)
