"""E7: tasks by definitions of their own, gradients and receptive fields by exact cases, matching, and cost."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis import memory_tasks
from tfm.analysis.claims import CLAIMS
from tfm.analysis.compute_cost import cost, loop_free_flops, power
from tfm.analysis.long_range_recall import Scale, _recall_conditions, recall_by_distance, scale_named, verdict
from tfm.analysis.long_range_structure import (
  _exploding_slope,
  at_first,
  cost_by_length,
  gradient_by_distance,
  receptive_fields,
)
from tfm.analysis.receptive_field import gradient_norms, log_slope, receptive_field
from tfm.analysis.report import write
from tfm.analysis.sequence_families import FAMILIES, convolutional, matched, parameters_of, recurrent, transformer
from tfm.analysis.task_training import Curve, Effort, accuracy_curve, half_distance, train
from tfm.claims import claims
from tfm.config import ConfigError, TransformerConfig
from tfm.models.build import build_model, initialize

SYMBOLS, T = 3, 24


# -- what each task asks, told again token by token: (distance, answer) for each position, or None --------------------


def first_token(ids):
  return [(t - 1, ids[1]) if t >= 2 else None for t in range(len(ids))]


def copied(ids):
  delays = [[1, 3, 7][i // SYMBOLS] for i in ids]
  return [(d, ids[t - d] % SYMBOLS) if t >= d else None for t, d in enumerate(delays)]


def marked(ids):
  mark = next(t for t, i in enumerate(ids) if SYMBOLS <= i < 2 * SYMBOLS)
  return [(t - mark, ids[mark] - SYMBOLS) if i == 2 * SYMBOLS else None for t, i in enumerate(ids)]


def associated(ids):
  found, asked, keys = {}, [], 8
  for t, i in enumerate(ids):
    asked.append((t - found[i][0], found[i][1]) if i in found else None)
    if i < keys and i not in found:
      found[i] = t + 1, ids[t + 1]
  return asked


def odd(ids):
  return [(t + 1, sum(ids[:t + 1]) % 2) for t in range(len(ids))]


def innermost(ids):
  stack, asked = [], []
  for t, i in enumerate(ids):
    if i < 2:
      stack.append(i)
      asked.append(None)
    else:
      assert stack.pop() == i - 2, 'a bracket closes another kind'
      asked.append((t + 1, stack[-1] if stack else 2))
    assert len(stack) <= 3
  return asked


TASKS = {
    'first': (memory_tasks.first_token_recall(T, SYMBOLS), first_token),
    'copy': (memory_tasks.copy(T, (1, 3, 7), SYMBOLS), copied),
    'marked': (memory_tasks.marked_recall(T, SYMBOLS), marked),
    'associative': (memory_tasks.associative_recall(T, 4, SYMBOLS, keys=8), associated),
    'parity': (memory_tasks.parity(T), odd),
    'dyck': (memory_tasks.bounded_dyck(T, depth=3), innermost),
}


@cache
def compiled(name):
  return jax.jit(TASKS[name][0].draw, static_argnums=1)


def draw(name, key) -> memory_tasks.Drawn:
  return jax.tree.map(np.asarray, compiled(name)(jax.random.key(key), 3000))


@pytest.mark.parametrize('name', TASKS)
def test_answers_and_distances_are_those_of_the_definition(name):
  task, define = TASKS[name]
  drawn = draw(name, 1)
  assert drawn.ids_BxT.shape == (3000, T) and task.length == T
  assert drawn.distance_BxT.min() >= 0, 'nothing is asked before it is told'
  # Every id is used: the vocabulary is no larger than the task.
  assert set(np.unique(drawn.ids_BxT)) <= set(range(task.vocab_size)) and drawn.ids_BxT.max() == task.vocab_size - 1
  for ids, answers, distances in zip(*(x[:50].tolist() for x in drawn)):
    got = [(d, a) if d else None for a, d in zip(answers, distances)]
    assert got == define(ids)


@pytest.mark.parametrize('name', TASKS)
def test_a_key_gives_the_sequences_and_another_key_others(name):
  first, again, other = (draw(name, n).ids_BxT for n in (0, 0, 1))
  assert (first == again).all() and (first != other).any()
  assert len(np.unique(first, axis=0)) > 2900, 'rows differ'


@pytest.mark.parametrize('name', TASKS)
def test_chance_is_the_share_of_the_most_frequent_answer(name):
  task, drawn = TASKS[name][0], draw(name, 2)
  late = (drawn.distance_BxT > 0) & (np.arange(T) >= T // 2)  # Dyck begins at height 0
  assert np.bincount(drawn.answers_BxT[late]).max() / late.sum() == pytest.approx(task.chance, abs=0.02)


def test_a_mark_moves_and_the_rest_of_the_sequence_stays():
  def ids(position):
    return np.asarray(memory_tasks.marked_recall(T, SYMBOLS, position).draw(jax.random.key(3), 6).ids_BxT)

  start, end = ids(0), ids(T - 2)
  assert (start[:, 1:T - 2] == end[:, 1:T - 2]).all() and (start[:, 0] == end[:, T - 2]).all()
  assert (start[:, -1] == 2 * SYMBOLS).all() and (start[:, 0] >= SYMBOLS).all()


@pytest.mark.parametrize('make, message', [
    (lambda: memory_tasks.first_token_recall(2), 'needs 3 tokens'),
    (lambda: memory_tasks.copy(8, (4, 8)), 'needs 9 tokens'),
    (lambda: memory_tasks.marked_recall(8, position=7), 'not before the last'),
    (lambda: memory_tasks.associative_recall(20, 4, keys=3), 'raise keys'),
    (lambda: memory_tasks.bounded_dyck(8, depth=1), 'give 2 or more'),
    (lambda: memory_tasks.first_token_recall(8, symbols=1), 'nothing to remember'),
    (lambda: scale_named('huge'), "no scale 'huge'"),
    (lambda: recall_by_distance(task='sorting'), "no recall task 'sorting'"),
    (lambda: gradient_by_distance(length=13), 'raise it'),
    (lambda: cost_by_length((32, 64)), 'raise it'),
    (lambda: log_slope([1, 2], [1.0, 0.0]), 'above 0'),
])
def test_what_makes_no_sense_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


# -- gradients and receptive fields -----------------------------------------------------------------------------------


def test_gradient_norms_are_those_of_the_function_of_the_embeddings():
  """Here the embedding table is the identity, so a sequence of T different tokens has its embeddings in the table."""
  length, width = 6, 6
  model = build_model(recurrent(4, d_model=width), length, length)
  params = initialize(model, jax.random.key(0))
  ids_T = jnp.array([3, 0, 5, 1, 4, 2])

  def last(table):
    variables = {'params': {**params, 'target_embedding': {'table': table}}}
    return model.apply(variables, ids_T[None], method='hidden')[0, -1]

  jacobian_WxVxD = jax.jacfwd(last)(params['target_embedding']['table'])
  expected_T = jnp.linalg.norm(jacobian_WxVxD, axis=(0, 2))[ids_T][::-1]
  np.testing.assert_allclose(gradient_norms(model, params, ids_T[None]), expected_T, rtol=1e-5)


def test_a_linear_recurrence_explodes_at_its_own_rate():
  assert _exploding_slope(0) == pytest.approx(np.log10(1.5), abs=1e-5)


def test_gradients_by_distance_are_in_the_order_of_the_calibration():
  result = gradient_by_distance(length=32, width=16, seeds=1)
  norms, slope = result.measured['norm_by_distance'], result.measured['slope_decades_per_step']
  assert slope['tanh RNN'] < -0.05 and slope['tanh RNN'] < slope['LSTM'] < -0.01
  assert abs(slope['Transformer']) < 0.02 and abs(slope['dilated CNN']) < 0.03
  assert norms['CNN'][13:] == [0.0] * 19 and min(norms['CNN'][:13]) > 0
  assert min(min(norms[name]) for name in norms if name != 'CNN') > 0
  json.dumps(result.measured)


@pytest.mark.parametrize('dilation, layers, kernel_width', [('none', 3, 2), ('none', 1, 5), ('doubling', 3, 3)])
def test_the_receptive_field_is_exactly_what_the_config_says(dilation, layers, kernel_width):
  config = dataclasses.replace(convolutional(4, dilation, layers, 4), kernel_width=kernel_width)
  model, params = at_first(config, 0)
  field = config.receptive_field.decoder
  assert receptive_field(model, params, jnp.arange(field + 4) % 16) == field
  assert receptive_field(model, params, jnp.arange(field - 1) % 16) == field - 1, 'no further than the sequence'


def test_a_window_of_attention_has_the_receptive_field_of_its_layers():
  model, params = at_first(dataclasses.replace(transformer(8, 2, 4, 1), window=3), 0)
  assert receptive_field(model, params, jnp.arange(9)) == 5


def test_paths_are_as_short_as_the_structure_allows():
  result = receptive_fields(lengths=(4, 8))
  assert result.verdict == 'holds'
  assert result.measured['field_by_layers']['dilated CNN'] == [3, 7, 14], 'and the sequence ends at 14'
  assert result.measured['path'] == {'Transformer': [1, 1], 'dilated CNN': [2, 3], 'CNN': [2, 4], 'tanh RNN': [4, 8]}


def test_only_a_model_that_reads_a_past_has_one():
  model = build_model(TransformerConfig(decoder_layers=0, encoder_layers=1, d_model=4, d_ff=4, num_heads=1), 8, 8)
  with pytest.raises(ValueError, match='encoder-only'):
    receptive_field(model, {}, jnp.arange(4))
  with pytest.raises(ValueError, match='one sequence'):
    receptive_field(build_model(recurrent(2), 8, 8), {}, jnp.zeros((2, 4), jnp.int32))


# -- training and matching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', FAMILIES)
def test_families_are_matched_in_parameters(name):
  model = matched(FAMILIES[name], 20_000, 17)
  params = jax.eval_shape(partial(initialize, model), jax.random.key(0))
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert abs(size / 20_000 - 1) <= 0.05 and size == parameters_of(model.config, 17)


def test_what_cannot_be_matched_is_refused():
  with pytest.raises(ConfigError, match='Ask for more parameters'):
    matched(FAMILIES['Transformer'], 1000, 17)


def test_a_trained_cnn_recalls_inside_its_field_and_is_at_chance_beyond():
  """Field 5: x_0 is inside up to distance 4, and known to be the first where BOS is seen too, up to distance 3."""
  task = memory_tasks.first_token_recall(12, symbols=4)
  model = build_model(convolutional(16, layers=2, d_model=16), task.vocab_size, task.vocab_size)
  params, losses = train(model, task, Effort(200, 32, 1e-2), jax.random.key(0))
  curve = accuracy_curve(model, params, task, jax.random.key(1), 1000)
  assert losses.shape == (200,) and curve.asked[1:11].tolist() == [1000] * 10 and curve.asked[[0, 11, 12]].max() == 0
  assert min(curve.at(d) for d in (1, 2, 3)) > 0.95
  assert max(abs(curve.at(d) - task.chance) for d in range(5, 11)) < 4 * curve.error(5)


def test_training_is_a_pure_function_of_its_key():
  task = memory_tasks.parity(8)
  model = build_model(recurrent(4, d_model=4), 2, 2)
  first, again, other = (train(model, task, Effort(3, 4), jax.random.key(n))[1] for n in (0, 0, 1))
  assert (first == again).all() and (first != other).any()


def test_half_distance_lies_between_the_distances_around_it():
  assert half_distance((4, 8, 16), (1.0, 1.0, 0.9), 0.5) is None
  assert half_distance((4, 16), (1.0, 0.5), 0.5) == pytest.approx(8)
  assert half_distance((4, 16), (0.6, 0.5), 0.5) == 4.0


def test_a_curve_counts_a_window_of_distances():
  curve = Curve(right=np.arange(20), asked=np.full(20, 20))
  assert curve.at(4) == 4 / 20 and curve.at(16) == (16 + 17) / 40 and np.isnan(curve.at(20))
  assert curve.error(4) == pytest.approx(0.5 / 20**0.5)


def test_a_verdict_needs_all_conditions_and_a_model_that_learned():
  assert verdict({'a': True, 'b': True}, True, True) == 'holds'
  assert verdict({'a': True, 'b': False}, True, True) == 'fails'
  assert verdict({'a': True, 'b': False}, False, True) == 'not supported at this scale'
  assert verdict({'a': True, 'b': True}, False, True) == 'not supported at this scale', 'nothing was learned'
  assert verdict({'a': True, 'b': True}, True, False) == 'fails', 'a control that did not fail'


FOUND = {'tanh RNN': [1.0, 0.2, 0.1], 'LSTM': [1.0, 0.4, 0.1], 'CNN': [1.0, 0.99, 0.13],
         'dilated CNN': [1.0, 1.0, 1.0], 'Transformer': [1.0, 1.0, 0.97]}


@pytest.mark.parametrize('change, expected', [
    ({}, 'holds'),
    ({'Transformer': [1.0, 1.0, 0.9]}, 'fails'),
    ({'tanh RNN': [1.0, 1.0, 1.0]}, 'fails'),
    ({'LSTM': [1.0, 1.0, 1.0]}, 'fails'),
    ({'CNN': [1.0, 0.99, 0.4]}, 'fails'),
    ({'CNN': [1.0, 0.9, 0.13]}, 'not supported at this scale'),
    ({'tanh RNN': [0.2, 0.1, 0.1]}, 'not supported at this scale'),
], ids=str)
def test_each_condition_of_recall_counts(change, expected):
  accuracy, distances = {**FOUND, **change}, (1, 8, 128)
  half = {name: half_distance(distances, values, 0.125) for name, values in accuracy.items()}
  conditions, trainable = _recall_conditions(accuracy, half, distances, field=15, chance=0.125, error=0.01)
  assert verdict(conditions, trainable, True) == expected


# -- cost -------------------------------------------------------------------------------------------------------------


def test_flops_and_chain_of_products_convolutions_and_loops():
  x, w = jnp.zeros((5, 3)), jnp.zeros((3, 3))
  assert cost(lambda x, w: x @ w, x, w) == (2 * 5 * 3 * 3, 1)
  assert cost(lambda x, w: (x @ w) + jnp.tanh(x) @ w, x, w) == (2 * 90, 1), 'side by side'
  assert cost(lambda x, w: jax.nn.relu(x @ w) @ w, x, w) == (2 * 90, 2), 'one after the other'

  def loop(x, w):
    def one(h, x):
      h = jnp.tanh(h @ w + x @ w)
      return h, h @ w  # an output that nothing waits for
    return jax.lax.scan(one, jnp.zeros(3), x)

  assert cost(loop, x, w) == (5 * 3 * 18, 6)
  kernel = jnp.zeros((2, 3, 4))

  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC'))

  assert cost(convolve, x[None], kernel) == (2 * 4 * 4 * 2 * 3, 1)
  with pytest.raises(ValueError, match='while loop'):
    cost(lambda x: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x + 1, x), x)


def test_flops_agree_with_xla_where_there_is_no_loop():
  def product(x, w):
    return x @ w @ w

  x, w = jnp.zeros((64, 32)), jnp.zeros((32, 32))
  assert cost(product, x, w).flops == pytest.approx(loop_free_flops(product, x, w), rel=0.01)


def test_attention_costs_the_square_of_the_length_and_an_rnn_waits():
  result = cost_by_length((128, 256, 512), width=4)
  assert result.verdict == 'holds', result.measured['conditions']
  assert result.measured['flops']['tanh RNN'][0] == 128 * 2 * (3 * 4 * 4 + 4 * 16), 'input, state, readout, vocabulary'
  assert result.measured['sequential_operations']['tanh RNN'][0] == 128 + 2, 'states, readout, vocabulary'


def test_a_power_law_gives_its_exponent():
  assert power([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_found(tmp_path, monkeypatch, capsys):
  pytest.importorskip('matplotlib')
  monkeypatch.setitem(CLAIMS, 'E7b', dataclasses.replace(CLAIMS['E7b'], options=(('lengths', (4, 8)),)))
  claims(('E7b',), output=tmp_path)
  assert re.search(r'E7b: .*\n  holds ', capsys.readouterr().out)
  stored = json.loads((tmp_path / 'results.json').read_text())
  assert [each['name'] for each in stored] == ['E7b']
  assert stored[0]['verdict'] == 'holds' and stored[0]['measured']['path']['CNN'] == [2, 4]
  assert '| E7b | ' in (tmp_path / 'results.md').read_text()
  assert (tmp_path / 'E7b.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_what_has_learned_nothing_supports_nothing(tmp_path):
  """Four minutes of compilation. Three steps teach nothing, and the verdict must say so."""
  tiny = Scale(distances=(4, 16, 32), beyond=(48,), parameters=20_000, recall=Effort(3, 2), associative=Effort(3, 2),
               width=Effort(3, 2), widths=(8, 16), regular=Effort(3, 2), regular_length=8, seeds=1, rows=64)
  results = []
  for name in ('E7c copy', 'E7d', 'E7c width', 'E7c parity'):
    results.append(CLAIMS[name].run(tiny, 0))
    write(results, tmp_path)
    assert results[-1].verdict == 'not supported at this scale', name
  rows = (tmp_path / 'results.md').read_text().splitlines()
  assert all(len(re.findall(r'(?<!\\)\|', row)) == 6 for row in rows[:2 + len(results)])
