from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import TransformerConfig
from tfm.models.feed_forward import ACTIVATIONS, FeedForward

X_BxTxD = np.random.default_rng(0).standard_normal((2, 3, 16)).astype(np.float32)


def gelu(x):
  """x Phi(x)."""
  return x * np.vectorize(lambda value: 0.5 * (1 + math.erf(value / math.sqrt(2))))(x)


def gelu_tanh(x):
  """Hendrycks & Gimpel 2016, section 2."""
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
  return x / (1 + np.exp(-x))


FUNCTIONS = {'relu': lambda x: np.maximum(x, 0), 'gelu': gelu, 'gelu_tanh': gelu_tanh, 'silu': silu,
             'swiglu': silu, 'geglu': gelu, 'geglu_tanh': gelu_tanh}


@pytest.mark.parametrize('biases', ['mlp', 'all', 'qkv', 'none'])
@pytest.mark.parametrize('kind', FUNCTIONS)
def test_it_is_equation_2_or_a_gated_variant(random_params, kind, biases):
  network = FeedForward(TransformerConfig(d_model=16, d_ff=24, feed_forward=kind, biases=biases))
  variables = random_params(network, X_BxTxD)
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['params'])

  def linear(x, name):
    return x @ params[name]['kernel'] + params[name].get('bias', 0)

  act, gated = FUNCTIONS[kind], kind in ('swiglu', 'geglu', 'geglu_tanh')
  inner = act(linear(X_BxTxD, 'gate')) * linear(X_BxTxD, 'inner') if gated else act(linear(X_BxTxD, 'inner'))
  np.testing.assert_allclose(network.apply(variables, X_BxTxD), linear(inner, 'outer'), atol=2e-6)
  assert set(params) == {'inner', 'outer', *['gate'] * gated}
  assert all(('bias' in part) == (biases in ('mlp', 'all')) for part in params.values())


def test_dropout_falls_behind_the_activation(random_params):
  network = FeedForward(TransformerConfig(d_model=16, d_ff=24, activation_dropout=0.5))
  variables = random_params(network, X_BxTxD)
  variables = {'params': {**variables['params'], 'outer': {'kernel': jnp.eye(24, 16), 'bias': jnp.zeros(16)}}}
  whole, dropped = (network.apply(variables, X_BxTxD, key) for key in (None, jax.random.key(0)))
  kept = dropped != 0
  np.testing.assert_allclose(dropped, np.where(kept, whole / 0.5, 0), rtol=1e-6)
  assert 0.25 < kept[whole > 0].mean() < 0.75


def test_gelu_by_erf_is_that_of_jax_with_its_gradient():
  x = jnp.linspace(-30.0, 30.0, 4001)
  theirs = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
  ours = ACTIVATIONS['gelu']
  np.testing.assert_allclose(ours(x), theirs(x), atol=1e-6)
  np.testing.assert_allclose(jax.vmap(jax.grad(ours))(x), jax.vmap(jax.grad(theirs))(x), atol=1e-6)
  assert ours(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
