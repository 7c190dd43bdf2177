from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.convolutional_config import ConvolutionalConfig
from tfm.models.convolution import GatedConvolution, Linear, glu, scale_gradient

F, T = 6, 9
KINDS = [(True, 3, 'none', 0), (True, 2, 'doubling', 2), (True, 1, 'none', 0), (False, 3, 'doubling', 1),
         (False, 5, 'none', 0)]
"""(causal, kernel width, dilation, layer)."""


def convolution(causal, width, dilation, layer, **fields):
  config = ConvolutionalConfig(encoder_layers=0 if width % 2 == 0 else 1, decoder_layers=4, d_model=4, d_hidden=F,
                               kernel_width=width, dilation=dilation, **fields)
  return GatedConvolution(config, layer, causal)


@pytest.fixture
def x_BxTxF():
  return jnp.asarray(np.random.default_rng(1).standard_normal((2, T, F)), jnp.float32)


@pytest.fixture(params=KINDS, ids=str)
def made(request, random_params, x_BxTxF):
  module = convolution(*request.param)
  return module, random_params(module, x_BxTxF)


def expected(module, variables, x_BxTxF):
  """A loop over outputs and inputs, in float64."""
  params, x_BxTxF = jax.tree.map(np.float64, variables['params']), np.float64(x_BxTxF)
  kernel = params['kernel'] * (params['scale'] / np.sqrt((params['kernel']**2).sum((0, 1))))
  width, dilation = kernel.shape[0], module.config.dilation_of(module.layer)
  y = np.zeros((*x_BxTxF.shape[:2], 2 * F)) + params['bias']
  for t in range(x_BxTxF.shape[1]):
    for i in range(width):
      s = t + (i - (width - 1 if module.causal else width // 2)) * dilation
      if 0 <= s < x_BxTxF.shape[1]:
        y[:, t] += x_BxTxF[:, s] @ kernel[i]
  return y[..., :F] / (1 + np.exp(-y[..., F:]))


def test_is_a_weighted_sum_of_neighbours_through_a_gate(made, x_BxTxF):
  module, variables = made
  np.testing.assert_allclose(module.apply(variables, x_BxTxF), expected(module, variables, x_BxTxF), atol=2e-6)


@pytest.mark.parametrize('widths', [(1, 1, 1, 6), (9,), (4, 5)], ids=str)
@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind[0]], ids=str)
def test_outputs_in_pieces_are_those_of_the_whole(kind, random_params, x_BxTxF, widths):
  module = convolution(*kind)
  variables = random_params(module, x_BxTxF)
  past, pieces = jnp.zeros((2, module.reach, F)), []
  for piece in jnp.split(x_BxTxF, np.cumsum(widths)[:-1], axis=1):
    y_BxTxF, past = module.apply(variables, piece, past, method='extend')
    assert past.shape == (2, module.reach, F)
    pieces.append(y_BxTxF)
  np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), module.apply(variables, x_BxTxF), atol=1e-6)


def test_a_segment_is_as_if_alone(made, x_BxTxF):
  module, variables = made
  segments_BxT = jnp.array([[3, 3, 3, 3, 1, 1, 1, 1, 1], [0] * T])
  packed = module.apply(variables, x_BxTxF, segments_BxT)
  for row, first, last in ((0, 0, 4), (0, 4, 9), (1, 0, 9)):
    alone = module.apply(variables, x_BxTxF[row:row + 1, first:last])
    np.testing.assert_allclose(packed[row, first:last], alone[0], atol=1e-6)


def test_glu_is_the_first_half_times_the_sigmoid_of_the_second():
  np.testing.assert_allclose(glu(jnp.array([2.0, -3.0, 0.0, 100.0])), [1.0, -3.0])


# -- weights ----------------------------------------------------------------------------------------------------------


def test_with_weight_norm_the_kernel_gives_a_direction_and_the_scale_its_length(x_BxTxF):
  module = convolution(True, 3, 'none', 0)
  variables = jax.jit(module.init)(jax.random.key(0), x_BxTxF)
  before = module.apply(variables, x_BxTxF)
  params = variables['params']
  np.testing.assert_allclose(params['scale'], np.sqrt((np.asarray(params['kernel'])**2).sum((0, 1))), rtol=1e-5)
  longer = {**params, 'kernel': params['kernel'] * jnp.linspace(0.5, 7, 2 * F)}
  np.testing.assert_allclose(module.apply({'params': longer}, x_BxTxF), before, atol=1e-6)
  gone = {**params, 'scale': params['scale'].at[0].set(0)}
  after = module.apply({'params': gone}, x_BxTxF)
  np.testing.assert_array_equal(after[..., 0], 0)
  np.testing.assert_array_equal(after[..., 1:], before[..., 1:])


def test_weight_norm_changes_nothing_at_first(x_BxTxF):
  module, plain = (convolution(False, 3, 'none', 0, weight_norm=norm) for norm in (True, False))
  # Not compiled: together with the norm of the kernel XLA rounds the kernel itself otherwise.
  variables, without = (each.init(jax.random.key(0), x_BxTxF) for each in (module, plain))
  assert set(without['params']) == {'kernel', 'bias'}
  np.testing.assert_array_equal(without['params']['kernel'], variables['params']['kernel'])
  np.testing.assert_allclose(module.apply(variables, x_BxTxF), plain.apply(without, x_BxTxF), atol=1e-6)


@pytest.mark.parametrize('dropout', [0.0, 0.5])
def test_kernels_begin_with_the_deviations_of_the_paper(dropout):
  """sqrt(4 p / n) before a gate, sqrt(p / n) elsewhere, for n = k F inputs kept with probability p; biases 0."""
  config = ConvolutionalConfig(d_hidden=64, kernel_width=3, dropout=dropout)
  gated, linear = (jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 2, width)))['params'] for module, width in (
      (GatedConvolution(config, 0, True), 64), (Linear(config, 200, 100, kept=1 - dropout), 200)))
  for params, deviation in ((gated, (4 * (1 - dropout) / 192)**0.5), (linear, ((1 - dropout) / 200)**0.5)):
    assert np.std(params['kernel']) == pytest.approx(deviation, rel=0.02)
    assert not np.any(params['bias'])


def test_a_gate_keeps_the_variance_of_its_input():
  config = ConvolutionalConfig(d_hidden=256, kernel_width=3, dropout=0.0)
  module, x_BxTxF = GatedConvolution(config, 0, False), 0.1 * jax.random.normal(jax.random.key(1), (8, 32, 256))
  y_BxTxF = jax.jit(module.init_with_output)(jax.random.key(0), x_BxTxF)[0]
  assert np.std(y_BxTxF) == pytest.approx(0.1, rel=0.05)


def test_a_linear_map_is_x_w_plus_b(random_params):
  config, x = ConvolutionalConfig(weight_norm=False), jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)))
  variables = random_params(Linear(config, 4, 5), x)
  params = variables['params']
  np.testing.assert_allclose(Linear(config, 4, 5).apply(variables, x), x @ params['kernel'] + params['bias'], atol=1e-6)


# -- gradients --------------------------------------------------------------------------------------------------------


def test_scaling_the_gradient_leaves_the_value_and_scales_both_kinds_of_derivatives():
  x = jnp.array([0.1, -0.7, 3.0])
  np.testing.assert_array_equal(scale_gradient(x, 0.3), x)
  for jacobian in (jax.jacrev, jax.jacfwd):
    np.testing.assert_allclose(jacobian(lambda x: scale_gradient(jnp.sin(x), 0.25))(x),
                               0.25 * np.diag(np.cos(np.asarray(x))), rtol=1e-6)
