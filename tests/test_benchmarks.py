"""The scripts of `benchmarks/` that set tfm beside its peers: their arithmetic, their clockwork, and that they run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'
NEEDS = {'limits': (), 'growth': (), 'data_pipeline': (), 'attention': ('torch',), 'accelerator': (),
         'training_step': ('torch', 'transformers'),
         'decoding': ('ctranslate2', 'torch', 'transformers'), 'start': ('ctranslate2', 'torch', 'transformers')}
"""Script -> the peers it runs."""


@pytest.fixture(name='script')
def _script(benchmark_script):
  return benchmark_script


@pytest.fixture
def allocator(script, monkeypatch):
  """That of the test's own process is left alone."""
  monkeypatch.setattr(script('tfm_step'), 'reuse_freed_memory', lambda: 'left alone')


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_a_summary_is_of_the_rounds_medians(script):
  found = script('side_by_side').summary([[1.0, 2.0, 9.0], [4.0], [3.0, 5.0]], {'tokens': 8, 'flops': 2})
  assert found == {'seconds': 4.0, 'range': [2.0, 4.0], 'rounds': 3, 'tokens_per_second': 2.0, 'flops_per_second': 0.5}


def test_a_ratio_above_1_is_faster_than_the_baseline(script):
  side = script('side_by_side')
  assert side.ratio([[1.0], [2.0], [4.0]], [[3.0], [4.0], [10.0]]) == {'ratio': 2.0, 'ratio_range': [2.0, 3.0]}
  assert side.ratio([[1.0, 5.0, 2.0]], [[2.0]]) == {'ratio': 1.0, 'ratio_range': [1.0, 1.0]}
  with pytest.raises(ValueError, match='shorter'):  # rounds belong together
    side.ratio([[1.0], [2.0]], [[1.0]])


def test_percentiles_are_calls_that_happened(script):
  calls = [[float(n) for n in range(100, 50, -1)], [float(n) for n in range(1, 51)]]
  assert script('side_by_side').percentiles(calls) == {'p50': 50.0, 'p90': 90.0, 'p99': 99.0}
  assert script('side_by_side').percentiles([[7.0]]) == {'p50': 7.0, 'p90': 7.0, 'p99': 7.0}


def test_exponents_of_power_laws_are_exact(script):
  growth, sizes = script('growth'), [128, 256, 512, 1024]
  assert growth.exponent(sizes, [3 * n**2 for n in sizes]) == pytest.approx(2, abs=1e-12)
  assert growth.exponent(sizes, [5.0] * 4) == pytest.approx(0, abs=1e-12)
  # Flat and then linear: the line through (0, 0), (1, 0), (2, 1) has slope 1/2, the last doubling 1.
  assert growth.fitted([1, 2, 4], [1, 1, 2]) == {'exponent': pytest.approx(0.5), 'last_exponent': pytest.approx(1)}


def test_doublings_put_seconds_beside_flops(script):
  assert script('growth').doublings([1, 2, 4], [1.0, 3.0, 3.0], [2.0, 4.0, 12.0]) == [
      {'from': 1, 'to': 2, 'seconds': 3.0, 'flops': 2.0}, {'from': 2, 'to': 4, 'seconds': 1.0, 'flops': 3.0}]


def test_figures_are_written_with_what_they_are_of(script, tmp_path):
  script('side_by_side').write(tmp_path / 'new' / 'file.json', rows=[{'seconds': 1.23456, 'rounds': 123456}])
  found = json.loads((tmp_path / 'new' / 'file.json').read_text())
  assert found['rows'] == [{'seconds': 1.235, 'rounds': 123456}]
  assert found['machine']['cores'] > 0 and {'tfm', 'jax', 'python'} <= set(found['versions'])
  assert found['command'].startswith('python ') and len(found['date']) == 10


# -- clockwork ---------------------------------------------------------------------------------------------------------


class Counted:
  """An engine whose calls take `seconds`, and which writes down its turns."""

  def __init__(self, name: str, seconds: float, turns: list):
    self.name, self.seconds, self.turns = name, seconds, turns

  def go(self, count: int) -> list[float]:
    self.turns.append((self.name, count))
    return [self.seconds] * count


def test_engines_take_turns_of_about_equal_time_and_another_begins_each_round(script, monkeypatch):
  side, turns = script('side_by_side'), []
  monkeypatch.setattr(side, 'PAUSE', 0)
  found = side.alternate({'a': Counted('a', 0.5, turns), 'b': Counted('b', 3.0, turns)}, rounds=2, turn=2.0)
  assert turns == [('a', 1), ('b', 1), ('a', 4), ('b', 1), ('b', 1), ('a', 4)]
  assert found == {'a': [[0.5] * 4] * 2, 'b': [[3.0]] * 2}


ENGINE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from side_by_side import each, serve
def prepare():
  print('what a library says'), os.system('echo and its children')
  return {'work': {'tokens': 3}}, each(lambda: print('more'))
serve(prepare)
"""


def test_an_engine_is_a_process_that_answers_and_ends(script):
  with script('side_by_side').running({'it': ['-c', ENGINE, str(BENCHMARKS)]}) as engines:
    assert engines['it'].facts == {'work': {'tokens': 3}}
    assert [len(engines['it'].go(count)) for count in (1, 3)] == [1, 3]
  assert engines['it'].process.returncode == 0


def test_an_engine_that_fails_is_named(script):
  with pytest.raises(RuntimeError, match='engine broken ended with code 3'):
    with script('side_by_side').running({'broken': ['-c', 'raise SystemExit(3)']}):
      pass


def test_limits_touch_every_byte(script):
  source, target = np.arange(1001.0), np.zeros(1001)
  assert len(script('limits')._in_parts(np.copyto, target, source)(2)) == 2
  np.testing.assert_array_equal(source, target)


def test_padding_of_a_batch_is_on_the_right_and_the_same_for_all(script):
  shape = script('shapes').SHAPES['small']
  dense, (source, target) = shape.batch(padded=False), shape.batch(padded=True)
  assert all((side > 3).all() for side in dense) and dense[1].shape == (4, 9)
  lengths = (source != 0).sum(1)
  assert (lengths >= 4).all() and len(set(lengths)) > 1 and ((target != 0).sum(1) == lengths + 1).all()
  for row, length in zip(source, lengths):
    assert row[:length].all() and not row[length:].any()


# -- the same computation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('padded', [False, True], ids=['dense', 'padded'])
def test_nn_transformer_with_our_weights_has_our_losses_step_by_step(script, allocator, tmp_path, padded):
  pytest.importorskip('torch', reason='the peer of the benchmark')
  step, shape = script('training_step'), script('shapes').SHAPES['small']
  step.write_weights(tmp_path, shape)
  ours, clock = step.prepare_tfm(shape, 0.0, padded, 3)
  theirs, _ = script('torch_step').prepare('torch', shape, 0.0, padded, tmp_path, None, 3)
  np.testing.assert_allclose(ours['losses'], theirs['losses'], atol=2e-5)
  assert ours['losses'][2] < ours['losses'][0] and len(clock(2)) == 1


def test_dropout_is_where_the_paper_has_it_unless_it_is_stock(script):
  torch = pytest.importorskip('torch', reason='the peer of the benchmark')
  shape = script('shapes').SHAPES['small']

  def rates(everywhere: bool) -> set[float]:
    model = script('torch_step').EncoderDecoder(shape, 0.1, everywhere)
    return {module.dropout for module in model.modules() if isinstance(module, torch.nn.MultiheadAttention)}

  assert (rates(False), rates(True)) == ({0.0}, {0.1})


def test_memory_is_that_of_the_weights_and_moments(script, allocator):
  rows = script('growth').measure('vocabulary', [64, 128], 1)
  # Parameters and Adam's two moments of 64 more rows of width 128, float32.
  assert rows[1]['state_bytes'] - rows[0]['state_bytes'] == 64 * 128 * 4 * 3
  assert all(row['temporary_bytes'] > 0 and row['seconds'] > 0 for row in rows)


def test_bytes_of_decoding_are_those_of_the_weights(script, tmp_path):
  pytest.importorskip('ctranslate2', reason='the peer of the benchmark')
  D, F, V = 32, 64, 400
  attention, mlp, norm = 4 * (D * D + D), 2 * D * F + F + D, 2 * D
  keys_and_values = 2 * (D * D + D)  # of the source: made once
  assert script('decoding').write_models(tmp_path, small=True) == {
      'once': 4 * (attention + mlp + 2 * norm + keys_and_values),
      'each_token': 4 * (2 * attention - keys_and_values + mlp + 3 * norm + V * D)}


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_results_say(script):
  report = script('report')
  page = report.PAGE.read_text()
  assert report.filled(page) == page, 'run python benchmarks/report.py'
  for name in report.TABLES:
    assert re.search(rf'<!-- {name}', page), f'docs/speed.md has no table of {name}'
  with pytest.raises(ValueError, match='"weather"'):
    report.filled('<!-- weather -->\n<!-- end -->')


# -- the scripts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', NEEDS)
def test_every_script_says_how_it_is_called(script, name, monkeypatch, capsys):
  module = script(name)
  monkeypatch.setattr(sys, 'argv', [name, '--help'])
  with pytest.raises(SystemExit) as ended:
    module.main()
  assert ended.value.code == 0 and {'--small', '--output'} <= set(capsys.readouterr().out.split())
  assert f'python benchmarks/{name}.py' in module.__doc__


@pytest.mark.slow  # a minute or two each on a free machine: up to a dozen processes that import and compile
@pytest.mark.parametrize('name', NEEDS)
def test_every_script_runs_in_small(name, tmp_path):
  for peer in NEEDS[name]:
    pytest.importorskip(peer, reason='a peer of the benchmark')
  output = tmp_path / 'found.json'
  done = subprocess.run([sys.executable, str(BENCHMARKS / f'{name}.py'), '--small', '--output', str(output)],
                        capture_output=True, text=True, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
  assert done.returncode == 0, done.stderr[-3000:]
  rows = json.loads(output.read_text())['rows']
  assert all(row['seconds'] > 0 for row in rows)
  if name == 'training_step':
    dense = [row for row in rows if row['shape'] == 'small' and row['dropout'] == 0]
    assert {row['engine'] for row in dense} == {'tfm', 'torch', 'marian'}
    assert max(abs(row['losses'][2] - dense[0]['losses'][2]) for row in dense) < 2e-3  # of four digits
  if name == 'decoding':
    assert len(rows) == 12 and all(row['same_as_tfm'] == 1 for row in rows if 'int8' not in row['engine'])
