from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tfm.config import OptimizerConfig
from tfm.training.optimizer import build_optimizer

PARAMS = {'a': jnp.zeros((2, 3)), 'b': jnp.zeros(4)}


def gradients(count: int, scale: float = 1.0):
  random = np.random.default_rng(0)
  return [jax.tree.map(lambda p: jnp.asarray(scale * random.normal(size=p.shape), jnp.float32), PARAMS)
          for _ in range(count)]


def updates(given: list, **fields) -> list:
  config = OptimizerConfig(**{'schedule': 'constant', 'learning_rate': 0.01, 'warmup_steps': 0, **fields})
  optimizer = build_optimizer(config, 64, 100)
  state, found = optimizer.init(PARAMS), []
  for gradient in given:
    update, state = optimizer.update(gradient, state, PARAMS)
    found.append(update)
  return found


def adam(given: list, rates: list[float], b1: float, b2: float, epsilon: float) -> list:
  """Kingma & Ba 2015, algorithm 1, in float64."""
  m = v = jax.tree.map(lambda p: np.zeros(p.shape), PARAMS)
  found = []
  for t, (gradient, rate) in enumerate(zip(given, rates), 1):
    m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * np.float64(g), m, gradient)
    v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * np.float64(g) ** 2, v, gradient)
    found.append(jax.tree.map(
        lambda m, v, t=t, rate=rate: -rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + epsilon), m, v))
  return found


def assert_close(found, expected, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


@pytest.mark.parametrize('b1, b2, epsilon', [(0.9, 0.98, 1e-9), (0.5, 0.9, 0.1), (0.0, 0.999, 1e-3)])
def test_is_adam_with_these_betas_and_epsilon(b1, b2, epsilon):
  given = gradients(5)
  assert_close(updates(given, b1=b1, b2=b2, epsilon=epsilon), adam(given, [0.01] * 5, b1, b2, epsilon), rtol=1e-4)


def test_the_rate_is_that_of_the_schedule():
  given = gradients(6)
  found = updates(given, schedule='noam', learning_rate=2.0, warmup_steps=3)
  rates = [2.0 * 64**-0.5 * min(t**-0.5, t * 3**-1.5) for t in range(1, 7)]
  assert_close(found, adam(given, rates, 0.9, 0.98, 1e-9), rtol=1e-4)


@pytest.mark.parametrize('scale', [1e-4, 1.0, 1e4])
def test_the_first_update_has_the_size_of_the_rate(scale):
  (gradient,) = gradients(1, scale)
  (update,) = updates([gradient], learning_rate=0.03)
  assert_close(update, jax.tree.map(lambda g: -0.03 * jnp.sign(g), gradient), rtol=1e-4)


def test_clipping_bounds_the_norm_and_keeps_the_direction():
  # With so large an epsilon Adam is plain gradient descent, so the update shows the gradient that it was given.
  plain = dict(epsilon=1e4, learning_rate=1e4, b1=0.0)
  (gradient,) = gradients(1, scale=10.0)
  norm = float(optax.tree.norm(gradient))
  (clipped,), (whole,) = updates([gradient], clip_norm=0.5, **plain), updates([gradient], **plain)
  assert float(optax.tree.norm(whole)) == pytest.approx(norm, rel=0.01)
  assert float(optax.tree.norm(clipped)) == pytest.approx(0.5, rel=0.01)
  assert_close(clipped, jax.tree.map(lambda g: -g * 0.5 / norm, gradient), rtol=0.01)


def test_clipping_leaves_a_smaller_gradient_alone():
  given = gradients(3, scale=0.01)
  assert_close(updates(given, clip_norm=5.0), updates(given), rtol=0)


def test_adam_sees_the_clipped_gradients():
  """Clipping its updates instead would leave the moments to one huge gradient."""
  huge, usual = gradients(2, scale=100.0)
  usual = jax.tree.map(lambda g: g / 1000.0, usual)
  norm = float(optax.tree.norm(huge))
  clipped = jax.tree.map(lambda g: g * 2.0 / norm, huge)
  expected = adam([clipped, usual], [0.01] * 2, 0.9, 0.98, 1e-9)
  assert_close(updates([huge, usual], clip_norm=2.0), expected, rtol=1e-4)
