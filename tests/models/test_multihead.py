from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention import masks
from tfm.config import TransformerConfig
from tfm.models.multihead import CachedKeysValues, MultiHeadAttention

B, T, S, D, H, KEY, VALUE = 2, 5, 4, 16, 2, 6, 3
CONFIG = TransformerConfig(d_model=D, num_heads=H, d_k=KEY, d_v=VALUE)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture
def attention(random_params):
  module = MultiHeadAttention(CONFIG)
  variables = random_params(module, draw(B, T, D), draw(B, S, D), masks.everything())
  return partial(module.apply, variables), variables['params']


def test_it_is_the_concatenation_of_heads_times_a_matrix(attention):
  """Section 3.2.2, head by head."""
  apply, params = attention
  x_BxTxD, y_BxSxD, lengths = draw(B, T, D), draw(B, S, D, seed=1), (2, 4)
  kernels = {name: np.asarray(part['kernel'], np.float64) for name, part in params.items()}
  expected_BxTxD = np.zeros((B, T, D))
  for b in range(B):
    heads = []
    for h in range(H):
      q, k, v = (np.asarray(side[b], np.float64) @ kernels[name][:, h]
                 for name, side in (('query', x_BxTxD), ('key', y_BxSxD), ('value', y_BxSxD)))
      weights = np.exp(q @ k[:lengths[b]].T / KEY**0.5)
      heads.append(weights / weights.sum(1, keepdims=True) @ v[:lengths[b]])
    expected_BxTxD[b] = np.concatenate(heads, axis=1) @ kernels['output'].reshape(H * VALUE, D)
  actual_BxTxD = apply(x_BxTxD, y_BxSxD, masks.lengths(jnp.array(lengths)))
  np.testing.assert_allclose(actual_BxTxD, expected_BxTxD, atol=1e-5)


def test_its_only_parameters_are_four_matrices(attention):
  shapes = jax.tree.map(jnp.shape, attention[1])
  assert shapes == {'query': {'kernel': (D, H, KEY)}, 'key': {'kernel': (D, H, KEY)},
                    'value': {'kernel': (D, H, VALUE)}, 'output': {'kernel': (H, VALUE, D)}}


def test_several_rows_can_share_the_keys_of_one_sentence(attention):
  """As beams do: row b * M + m reads the memory of sentence b."""
  apply, _ = attention
  M = 3
  x_RxTxD, y_BxSxD, mask = draw(B * M, T, D), draw(B, S, D, seed=1), masks.lengths(jnp.array([2, 4]))
  shared = apply(x_RxTxD, apply(y_BxSxD, method='keys_values'), mask, method='attend')
  for r in range(B * M):
    b = slice(r // M, r // M + 1)
    alone = apply(x_RxTxD[r:r + 1], y_BxSxD[b], masks.lengths(mask.lengths_B[b]))
    np.testing.assert_allclose(shared[r], alone[0], atol=1e-6)


def test_extending_a_cache_is_causal_self_attention(attention):
  apply, _ = attention
  x_BxTxD = draw(B, T, D)
  whole_BxTxD = apply(x_BxTxD, x_BxTxD, masks.causal())
  # What lies in the cache beyond the index must not matter: it holds leftovers, here enormous ones.
  past = CachedKeysValues(jnp.full((B, H, T + 2, KEY), 1e4), jnp.full((B, H, T + 2, VALUE), -1e4))
  index, parts = 0, []
  for width in (2, 1, 2):
    out, past = apply(x_BxTxD[:, index:index + width], past, index, masks.causal(offset=index), method='extend')
    parts.append(out)
    index += width
  np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole_BxTxD, atol=1e-6)


@pytest.mark.parametrize('norm_type', ['layer', 'rms'])
@pytest.mark.parametrize('positions', ['rope', 'none'])
def test_biases_norms_of_heads_rope_grouped_heads_cap_scale_and_sinks(random_params, norm_type, positions):
  """Head by head, in this order: bias, norm, rotation; cap, bias of scores, mask, sink; bias of the output."""
  K, cap, scale = 1, 2.0, 0.7
  module = MultiHeadAttention(TransformerConfig(
      d_model=D, num_heads=H, num_kv_heads=K, d_k=KEY, d_v=VALUE, biases='all', qk_norm=True, norm_type=norm_type,
      norm_epsilon=0.1, positions=positions, attention_scale=scale, attention_softcap=cap, attention_sinks=True))
  x_BxTxD, at_T, bias_1xHxTxT = draw(B, T, D), jnp.arange(T) + 3, draw(1, H, T, T, seed=2)
  arguments = (x_BxTxD, x_BxTxD, masks.causal(), None, at_T if positions == 'rope' else None, bias_1xHxTxT)
  variables = random_params(module, *arguments)
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['params'])

  def project(x_TxD, name, h):
    return x_TxD @ p[name]['kernel'][:, h] + p[name]['bias'][h]

  def placed(x_TxC, name):
    norm = p[f'{name}_norm']
    centred_TxC = x_TxC - x_TxC.mean(1, keepdims=True) * (norm_type == 'layer')
    x_TxC = centred_TxC / np.sqrt((centred_TxC**2).mean(1, keepdims=True) + 0.1) * norm['scale'] + norm.get('bias', 0)
    if positions == 'none':
      return x_TxC
    angles = np.asarray(at_T)[:, None] * 10000.0 ** (-np.arange(KEY // 2) / (KEY // 2))
    turned = (x_TxC[:, :KEY // 2] + 1j * x_TxC[:, KEY // 2:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=1)

  expected_BxTxD = np.zeros((B, T, D)) + p['output']['bias']
  for b, h in np.ndindex(B, H):
    x_TxD = np.asarray(x_BxTxD[b], np.float64)
    q, k = placed(project(x_TxD, 'query', h), 'query'), placed(project(x_TxD, 'key', 0), 'key')
    scores = cap * np.tanh(q @ k.T * scale / cap) + np.asarray(bias_1xHxTxT[0, h])
    weights = np.where(np.tri(T) > 0, np.exp(scores), 0)
    pattern = weights / (weights.sum(1, keepdims=True) + np.exp(p['sinks'][h]))
    expected_BxTxD[b] += pattern @ project(x_TxD, 'value', 0) @ p['output']['kernel'][h]
  np.testing.assert_allclose(module.apply(variables, *arguments), expected_BxTxD, atol=2e-5)


@pytest.mark.parametrize('biases, names', [('mlp', set()), ('none', set()), ('qkv', {'query', 'key', 'value'}),
                                           ('all', {'query', 'key', 'value', 'output'})])
def test_which_maps_have_a_bias(random_params, biases, names):
  module = MultiHeadAttention(TransformerConfig(d_model=D, num_heads=H, biases=biases))
  params = random_params(module, draw(B, T, D), draw(B, S, D), masks.everything())['params']
  assert {name for name, part in params.items() if 'bias' in part} == names


@pytest.mark.parametrize('scale', [1.0, 0.01])
def test_first_scores_have_the_usual_size_whatever_their_factor(scale):
  sizes = []
  for attention_scale in (None, scale):
    c = TransformerConfig(d_model=64, num_heads=4, attention_scale=attention_scale)
    attention = MultiHeadAttention(c)
    x_BxTxD = jax.random.normal(jax.random.key(1), (2, 16, 64))
    params = attention.init(jax.random.key(0), x_BxTxD, x_BxTxD, masks.everything())
    _, state = attention.apply(params, x_BxTxD, x_BxTxD, masks.everything(), mutable=['intermediates'],
                               capture_intermediates=lambda module, _: module.name == 'scores')
    sizes.append(float(jnp.std(state['intermediates']['scores']['__call__'][0])))
  assert sizes[1] == pytest.approx(sizes[0], rel=1e-4)
