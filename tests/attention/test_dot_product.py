from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention import masks
from tfm.attention.dot_product import attend

B, T, S, C = 2, 3, 5, 4
RANDOM = np.random.default_rng(0)
DENSE = RANDOM.random((B, 4, T, S)) < 0.5
BIAS = RANDOM.standard_normal((B, 4, T, S)).astype(np.float32)
SINKS = np.array([0.5, -3.0, 2.0, 0.0], np.float32)


def draw(H=4, K=4, value_width=C, dtype=jnp.float32):
  random = np.random.default_rng(1)
  return [jnp.asarray(random.standard_normal(shape), dtype)
          for shape in ((B, T, H, C), (B, S, K, C), (B, S, K, value_width))]


def by_hand(q, k, v, sees=lambda b, h, t, s: True, bias=None, scale=C**-0.5, softcap=None, sinks=None) -> np.ndarray:
  """Equation 1 one number at a time, float64; a query that sees nothing gets 0."""
  def score(b, h, t, s):
    value = q[b, t, h] @ k[b, s, h // (H // K)] * scale
    value = value if softcap is None else softcap * np.tanh(value / softcap)
    return value if bias is None else value + bias[b, h, t, s]

  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  H, K = q.shape[2], k.shape[2]
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, t, h in np.ndindex(q.shape[:3]):
    head = h // (H // K)
    keys = [s for s in range(S) if sees(b, h, t, s)]
    weights = [np.exp(score(b, h, t, s)) for s in keys]
    nowhere = 0 if sinks is None else np.exp(sinks[h])
    for weight, s in zip(weights, keys):
      out[b, t, h] += weight / (sum(weights) + nowhere) * v[b, s, head]
  return out


CASES = {
    'plain': {},
    'one key head for all': dict(draw=dict(K=1)),
    'two query heads a key head': dict(draw=dict(K=2), mask=masks.dense(DENSE), sees=lambda *pair: DENSE[pair]),
    'wide values': dict(draw=dict(value_width=7)),
    'bias': dict(bias=BIAS),
    'bias of one row for all heads': dict(bias=np.broadcast_to(BIAS[:, :1, :1], BIAS.shape), given=BIAS[:, :1, :1]),
    'scale': dict(scale=0.3),
    'softcap': dict(softcap=0.6),
    'softcap, before the bias': dict(softcap=0.6, bias=2 * BIAS, scale=0.9),
    'sinks': dict(sinks=SINKS),
    'lengths': dict(mask=masks.lengths(jnp.array([2, 5])), sees=lambda b, h, t, s: s < (2, 5)[b]),
    'causal': dict(mask=masks.causal(), sees=lambda b, h, t, s: s <= t),
    'continued': dict(mask=masks.causal(2), sees=lambda b, h, t, s: s <= t + 2),
    'dense': dict(mask=masks.dense(DENSE), sees=lambda *pair: DENSE[pair]),
    'all at once': dict(
        draw=dict(K=2, value_width=3), bias=BIAS, scale=0.8, softcap=1.2, sinks=SINKS,
        mask=masks.causal(1) & masks.lengths(jnp.array([2, 4])) & masks.dense(DENSE),
        sees=lambda b, h, t, s: s <= t + 1 and s < (2, 4)[b] and DENSE[b, h, t, s]),
}


@pytest.mark.parametrize('case', CASES)
def test_attention_is_equation_1(case):
  case = dict(CASES[case])
  q, k, v = draw(**case.pop('draw', {}))
  mask, given = case.pop('mask', None), case.pop('given', case.get('bias'))
  z = attend(q, k, v, mask, bias=given, scale=case.get('scale'), softcap=case.get('softcap'), sinks_H=case.get('sinks'))
  np.testing.assert_allclose(z, by_hand(q, k, v, **case), atol=2e-6)


@pytest.mark.parametrize('more', [{}, dict(softcap=0.9, sinks_H=jnp.asarray(SINKS))], ids=['plain', 'cap and sinks'])
def test_a_query_that_sees_nothing_gets_zero_and_so_do_its_gradients(more):
  q, k, v = draw()
  dense = np.ones((B, 1, T, S), bool)
  dense[0, :, 1] = False  # one query
  dense[1] = False        # a whole row of the batch, as when the source is empty

  def total(q, k, v, bias):
    z_BxTxHxC = attend(q, k, v, masks.dense(jnp.asarray(dense)), bias=bias, **more)
    return jnp.sum(z_BxTxHxC * jnp.arange(1., 1 + C)), z_BxTxHxC

  gradients, z = jax.grad(total, (0, 1, 2, 3), has_aux=True)(q, k, v, jnp.asarray(BIAS))
  d_q, d_k, d_v, d_bias = gradients
  for nothing in (z[0, 1], z[1], d_q[0, 1], d_q[1], d_k[1], d_v[1], d_bias[0, :, 1], d_bias[1]):
    np.testing.assert_array_equal(nothing, 0)
  for something in (z[0, 0], d_q[0, 0], d_k[0], d_v[0], d_bias[0, :, 0]):
    assert np.isfinite(something).all() and np.abs(something).min() > 0


def test_a_query_that_sees_nothing_gives_its_sink_no_gradient():
  q, k, v = draw()
  for lengths, moves in (((0, 0), False), ((0, 5), True)):
    d_sinks_H = jax.grad(lambda sinks_H, lengths=lengths: jnp.sum(
        attend(q, k, v, masks.lengths(jnp.array(lengths)), sinks_H=sinks_H)**2))(jnp.asarray(SINKS))
    assert (np.abs(d_sinks_H) > 0).all() if moves else (d_sinks_H == 0).all()


@pytest.mark.parametrize('softcap', [None, 0.7])
def test_a_sink_is_one_more_key_without_a_value(softcap):
  """Its score is then a bias, whose gradient is the sink's."""
  q, k, v = draw(K=2)
  longer_k, longer_v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (k, v))
  mask, longer = (masks.dense(jnp.asarray(np.concatenate([DENSE | (np.arange(S) == 0), sink], axis=-1)))
                  for sink in (np.ones((B, 4, T, 0), bool), np.ones((B, 4, T, 1), bool)))

  def with_sinks(sinks_H):
    return attend(q, k, v, mask, softcap=softcap, sinks_H=sinks_H)

  def with_a_key(sinks_H):
    bias_HxS = jnp.zeros((4, S + 1)).at[:, S].set(sinks_H)
    return attend(q, longer_k, longer_v, longer, bias=bias_HxS[None, :, None], softcap=softcap)

  (one, pull), (other, pull_other) = (jax.vjp(f, jnp.asarray(SINKS)) for f in (with_sinks, with_a_key))
  np.testing.assert_allclose(one, other, atol=1e-6)
  np.testing.assert_allclose(*(pull(jnp.cos(5 * one))[0] for pull in (pull, pull_other)), atol=1e-5)


def test_sinks_far_above_and_far_below_all_scores():
  q, k, v = draw()
  sinks_H = jnp.array([1e4, 300.0, -1e4, -jnp.inf])
  z, pull = jax.vjp(lambda q, sinks_H: attend(q, k, v, sinks_H=sinks_H), q, sinks_H)
  np.testing.assert_array_equal(z[:, :, :2], 0)
  np.testing.assert_allclose(z[:, :, 2:], attend(q, k, v)[:, :, 2:], atol=1e-6)
  assert all(np.isfinite(gradient).all() for gradient in pull(jnp.ones_like(z)))


def test_keys_that_nobody_sees_have_no_gradient():
  q, k, v = draw()
  d_k, d_v = jax.grad(lambda k, v: jnp.sum(attend(q, k, v, masks.lengths(jnp.array([2, 5])))**2), (0, 1))(k, v)
  for gradient in (d_k, d_v):
    np.testing.assert_array_equal(gradient[0, 2:], 0)
    assert np.abs(gradient[0, :2]).min() > 0 and np.abs(gradient[1]).min() > 0


def test_the_order_of_keys_does_not_matter():
  q, k, v = draw(K=2)
  order = np.array([3, 0, 4, 1, 2])
  shuffled = attend(q, k[:, order], v[:, order], masks.dense(jnp.asarray(DENSE[..., order])), bias=BIAS[..., order])
  np.testing.assert_allclose(shuffled, attend(q, k, v, masks.dense(jnp.asarray(DENSE)), bias=BIAS), atol=1e-6)


def test_a_shift_of_all_scores_of_a_query_does_not_matter():
  q, k, v = draw()
  np.testing.assert_allclose(attend(q, k, v, bias=jnp.full((1, 1, T, 1), 300.)), attend(q, k, v), atol=1e-4)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_taps_see_scores_pattern_and_z_and_decide_what_goes_on(dtype):
  q, k, v = draw(K=2, value_width=6, dtype=dtype)
  mask, seen = masks.lengths(jnp.array([0, 4])), {}

  def look(name, value):
    seen[name] = value
    return value

  z = attend(q, k, v, mask, tap=look)
  assert list(seen) == ['scores', 'pattern', 'z']
  assert seen['scores'].shape == seen['pattern'].shape == (B, 4, T, S) and seen['z'].shape == (B, T, 4, 6)
  # Whatever the values are, the softmax is float32.
  assert seen['scores'].dtype == seen['pattern'].dtype == jnp.float32 and z.dtype == seen['z'].dtype == dtype
  np.testing.assert_allclose(seen['pattern'].sum(-1), np.broadcast_to(np.array([0, 1])[:, None, None], (B, 4, T)),
                             atol=1e-6)
  np.testing.assert_array_equal(seen['pattern'][..., 4:], 0)
  assert np.isfinite(seen['scores']).all()  # an edit may multiply them by 0
  np.testing.assert_allclose(jax.nn.softmax(seen['scores'][1]), seen['pattern'][1], atol=1e-7)

  first = jnp.zeros((B, 4, T, S)).at[..., 0].set(1)  # short-circuited: everybody looks at key 0
  np.testing.assert_array_equal(
      attend(q, k, v, mask, tap=lambda name, value: first if name == 'pattern' else value),
      jnp.broadcast_to(jnp.repeat(v[:, :1], 2, axis=2), z.shape))
  np.testing.assert_array_equal(attend(q, k, v, tap=lambda name, value: value * (name != 'z')), jnp.zeros_like(z))
  uniform = attend(q, k, v, tap=lambda name, value: value * (name != 'scores'))
  np.testing.assert_allclose(uniform, jnp.broadcast_to(jnp.repeat(v.mean(1, keepdims=True), 2, axis=2), z.shape),
                             atol=1e-6 if dtype == jnp.float32 else 0.02)


def test_the_taps_see_the_cap_and_no_column_of_sinks():
  (q, k, v), seen = draw(), {}
  look = seen.setdefault
  attend(q, k, v, masks.causal(), softcap=0.2, sinks_H=jnp.asarray(SINKS), tap=look)
  assert seen['scores'].shape == seen['pattern'].shape == (B, 4, T, S)
  allowed = np.tri(T, S, dtype=bool)
  assert np.abs(seen['scores'][..., allowed]).max() <= np.float32(0.2) and (seen['scores'][..., ~allowed] < -1e38).all()
  weights = np.exp(seen['scores'])
  np.testing.assert_allclose(seen['pattern'].sum(-1), 1 - np.exp(SINKS[:, None]) / (
      weights.sum(-1) + np.exp(SINKS[:, None])), atol=1e-6)


def test_dropout_is_applied_to_the_pattern_after_its_tap():
  q, k, v = draw()
  keep = jnp.asarray(DENSE)
  pattern = {}
  z = attend(q, k, v, dropout=lambda pattern: jnp.where(keep, pattern / 0.5, 0.0), tap=pattern.setdefault)
  np.testing.assert_allclose(pattern['pattern'].sum(-1), 1, atol=1e-6)
  np.testing.assert_allclose(z, jnp.einsum('bhts,bshc->bthc', pattern['pattern'] * keep * 2, v), atol=1e-6)


def test_bfloat16_is_the_float32_result_rounded():
  exact, rounded = draw(), draw(dtype=jnp.bfloat16)
  np.testing.assert_allclose(attend(*rounded).astype(jnp.float32), attend(*exact), atol=0.03)


def test_scores_of_bfloat16_are_accumulated_in_float32():
  q, k, v = draw(dtype=jnp.bfloat16)
  seen = {}
  attend(q, k, v, tap=lambda name, value: seen.setdefault(name, value))
  exact = np.einsum('bthc,bshc->bhts', np.asarray(q, np.float64), np.asarray(k, np.float64)) / 2  # sqrt(C)
  assert seen['scores'].dtype == jnp.float32
  np.testing.assert_allclose(seen['scores'], exact, rtol=1e-5, atol=1e-6)


def test_query_heads_that_cannot_share_the_key_heads_are_refused():
  with pytest.raises(ValueError, match='4 query heads cannot share 3'):
    attend(*draw(H=4, K=3))
