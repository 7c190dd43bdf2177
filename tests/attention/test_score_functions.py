"""Each score against a loop over the survey's column vectors, one number at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention import score_functions
from tfm.attention.score_functions import ACTIVATIONS, SCORES, Score
from tfm.config import ConfigError

B, T, S, Q, K, W, V = 2, 3, 5, 4, 6, 7, 3

# In the survey's words: query q (d_q), key k (d_k), parameters p as matrices that are multiplied from the left.
BY_HAND = {
    'additive': lambda q, k, p, act: p['w'].T @ act(p['W_1'] @ q + p['W_2'] @ k + p['b']),
    'multiplicative': lambda q, k, p, act: q @ k,
    'scaled': lambda q, k, p, act: q @ k / np.sqrt(len(k)),
    'general': lambda q, k, p, act: k @ (p['W'] @ q),
    'biased_general': lambda q, k, p, act: k @ (p['W'] @ q + p['b']),
    'activated_general': lambda q, k, p, act: act(k @ (p['W'] @ q) + p['b']),
    'cosine': lambda q, k, p, act: q @ k / np.sqrt(q @ q) / np.sqrt(k @ k),
    'euclidean': lambda q, k, p, act: -np.sqrt(sum((q - k)**2))}
ACTS = {'tanh': np.tanh, 'relu': lambda x: np.maximum(x, 0), 'sigmoid': lambda x: 1 / (1 + np.exp(-x)),
        'gelu': None, 'identity': lambda x: x}


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def make(kind, **options):
  """The module and random parameters of it."""
  same = kind in score_functions.SAME_WIDTH
  module = Score(kind, K if same else Q, K, W if kind == 'additive' else None, **options)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((B, S, K)), method='prepare'))
  leaves, tree = jax.tree.flatten(shapes)
  return module, tree.unflatten([draw(*leaf.shape, seed=10 + i) for i, leaf in enumerate(leaves)])


def inputs(module):
  return draw(B, T, module.query_width or Q), draw(B, S, K, seed=1)


def run(module, variables, query, keys):
  prepared = module.apply(variables, keys, method='prepare')
  return module.apply(variables, query, prepared)


def columns(variables):
  """The parameters as the survey has them: what multiplies from the right here, transposed."""
  own = variables.get('params', {})
  names = {'query_kernel': 'W_1', 'key_kernel': 'W_2', 'output': 'w', 'weight': 'W', 'bias': 'b'}
  return {names[name]: value.T if name.endswith('kernel') else value for name, value in own.items()}


def by_hand(kind, variables, query, keys, activation='tanh'):
  F, parameters = np.swapaxes(keys, 1, 2), columns(variables)  # B x d_k x n_f, a key a column
  return np.array([[[BY_HAND[kind](query[b, t], F[b, :, l], parameters, ACTS[activation]) for l in range(S)]
                    for t in range(T)] for b in range(B)])


@pytest.mark.parametrize('kind', SCORES)
def test_a_score_is_its_formula_in_float32_and_in_float64(kind):
  module, variables = make(kind)
  query, keys = inputs(module)
  expected = by_hand(kind, variables, query, keys)
  single = run(module, jax.tree.map(np.float32, variables), np.float32(query), np.float32(keys))
  assert single.shape == (B, T, S) and single.dtype == jnp.float32
  np.testing.assert_allclose(single, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
  with jax.enable_x64(True):
    double = run(make(kind, dtype='float64')[0], variables, query, keys)
    assert double.dtype == jnp.float64
  np.testing.assert_allclose(double, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('kind', SCORES)
def test_the_module_is_the_function(kind):
  module, variables = make(kind)
  query, keys = inputs(module)
  own = variables.get('params', {})
  names = {'additive': ('query_kernel', 'key_kernel', 'bias', 'output'), 'general': ('weight',),
           'biased_general': ('weight', 'bias'), 'activated_general': ('weight', 'bias')}.get(kind, ())
  arrays = [jnp.asarray(array) for array in (query, keys, *(own[name] for name in names))]
  np.testing.assert_allclose(getattr(score_functions, kind)(*arrays), run(module, variables, query, keys), atol=2e-6,
                             rtol=2e-6)


@pytest.mark.parametrize('activation', [name for name, act in ACTS.items() if act])
@pytest.mark.parametrize('kind', score_functions.ACTIVATED)
def test_activations(kind, activation):
  module, variables = make(kind, activation=activation)
  query, keys = inputs(module)
  np.testing.assert_allclose(run(module, variables, query, keys), by_hand(kind, variables, query, keys, activation),
                             atol=2e-5)


def test_the_activations_of_this_test_are_all_there_are():
  assert set(ACTS) == set(ACTIVATIONS)


def test_one_score_for_every_feature():
  """Equation 31."""
  module, variables = make('additive', dimensions=V)
  query, keys = inputs(module)
  assert variables['params']['output'].shape == (W, V)
  scores = run(module, variables, query, keys)
  assert scores.shape == (B, T, S, V)
  np.testing.assert_allclose(scores, by_hand('additive', variables, query, keys), atol=1e-5)


@pytest.mark.parametrize('query_width', [None, Q])
def test_without_a_query_its_term_is_left_out(query_width):
  """Equation 33, and 7 before 9: the same parameters."""
  module, variables = make('additive')
  keys = draw(B, S, K, seed=1)
  if query_width is None:
    module = Score('additive', None, K, W)
    variables = {'params': {name: value for name, value in variables['params'].items() if name != 'query_kernel'}}
  p = columns(variables)
  expected = [[p['w'] @ np.tanh(p['W_2'] @ keys[b, l] + p['b']) for l in range(S)] for b in range(B)]
  scores = run(module, variables, None, keys)
  assert scores.shape == (B, 1, S)
  np.testing.assert_allclose(scores[:, 0], expected, atol=1e-5)


def test_a_general_score_of_the_other_direction_has_the_transposed_matrix():
  """score(q, k; W) = score(k, q; W^T), so scores of the swapped sequences are the transpose."""
  query, keys, weight = (jnp.asarray(draw(*shape, seed=i)) for i, shape in enumerate([(B, T, Q), (B, S, K), (K, Q)]))
  there, back = score_functions.general(query, keys, weight), score_functions.general(keys, query, weight.T)
  np.testing.assert_allclose(there, np.swapaxes(back, 1, 2), atol=1e-5)


@pytest.mark.parametrize('kind', SCORES)
def test_scores_of_bfloat16_are_float32(kind):
  module, variables = make(kind, dtype='bfloat16')
  query, keys = inputs(module)
  scores = run(module, variables, query, keys)
  exact = by_hand(kind, variables, query, keys)
  assert scores.dtype == jnp.float32
  np.testing.assert_allclose(scores, exact, atol=0.05 * np.abs(exact).max())


@pytest.mark.parametrize('kind', SCORES)
def test_initial_parameters_give_scores_of_moderate_size_and_all_are_used(kind):
  module, _ = make(kind)
  query, keys = (jnp.asarray(x, jnp.float32) for x in inputs(module))
  variables = module.init(jax.random.key(0), keys, method='prepare')
  gradients = jax.grad(lambda variables: jnp.sum(run(module, variables, query, keys)**2))(variables)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
  assert 0.05 < np.std(run(module, variables, query, keys)) < 5


@pytest.mark.parametrize('kind', ['cosine', 'euclidean'])
def test_similarities_of_zero_and_of_equal_vectors_have_finite_gradients(kind):
  x = jnp.zeros((1, 2, K)).at[0, 0].set(1.0)
  score, pull = jax.vjp(lambda q, k: getattr(score_functions, kind)(q, k), x, x)
  assert np.isfinite(score).all()
  np.testing.assert_allclose(np.diagonal(score[0]), [1, 0] if kind == 'cosine' else [0, 0], atol=1e-6)
  assert all(np.isfinite(gradient).all() for gradient in pull(jnp.ones_like(score)))


@pytest.mark.parametrize('fields, message', [
    (dict(kind='dot', query_width=K, key_width=K), "There is no score 'dot'; choose one of additive"),
    (dict(kind='scaled', query_width=Q, key_width=K), 'needs queries as wide as keys, not 4 and 6'),
    (dict(kind='general', query_width=None, key_width=K), 'give query_width, or choose'),
    (dict(kind='general', query_width=Q, key_width=K, width=3), "'additive' needs one for its hidden layer"),
    (dict(kind='additive', query_width=Q, key_width=K), "'additive' needs one for its hidden layer"),
    (dict(kind='general', query_width=Q, key_width=K, dimensions=3), 'leave dimensions out'),
    (dict(kind='general', query_width=Q, key_width=K, activation='relu'), 'has no activation'),
    (dict(kind='additive', query_width=Q, key_width=K, width=3, activation='than'), "no activation 'than'"),
])
def test_fields_that_do_not_go_together_are_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    Score(**fields)


def test_a_query_that_is_missing_or_too_many_is_refused():
  module, variables = make('general')
  prepared = module.apply(variables, draw(B, S, K), method='prepare')
  with pytest.raises(ValueError, match='compares keys with a query; give one'):
    module.apply(variables, None, prepared)
  module = Score('additive', None, K, W)
  variables = module.init(jax.random.key(0), jnp.zeros((B, S, K)), method='prepare')
  with pytest.raises(ValueError, match='built without a query'):
    module.apply(variables, jnp.zeros((B, T, Q)), jnp.zeros((B, S, W)))
