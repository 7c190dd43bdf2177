"""Encoders are those of PyTorch on packed sequences: states, last states and gradients, for every cell."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.models.recurrent_stacks import RecurrentEncoder
from tfm.recurrent_config import RecurrentConfig

torch = pytest.importorskip('torch', reason='needs PyTorch to compare with: pip install "tfm[oracle]"')

D, W, LENGTHS_B = 5, 6, [4, 7, 1, 5]
KINDS = {'lstm': torch.nn.LSTM, 'gru': torch.nn.GRU, 'tanh': torch.nn.RNN}


def torch_names(layer: dict, suffix: str) -> dict[str, np.ndarray]:
  """One cell under PyTorch's names. It has two biases where one is enough; the second one of the GRU's candidate is
  the one inside the reset gate."""

  def rows(kernel_GxIxW):
    return np.concatenate([np.asarray(matrix).T for matrix in kernel_GxIxW])

  inner = np.zeros(layer['bias'].shape, np.float32)
  if 'candidate_bias' in layer:
    inner[2] = layer['candidate_bias']
  return {f'weight_ih_{suffix}': rows(layer['kernel']), f'weight_hh_{suffix}': rows(layer['recurrent']),
          f'bias_ih_{suffix}': np.asarray(layer['bias']).reshape(-1), f'bias_hh_{suffix}': inner.reshape(-1)}


def named(params: dict) -> dict[str, np.ndarray]:
  found = {}
  for name, layer in params.items():
    for direction, cell in layer.items():
      found |= torch_names(cell, f'l{name.removeprefix("layers_")}{"_reverse" if direction == "backward" else ""}')
  return found


@pytest.mark.parametrize('bidirectional', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_encoder(kind, bidirectional):
  config = RecurrentConfig(cell=kind, encoder_layers=2, d_model=D, d_hidden=W, bidirectional=bidirectional)
  random = np.random.default_rng(0)
  S, B, V = max(LENGTHS_B), len(LENGTHS_B), config.memory_width
  x_SxBxD = random.standard_normal((S, B, D)).astype(np.float32)
  real_SxB = np.arange(S)[:, None] < np.array(LENGTHS_B)
  weight_SxBxV = random.standard_normal((S, B, V)).astype(np.float32)
  encoder = RecurrentEncoder(config)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), x_SxBxD, real_SxB)['params']
  params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32) * 0.5, shapes)

  def loss(params, x_SxBxD):
    states_SxBxV, finals = encoder.apply({'params': params}, x_SxBxD, real_SxB)
    return jnp.sum(states_SxBxV * weight_SxBxV) + sum(jnp.sum(part) for state in finals for part in state), (
        states_SxBxV, finals)

  (d_params, d_x_SxBxD), (states_SxBxV, finals) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x_SxBxD)

  twin = KINDS[kind](D, W, num_layers=2, bidirectional=bidirectional)
  with torch.no_grad():
    for name, array in named(params).items():
      getattr(twin, name).copy_(torch.tensor(array))
  x = torch.tensor(x_SxBxD, requires_grad=True)
  packed, last = twin(torch.nn.utils.rnn.pack_padded_sequence(x, LENGTHS_B, enforce_sorted=False))
  theirs_SxBxV = torch.nn.utils.rnn.pad_packed_sequence(packed)[0]
  last = last if kind == 'lstm' else (last,)
  ((theirs_SxBxV * torch.tensor(weight_SxBxV)).sum() + sum(part.sum() for part in last)).backward()

  np.testing.assert_allclose(states_SxBxV, theirs_SxBxV.detach(), atol=2e-6)
  directions = 2 if bidirectional else 1
  for part, theirs in enumerate(last):  # (layers x directions) x B x W
    for layer, theirs_DxBxW in enumerate(theirs.detach().unflatten(0, (2, directions))):
      np.testing.assert_allclose(finals[layer][part], np.concatenate(list(theirs_DxBxW), axis=-1), atol=2e-6)
  np.testing.assert_allclose(d_x_SxBxD, x.grad, atol=2e-5)
  for name, gradient in named(d_params).items():
    theirs = getattr(twin, name).grad.numpy()
    if 'bias_hh' in name:  # a bias of ours is one of theirs alone, and so is its gradient
      theirs = np.where(np.arange(len(theirs)) >= 2 * W, theirs, 0) if kind == 'gru' else 0 * theirs
    np.testing.assert_allclose(gradient, theirs, atol=1e-4, err_msg=name)
