"""Queries: heads, hops, capsules and self-attention against loops over columns; the Transformer's heads as a case."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention import dot_product, masks
from tfm.attention.alignments import ALIGNMENTS, LOCAL
from tfm.attention.general import AttentionParts
from tfm.attention.query_side import Capsules, MultiHead, MultiHop, SelfAttentive, Specialized, capsule_loss
from tfm.config import ConfigError, TransformerConfig
from tfm.models.multihead import MultiHeadAttention

B, T, S, Q, F, K, V, W, H = 2, 3, 5, 6, 6, 4, 6, 8, 2
MASK = masks.lengths(jnp.array([5, 2]))
LENGTHS = 5, 2
DOT = AttentionParts('multiplicative')
ADDITIVE = AttentionParts('additive', hidden_width=W)


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def apply(module, *inputs, **options):
  """With random parameters: what it returns, and the parameters."""
  leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **options)))
  variables = tree.unflatten([draw(*leaf.shape, seed=30 + i) / 2 for i, leaf in enumerate(leaves)])
  return module.apply(variables, *inputs, **options), variables.get('params', {})


def softmax(e):
  e = np.asarray(e, np.float64)
  return np.exp(e) / sum(np.exp(e))


def additive(params, q, k):
  p = params['score']
  own = 0 if q is None else p['query_kernel'].T @ q
  return p['output'] @ np.tanh(own + p['key_kernel'].T @ k + p['bias'])


def attend(score, q, keys, values):
  """keys d_k x n_f, values d_v x n_f."""
  a = softmax([score(q, keys[:, l]) for l in range(keys.shape[1])])
  return sum(a[l] * values[:, l] for l in range(keys.shape[1]))


def test_multi_head_scaled_soft_is_the_kernel_of_the_transformer():
  parts = AttentionParts('scaled', key_width=K, value_width=V)
  x, y = draw(B, T, Q), draw(B, S, F, seed=1)
  found, params = apply(MultiHead(parts, H, Q), x, y, MASK)
  q, k, v = (jnp.einsum('btd,dhc->bthc', side, params[name]['kernel'])
             for name, side in (('query', x), ('key', y), ('value', y)))
  z = dot_product.attend(q, k, v, MASK)
  np.testing.assert_allclose(found.context_BxTxV, jnp.einsum('bthc,hcd->btd', z, params['output']['kernel']),
                             atol=1e-5)


@pytest.mark.parametrize('mask', [masks.causal(1), masks.lengths(jnp.array([0, 3])),
                                  masks.dense(jnp.asarray(np.random.default_rng(0).random((B, H, T, S)) < 0.5))],
                         ids=['causal', 'lengths', 'another for each head'])
def test_multi_head_scaled_soft_is_the_models_with_its_own_weights(mask):
  model = MultiHeadAttention(TransformerConfig(d_model=Q, num_heads=H, d_k=K, d_v=V))
  x, y = draw(B, T, Q), draw(B, S, F, seed=1)
  expected, params = apply(model, x, y, mask)
  seen = {}
  found = MultiHead(AttentionParts('scaled', key_width=K, value_width=V), H, Q).apply(
      {'params': params}, x, y, mask, tap=lambda name, value: seen.setdefault(name, value))
  np.testing.assert_allclose(found.context_BxTxV, expected, atol=1e-5)
  assert seen['scores'].shape == found.weights.shape == (B, H, T, S) and seen['z'].shape == (B, T, H, V)


def test_heads_are_equations_38_to_40_in_columns_with_parameters_of_their_own():
  parts = AttentionParts('additive', hidden_width=W, key_width=K, value_width=V)
  x, y = draw(B, T, Q), draw(B, S, F, seed=1)
  found, params = apply(MultiHead(parts, H, 5), x, y, MASK)
  for b, t in np.ndindex(B, T):
    features, heads = y[b].T[:, :LENGTHS[b]], []
    for j in range(H):
      W_q, W_K, W_V = (params[name]['kernel'][:, j].T for name in ('query', 'key', 'value'))
      score = {'score': jax.tree.map(lambda leaf, j=j: leaf[j], params['score'])}
      heads.append(attend(lambda q, k, score=score: additive(score, q, k), W_q @ x[b, t], W_K @ features,
                          W_V @ features))
    W_O = params['output']['kernel'].reshape(H * V, 5).T
    np.testing.assert_allclose(found.context_BxTxV[b, t], W_O @ np.concatenate(heads), atol=1e-5)


@pytest.mark.parametrize('alignment', ALIGNMENTS)
def test_heads_take_every_alignment(alignment):
  predicted = alignment in ('local_predictive', 'local_window')
  parts = AttentionParts('additive', alignment, hidden_width=W, key_width=K, value_width=V,
                         window=1.5 if alignment in LOCAL else None, centre_width=3 if predicted else None)
  options = dict(key=jax.random.key(1)) if alignment == 'hard_sampled' else {}
  x, y = draw(B, T, Q), draw(B, S, F, seed=1)
  found, _ = apply(MultiHead(parts, H, Q), x, y, masks.lengths(jnp.array([0, 3])), **options)
  assert found.weights.shape[:4] == (B, H, T, S) and found.context_BxTxV.shape == (B, T, Q)
  np.testing.assert_array_equal(found.context_BxTxV[0], 0)
  np.testing.assert_array_equal(found.weights[:, :, :, 3:], 0)
  if alignment not in LOCAL:
    np.testing.assert_allclose(np.asarray(found.weights).sum(3)[1], 1, atol=1e-6)
  assert (found.log_probability_BxT is None) == (alignment != 'hard_sampled')


@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize('transform', ['none', 'linear'])
def test_hops_are_equations_41_and_42_in_columns(transform, shared):
  x, y = draw(B, T, Q), draw(B, S, F, seed=1)
  hops, params = apply(MultiHop(ADDITIVE, Q, F, 3, shared, transform), x, y, MASK)
  assert len(hops) == 3 and len(params) == (1 if shared else 3) * (1 if transform == 'none' else 2)
  for b, t in np.ndindex(B, T):
    features = y[b].T[:, :LENGTHS[b]]
    q, c = x[b, t], features.mean(1)
    for s in range(3):
      own = 0 if shared else s
      if transform == 'linear':
        dense = params[f'next_query_{own}']
        q = np.tanh(dense['kernel'].T @ np.concatenate([q, c]) + dense['bias'])
      c = attend(lambda q, k, own=own: additive(params[f'attention_{own}'], q, k), np.concatenate([q, c]), features,
                 features)
      np.testing.assert_allclose(hops[s].context_BxTxV[b, t], c, atol=1e-5)


def test_capsules_are_equations_43_to_45_in_columns():
  y, L = draw(B, S, F, seed=1), 4
  found, params = apply(Capsules(DOT, F, L), y, MASK)
  assert found.weights.shape == (B, L, S)
  for b, c in np.ndindex(B, L):
    features = y[b].T[:, :LENGTHS[b]]
    context = attend(lambda q, k: q @ k, params['query'][c], features, features)
    p = 1 / (1 + np.exp(-(params['weight'][c] @ context + params['bias'][c])))
    np.testing.assert_allclose(found.probabilities_BxL[b, c], p, atol=1e-6)
    np.testing.assert_allclose(found.representations_BxLxV[b, c], p * context, atol=1e-5)


def test_the_joint_loss_of_capsules_wants_the_label_probable_and_like_the_features():
  y, label = draw(B, S, F, seed=1), jnp.array([1, 0])
  module = Capsules(DOT, F, 2)
  found, params = apply(module, y, MASK)
  expected = []
  for b in range(B):
    f, sign = y[b].T[:, :LENGTHS[b]].mean(1), np.where(np.arange(2) == label[b], -1, 1)
    expected.append(max(0, 1 + sign @ found.probabilities_BxL[b])
                    + max(0, 1 + sign @ (found.representations_BxLxV[b] @ f)))
  np.testing.assert_allclose(capsule_loss(found, y, label, jnp.array(LENGTHS)), expected, atol=1e-5)

  @jax.jit
  def step(params):
    loss, gradient = jax.value_and_grad(lambda params: jnp.sum(
        capsule_loss(module.apply({'params': params}, y, MASK), y, label, jnp.array(LENGTHS))))(params)
    return jax.tree.map(lambda leaf, d: leaf - 0.3 * d, params, gradient), loss

  params = {'query': params['query'], 'weight': jnp.zeros((2, F)), 'bias': jnp.zeros(2)}
  losses = []
  for _ in range(60):
    params, loss = step(params)
    losses.append(float(loss))
  after = module.apply({'params': params}, y, MASK)
  assert losses[-1] < 0.5 * losses[0]
  np.testing.assert_array_equal(np.argmax(after.probabilities_BxL, axis=1), label)
  with pytest.raises(ValueError, match='width 4 cannot be compared with features of width 6'):
    capsule_loss(found.replace(representations_BxLxV=jnp.zeros((B, 2, 4))), y, label)


def test_a_constant_query_is_equation_33_and_a_learned_one_34():
  y = draw(B, S, F, seed=1)
  constant, one = apply(SelfAttentive(ADDITIVE, F, 'constant'), y, MASK)
  learned, other = apply(SelfAttentive(DOT, F, 'learned'), y, MASK)
  for b in range(B):
    features = y[b].T[:, :LENGTHS[b]]
    np.testing.assert_allclose(constant.context_BxTxV[b, 0], attend(
        lambda q, k: additive(one['attention'], None, k), None, features, features), atol=1e-5)
    np.testing.assert_allclose(learned.context_BxTxV[b, 0], attend(
        lambda q, k: q @ k, other['query'], features, features), atol=1e-5)


@pytest.mark.parametrize('update', ['context', 'add_norm'])
def test_a_query_for_every_feature_is_equations_35_to_37(update):
  y = draw(B, S, F, seed=1)
  found, params = apply(SelfAttentive(AttentionParts('scaled'), F, 'features', update), y, MASK)
  assert found.context_BxTxV.shape == (B, S, F)
  for b in range(B):
    features = y[b].T[:, :LENGTHS[b]]
    Q_ = params['query_matrix']['kernel'].T @ y[b].T  # d_q x n_f
    for t in range(S):
      new = attend(lambda q, k: q @ k / F**0.5, Q_[:, t], features, features)
      if update == 'add_norm':
        new = y[b, t] + new
        new = (new - new.mean()) / np.sqrt(new.var() + 1e-6) * params['norm']['scale'] + params['norm']['bias']
      np.testing.assert_allclose(found.context_BxTxV[b, t], new, atol=1e-5)


@pytest.mark.parametrize('kind', ['mean', 'context'])
def test_a_specialized_query_comes_from_another_input(kind):
  other, y = draw(B, T, 7, seed=2), draw(B, S, F, seed=1)
  lengths = jnp.array([1, 3])
  found, params = apply(Specialized(ADDITIVE, F, 7, kind), other, y, MASK, lengths)
  for b in range(B):
    theirs, features = other[b].T[:, :lengths[b]], y[b].T[:, :LENGTHS[b]]
    query = theirs.mean(1) if kind == 'mean' else attend(
        lambda q, k: additive(params['other']['attention'], None, k), None, theirs, theirs)
    np.testing.assert_allclose(found.context_BxTxV[b, 0], attend(
        lambda q, k: additive(params['attention'], q, k), query, features, features), atol=1e-5)


MODULES = {
    'heads': (MultiHead(AttentionParts('scaled', key_width=K, value_width=V), H, Q), True),
    'hops': (MultiHop(ADDITIVE, Q, F, 2), True),
    'constant': (SelfAttentive(ADDITIVE, F, 'constant'), False),
    'learned': (SelfAttentive(DOT, F, 'learned'), False), 'capsules': (Capsules(DOT, F, 3), False)}


@pytest.mark.parametrize('name', MODULES)
def test_order_and_padding_do_not_matter_and_an_empty_source_gives_zero(name):
  module, has_query = MODULES[name]
  query = (draw(B, T, Q),) if has_query else ()
  y, order, lengths = draw(B, S, F, seed=1), np.array([2, 0, 1, 3, 4]), masks.lengths(jnp.array([3, 0]))
  garbage = y.copy()
  garbage[0, 3:], garbage[1] = 1e3, -1e3

  def result(y, mask=None):
    found = apply(module, *query, y, mask)[0]
    found = found[-1] if isinstance(found, tuple) else found
    return found.representations_BxLxV if name == 'capsules' else found.context_BxTxV

  np.testing.assert_allclose(result(y), result(y[:, order]), atol=1e-5)
  found = result(y, lengths)
  np.testing.assert_allclose(found, result(garbage, lengths), atol=1e-5)
  np.testing.assert_array_equal(found[1], 0)
  assert np.abs(found[0]).min() > 0


@pytest.mark.parametrize('module, message', [
    (MultiHead(AttentionParts('scaled', key_width=4), H, Q), 'give both'),
    (MultiHop(ADDITIVE, Q, F, 0), 'give 1 or more'),
    (SelfAttentive(DOT, F, 'constant'), "choose 'additive', which can do without"),
    (SelfAttentive(ADDITIVE, F, 'constant', 'add_norm'), 'gives one context for all'),
    (SelfAttentive(ADDITIVE, F, 'constant', query_width=3), 'query_width has no effect'),
    (SelfAttentive(AttentionParts('scaled', value_width=3), F, 'features', 'add_norm'), 'set value_width to that'),
])
def test_fields_that_do_not_go_together_are_refused(module, message):
  inputs = (draw(B, S, F),) if isinstance(module, SelfAttentive) else (draw(B, T, Q), draw(B, S, F))
  with pytest.raises(ConfigError, match=message):
    module.init(jax.random.key(0), *inputs)
