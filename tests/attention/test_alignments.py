"""Each alignment against its definition, its gradient against finite differences, and what all of them promise."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

from tfm.attention import alignments
from tfm.attention.alignments import ALIGNMENTS, PredictedCentre, align
from tfm.config import ConfigError

B, T, S, V = 2, 3, 6, 4
SCORES = 2 * np.random.default_rng(0).standard_normal((B, T, S))
MASK = np.random.default_rng(1).random((B, T, S)) < 0.7
MASK[0, 1] = False  # a row without keys
CENTRE = np.array([[0.2, 2.5, 5.9], [-1.0, 3.0, 7.2]])
WINDOW = 1.5
KEY = jax.random.key(5)

OPTIONS = {'hard_sampled': dict(key=KEY), 'local_monotonic': dict(window=WINDOW),
           'local_predictive': dict(window=WINDOW, centre_BxT=CENTRE),
           'local_window': dict(window=WINDOW, centre_BxT=CENTRE)}
SINGLE = [kind for kind in ALIGNMENTS if kind != 'soft_per_feature']
SMOOTH = [kind for kind in SINGLE if not kind.startswith('hard')]


def run(kind, scores=SCORES, mask=None):
  return align(kind, jnp.asarray(scores), None if mask is None else jnp.asarray(mask), **OPTIONS.get(kind, {}))


def softmax(e):
  return np.exp(e) / sum(np.exp(e))


def simplex(e, power):
  """Weights max(e - tau, 0) ^ power that sum to 1, with tau found by bisection."""
  tau = brentq(lambda tau: sum(np.maximum(e - tau, 0)**power) - 1, min(e) - 2, max(e))
  return np.maximum(e - tau, 0)**power


def local(e, keys, t, b, gaussian, centre):
  near = [l for l in range(len(e)) if keys[l] and centre - WINDOW <= l <= centre + WINDOW]
  weights = np.zeros(len(e))
  for l, weight in zip(near, softmax(e[near]) if near else ()):
    weights[l] = weight * (np.exp(-(l - centre)**2 / (2 * (WINDOW / 2)**2)) if gaussian else 1)
  return weights


def by_hand(kind, b, t, keys):
  """One query's weights, in float64."""
  e = SCORES[b, t]
  if kind.startswith('local'):
    return local(e, keys, t, b, kind == 'local_predictive', t if kind == 'local_monotonic' else CENTRE[b, t])
  weights = np.zeros(S)
  if keys.any():
    weights[keys] = {'soft': softmax, 'sparsemax': lambda e: simplex(e, 1), 'entmax15': lambda e: simplex(e / 2, 2),
                     'hard': lambda e: np.float64(np.arange(len(e)) == np.argmax(e))}[kind](e[keys])
  return weights


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('kind', [kind for kind in SINGLE if kind != 'hard_sampled'])
def test_an_alignment_is_its_definition(kind, masked):
  keys = MASK if masked else np.ones_like(MASK)
  expected = np.array([[by_hand(kind, b, t, keys[b, t]) for t in range(T)] for b in range(B)])
  np.testing.assert_allclose(run(kind, mask=MASK if masked else None), expected, atol=1e-6)
  with jax.enable_x64(True):
    double = run(kind, mask=MASK if masked else None)
    assert double.dtype == jnp.float64
  np.testing.assert_allclose(double, expected, atol=1e-12)


@pytest.mark.parametrize('kind', ALIGNMENTS)
def test_masked_positions_and_empty_rows_get_nothing_and_no_gradient(kind):
  scores = jnp.asarray(SCORES if kind != 'soft_per_feature' else SCORES[..., None] * np.arange(1, V + 1), jnp.float32)
  weights, pull = jax.vjp(lambda scores: run(kind, scores, MASK), scores)
  (gradient,) = pull(jnp.cos(jnp.arange(weights.size, dtype=jnp.float32)).reshape(weights.shape))
  for array in (weights, gradient):
    assert np.isfinite(array).all()
    np.testing.assert_array_equal(np.asarray(array)[~MASK], 0)
  assert kind == 'hard_sampled' or np.abs(gradient).max() > 0


@pytest.mark.parametrize('size', [1e4, 3e38])
@pytest.mark.parametrize('kind', SINGLE)
def test_huge_scores_stay_finite(kind, size):
  scores = jnp.asarray(SCORES, jnp.float32) / np.abs(SCORES).max() * size
  weights, pull = jax.vjp(lambda scores: run(kind, scores, MASK), scores)
  assert np.isfinite(weights).all() and np.isfinite(pull(jnp.ones_like(weights))[0]).all()


@pytest.mark.parametrize('kind', SMOOTH)
def test_gradients_are_those_of_finite_differences(kind):
  with jax.enable_x64(True):
    scores, weight, step = jnp.asarray(SCORES), jnp.cos(jnp.arange(B * T * S)).reshape(B, T, S), 1e-6
    if kind in ('sparsemax', 'entmax15'):
      weights = np.asarray(run(kind))
      assert (weights == 0).any() and (weights > 0).sum(-1).max() > 1, 'some in the support, some not'

    def total(scores):
      return jnp.sum(run(kind, scores, MASK) * weight)

    numeric = np.array([
        (total(scores + step * change) - total(scores - step * change)) / (2 * step)
        for change in np.eye(B * T * S).reshape(-1, B, T, S)]).reshape(B, T, S)
    np.testing.assert_allclose(jax.grad(total)(scores), numeric, atol=1e-8)
    _, forward = jax.jvp(total, (scores,), (jnp.sin(scores),))
    np.testing.assert_allclose(forward, np.sum(numeric * np.sin(SCORES)), atol=1e-7)


def test_sparse_weights_of_equal_scores_are_equal_and_their_gradients_sum_to_zero():
  for kind in ('sparsemax', 'entmax15'):
    weights, pull = jax.vjp(partial(run, kind), jnp.zeros((1, 1, S)))
    np.testing.assert_allclose(weights, 1 / S, atol=1e-6)
    np.testing.assert_allclose(pull(jnp.arange(float(S))[None, None])[0].sum(), 0, atol=1e-5)


def test_the_number_of_weights_above_zero_falls_from_soft_to_entmax_to_sparsemax_to_hard():
  counts = [int((np.asarray(run(kind)) > 0).sum()) for kind in ('soft', 'entmax15', 'sparsemax', 'hard')]
  assert counts[0] == SCORES.size and counts[3] == B * T and counts == sorted(counts, reverse=True)
  assert len(set(counts)) == 4


def test_hard_attention_has_the_gradient_of_soft():
  for key in (None, KEY):
    def gradient(align, *arguments):
      return jax.grad(lambda e: jnp.sum(jnp.sin(jnp.arange(S)) * align(e, MASK, *arguments)))(jnp.float32(SCORES))

    np.testing.assert_allclose(gradient(alignments.hard, key), gradient(alignments.soft), atol=1e-7)
  assert set(np.unique(run('hard'))) == {0, 1}, 'exactly'


def test_samples_are_drawn_as_often_as_their_weights_say():
  scores = jnp.asarray(SCORES[:1, :1], jnp.float32)
  mask = jnp.asarray([True, True, False, True, True, True])
  draws, logs = jax.vmap(lambda key: alignments.hard_sampled(scores, mask, key))(jax.random.split(KEY, 20000))
  soft = np.asarray(alignments.soft(scores, mask))
  np.testing.assert_allclose(draws.mean(0), soft, atol=0.015)
  np.testing.assert_array_equal(draws.sum(-1), 1)
  np.testing.assert_allclose(np.exp(logs), (draws * soft).sum(-1), atol=1e-6)
  np.testing.assert_array_equal(run('hard_sampled'), alignments.hard_sampled(jnp.asarray(SCORES), None, KEY)[0])


def test_reinforce_is_an_unbiased_gradient_of_the_mean_reward():
  scores, reward = jnp.asarray(SCORES[:1, :1], jnp.float32), jnp.arange(float(S))

  def estimate(key):
    def surrogate(scores):
      sample, log = alignments.hard_sampled(scores, None, key)
      return jnp.sum(sample @ reward * log)
    return jax.grad(surrogate)(scores)

  exact = jax.grad(lambda scores: jnp.sum(alignments.soft(scores) @ reward))(scores)
  drawn = jax.vmap(estimate)(jax.random.split(KEY, 40000))
  error = drawn.std(0) / 200
  assert (np.abs(drawn.mean(0) - exact) < 5 * error + 1e-6).all() and np.abs(exact).max() > 10 * error.max()


def test_an_empty_row_has_no_log_probability():
  sample, log = alignments.hard_sampled(jnp.asarray(SCORES), jnp.asarray(MASK), KEY)
  assert log[0, 1] == 0 and sample[0, 1].sum() == 0 and (np.asarray(log)[MASK.any(-1)] < 0).any()


def test_soft_per_feature_is_a_softmax_over_positions():
  """Equation 32."""
  scores = np.random.default_rng(3).standard_normal((B, T, S, V))
  expected = np.zeros_like(scores)
  for b, t, i in np.ndindex(B, T, V):
    keys = MASK[b, t]
    if keys.any():
      expected[b, t, keys, i] = softmax(scores[b, t, keys, i])
  np.testing.assert_allclose(run('soft_per_feature', scores, MASK), expected, atol=1e-6)


def test_a_mask_is_broadcast():
  keys = MASK[1, 0]
  np.testing.assert_array_equal(run('entmax15', mask=keys), run('entmax15', mask=np.broadcast_to(keys, (B, T, S))))


def test_the_gaussian_takes_off_weight_and_nothing_else():
  plain, damped = (np.asarray(run(kind)) for kind in ('local_window', 'local_predictive'))
  assert (damped <= plain).all() and (damped.sum(-1) < plain.sum(-1) - 1e-3).any()
  np.testing.assert_allclose(plain.sum(-1)[CENTRE < S - 1 + WINDOW], 1, atol=1e-6)


def test_monotonic_follows_the_position_that_it_is_told():
  """As a recurrent decoder does, one query at a time."""
  whole = run('local_monotonic')
  for t in range(T):
    step = align('local_monotonic', jnp.asarray(SCORES[:, t:t + 1]), window=WINDOW, centre_BxT=jnp.full((1, 1), t))
    np.testing.assert_array_equal(step[:, 0], whole[:, t])


def test_a_predicted_centre_is_equation_28_and_learns():
  module, lengths = PredictedCentre(query_width=5, width=3), np.array([6, 2])
  query = np.random.default_rng(0).standard_normal((B, T, 5))
  params = {'params': {'kernel': np.random.default_rng(1).standard_normal((5, 3)),
                       'output': np.random.default_rng(2).standard_normal(3)}}
  W_p, w_p = params['params']['kernel'].T, params['params']['output']
  expected = [[lengths[b] / (1 + np.exp(-w_p @ np.tanh(W_p @ query[b, t]))) for t in range(T)] for b in range(B)]
  np.testing.assert_allclose(module.apply(params, query, lengths), expected, atol=1e-5)

  def looked(params):
    centre_BxT = module.apply(params, query, S)
    return jnp.sum(align('local_predictive', jnp.asarray(SCORES), centre_BxT=centre_BxT, window=2.0)[..., 0])

  gradient = jax.grad(looked)(jax.tree.map(jnp.float32, params))
  assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize('kind, options, message', [
    ('soft', dict(window=2), "'soft' has no use for window"),
    ('entmax15', dict(centre_BxT=CENTRE), 'no use for centre_BxT'),
    ('local_window', dict(window=2, centre_BxT=CENTRE, key=KEY), 'no use for key'),
    ('hard_sampled', {}, 'needs key'), ('local_predictive', dict(window=2), 'needs centre_BxT'),
    ('local_monotonic', {}, 'needs window'), ('local_monotonic', dict(window=0), 'give a number above 0'),
    ('soft_per_feature', {}, 'takes scores with 4 axes, not 3'),
])
def test_arguments_that_do_not_go_together_are_refused(kind, options, message):
  with pytest.raises(ValueError, match=message):
    align(kind, jnp.asarray(SCORES), **options)


def test_unknown_and_reinforced_alignments_are_refused():
  with pytest.raises(ConfigError, match='lets an agent with a reward of its own choose the keys'):
    align('reinforced', jnp.asarray(SCORES))
  with pytest.raises(ConfigError, match="no alignment 'global'; choose one of soft, sparsemax"):
    align('global', jnp.asarray(SCORES))
