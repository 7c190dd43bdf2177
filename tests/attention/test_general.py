"""The general model against a loop over column vectors, and the invariants (i) to (v) of a weighted sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from tfm.attention import masks
from tfm.attention.alignments import ALIGNMENTS, LOCAL
from tfm.attention.general import AttentionModule, AttentionParts, mean
from tfm.attention.score_functions import SAME_WIDTH, SCORES
from tfm.config import ConfigError

B, T, S, Q, F, G, K, V, W = 2, 3, 5, 4, 6, 3, 4, 7, 8
KEY = jax.random.key(7)
PERMUTATION = np.array([3, 0, 4, 1, 2])


def draw(*shape, seed=0, dtype=np.float32):
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def make(alignment='soft', score='additive', query_width=Q, feature_width=F, value_feature_width=None, **options):
  """A module with random parameters."""
  options = dict(hidden_width=W if score == 'additive' else None,
                 window=1.6 if alignment in LOCAL else None) | options
  module = AttentionModule(AttentionParts(score, alignment, **options), query_width, feature_width,
                           value_feature_width)
  query = None if query_width is None else draw(B, T, query_width)
  values = None if value_feature_width is None else draw(B, S, value_feature_width, seed=2)
  extra = dict(centre_BxT=np.full((B, T), 2.2)) if (
      alignment in ('local_predictive', 'local_window') and module.parts.centre_width is None) else {}
  extra |= dict(key=KEY) if alignment == 'hard_sampled' else {}
  variables = jax.eval_shape(lambda: module.init(jax.random.key(0), query, draw(B, S, feature_width),
                                                 value_features_BxSxF=values, **extra))
  leaves, tree = jax.tree.flatten(variables)
  params = tree.unflatten([draw(*leaf.shape, seed=20 + i) for i, leaf in enumerate(leaves)])

  def run(query, features, mask=None, **more):
    return module.apply(params, query, features, mask, **(extra | more))

  return run, params.get('params', {})


def softmax(e):
  return np.exp(e) / sum(np.exp(e))


@pytest.mark.parametrize('separate', [False, True], ids=['one input', 'separate values'])
def test_the_model_is_equations_1_to_4_in_columns(separate):
  run, params = make(key_width=K, value_width=V, value_feature_width=G if separate else None)
  query, F_k, F_v = draw(B, T, Q), draw(B, S, F, seed=1), draw(B, S, G, seed=2)
  F_v = F_v if separate else F_k
  found = run(query, F_k, masks.lengths(jnp.array([5, 2])), **(dict(value_features_BxSxF=F_v) if separate else {}))
  W_K, W_V, s = params['key']['kernel'].T, params['value']['kernel'].T, params['score']
  for b, n in enumerate((5, 2)):
    keys, values = W_K @ F_k[b].T[:, :n], W_V @ F_v[b].T[:, :n]  # d_k x n_f, d_v x n_f
    E = np.array([[s['output'] @ np.tanh(s['query_kernel'].T @ query[b, t] + s['key_kernel'].T @ keys[:, l] + s['bias'])
                   for t in range(T)] for l in range(n)])  # n_f x n_q: a query a column
    A = np.stack([softmax(E[:, t]) for t in range(T)], axis=1)
    np.testing.assert_allclose(found.context_BxTxV[b], (values @ A).T, atol=1e-5)
    np.testing.assert_allclose(found.weights[b, :, :n], A.T, atol=1e-6)
    np.testing.assert_array_equal(found.weights[b, :, n:], 0)


def test_multi_dimensional_attention_is_equations_30_to_32_in_columns():
  run, params = make('soft_per_feature', value_width=V)
  query, features, s = draw(B, T, Q), draw(B, S, F, seed=1), params['score']
  found = run(query, features)
  for b, t in np.ndindex(B, T):
    values = params['value']['kernel'].T @ features[b].T
    e = np.stack([s['output'].T @ np.tanh(s['query_kernel'].T @ query[b, t] + s['key_kernel'].T @ features[b, l]
                                          + s['bias']) for l in range(S)], axis=1)  # d_v x n_f
    a = np.stack([softmax(e[i]) for i in range(V)])
    np.testing.assert_allclose(found.context_BxTxV[b, t], sum(a[:, l] * values[:, l] for l in range(S)), atol=1e-5)


@pytest.mark.parametrize('score', SCORES)
def test_every_score_goes_with_the_module_and_all_parameters_are_used(score):
  same = score in SAME_WIDTH
  _, params = make(score=score, key_width=Q if same else K, value_width=V)
  parts = AttentionParts(score, key_width=Q if same else K, value_width=V,
                         hidden_width=W if score == 'additive' else None)
  module = AttentionModule(parts, Q, F)
  gradients = jax.jit(jax.grad(lambda params: jnp.sum(module.apply(
      {'params': params}, draw(B, T, Q), draw(B, S, F, seed=1)).context_BxTxV**2)))(params)
  assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradients))


def in_hull(point, points) -> bool:
  """Whether a point is a convex combination of others (to 1e-5), by a linear program."""
  n = len(points)
  slack = np.concatenate([points.T, np.ones((1, n))]).astype(np.float64)
  target = np.append(point, 1.0)
  rows = len(target)
  result = linprog(np.append(np.zeros(n), 1.0),
                   A_ub=np.block([[slack, -np.ones((rows, 1))], [-slack, -np.ones((rows, 1))]]),
                   b_ub=np.concatenate([target, -target]), bounds=[(0, None)] * (n + 1))
  return result.fun < 1e-5


@pytest.mark.parametrize('alignment', ALIGNMENTS)
def test_weights_are_a_distribution_but_for_the_gaussian(alignment):
  """(i); the Gaussian takes weight away (equation 29)."""
  weights = np.asarray(make(alignment)[0](draw(B, T, Q), draw(B, S, F, seed=1)).weights)
  assert (weights >= 0).all()
  total = weights.sum(2)
  if alignment == 'local_predictive':
    assert (total < 1 - 1e-3).any() and (total <= 1 + 1e-6).all()
  else:
    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize('projected', [True, False], ids=['values', 'features'])
@pytest.mark.parametrize('alignment', ALIGNMENTS)
def test_contexts_are_in_the_convex_hull_but_for_two(alignment, projected):
  """(ii) of the values and (iv) of the features where W_V = I; per feature only, if every feature has weights."""
  run, params = make(alignment, value_width=2 if projected else None, feature_width=2)
  features = 3 + draw(B, S, 2, seed=1)
  found = run(draw(B, T, Q), features)
  values = features @ params['value']['kernel'] if projected else features
  context = np.asarray(found.context_BxTxV)
  inside = [in_hull(context[b, t], values[b]) for b, t in np.ndindex(B, T)]
  if alignment == 'local_predictive':
    assert not all(inside), 'weights that sum to less than 1 leave the hull'
  elif alignment == 'soft_per_feature':
    assert not all(inside), 'features are chosen apart'
    assert (values.min(1, keepdims=True) - 1e-5 <= context).all()
    assert (context <= values.max(1, keepdims=True) + 1e-5).all()
  else:
    assert all(inside)


# What is sampled has noise at a place of its own; what it is drawn from is soft.
@pytest.mark.parametrize('alignment', [kind for kind in ALIGNMENTS if kind != 'hard_sampled'])
def test_the_order_of_keys_and_values_does_not_matter_but_where_it_is_local(alignment):
  """(v)"""
  run, _ = make(alignment, value_feature_width=G)
  query, keys, values = draw(B, T, Q), draw(B, S, F, seed=1), draw(B, S, G, seed=2)
  contexts = [run(query, keys[:, order], value_features_BxSxF=values[:, order]).context_BxTxV
              for order in (np.arange(S), PERMUTATION)]
  same = np.allclose(*contexts, atol=1e-5)
  assert same == (alignment not in LOCAL)
  # The control that must fail: keys permuted, and their values not.
  broken = run(query, keys[:, PERMUTATION], value_features_BxSxF=values).context_BxTxV
  assert not np.allclose(broken, contexts[0], atol=1e-2)


def test_a_key_without_a_value_is_refused():
  """(iii)"""
  run, _ = make(value_feature_width=G)
  with pytest.raises(ValueError, match='5 keys in 2 rows cannot have 4 values in 2; give every key one value'):
    run(draw(B, T, Q), draw(B, S, F), value_features_BxSxF=draw(B, S - 1, G))


@pytest.mark.parametrize('alignment', ALIGNMENTS)
def test_padding_changes_nothing_and_an_empty_source_gives_zero(alignment):
  run, _ = make(alignment, **(dict(centre_width=3) if alignment in ('local_predictive', 'local_window') else {}))
  query, features = draw(B, T, Q), draw(B, S, F, seed=1)
  mask = masks.lengths(jnp.array([0, 3]))
  garbage = features.copy()
  garbage[0], garbage[1, 3:] = 1e4, -1e4
  found, other = run(query, features, mask), run(query, garbage, mask)
  np.testing.assert_array_equal(found.context_BxTxV[0], 0)
  np.testing.assert_allclose(found.context_BxTxV, other.context_BxTxV, atol=1e-6)
  if alignment != 'hard_sampled':  # the shape of the noise is that of the scores
    alone = run(query[1:], features[1:, :3])
    np.testing.assert_allclose(found.context_BxTxV[1:], alone.context_BxTxV, atol=1e-5)


def test_a_source_is_prepared_once_and_read_step_by_step():
  module = AttentionModule(AttentionParts('additive', hidden_width=W, value_width=V), Q, F)
  query, features = draw(B, T, Q), draw(B, S, F, seed=1)
  variables = module.init(jax.random.key(0), query, features)
  whole = module.apply(variables, query, features, masks.causal(1))
  source = module.apply(variables, features, method='prepare')
  for t in range(T):
    step = module.apply(variables, query[:, t:t + 1], source, masks.causal(t + 1), method='attend')
    np.testing.assert_allclose(step.context_BxTxV[:, 0], whole.context_BxTxV[:, t], atol=1e-6)


def test_a_sample_comes_with_its_log_probability():
  query, features = draw(B, T, Q), draw(B, S, F, seed=1)
  found, soft = make('hard_sampled')[0](query, features), make('soft')[0](query, features)
  np.testing.assert_allclose(np.exp(found.log_probability_BxT), (found.weights * soft.weights).sum(-1), atol=1e-6)
  assert soft.log_probability_BxT is None


def test_taps_see_scores_pattern_and_z_and_decide_what_goes_on():
  (run, _), seen = make(), {}
  found = run(draw(B, T, Q), draw(B, S, F, seed=1), tap=lambda name, value: seen.setdefault(name, value))
  assert list(seen) == ['scores', 'pattern', 'z']
  np.testing.assert_array_equal(seen['z'], found.context_BxTxV)
  first = jnp.zeros((B, T, S)).at[..., 0].set(1)
  edited = run(draw(B, T, Q), draw(B, S, F, seed=1), tap=lambda name, value: first if name == 'pattern' else value)
  np.testing.assert_array_equal(edited.context_BxTxV, np.repeat(draw(B, S, F, seed=1)[:, :1], T, axis=1))


def test_the_mean_is_over_real_positions():
  features = draw(B, S, F)
  for lengths in ((2, 0), (1, 3)):
    expected = [features[b, :n].mean(0) if n else np.zeros(F) for b, n in enumerate(lengths)]
    np.testing.assert_allclose(mean(features, jnp.array(lengths)), expected, atol=1e-6)
  np.testing.assert_allclose(mean(features), features.mean(1), atol=1e-6)


@pytest.mark.parametrize('fields, message', [
    (dict(alignment='reinforced'), 'lets an agent with a reward of its own'),
    (dict(score='dot'), "no score 'dot'"),
    (dict(alignment='local_window', hidden_width=2), 'local alignment needs it'),
    (dict(window=2, hidden_width=2), 'others have no use for it'),
    (dict(alignment='local_monotonic', window=2, centre_width=3, hidden_width=2), 'centre_width has no effect'),
    (dict(alignment='soft_per_feature', score='scaled'), "choose score='additive'"),
    (dict(score='scaled', hidden_width=2), "'additive' needs it"), (dict(), "'additive' needs it"),
    (dict(hidden_width=0), 'give a number above 0'),
])
def test_parts_that_do_not_go_together_are_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    AttentionParts(**fields)


def test_masks_and_centres_that_do_not_fit_are_refused():
  run, _ = make()
  with pytest.raises(ValueError, match='is for 4 heads, and there is one'):
    run(draw(B, T, Q), draw(B, S, F), masks.dense(jnp.ones((B, 4, T, S), bool)))
  run, _ = make('local_window', centre_width=3)
  with pytest.raises(ValueError, match='leave one of them out'):
    run(draw(B, T, Q), draw(B, S, F), centre_BxT=np.zeros((B, T)))
  with pytest.raises(ValueError, match='predicts its centre from the query; give one'):
    run(None, draw(B, S, F))
  with pytest.raises(ConfigError, match='predicts its centre from the query, and there is none'):
    make('local_window', query_width=None, centre_width=3)
