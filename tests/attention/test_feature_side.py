"""Several inputs, levels and representations against loops over the survey's column vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention.feature_side import (
  AlternatingCoAttention,
  AttentionViaAttention,
  HierarchicalAttention,
  InteractiveCoAttention,
  MultiGrainedCoAttention,
  MultiRepresentational,
  ParallelCoAttention,
  RotatoryAttention,
)
from tfm.attention.general import AttentionParts
from tfm.config import ConfigError

B, S1, S2, S3, F1, F2, F3, W = 2, 4, 5, 3, 6, 7, 5, 8
LENGTHS = np.array([4, 2]), np.array([3, 5]), np.array([3, 1])
ADDITIVE = AttentionParts('additive', hidden_width=W)
ACTIVATED = AttentionParts('activated_general')


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


FIRST, SECOND, THIRD = draw(B, S1, F1, seed=1), draw(B, S2, F2, seed=2), draw(B, S3, F3, seed=3)


def apply(module, *inputs):
  """With random parameters: what it returns, and the parameters."""
  leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)))
  variables = tree.unflatten([draw(*leaf.shape, seed=40 + i) / 2 for i, leaf in enumerate(leaves)])
  return (*module.apply(variables, *inputs), variables.get('params', {}))


def columns(features, b, lengths):
  """d_f x n_f of one row, without its padding."""
  return np.float64(features[b].T[:, :lengths[b]])


def softmax(e):
  e = np.asarray(e, np.float64)
  return np.exp(e) / sum(np.exp(e))


def weighted(e, values):
  a = softmax(e)
  return sum(a[l] * values[:, l] for l in range(values.shape[1]))


def attend(params, q, keys, values=None):
  """The context of one query under the parameters of an `AttentionModule`: additive, or activated general."""
  p = params['score']

  def score(k):
    if 'weight' in p:
      return np.tanh(k @ p['weight'] @ q + p['bias'])
    return p['output'] @ np.tanh((0 if q is None else p['query_kernel'].T @ q) + p['key_kernel'].T @ k + p['bias'])

  return weighted([score(keys[:, l]) for l in range(keys.shape[1])], keys if values is None else values)


def test_alternating_is_equations_7_to_9():
  context, weights, params = apply(AlternatingCoAttention(ADDITIVE, (F1, F2)), FIRST, SECOND, *LENGTHS[:2])
  for b in range(B):
    one, two = columns(FIRST, b, LENGTHS[0]), columns(SECOND, b, LENGTHS[1])
    c_0 = attend(params['first'], None, one)
    c_2 = attend(params['second'], c_0, two)
    c_1 = attend(params['first'], c_2, one)
    np.testing.assert_allclose(context[b], np.concatenate([c_1, c_2]), atol=1e-5)
  assert list(weights) == ['start', 'second', 'first'] and weights['second'].shape == (B, S2)


def test_interactive_is_equations_10_and_11():
  parts = AttentionParts('additive', hidden_width=W, key_width=3, value_width=4)
  context, weights, params = apply(InteractiveCoAttention(parts, (F1, F2)), FIRST, SECOND, *LENGTHS[:2])
  for b in range(B):
    sides = {}
    for name, features, lengths in (('first', FIRST, LENGTHS[0]), ('second', SECOND, LENGTHS[1])):
      own = columns(features, b, lengths)
      sides[name] = params[name]['key']['kernel'].T @ own, params[name]['value']['kernel'].T @ own
    (K_1, V_1), (K_2, V_2) = sides['first'], sides['second']
    expected = [attend(params['first'], K_2.mean(1), K_1, V_1), attend(params['second'], K_1.mean(1), K_2, V_2)]
    np.testing.assert_allclose(context[b], np.concatenate(expected), atol=1e-5)
  assert weights['first'].shape == (B, S1) and weights['second'].shape == (B, S2)


@pytest.mark.parametrize('output', ['concatenated', 'sum'])
@pytest.mark.parametrize('scores', ['additive', 'max'])
@pytest.mark.parametrize('affinity', ['bilinear', 'concatenated'])
def test_parallel_is_equations_12_to_16(affinity, scores, output):
  second = draw(B, S2, F1, seed=2)
  module = ParallelCoAttention((F1, F1), affinity, scores, W if scores == 'additive' else None, output=output)
  context, weights, p = apply(module, FIRST, second, *LENGTHS[:2])
  for b in range(B):
    K_1, K_2 = columns(FIRST, b, LENGTHS[0]), columns(second, b, LENGTHS[1])
    if affinity == 'bilinear':
      A = np.tanh(K_1.T @ p['affinity'] @ K_2)
    else:
      w_A = p['affinity'].reshape(-1)
      A = np.array([[w_A @ np.concatenate([i, j, i * j]) for j in K_2.T] for i in K_1.T])
    np.testing.assert_allclose(weights['affinity'][b, :A.shape[0], :A.shape[1]], A, atol=1e-5)
    if scores == 'max':
      e_1, e_2 = A.max(1), A.max(0)
    else:
      W_1, W_2 = p['first_kernel'].T, p['second_kernel'].T
      e_1 = p['first_output'] @ np.tanh(W_2 @ K_2 @ A.T + W_1 @ K_1)
      e_2 = p['second_output'] @ np.tanh(W_1 @ K_1 @ A + W_2 @ K_2)
    contexts = weighted(e_1, K_1), weighted(e_2, K_2)
    np.testing.assert_allclose(context[b], sum(contexts) if output == 'sum' else np.concatenate(contexts), atol=1e-5)


def test_multi_grained_is_both_side_by_side():
  coarse, fine = InteractiveCoAttention(ADDITIVE, (F1, F2)), ParallelCoAttention((F1, F2), hidden_width=W)
  context, weights, params = apply(MultiGrainedCoAttention(coarse, fine), FIRST, SECOND, *LENGTHS[:2])
  expected = [module.apply({'params': params[name]}, FIRST, SECOND, *LENGTHS[:2])[0]
              for name, module in (('coarse', coarse), ('fine', fine))]
  assert context.shape == (B, 2 * (F1 + F2))
  np.testing.assert_allclose(context, np.concatenate(expected, axis=-1), atol=1e-6)
  assert {'coarse_first', 'coarse_second', 'fine_first', 'fine_second', 'fine_affinity'} == set(weights)


@pytest.mark.parametrize('hops', [1, 3])
def test_rotatory_is_equations_17_to_20_and_again_with_hops(hops):
  module = RotatoryAttention(ACTIVATED, F1, F2, F3, hops)
  context, weights, params = apply(module, FIRST, SECOND, THIRD, *LENGTHS)
  for b in range(B):
    target, left, right = (columns(x, b, n) for x, n in zip((FIRST, SECOND, THIRD), LENGTHS))
    r_lt = r_rt = target.mean(1)
    for _ in range(hops):
      r_l, r_r = attend(params['left'], r_lt, left), attend(params['right'], r_rt, right)
      r_lt, r_rt = (attend(params[name], r, target) for name, r in (('target_of_left', r_l), ('target_of_right', r_r)))
    np.testing.assert_allclose(context[b], np.concatenate([r_l, r_r, r_lt, r_rt]), atol=1e-5)
  assert weights['target_of_left'].shape == (B, S1) and weights['right'].shape == (B, S3)


def test_attention_via_attention_asks_the_characters_with_what_the_words_said():
  query, T = draw(B, 2, 3), 2
  context, weights, params = apply(AttentionViaAttention(ADDITIVE, 3, F1, F2), query, FIRST, SECOND, *LENGTHS[:2])
  for b, t in np.ndindex(B, T):
    c_w = attend(params['words'], query[b, t], columns(FIRST, b, LENGTHS[0]))
    c_c = attend(params['characters'], np.concatenate([query[b, t], c_w]), columns(SECOND, b, LENGTHS[1]))
    np.testing.assert_allclose(context[b, t], np.concatenate([c_w, c_c]), atol=1e-5)
  assert weights['words'].shape == (B, T, S1) and weights['characters'].shape == (B, T, S2)


def test_hierarchical_goes_from_words_to_sentences_to_the_document():
  words, lengths = draw(B, 3, S1, F1), np.array([[4, 1, 2], [3, 0, 0]])  # the second document has one sentence
  context, weights, params = apply(HierarchicalAttention(ADDITIVE, F1), words, lengths)
  for b in range(B):
    C = np.stack([attend(params['words'], None, np.float64(words[b, s].T[:, :n]))
                  for s, n in enumerate(lengths[b]) if n], axis=1)  # d_v x n_S
    np.testing.assert_allclose(context[b], attend(params['sentences'], None, C), atol=1e-5)
  assert weights['words'].shape == (B, 3, S1)
  np.testing.assert_allclose(weights['sentences'][1], [1, 0, 0], atol=1e-6)


def test_multi_representational_is_equations_21_and_22():
  third = draw(B, S1, F3)
  tokens, weights, params = apply(MultiRepresentational(ADDITIVE, (F1, F3), 4), FIRST, third)
  for b, s in np.ndindex(B, S1):
    x = np.stack([params[f'projection_{i}']['kernel'].T @ e[b, s] + params[f'projection_{i}']['bias']
                  for i, e in enumerate((FIRST, third))], axis=1)  # d_t x representations
    np.testing.assert_allclose(tokens[b, s], attend(params['attention'], None, x), atol=1e-5)
  assert weights['representations'].shape == (B, S1, 2)
  np.testing.assert_allclose(weights['representations'].sum(-1), 1, atol=1e-6)


ONE, TWO, THREE = (FIRST, LENGTHS[0]), (SECOND, LENGTHS[1]), (THIRD, LENGTHS[2])
MODULES = {
    'alternating': (AlternatingCoAttention(ADDITIVE, (F1, F2)), (ONE, TWO)),
    'interactive': (InteractiveCoAttention(ADDITIVE, (F1, F2)), (ONE, TWO)),
    'parallel': (ParallelCoAttention((F1, F2), hidden_width=W), (ONE, TWO)),
    'parallel, max': (ParallelCoAttention((F1, F2), scores='max'), (ONE, TWO)),
    'parallel, sparse': (ParallelCoAttention((F1, F2), hidden_width=W, alignment='sparsemax'), (ONE, TWO)),
    'rotatory': (RotatoryAttention(ACTIVATED, F1, F2, F3), (ONE, TWO, THREE)),
    'rotatory, 2 hops': (RotatoryAttention(ACTIVATED, F1, F2, F3, 2), (ONE, TWO, THREE))}


@pytest.mark.parametrize('name', MODULES)
def test_padding_and_order_do_not_matter_and_weights_are_a_distribution(name):
  module, inputs = MODULES[name]
  features, lengths = zip(*inputs)
  context, weights, _ = apply(module, *features, *lengths)
  garbage, shuffled = [], []
  for x, n in inputs:
    real = np.arange(x.shape[1])[None] < n[:, None]
    garbage.append(np.where(real[..., None], x, 1e3))
    orders = [np.concatenate([np.random.default_rng(5).permutation(m), np.arange(m, x.shape[1])]) for m in n]
    shuffled.append(np.stack([x[b, order] for b, order in enumerate(orders)]))
  for changed in (garbage, shuffled):
    np.testing.assert_allclose(apply(module, *changed, *lengths)[0], context, atol=1e-5)
  for key, array in weights.items():
    if key != 'affinity':
      np.testing.assert_allclose(array.sum(-1), 1, atol=1e-6)
      assert (array >= 0).all()


@pytest.mark.parametrize('name', MODULES)
def test_contexts_stay_between_the_least_and_the_greatest_feature_and_empty_inputs_are_zero(name):
  module, inputs = MODULES[name]
  features, _ = zip(*inputs)
  context, _, _ = apply(module, *features)
  low, high = min(x.min() for x in features), max(x.max() for x in features)
  assert low <= context.min() and context.max() <= high
  nothing = [np.zeros(B, int)] * len(features)
  empty, weights, _ = apply(module, *features, *nothing)
  np.testing.assert_array_equal(empty, 0)
  only_second = [np.array([x.shape[1]] * B) if i == 1 else np.zeros(B, int) for i, x in enumerate(features)]
  assert np.isfinite(apply(module, *features, *only_second)[0]).all()


@pytest.mark.parametrize('make, message', [
    (lambda: AlternatingCoAttention(AttentionParts('general'), (F1, F2)), "choose score='additive'"),
    (lambda: InteractiveCoAttention(AttentionParts('general', 'hard_sampled'), (F1, F2)), 'looks once at all'),
    (lambda: ParallelCoAttention((F1, F2), 'concatenated', 'max'), 'needs inputs of one width, not 6 and 7'),
    (lambda: ParallelCoAttention((F1, F2)), "'additive' needs it"),
    (lambda: ParallelCoAttention((F1, F2), hidden_width=2, alignment='reinforced'), 'an agent with a reward'),
    (lambda: ParallelCoAttention((F1, F2), hidden_width=2, alignment='local_window'), 'has nothing to go by'),
])
def test_fields_that_do_not_go_together_are_refused(make, message):
  with pytest.raises(ConfigError, match=message):
    make().init(jax.random.key(0), FIRST, SECOND)


def test_others_are_refused_too():
  for module, message in ((RotatoryAttention(AttentionParts('general', value_width=3), F1, F2, F3), 'leave key_width'),
                          (RotatoryAttention(ACTIVATED, F1, F2, F3, 0), 'give 1 or more')):
    with pytest.raises(ConfigError, match=message):
      module.init(jax.random.key(0), FIRST, SECOND, THIRD)
  with pytest.raises(ValueError, match='1 embeddings were given, and embedding_widths has 2'):
    MultiRepresentational(ADDITIVE, (F1, F3), 4).init(jax.random.key(0), jnp.asarray(FIRST))
