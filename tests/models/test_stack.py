from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.models.layout import to_layout

quick = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})  # compiles in half the time
RATES = dict(dropout=0.2, attention_dropout=0.3, activation_dropout=0.4)


def loss_and_gradients(tiny, ids, params, **changes):
  """A loss with dropout and its gradients, in the unrolled layout."""
  model, _ = tiny(**RATES, **changes)
  layout = 'scanned' if model.config.scan_layers else 'unrolled'

  @quick
  def run(params, key):
    def loss(params):
      return jnp.sum(jax.nn.log_softmax(model.apply({'params': params}, *ids, key))[..., 5])
    return jax.value_and_grad(loss)(params)

  value, gradients = run(to_layout(params, layout), jax.random.key(3))
  return value, to_layout(gradients, 'unrolled')


@pytest.mark.parametrize('norm, others', [
    ('pre', [(True, 'none'), (False, 'full'), (True, 'dots')]),
    ('post', [(False, 'dots'), (True, 'full')]),
])
def test_scanning_and_recomputing_change_nothing(tiny, ids, norm, others):
  """Loss and gradients of a model with dropout, for the same parameters and the same key."""
  sizes = dict(norm=norm, decoder_layers=3)
  params = tiny(**sizes)[1]['params']
  value, gradients = loss_and_gradients(tiny, ids, params, **sizes)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.abs(leaf).max() > 1e-3, path  # every parameter counts
  for scan_layers, remat in others:
    other_value, other = loss_and_gradients(tiny, ids, params, scan_layers=scan_layers, remat=remat, **sizes)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), other, gradients)


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


@pytest.mark.parametrize('scan_layers', [False, True])
def test_no_two_places_share_a_dropout_key(tiny, ids, monkeypatch, scan_layers):
  model, variables = tiny(norm='pre', scan_layers=scan_layers, **RATES)
  sites = []

  def record(key, shape, rate):
    sites.append((key, rate))
    return jnp.ones(shape, bool)

  monkeypatch.setattr('tfm.models.dropout.keep_mask', record)
  if not scan_layers:

    @quick
    def keys(key):
      sites.clear()
      model.apply(variables, *ids, key)
      return jnp.stack([jax.random.key_data(key) for key, _ in sites])

    drawn = np.asarray(keys(jax.random.key(0)))
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 2 + 2 * 4 + 2 * 6
    # Another step has another key, and none of it comes back.
    both = np.concatenate([drawn, keys(jax.random.key(1))])
    assert len(np.unique(both, axis=0)) == len(both)
  rates = [rate for _, rate in sites] if sites else []
  if scan_layers:
    jax.eval_shape(lambda: model.apply(variables, *ids, jax.random.key(0)))
    rates = [rate for _, rate in sites]
  assert {rate: rates.count(rate) for rate in rates}.keys() == set(RATES.values())
