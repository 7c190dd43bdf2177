"""Tiny models with random parameters, for all tests of tfm/models."""

from __future__ import annotations

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import TransformerConfig
from tfm.models.build import build_model, initialize

TINY = dict(encoder_layers=2, decoder_layers=2, d_model=16, d_ff=24, num_heads=2, dropout=0.0)


def fill(shapes, seed: int = 0):
  """Random values for every parameter, norms and biases included, so that none can be forgotten unnoticed."""
  random = np.random.default_rng(seed)

  def one(path, leaf):
    return jnp.asarray((path[-1].key == 'scale') + 0.25 * random.standard_normal(leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(one, shapes)


@cache
def _make(changes):
  config = TransformerConfig(**{**TINY, **dict(changes)})
  model = build_model(config, 19 if config.tying != 'all' else 17, 17)
  return model, {'params': fill(jax.eval_shape(partial(initialize, model), jax.random.key(0)))}


@pytest.fixture
def tiny():
  """`tiny(norm='pre', ...)` -> (model, variables): width 16, 2 + 2 layers, 17 target words."""
  return lambda **changes: _make(tuple(sorted(changes.items())))


@pytest.fixture
def in_place():
  """`with in_place():` somebody looks on, so that every layer is called where it stands in the model."""
  return lambda: nn.intercept_methods(lambda call, args, kwargs, _: call(*args, **kwargs))


@pytest.fixture
def random_params():
  """`random_params(module, *arguments)` -> variables for any module, nothing at its initial value."""
  return lambda module, *arguments: fill(jax.eval_shape(partial(module.init, jax.random.key(0)), *arguments))


@pytest.fixture
def ids():
  """(source_BxS, target_BxT): three sentences of other lengths, padded on the right."""
  source_BxS = jnp.array([[5, 6, 7, 8, 9, 2], [4, 9, 2, 0, 0, 0], [13, 3, 8, 2, 0, 0]])
  target_BxT = jnp.array([[1, 7, 11, 4, 16], [1, 9, 0, 0, 0], [1, 5, 5, 12, 0]])
  return source_BxS, target_BxT
