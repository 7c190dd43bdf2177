"""Norms: LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019); statistics are float32."""

from __future__ import annotations

import flax.linen as nn

from tfm.config import TransformerConfig


def make_norm(config: TransformerConfig) -> nn.Module:
  """Over the last axis, with a trained scale, and with a bias where the config has them."""
  if config.norm_type == 'rms':
    return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=config.dtype)
  return nn.LayerNorm(epsilon=config.norm_epsilon, dtype=config.dtype, use_bias=config.biases in ('mlp', 'all'))
