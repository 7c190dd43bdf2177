"""ConvS2S against the same model of PyTorch's parts: its convolution, gated linear unit and weight normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.convolutional_config import ConvolutionalConfig
from tfm.models.convolution import GatedConvolution
from tfm.models.convolutional import ConvolutionalEncoderDecoder

torch = pytest.importorskip('torch', reason='needs PyTorch to compare with: pip install "tfm[oracle]"')

HALF = 0.5**0.5


def fill(shapes):
  random = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: (0.2 + 0.25 * random.standard_normal(leaf.shape)).astype(np.float32), shapes)


def tensors(params):
  return jax.tree.map(lambda leaf: torch.tensor(np.array(leaf), requires_grad=True), params)


def weight(params):
  """[outputs, inputs, width] of a convolution, [outputs, inputs] of a linear map."""
  kernel = params['kernel'].permute(*reversed(range(params['kernel'].ndim)))
  return torch._weight_norm(kernel, params['scale'].reshape(-1, *[1] * (kernel.ndim - 1)), 0)


def convolve(x_BxTxF, params, dilation, causal):
  reach = (params['kernel'].shape[0] - 1) * dilation
  x_BxFxT = torch.nn.functional.pad(x_BxTxF.mT, (reach, 0) if causal else (reach // 2, reach // 2))
  y_BxGxT = torch.nn.functional.conv1d(x_BxFxT, weight(params), params['bias'], dilation=dilation)
  return torch.nn.functional.glu(y_BxGxT, dim=1).mT


def linear(x, params):
  return torch.nn.functional.linear(x, weight(params), params['bias'])


@pytest.mark.parametrize('width, layer, causal', [(3, 0, False), (3, 2, True), (5, 1, False)])
def test_a_gated_convolution_is_conv1d_and_glu_with_the_same_gradients(width, layer, causal):
  config = ConvolutionalConfig(d_hidden=6, kernel_width=width, dilation='doubling')
  module, x_BxTxF = GatedConvolution(config, layer, causal), np.random.default_rng(1).normal(size=(2, 9, 6))
  x_BxTxF = x_BxTxF.astype(np.float32)
  params = fill(jax.eval_shape(module.init, jax.random.key(0), x_BxTxF)['params'])
  twin = tensors(params)
  expected = convolve(torch.tensor(x_BxTxF), twin, 2**layer, causal)
  expected.sin().sum().backward()
  found, gradients = jax.jit(lambda params: (
      module.apply({'params': params}, x_BxTxF),
      jax.grad(lambda params: jnp.sum(jnp.sin(module.apply({'params': params}, x_BxTxF))))(params)))(params)
  np.testing.assert_allclose(found, expected.detach(), atol=1e-5)
  jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs.grad, atol=1e-4), gradients, twin)


def translate(params, source_1xS, target_1xT, config):
  """Logits 1xTxV of one sentence without padding."""
  def embed(side, ids_1xT):
    return params[f'{side}_embedding']['table'][ids_1xT] + params[f'{side}_positions']['table'][:ids_1xT.shape[1]]

  e, g = embed('source', torch.tensor(source_1xS).long()), embed('target', torch.tensor(target_1xT).long())
  x = linear(e, params['encoder']['input_projection'])
  for i in range(config.encoder_layers):
    x = (x + convolve(x, params['encoder'][f'layers_{i}']['convolution'], 2**i, causal=False)) * HALF
  z = linear(x, params['encoder']['output_projection'])
  # The gradient of the encoder is divided by the number of attentions.
  z = z.detach() + (z - z.detach()) / config.decoder_layers
  x = linear(g, params['decoder']['input_projection'])
  for i in range(config.decoder_layers):
    layer = params['decoder'][f'layers_{i}']
    h = convolve(x, layer['convolution'], 2**i, causal=True)
    d = (linear(h, layer['cross_attention']['query_projection']) + g) * HALF
    c = torch.softmax(d @ z.mT, dim=-1) @ ((z + e) * HALF) * source_1xS.shape[1]**0.5
    x = (x + (h + linear(c, layer['cross_attention']['output_projection'])) * HALF) * HALF
  return linear(x, params['decoder']['output_projection']) @ params['output']['table'].T + params['output_bias']


def test_a_model_gives_the_logits_and_gradients_of_its_twin():
  """Two sentences of other lengths: ours in one batch with padding, the twin's one by one."""
  config = ConvolutionalConfig(encoder_layers=2, decoder_layers=3, d_model=8, d_hidden=12, dilation='doubling',
                               max_positions=8, dropout=0.0)
  source_BxS, target_BxT = np.array([[5, 6, 7, 8, 9, 2], [4, 9, 2, 0, 0, 0]]), np.array([[1, 7, 11, 4], [1, 9, 3, 8]])
  model = ConvolutionalEncoderDecoder(config, 19, 17)
  params = fill(jax.eval_shape(model.init, jax.random.key(0), source_BxS, target_BxT)['params'])

  @jax.jit
  def run(params):
    def loss(params):
      logits_BxTxV = model.apply({'params': params}, source_BxS, target_BxT)
      return jnp.sum(jax.nn.log_softmax(logits_BxTxV)[..., 5]), logits_BxTxV
    return jax.grad(loss, has_aux=True)(params)

  gradients, logits_BxTxV = run(params)
  twin = tensors(params)
  for b, length in enumerate((6, 3)):
    expected = translate(twin, source_BxS[b:b + 1, :length], target_BxT[b:b + 1], config)
    np.testing.assert_allclose(logits_BxTxV[b], expected[0].detach(), atol=2e-5)
    torch.log_softmax(expected, dim=-1)[..., 5].sum().backward()
  jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs.grad, rtol=1e-3, atol=1e-4),
               gradients, twin)
