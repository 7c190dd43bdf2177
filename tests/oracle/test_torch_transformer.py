"""Logits, loss and gradients are those of `torch.nn.Transformer` and `torch.nn.functional.cross_entropy`.

The smoothed loss of PyTorch spreads e / V over the whole vocabulary, the right token included: the convention of
`tfm.training.loss`. Positions whose label is padding are left out of the comparison, as they are of the loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm.training.loss
from tfm.config import TransformerConfig
from tfm.special_ids import PAD
from tfm.training.objectives import batch_sums

pytest.importorskip('torch', reason='needs PyTorch to compare with: pip install "tfm[oracle]"')

SMOOTHING = 0.1


class Pair(NamedTuple):
  """What our model and its twin make of one batch."""

  twin: object
  labels_BxT: np.ndarray
  our_logits_BxTxV: np.ndarray
  our_sums: tfm.training.loss.Sums
  our_gradients: dict
  their_logits_BxTxV: np.ndarray
  their_loss: float
  their_nll: float


@pytest.fixture(scope='module', params=[
    ('post', 'none', 'chunked'), ('post', 'target', 'whole'), ('post', 'all', 'chunked'),
    ('pre', 'none', 'whole'), ('pre', 'target', 'chunked'), ('pre', 'all', 'chunked')], ids='-'.join)
def pair(request, new_model, new_batch, torch_twin):
  norm, tying, loss_path = request.param
  # Scanned layers once, and an epsilon large enough to be seen in the logits.
  config = TransformerConfig(encoder_layers=1, decoder_layers=2, d_model=32, d_ff=48, num_heads=4, dropout=0.0,
                             norm_epsilon=1e-2, norm=norm, tying=tying, scan_layers=(norm, tying) == ('pre', 'target'))
  vocabularies = (37, 37) if tying == 'all' else (31, 37)
  model, params = new_model(config, *vocabularies)
  source_BxS, target_BxT = batch = new_batch(*vocabularies)

  def loss(params):
    sums = batch_sums(model, params, batch, SMOOTHING)
    return sums.loss, (sums, model.apply({'params': params}, source_BxS, target_BxT[:, :-1]))

  with pytest.MonkeyPatch.context() as patch:
    if loss_path == 'chunked':  # three chunks of two rows
      patch.setattr(tfm.training.loss, 'most_logits',
                  lambda params: 2 * (target_BxT.shape[1] - 1) * model.target_vocab_size)
    both = jax.jit(jax.grad(loss, has_aux=True))
    gradients, (sums, our_logits_BxTxV) = both(jax.tree.map(jnp.asarray, params))

  twin, labels_BxT = torch_twin(config, params), target_BxT[:, 1:]
  logits_BxTxV = twin.logits(source_BxS, target_BxT[:, :-1])
  their_loss = twin.loss(logits_BxTxV, labels_BxT, SMOOTHING, 'sum')
  their_loss.backward()
  their_nll = twin.loss(logits_BxTxV, labels_BxT, 0.0, 'sum')
  return Pair(twin, labels_BxT, np.asarray(our_logits_BxTxV), sums, gradients,
              logits_BxTxV.detach().numpy(), their_loss.item(), their_nll.item())


def assert_close(ours, theirs, tolerance, name=''):
  """Equal to `tolerance` times the largest number there is in `theirs`."""
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=name)


def test_logits(pair):
  real_BxT = pair.labels_BxT != PAD
  assert_close(pair.our_logits_BxTxV[real_BxT], pair.their_logits_BxTxV[real_BxT], 1e-5)


def test_loss_sums(pair):
  real_BxT = pair.labels_BxT != PAD
  assert float(pair.our_sums.loss) == pytest.approx(pair.their_loss, rel=1e-6)
  assert float(pair.our_sums.nll) == pytest.approx(pair.their_nll, rel=1e-6)
  assert float(pair.our_sums.tokens) == real_BxT.sum()
  assert float(pair.our_sums.correct) == (pair.their_logits_BxTxV.argmax(-1) == pair.labels_BxT)[real_BxT].sum()


def test_gradients_of_all_parameters(pair):
  for name, gradient in pair.twin.named(pair.our_gradients).items():
    assert_close(gradient, pair.twin.trained[name].grad.numpy(), 1e-5, name)
