from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tfm.config import ConfigError, OptimizerConfig, TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.models.layout import layout_of, to_layout
from tfm.parallel import rules
from tfm.training.named_arrays import named_leaves
from tfm.training.optimizer import GROUPS, build_optimizer, role
from tfm.training.start import _convert_state

PARAMS = {'a': jnp.zeros((2, 3)), 'b': jnp.zeros(4)}


def gradients(count: int, scale: float = 1.0):
  random = np.random.default_rng(0)
  return [jax.tree.map(lambda p: jnp.asarray(scale * random.normal(size=p.shape), jnp.float32), PARAMS)
          for _ in range(count)]


def updates(given: list, **fields) -> list:
  config = OptimizerConfig(**{'schedule': 'constant', 'learning_rate': 0.01, 'warmup_steps': 0, **fields})
  optimizer = build_optimizer(config, 64, 100)
  state, found = optimizer.init(PARAMS), []
  for gradient in given:
    update, state = optimizer.update(gradient, state, PARAMS)
    found.append(update)
  return found


def adam(given: list, rates: list[float], b1: float, b2: float, epsilon: float) -> list:
  """Kingma & Ba 2015, algorithm 1, in float64."""
  m = v = jax.tree.map(lambda p: np.zeros(p.shape), PARAMS)
  found = []
  for t, (gradient, rate) in enumerate(zip(given, rates), 1):
    m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * np.float64(g), m, gradient)
    v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * np.float64(g) ** 2, v, gradient)
    found.append(jax.tree.map(
        lambda m, v, t=t, rate=rate: -rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + epsilon), m, v))
  return found


def assert_close(found, expected, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


@pytest.mark.parametrize('b1, b2, epsilon', [(0.9, 0.98, 1e-9), (0.5, 0.9, 0.1), (0.0, 0.999, 1e-3)])
def test_is_adam_with_these_betas_and_epsilon(b1, b2, epsilon):
  given = gradients(5)
  assert_close(updates(given, b1=b1, b2=b2, epsilon=epsilon), adam(given, [0.01] * 5, b1, b2, epsilon), rtol=1e-4)


def test_the_rate_is_that_of_the_schedule():
  given = gradients(6)
  found = updates(given, schedule='noam', learning_rate=2.0, warmup_steps=3)
  rates = [2.0 * 64**-0.5 * min(t**-0.5, t * 3**-1.5) for t in range(1, 7)]
  assert_close(found, adam(given, rates, 0.9, 0.98, 1e-9), rtol=1e-4)


@pytest.mark.parametrize('scale', [1e-4, 1.0, 1e4])
def test_the_first_update_has_the_size_of_the_rate(scale):
  (gradient,) = gradients(1, scale)
  (update,) = updates([gradient], learning_rate=0.03)
  assert_close(update, jax.tree.map(lambda g: -0.03 * jnp.sign(g), gradient), rtol=1e-4)


def test_clipping_bounds_the_norm_and_keeps_the_direction():
  # With so large an epsilon Adam is plain gradient descent, so the update shows the gradient that it was given.
  plain = dict(epsilon=1e4, learning_rate=1e4, b1=0.0)
  (gradient,) = gradients(1, scale=10.0)
  norm = float(optax.tree.norm(gradient))
  (clipped,), (whole,) = updates([gradient], clip_norm=0.5, **plain), updates([gradient], **plain)
  assert float(optax.tree.norm(whole)) == pytest.approx(norm, rel=0.01)
  assert float(optax.tree.norm(clipped)) == pytest.approx(0.5, rel=0.01)
  assert_close(clipped, jax.tree.map(lambda g: -g * 0.5 / norm, gradient), rtol=0.01)


def test_clipping_leaves_a_smaller_gradient_alone():
  given = gradients(3, scale=0.01)
  assert_close(updates(given, clip_norm=5.0), updates(given), rtol=0)


def test_adam_sees_the_clipped_gradients():
  """Clipping its updates instead would leave the moments to one huge gradient."""
  huge, usual = gradients(2, scale=100.0)
  usual = jax.tree.map(lambda g: g / 1000.0, usual)
  norm = float(optax.tree.norm(huge))
  clipped = jax.tree.map(lambda g: g * 2.0 / norm, huge)
  expected = adam([clipped, usual], [0.01] * 2, 0.9, 0.98, 1e-9)
  assert_close(updates([huge, usual], clip_norm=2.0), expected, rtol=1e-4)


# -- the other optimizers ---------------------------------------------------------------------------------------------

NAMES = ['adam', 'adamw', 'adafactor', 'lion', 'muon']
SHAPES = [
    dict(encoder_layers=1, decoder_layers=2, tying='none', positions='learned', max_positions=8, biases='all',
         attention_sinks=True, output_bias=True),
    dict(encoder_layers=0, decoder_layers=2, experts=4, biases='none', positions='relative', feed_forward='swiglu'),
    dict(encoder_layers=2, decoder_layers=0, token_types=2, pooler=True, num_labels=3, output_transform=True)]


def tree_of(fields: dict, scan: bool = False, d_model: int = 8, **sizes):
  """Random values, and for each of two updates a random gradient, in every parameter of a model."""
  config = TransformerConfig(**{'d_model': d_model, 'd_ff': 12, 'num_heads': 2, **fields, **sizes})
  shapes = jax.eval_shape(lambda: initialize(build_model(config, 11, 11), jax.random.key(0)))
  random = np.random.default_rng(1)
  trees = [jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), shapes)
           for _ in range(3)]
  return [to_layout(tree, 'scanned') for tree in trees] if scan else trees


def two_updates(params, given, **fields):
  """The state and both updates, with the weights that they lead to; the rate is 0.01."""
  optimizer = build_optimizer(OptimizerConfig(schedule='constant', learning_rate=0.01, warmup_steps=0, **fields), 8, 9)
  state, found = optimizer.init(params), []
  for gradient in given:
    update, state = jax.jit(optimizer.update)(gradient, state, params)
    params = optax.apply_updates(params, update)
    found.append(update)
  return state, found


@pytest.mark.parametrize('fields', SHAPES)
def test_every_parameter_is_in_one_group_and_matrices_alone_decay(fields):
  (params, *_), decay = tree_of(fields), dict(name='adamw', weight_decay=0.1)
  zeros = jax.tree.map(jnp.zeros_like, params)
  groups = {name: role(name, leaf.ndim).group for name, leaf in named_leaves(params).items()}
  _, (update, _) = two_updates(params, [zeros, zeros], **decay)
  for name, leaf in named_leaves(update).items():
    decays = ('kernel' in name or 'router' in name or re.search('mlp/(inner|gate|outer)$', name)
              or name.endswith(('embedding/table', 'output/table')))
    expected = -0.01 * 0.1 * named_leaves(params)[name] * (1.0 if decays else 0.0)
    np.testing.assert_allclose(leaf, expected, rtol=1e-5, err_msg=name)
    hidden = '/layers_' in name and decays and 'router' not in name
    assert (groups[name] == 'hidden') == bool(hidden), name


def test_every_rule_has_a_group_and_an_unknown_parameter_is_an_error(monkeypatch):
  numbered = ('experts', 'gates')
  used = {tuple(axis for axis in axes if axis not in numbered) for axes in rules.PARAMETER_AXES.values()}
  assert used | {()} == set(GROUPS)  # a scalar has no rule
  with pytest.raises(ConfigError, match='No sharding rule covers novel/kernel'):
    role('novel/kernel', 2)
  monkeypatch.setitem(rules.PARAMETER_AXES, 'novel/kernel', ('mlp', 'mlp'))
  with pytest.raises(ConfigError, match='novel/kernel has the logical axes .* which are in no group'):
    role('novel/kernel', 2)


@pytest.mark.parametrize('path, shape, flat', [
    ('decoder/layers_0/self_attention/query/kernel', (6, 2, 4), (6, 8)),
    ('decoder/layers/self_attention/output/kernel', (3, 2, 4, 6), (3, 8, 6)),
    ('decoder/layers/mlp/outer', (3, 5, 7, 6), (3, 5, 7, 6)), ('decoder/layers_0/mlp/outer/kernel', (7, 6), (7, 6)),
    ('decoder/layers/self_attention/key/bias', (3, 2, 4), (3, 8)), ('decoder/layers/mlp/router', (3, 6, 5), (3, 6, 5))])
def test_a_leaf_as_matrices(path, shape, flat):
  assert role(path, len(shape)).matrix(jnp.zeros(shape)).shape == flat


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('fields', SHAPES)
def test_both_layouts_get_the_same_updates_and_their_states_convert(name, fields):
  sizes = dict(d_model=128, d_ff=132, d_k=64, d_v=64) if name == 'adafactor' else {}  # wide enough to be factored
  decay = {} if name in ('adam', 'adafactor') else dict(weight_decay=0.1)
  (params, *given), (stacked, *stacked_given) = tree_of(fields, **sizes), tree_of(fields, scan=True, **sizes)
  state, found = two_updates(params, given, name=name, **decay)
  stacked_state, stacked_found = two_updates(stacked, stacked_given, name=name, **decay)
  assert layout_of(stacked) == 'scanned' and layout_of(params) == 'unrolled'
  for one, other in zip(found, stacked_found):
    assert_close(to_layout(other, 'unrolled'), one, rtol=1e-3, atol=1e-6)
  for layout, start, end in (('scanned', state, stacked_state), ('unrolled', stacked_state, state)):
    converted = _convert_state(start, layout)
    assert jax.tree.structure(converted) == jax.tree.structure(end)
    assert_close(converted, end, rtol=1e-4, atol=1e-5)


def test_adamw_is_adam_and_decay():
  params, *given = tree_of(SHAPES[0])
  _, (first, second) = two_updates(params, given, name='adamw', weight_decay=0.1, b1=0.8, b2=0.9, epsilon=1e-3)
  pick = lambda tree: np.float64(tree['decoder']['layers_0']['mlp']['inner']['kernel'])  # noqa: E731
  (g, h), w = map(pick, given), pick(params)
  once = -0.01 * (g / (np.abs(g) + 1e-3) + 0.1 * w)
  np.testing.assert_allclose(pick(first), once, rtol=1e-4)
  m, v = (0.8 * 0.2 * g + 0.2 * h) / (1 - 0.8**2), (0.9 * 0.1 * g**2 + 0.1 * h**2) / (1 - 0.9**2)
  np.testing.assert_allclose(pick(second), -0.01 * (m / (np.sqrt(v) + 1e-3) + 0.1 * (w + once)), rtol=1e-3, atol=1e-7)


def test_lion_is_algorithm_2():
  """Chen et al. 2023."""
  params, *given = tree_of(SHAPES[0])
  _, (first, second) = two_updates(params, given, name='lion', weight_decay=0.1, b1=0.7, b2=0.9)
  pick = lambda tree: np.float64(tree['decoder']['layers_0']['mlp']['inner']['kernel'])  # noqa: E731
  (g, h), w = map(pick, given), pick(params)
  once = -0.01 * (np.sign(g) + 0.1 * w)
  np.testing.assert_allclose(pick(first), once, rtol=1e-5)
  np.testing.assert_allclose(pick(second), -0.01 * (np.sign(0.7 * 0.1 * g + 0.3 * h) + 0.1 * (w + once)), rtol=1e-4)


def newton_schulz(m: np.ndarray) -> np.ndarray:
  """Jordan 2024: five steps of the quintic that drives singular values towards 1."""
  x = m / np.linalg.norm(m)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x


def test_muon_orthogonalises_the_matrix_of_all_heads_and_adamw_does_the_rest():
  params, *given = tree_of(SHAPES[0])
  fields = dict(weight_decay=0.1, b1=0.8, b2=0.9)
  _, found = two_updates(params, given, name='muon', **fields)
  _, adam_found = two_updates(params, given, name='adamw', **fields)
  for path, shape in ((('decoder', 'layers_1', 'self_attention', 'query', 'kernel'), (8, 8)),
                      (('decoder', 'layers_1', 'cross_attention', 'output', 'kernel'), (8, 8)),
                      (('encoder', 'layers_0', 'mlp', 'outer', 'kernel'), (12, 8))):
    pick = lambda tree: np.float64(functools.reduce(dict.__getitem__, path, tree)).reshape(shape)  # noqa: E731, B023
    (g, h), w, (first, second) = map(pick, given), pick(params), map(pick, found)
    size = 0.01 * 0.2 * max(shape)**0.5
    direction = -(first + 0.01 * 0.1 * w) / size
    values = np.linalg.svd(direction, compute_uv=False)
    assert values.min() > 0.2 and values.max() < 1.3
    np.testing.assert_allclose(direction, newton_schulz(g), atol=1e-4)
    m = 0.95 * 0.05 * g + 0.05 * h  # Nesterov looks one step ahead, each term corrected for its bias
    ahead = 0.95 * m / (1 - 0.95**3) + 0.05 * h / (1 - 0.95**2)
    np.testing.assert_allclose(-(second + 0.01 * 0.1 * (w + first)) / size, newton_schulz(ahead), atol=1e-3)
  for name, leaf in named_leaves(found[1]).items():
    if role(name, leaf.ndim).group != 'hidden':
      np.testing.assert_allclose(leaf, named_leaves(adam_found[1])[name], rtol=1e-6, err_msg=name)


def test_adafactor_is_that_of_the_flattened_matrices_and_experts():
  sizes = dict(d_model=128, d_ff=132, d_k=64, d_v=64)
  params, *given = tree_of(SHAPES[1], scan=True, **sizes)
  state, found = two_updates(params, given, name='adafactor')
  plain = optax.adafactor(0.01)
  for path, own, shape in ((('self_attention', 'query', 'kernel'), (1,), (128, 128)),
                           (('self_attention', 'output', 'kernel'), (0,), (128, 128)),
                           (('mlp', 'gate'), (1, 3), (128, 132)), (('self_attention_norm', 'scale'), (1,), (128,))):
    pick = lambda tree: functools.reduce(dict.__getitem__, path, tree['decoder']['layers'])[own].reshape(shape)  # noqa
    weights = pick(params)
    inner = plain.init(weights)
    for gradient, update in zip(given, found):
      expected, inner = plain.update(pick(gradient), inner, weights)
      np.testing.assert_allclose(pick(update), expected, rtol=1e-4, atol=1e-7)
      weights = weights + expected
  held = sum(leaf.size for leaf in jax.tree.leaves(state))
  assert held < 0.1 * sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize('name', NAMES)
def test_a_tiny_loss_falls(name):
  params, target, _ = tree_of(SHAPES[1])
  rate = 0.3 if name == 'adafactor' else 0.1
  optimizer = build_optimizer(OptimizerConfig(name=name, schedule='constant', learning_rate=rate, warmup_steps=0), 8, 9)
  loss = lambda p: optax.tree.norm(jax.tree.map(jnp.subtract, p, target), squared=True)  # noqa: E731

  def step(carry, _):
    params, state = carry
    value, gradient = jax.value_and_grad(loss)(params)
    update, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, update), state), value

  _, values = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, 60))(params)
  assert values[-1] < 0.5 * values[0] and jnp.isfinite(values).all()
