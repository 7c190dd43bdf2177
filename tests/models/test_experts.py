"""Experts against a loop over tokens and experts, and the laws that routing must not break."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import TransformerConfig
from tfm.models.build import build_model, initialize, with_layout
from tfm.models.experts import Experts, balance_loss
from tfm.models.layout import to_layout

B, T, D, F, E, k = 3, 6, 8, 12, 5, 2
CONFIG = TransformerConfig(encoder_layers=0, decoder_layers=2, d_model=D, d_ff=F, num_heads=2, experts=E, dropout=0.0,
                           experts_per_token=k, biases='none', feed_forward='swiglu')
REAL = jnp.arange(T) < jnp.array([6, 4, 1])[:, None]
LABELS = jax.random.normal(jax.random.key(9), (B, T, D))


def drawn(**changes):
  """(layer, parameters, x)"""
  layer = Experts(dataclasses.replace(CONFIG, **changes))
  x_BxTxD = jax.random.normal(jax.random.key(1), (B, T, D))
  return layer, layer.init(jax.random.key(0), x_BxTxD)['params'], x_BxTxD


def token_by_token(params, x_BxTxD, activation, gated, k=k):
  """The layer's output, by nothing but products of a vector and a matrix."""
  rows = []
  for x_D in x_BxTxD.reshape(-1, D):
    logits_E = x_D @ params['router']
    chosen = jnp.argsort(-logits_E)[:k]
    share = jnp.exp(logits_E[chosen] - jnp.max(logits_E))
    total_D = 0.0
    share /= share.sum() if k > 1 else jnp.exp(logits_E - jnp.max(logits_E)).sum()
    for e, weight in zip(chosen, share):
      inner_F = x_D @ params['inner'][e]
      act_F = activation(x_D @ params['gate'][e]) * inner_F if gated else activation(inner_F)
      total_D += weight * (act_F @ params['outer'][e])
    rows.append(total_D)
  return jnp.stack(rows).reshape(x_BxTxD.shape)


@pytest.mark.parametrize('feed_forward, activation, k', [('swiglu', jax.nn.silu, 2), ('relu', jax.nn.relu, 1)])
def test_output_and_gradients_are_those_of_a_loop_over_tokens(feed_forward, activation, k):
  layer, params, x_BxTxD = drawn(feed_forward=feed_forward, experts_per_token=k)

  def both(compute):
    y_BxTxD, vjp = jax.vjp(compute, params, x_BxTxD)
    return y_BxTxD, vjp(LABELS)

  found = jax.jit(lambda: both(lambda params, x: layer.apply({'params': params}, x)))()
  expected = jax.jit(
      lambda: both(lambda params, x: token_by_token(params, x, activation, feed_forward == 'swiglu', k)))()
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_a_token_is_the_same_alone_and_in_company():
  layer, params, x_BxTxD = drawn()
  apply = jax.jit(lambda x_BxTxD: layer.apply({'params': params}, x_BxTxD))
  for row, t in np.ndindex(B, T):
    alone_1x1xD = apply(x_BxTxD[row:row + 1, t:t + 1])
    np.testing.assert_allclose(apply(x_BxTxD)[row, t], alone_1x1xD[0, 0], atol=1e-6)


def test_every_expert_begins_like_a_matrix_alone():
  wide = Experts(dataclasses.replace(CONFIG, d_model=64, d_ff=192))
  params = wide.init(jax.random.key(0), jnp.zeros((1, 1, 64)))['params']
  for name in ('inner', 'gate', 'outer'):
    bound = (6 / (64 + 192))**0.5  # Glorot & Bengio 2010, equation 16
    for kernel in params[name]:
      assert 0.99 * bound < jnp.abs(kernel).max() <= bound
      np.testing.assert_allclose(jnp.std(kernel), bound / 3**0.5, rtol=0.02)
  assert not jnp.allclose(params['inner'][0], params['inner'][1])


# -- balance ----------------------------------------------------------------------------------------------------------


def balance_of(layer, params, x_BxTxD, real_BxT):
  return layer.apply({'params': params}, x_BxTxD, None, real_BxT, mutable=['losses'])[1]['losses']['balance'][0]


def test_the_balance_loss_is_switch_transformers_row_by_row():
  layer, params, x_BxTxD = drawn()
  expected = 0.0
  for x_TxD, real_T in zip(np.asarray(x_BxTxD), np.asarray(REAL)):
    logits_TxE = x_TxD[real_T] @ np.asarray(params['router'])
    probability_TxE = np.exp(logits_TxE) / np.exp(logits_TxE).sum(-1, keepdims=True)
    chosen_Txk = np.argsort(-logits_TxE)[:, :k]
    f_E = np.array([(chosen_Txk == e).mean() for e in range(E)])
    expected += real_T.sum() * E * np.sum(f_E * probability_TxE.mean(0))
  np.testing.assert_allclose(balance_of(layer, params, x_BxTxD, REAL), expected, rtol=1e-5)


def test_an_even_load_costs_one_for_each_token_and_one_expert_costs_their_number():
  chosen_1x5x1, real = jnp.arange(E)[None, :, None], jnp.ones((1, E), bool)
  np.testing.assert_allclose(balance_loss(jnp.zeros((1, E, E)), chosen_1x5x1, real), E, rtol=1e-6)
  one = jnp.full((1, E, E), -1e9).at[..., 2].set(0.0)
  np.testing.assert_allclose(balance_loss(one, jnp.full((1, E, 1), 2), real), E * E, rtol=1e-6)


def test_the_balance_loss_adds_up_over_rows_and_knows_no_padding():
  layer, params, x_BxTxD = drawn()
  of = jax.jit(jax.value_and_grad(lambda p, x_BxTxD, real_BxT: balance_of(layer, p, x_BxTxD, real_BxT)))
  whole, slope = of(params, x_BxTxD, REAL)
  parts = [of(params, x_BxTxD[i:i + 1], REAL[i:i + 1]) for i in range(B)]
  np.testing.assert_allclose(whole, sum(part for part, _ in parts), rtol=1e-6)
  np.testing.assert_allclose(slope['router'], sum(part['router'] for _, part in parts), atol=1e-5)
  assert jnp.abs(slope['router']).max() > 0
  longer = jnp.pad(x_BxTxD, ((0, 1), (0, 3), (0, 0)), constant_values=7.0)
  np.testing.assert_allclose(balance_of(layer, params, longer, jnp.pad(REAL, ((0, 1), (0, 3)))), whole, rtol=1e-6)


def test_without_tokens_that_count_there_is_no_balance_loss():
  layer, params, x_BxTxD = drawn()
  assert layer.apply({'params': params}, x_BxTxD, mutable=['losses'])[1] == {}


# -- in a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('changes', [dict(), dict(remat='full'), dict(remat='dots', num_kv_heads=1)])
def test_scanned_is_unrolled_with_its_losses(changes):
  model = build_model(dataclasses.replace(CONFIG, **changes), 11, 11)
  params = initialize(model, jax.random.key(0))
  ids_BxT = jax.random.randint(jax.random.key(1), (B, T), 1, 11) * REAL

  def of(model, params):
    def total(params):
      logits, sown = model.apply({'params': params}, ids_BxT, mutable=['losses'])
      balance = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sown))
      return balance + jnp.sum(logits * REAL[..., None]), balance
    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

  (total, balance), slopes = of(model, params)
  assert balance > 0.99 * 2 * REAL.sum()  # two layers
  (other, other_balance), others = of(with_layout(model, True), to_layout(params, 'scanned'))
  np.testing.assert_allclose((other, other_balance), (total, balance), rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), to_layout(others, 'unrolled'), slopes)


def test_bfloat16_is_near_float32_and_routes_in_float32():
  layer, params, x_BxTxD = drawn(dtype='bfloat16')
  found = layer.apply({'params': params}, x_BxTxD)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(jnp.float32), drawn()[0].apply({'params': params}, x_BxTxD), atol=0.05)
  slopes = jax.jit(jax.grad(lambda p: jnp.sum(layer.apply({'params': p}, x_BxTxD).astype(jnp.float32))))(params)
  assert all(leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_the_taps_tell_who_was_chosen_and_what_fired():
  layer, params, x_BxTxD = drawn()
  seen = layer.apply({'params': params}, x_BxTxD, capture_intermediates=True)[1]['intermediates']
  chosen_BxTxk, act_mxF = seen['chosen']['__call__'][0], seen['act']['__call__'][0]
  np.testing.assert_array_equal(chosen_BxTxk, np.argsort(-(x_BxTxD @ params['router']), axis=-1)[..., :k])
  for row, place in enumerate(np.argsort(chosen_BxTxk.reshape(-1), kind='stable')):
    x_D, e = x_BxTxD.reshape(-1, D)[place // k], chosen_BxTxk.reshape(-1)[place]
    expected = jax.nn.silu(x_D @ params['gate'][e]) * (x_D @ params['inner'][e])
    np.testing.assert_allclose(act_mxF[row], expected, atol=1e-5)


def test_dropout_of_a_tokens_units_depends_on_its_place_alone():
  """Not on how others are routed, which decides where it is sorted to; and it drops what it says."""
  layer, params, x_BxTxD = drawn(activation_dropout=0.5, feed_forward='relu')
  key = jax.random.key(3)

  of = jax.jit(lambda x_BxTxD, dropout_key=key: layer.apply({'params': params}, x_BxTxD, dropout_key))

  other = x_BxTxD.at[0, 1:].set(-x_BxTxD[0, 1:]).at[1:].set(0.0)
  np.testing.assert_allclose(of(x_BxTxD)[0, 0], of(other)[0, 0], atol=1e-6)
  assert not jnp.allclose(of(x_BxTxD)[0, 0], of(x_BxTxD, None)[0, 0], atol=1e-3)
  same = jnp.broadcast_to(x_BxTxD[:1, :1], (40, 50, D))
  np.testing.assert_allclose(of(same).mean((0, 1)), of(same, None)[0, 0], atol=0.05)
  assert jnp.std(of(same), axis=(0, 1)).max() > 0.1
