from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import TransformerConfig
from tfm.models.norms import make_norm

X_BxTxD = np.random.default_rng(0).standard_normal((2, 3, 16)).astype(np.float32) + 2


@pytest.mark.parametrize('norm_type, biases, parameters', [
    ('layer', 'mlp', {'scale', 'bias'}), ('layer', 'all', {'scale', 'bias'}), ('layer', 'qkv', {'scale'}),
    ('layer', 'none', {'scale'}), ('rms', 'all', {'scale'}), ('rms', 'none', {'scale'})])
def test_a_norm_is_that_of_its_paper(random_params, norm_type, biases, parameters):
  """An epsilon large enough to matter."""
  norm = make_norm(TransformerConfig(norm_type=norm_type, biases=biases, norm_epsilon=0.5))
  variables = random_params(norm, X_BxTxD)
  params = {name: np.asarray(leaf, np.float64) for name, leaf in variables['params'].items()}
  x_BxTxD = np.asarray(X_BxTxD, np.float64)
  if norm_type == 'layer':
    x_BxTxD = x_BxTxD - x_BxTxD.mean(-1, keepdims=True)
  expected = x_BxTxD / np.sqrt((x_BxTxD**2).mean(-1, keepdims=True) + 0.5) * params['scale'] + params.get('bias', 0)
  np.testing.assert_allclose(norm.apply(variables, X_BxTxD), expected, atol=2e-6)
  assert set(params) == parameters


@pytest.mark.parametrize('norm_type', ['layer', 'rms'])
def test_statistics_are_float32_whatever_the_type(random_params, norm_type):
  """256 + 1 is 256 in bfloat16, so its own mean and variance would be wrong."""
  norm = make_norm(TransformerConfig(norm_type=norm_type, dtype='bfloat16'))
  x_1xD = jnp.asarray([[256.0] * 300 + [-256.0] * 100], jnp.bfloat16)
  out = norm.apply({'params': {'scale': jnp.ones(400), **({'bias': jnp.zeros(400)} if norm_type == 'layer' else {})}},
                   x_1xD)
  assert out.dtype == jnp.bfloat16
  exact = np.asarray(x_1xD, np.float64) - (128 if norm_type == 'layer' else 0)
  np.testing.assert_allclose(np.asarray(out, np.float64), exact / np.sqrt((exact**2).mean()), rtol=2**-8)
