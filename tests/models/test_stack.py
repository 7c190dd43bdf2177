from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.models.layout import to_layout

RATES = dict(dropout=0.2, attention_dropout=0.3, activation_dropout=0.4)


def loss_and_gradients(tiny, ids, params, scan_layers, remat, **sizes):
  """A loss with dropout and its gradients, for parameters in the unrolled layout."""
  model, _ = tiny(**RATES, scan_layers=scan_layers, remat=remat, **sizes)
  layout = 'scanned' if scan_layers else 'unrolled'

  def loss(params, key):
    logits_BxTxV = model.apply({'params': to_layout(params, layout)}, *ids, dropout_key=key)
    return jnp.sum(jax.nn.log_softmax(logits_BxTxV)[..., 5])

  return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, jax.random.key(3)))


@pytest.mark.parametrize('norm, first, others', [
    ('pre', (False, 'none'), [(True, 'none'), (False, 'full'), (True, 'dots')]),
    ('post', (False, 'dots'), [(True, 'full')]),
])
def test_scanning_and_recomputing_change_nothing(tiny, ids, norm, first, others):
  """Loss and gradients of a model with dropout, for the same parameters and the same key."""
  sizes = dict(norm=norm, encoder_layers=1)
  params = tiny(**sizes)[1]['params']
  value, gradients = loss_and_gradients(tiny, ids, params, *first, **sizes)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.abs(leaf).max() > 1e-3, path  # every parameter counts
  for other in others:
    other_value, other_gradients = loss_and_gradients(tiny, ids, params, *other, **sizes)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), other_gradients, gradients)


def equations(jaxpr, name: str) -> list:
  """All equations of one primitive, those in inner jaxprs too."""
  found = []
  for equation in jaxpr.eqns:
    found += [equation] if equation.primitive.name == name else []
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, 'eqns')):
      inner = getattr(value, 'jaxpr', value)
      found += equations(inner, name) if hasattr(inner, 'eqns') else []
  return found


def gradient_jaxpr(tiny, ids, **changes):
  model, variables = tiny(**changes)
  return jax.make_jaxpr(jax.grad(lambda variables: model.apply(variables, *ids).sum()))(variables).jaxpr


@pytest.mark.parametrize('scan_layers', [False, True])
def test_remat_recomputes_what_its_name_says(tiny, ids, scan_layers):
  """Matrix products in forward and backward pass: with 'full' all of a layer again, with 'dots' those of attention."""
  counts = {remat: len(equations(gradient_jaxpr(tiny, ids, scan_layers=scan_layers, remat=remat), 'dot_general'))
            for remat in ('none', 'dots', 'full')}
  assert counts['none'] < counts['dots'] < counts['full']


def test_a_scanned_stack_is_one_loop_over_its_layers(tiny, ids):
  def loops(**changes):
    model, variables = tiny(encoder_layers=3, **changes)
    jaxpr = jax.make_jaxpr(lambda variables: model.apply(variables, *ids))(variables).jaxpr
    return [loop.params['length'] for loop in equations(jaxpr, 'scan')]

  assert loops(scan_layers=True) == [3, 2]
  assert loops(scan_layers=False) == []


def test_no_two_places_share_a_dropout_key(tiny, ids, in_place, monkeypatch):
  model, variables = tiny(norm='pre', **RATES)
  sites = []

  def record(key, shape, rate):
    sites.append((rate, jax.random.key_data(key)))
    return jnp.ones(shape, bool)

  monkeypatch.setattr('tfm.models.dropout.keep_mask', record)

  @jax.jit
  def keys(key):
    sites.clear()
    with in_place():
      model.apply(variables, *ids, dropout_key=key)
    return jnp.stack([key for _, key in sites])

  # Two steps have two keys, and no place of either shares one.
  drawn = np.concatenate([keys(jax.random.key(step)) for step in range(2)])
  assert len(np.unique(drawn, axis=0)) == len(drawn)
  rates = [rate for rate, _ in sites]
  assert {name: rates.count(rate) for name, rate in RATES.items()} == {
      'dropout': 2 + 2 * 2 + 2 * 3, 'attention_dropout': 2 + 2 * 2, 'activation_dropout': 2 + 2}
