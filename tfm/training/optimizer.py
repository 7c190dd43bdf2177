"""Adam as in the paper (Vaswani et al. 2017, section 5.3), with optional clipping."""

from __future__ import annotations

import optax

from tfm.config import OptimizerConfig
from tfm.training.schedule import learning_rate


def build_optimizer(config: OptimizerConfig, d_model: int, total_steps: int) -> optax.GradientTransformation:
  adam = optax.adam(learning_rate(config, d_model, total_steps), config.b1, config.b2, config.epsilon)
  if config.clip_norm is None:
    return adam
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)
