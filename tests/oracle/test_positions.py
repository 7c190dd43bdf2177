"""Positions are those of `transformers`: rope with every scaling, ALiBi's slopes, T5's buckets, Marian's sinusoid."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tfm.models.positions import alibi_slopes, relative_bucket, rope, rope_frequencies, sinusoidal

EXTRA = 'needs {} to compare with: pip install "tfm[oracle]"'
torch = pytest.importorskip('torch', reason=EXTRA.format('PyTorch'))
transformers = pytest.importorskip('transformers', reason=EXTRA.format('transformers'))

# name -> (width, base, factor, original length)
CASES = {
    'none': [(64, 10000.0, 1.0, None), (6, 500.0, 1.0, None)],
    'linear': [(64, 10000.0, 4.0, None), (6, 500.0, 2.5, None)],
    'llama3': [(128, 500000.0, 8.0, 8192), (64, 500000.0, 32.0, 8192), (16, 10000.0, 2.0, 100)],
    'yarn': [(128, 10000.0, 16.0, 4096), (64, 1000000.0, 4.0, 32768), (16, 10000.0, 2.0, 100), (8, 10000.0, 8.0, 20),
             (64, 10000.0, 1.0, 64)],
}


def llama(width, base, scaling, factor, original_length):
  """Transformers' rotary embedding, as Llama has it."""
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
  parameters = dict(rope_type='default' if scaling == 'none' else scaling, rope_theta=base)
  if scaling != 'none':
    parameters |= dict(factor=factor)
  if original_length is not None:
    parameters |= dict(original_max_position_embeddings=original_length)
  if scaling == 'llama3':
    parameters |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
  longest = int((original_length or 512) * factor)
  return LlamaRotaryEmbedding(transformers.LlamaConfig(
      hidden_size=2 * width, num_attention_heads=2, head_dim=width, max_position_embeddings=longest,
      rope_parameters=parameters))


@pytest.mark.parametrize('scaling, case', [(scaling, case) for scaling, cases in CASES.items() for case in cases])
def test_rope(scaling, case):
  from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
  width, base, factor, original_length = case
  theirs = llama(width, base, scaling, factor, original_length)
  frequency, amplitude = rope_frequencies(width, base, scaling, factor, original_length)
  np.testing.assert_allclose(frequency, theirs.inv_freq.numpy(), rtol=3e-6)
  assert amplitude == pytest.approx(theirs.attention_scaling)

  random = np.random.default_rng(0)
  q, k = (random.standard_normal((2, 5, heads, width), np.float32) for heads in (4, 2))
  positions = np.array([[0, 1, 2, 90, 91], [3, 4, 0, 1, 2]])
  cos, sin = theirs(torch.tensor(q), torch.tensor(positions))
  turned = apply_rotary_pos_emb(torch.tensor(q), torch.tensor(k), cos, sin, unsqueeze_dim=2)
  for ours, expected in zip((q, k), turned):
    found = rope(jnp.asarray(ours), jnp.asarray(positions), base=base, scaling=scaling, factor=factor,
                 original_length=original_length)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize('num_heads', [1, 2, 3, 5, 8, 12, 16, 20, 71])
def test_alibi_slopes(num_heads):
  from transformers.models.bloom.modeling_bloom import build_alibi_tensor
  theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]  # slope times position 1
  np.testing.assert_allclose(alibi_slopes(num_heads), theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize('buckets, max_distance', [(32, 128), (8, 20), (16, 64), (4, 8), (64, 512), (32, 1000)])
@pytest.mark.parametrize('bidirectional', [True, False])
def test_relative_buckets(buckets, max_distance, bidirectional):
  from transformers.models.t5.modeling_t5 import T5Attention
  distance = np.arange(-1500, 1500)
  theirs = T5Attention._relative_position_bucket(torch.tensor(distance), bidirectional, buckets, max_distance)
  np.testing.assert_array_equal(relative_bucket(jnp.asarray(distance), buckets, max_distance, bidirectional), theirs)


def test_sinusoid_in_halves():
  from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
  theirs = MarianSinusoidalPositionalEmbedding(200, 32).create_weight()
  np.testing.assert_allclose(sinusoidal(jnp.arange(200), 32, halves=True), theirs.numpy(), atol=3e-5)
