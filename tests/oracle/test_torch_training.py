"""Twenty updates of the training step are those of `torch.optim.Adam` under the paper's schedule."""

import jax
import numpy as np
import pytest

from tfm.config import Config, OptimizerConfig, TrainingConfig, TransformerConfig
from tfm.special_ids import PAD
from tfm.training.step import build_step, new_state

torch = pytest.importorskip('torch', reason='needs PyTorch to compare with: pip install "tfm[oracle]"')

STEPS, VOCABULARY, WARMUP, FACTOR = 20, 37, 8, 0.1


@pytest.mark.parametrize('norm, epsilon, clip_norm, accumulate', [('post', 1e-9, None, 1), ('pre', 1e-3, 0.5, 2)])
def test_twenty_updates(new_model, new_batch, torch_twin, norm, epsilon, clip_norm, accumulate):
  """Same losses, learning rates, gradient norms and weights.

  Both Adams divide m / (1 - b1^t) by sqrt(v / (1 - b2^t)) + epsilon: the epsilon is outside the root and added after
  the correction. The paper's 1e-9 is too small to show that, hence 1e-3 too. PyTorch's loss is the mean over the labels
  that are not padding; its clipping adds 1e-6 to the norm.
  """
  config = Config(
      model=TransformerConfig(encoder_layers=1, decoder_layers=2, d_model=32, d_ff=48, num_heads=4, dropout=0.0,
                              norm=norm),
      optimizer=OptimizerConfig(schedule='noam', learning_rate=FACTOR, warmup_steps=WARMUP, epsilon=epsilon,
                                clip_norm=clip_norm),
      training=TrainingConfig(steps=STEPS, accumulate=accumulate))
  model, params = new_model(config.model, VOCABULARY, VOCABULARY)
  batches = [new_batch(VOCABULARY, VOCABULARY, seed) for seed in range(3)]

  twin = torch_twin(config.model, params)
  adam = torch.optim.Adam(twin.trained.values(), betas=(0.9, 0.98), eps=epsilon)
  state, step = new_state(config, model, params), jax.jit(build_step(config, model))
  for i in range(1, STEPS + 1):
    source_BxS, target_BxT = batch = batches[i % len(batches)]
    state, metrics = step(state, batch)

    labels_BxT = target_BxT[:, 1:]
    loss = twin.loss(twin.logits(source_BxS, target_BxT[:, :-1]), labels_BxT, 0.1, 'mean')
    adam.zero_grad()
    loss.backward()
    norm_before = torch.nn.utils.clip_grad_norm_(twin.trained.values(), clip_norm or float('inf')).item()
    (group,) = adam.param_groups
    group['lr'] = FACTOR * 32**-0.5 * min(i**-0.5, i * WARMUP**-1.5)
    adam.step()

    assert float(metrics.sums.tokens) == (labels_BxT != PAD).sum()
    assert float(metrics.sums.loss / metrics.sums.tokens) == pytest.approx(loss.item(), rel=1e-5), i
    assert float(metrics.grad_norm) == pytest.approx(norm_before, rel=1e-4), i
    assert float(metrics.learning_rate) == pytest.approx(group['lr'], rel=1e-6), i

  before, after = twin.named(params), twin.named(state.params)
  for name, parameter in twin.trained.items():
    theirs = parameter.detach().numpy()
    moved, apart = np.linalg.norm(theirs - before[name]), np.linalg.norm(theirs - after[name])
    assert apart < 1e-4 * moved, name
