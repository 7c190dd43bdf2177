"""What the experiment makes of the models' answers; the models are made up here, so that every figure is known."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from tfm.analysis.alignment_experiment import Readings, judge, measure, run
from tfm.analysis.alignment_report import draw, markdown, write_report
from tfm.errors import UserError
from tfm.text.synthetic_language import aligned_splits

SPLITS = aligned_splits(0, validation=40, test=150)
PAIRS = [*SPLITS['validation'], *SPLITS['test']]
LENGTHS = np.array([len(pair.source) for pair in PAIRS])
TOKENS = np.array([len(pair.target) + 1 for pair in PAIRS])


def gold_pattern(pair) -> np.ndarray:
  pattern_TxS = np.full((len(pair.target), len(pair.source)), 0.2 / (len(pair.source) - 1))
  for i, j in pair.links:
    pattern_TxS[j, i] = 0.8
  return pattern_TxS


def noise(pair, rng) -> np.ndarray:
  return rng.dirichlet(np.ones(len(pair.source)), size=len(pair.target))


def readings() -> dict[str, Readings]:
  """By input head 2 of layer 1 is gold; by output all is noise; a model without attention gets worse with length."""
  rng = np.random.default_rng(0)
  attention = {
      'input': [np.array([[noise(pair, rng), gold_pattern(pair)], [noise(pair, rng), noise(pair, rng)]])
                for pair in PAIRS],
      'output': [np.array([[noise(pair, rng), noise(pair, rng)]] * 2) for pair in PAIRS],
      'saliency': [noise(pair, rng)[None, None] for pair in PAIRS]}
  right = TOKENS - rng.integers(0, 2, len(PAIRS))
  falling = np.round(TOKENS * (1 - LENGTHS / 20)).astype(int)
  with_attention = Readings(right, TOKENS, attention, TOKENS // 2)
  return {'transformer': with_attention, 'gru with attention': with_attention,
          'fixed-vector lstm': Readings(falling, TOKENS, {'saliency': attention['saliency']}, None)}


@pytest.fixture(scope='module')
def measured() -> dict:
  found = measure(readings(), SPLITS['validation'], SPLITS['test'], seed=0)
  models = {name: {'parameters': 1000, 'accuracy': reading.of(40, None).accuracy}
            for name, reading in readings().items()}
  return {'scale': 'cpu', 'seed': 0, 'models': models, **found}


def test_the_head_is_chosen_by_validation_and_judged_on_the_test_set(measured):
  best = measured['attention']['transformer']['input']
  assert (best['layer'], best['head'], best['error']) == (1, 2, 0.0) and best['interval'] == [0.0, 0.0]
  assert np.array(best['table']).shape == (2, 3)
  assert measured['attention_correctness']['transformer']['input'] == pytest.approx(0.8)
  assert measured['attention']['transformer']['output']['error'] > 0.7
  spoiled = readings()['transformer']
  for pattern in spoiled.patterns['input'][:40]:
    pattern[0, 1] = 1 - pattern[0, 1]
  other = measure({**readings(), 'transformer': spoiled}, SPLITS['validation'], SPLITS['test'], 0)
  chosen = other['attention']['transformer']['input']
  assert (chosen['layer'], chosen['head']) != (1, 2) and chosen['error'] > 0.7, 'the test set must have no say'


def test_figures_are_those_that_were_put_in(measured):
  test = slice(40, None)
  assert measured['unweighted_mean']['transformer']['unweighted'] == pytest.approx(
      (TOKENS // 2)[test].sum() / TOKENS[test].sum())
  assert set(measured['unweighted_mean']) == {'transformer', 'gru with attention'}
  slope = measured['accuracy_slope']['fixed-vector lstm']
  assert slope['slope'] == pytest.approx(-0.05, abs=0.005) and slope['interval'][0] < slope['slope'] < slope[
      'interval'][1] < -0.04
  low, high = measured['accuracy_slope']['transformer']['interval']
  assert high - low < 0.02
  assert [n for n, _ in measured['accuracy_by_length']['transformer']] == sorted({*LENGTHS[test].tolist()})
  assert set(measured['controls']) == {'diagonal', 'uniform', 'shuffled rows'}
  assert all(0.5 < error < 1 for error in measured['controls'].values())
  assert measured['saliency']['fixed-vector lstm'] > 0.7


def test_measuring_is_reproducible(measured):
  assert measure(readings(), SPLITS['validation'], SPLITS['test'], 0).items() <= measured.items()


def test_the_verdict_follows_the_figures(measured):
  good = copy.deepcopy(measured)
  for name in ('transformer', 'gru with attention'):
    good['accuracy_slope'][name]['interval'] = [-0.001, 0.001]
  result = judge(good)
  assert result.verdict == 'holds' and all(result.measured['checks'].values())
  assert 'all above 0.5, as they must' in result.control

  def changed(*path, value):
    other = copy.deepcopy(good)
    inner = other
    for name in path[:-1]:
      inner = inner[name]
    inner[path[-1]] = value
    return judge(other).verdict

  assert changed('attention', 'transformer', 'input', 'error', value=0.11) == 'fails'
  assert changed('saliency', 'fixed-vector lstm', value=0.0) == 'fails'
  assert changed('controls', 'diagonal', value=0.51) == 'holds'
  assert changed('controls', 'shuffled rows', value=0.3) == 'not supported at this scale'
  assert changed('unweighted_mean', 'transformer', 'unweighted', value=0.9) == 'fails'
  assert changed('accuracy_slope', 'gru with attention', 'interval', value=[-0.02, -0.01]) == 'fails'
  assert changed('accuracy_slope', 'fixed-vector lstm', 'interval', value=[-0.02, 0.01]) == 'fails'
  assert changed('models', 'transformer', 'accuracy', value=0.8) == 'not supported at this scale'


def test_the_report_has_all_figures(measured, tmp_path):
  pytest.importorskip('matplotlib', reason="needs the extra 'plot'")
  result = judge(measured)
  write_report(result, tmp_path / 'report')
  content = json.loads((tmp_path / 'report' / 'results.json').read_text())
  assert content['measured'] == result.measured and content['verdict'] == result.verdict
  assert (tmp_path / 'report' / 'alignment.png').read_bytes().startswith(b'\x89PNG')
  text = (tmp_path / 'report' / 'results.md').read_text()
  assert text == markdown(result) and '| transformer, by input, layer 1 head 2 | 0.000 |' in text
  with pytest.raises(UserError, match='cannot be written to'):
    write_report(result, tmp_path / 'report' / 'results.md')


def test_the_figure_shows_every_head_and_every_model(measured):
  pytest.importorskip('matplotlib', reason="needs the extra 'plot'")
  figure = draw(measured)
  by_output, by_input, bars, lines = (axes for part in figure.subfigs for axes in part.axes
                                      if axes.get_label() != '<colorbar>')
  for axes, indexing in ((by_output, 'output'), (by_input, 'input')):
    np.testing.assert_array_equal(axes.images[0].get_array(), measured['attention']['transformer'][indexing]['table'])
    assert indexing in axes.get_title()
  assert len(bars.patches) == 4 + 3 + 3 and len(lines.lines) == 3


def test_an_unknown_scale_is_refused():
  with pytest.raises(ValueError, match="scale is 'huge'; choose one of 'cpu', 'accel'"):
    run('huge')
