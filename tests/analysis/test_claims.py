"""The claims that need no training hold over five seeds, with controls that fail; the others are run with -m slow."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tfm.analysis.claims import CLAIMS
from tfm.analysis.mixing import shift_error, spread
from tfm.analysis.rank_collapse import rate
from tfm.analysis.report import as_json, read, write
from tfm.analysis.result import Result
from tfm.errors import UserError


# Two minutes for E8, which trains ten small models, one for the other two, which test_long_range.py has in small.
@pytest.mark.parametrize('name', ['E1', 'E3', 'E4', 'E5', 'E7e', 'E9', 'E14', *(
    pytest.param(name, marks=pytest.mark.slow) for name in ('E8', 'E7a', 'E7b'))])
def test_it_holds_over_five_seeds(name, tmp_path):
  result = CLAIMS[name].run()
  print(f'\n{result.name}: {result.verdict}\n  ' + '\n  '.join(f'{key}: {value}' for key, value in
                                                               result.measured.items()))
  assert result.verdict == 'holds', result.measured
  assert result.name == name and result.control and result.criterion
  pytest.importorskip('matplotlib')
  write([result], tmp_path)
  assert json.loads((tmp_path / 'results.json').read_text())[0]['verdict'] == 'holds'
  assert f'![{name}]({name}.png)' in (tmp_path / 'results.md').read_text()


def test_every_claim_can_be_imported_and_says_what_it_is():
  from importlib import import_module
  for name, claim in CLAIMS.items():
    module, _, function = claim.where.partition('.')
    assert callable(getattr(import_module(f'tfm.analysis.{module}'), function)), name
    assert claim.says


def test_a_scale_that_changes_nothing_is_refused():
  with pytest.raises(ValueError, match='the same at every scale'):
    CLAIMS['E4'].run(scale='accel')


def test_results_become_json():
  result = Result('E0', 'c', 'k', {'a': np.arange(2), 'b': {1: (np.float32(0.5), True)}}, 'holds', 'none')
  assert json.loads(json.dumps(as_json(result)))['measured'] == {'a': [0, 1], 'b': {'1': [0.5, True]}}


def test_a_folder_keeps_what_other_experiments_found(tmp_path):
  results = {name: Result(name, 'c', 'k', {}, 'holds', 'none') for name in ('E10', 'E2', 'E7c copy')}
  write([results['E10'], results['E2']], tmp_path)
  write([results['E7c copy'], replace(results['E2'], verdict='fails')], tmp_path)
  assert [(each.name, each.verdict) for each in read(tmp_path)] == [
      ('E2', 'fails'), ('E7c copy', 'holds'), ('E10', 'holds')]
  assert (tmp_path / 'results.md').read_text().count('| c |') == 3
  (tmp_path / 'results.json').write_text('[{"other": 1}]')
  with pytest.raises(UserError, match='is not what an earlier run wrote'):
    read(tmp_path)


def test_the_rate_of_a_doubly_exponential_curve_is_its_base():
  assert abs(rate(np.exp(-3.0**np.arange(5))) - 3) < 1e-12
  assert abs(rate(0.4 * 0.9**np.arange(20)) - 1) < 0.12
  assert np.isnan(rate(np.ones(9)))


def test_the_spread_of_one_operator_is_zero_and_of_two_opposites_their_distance():
  one = np.random.default_rng(0).normal(size=(1, 3, 3))
  assert spread(one.repeat(4, axis=0)) < 1e-15
  assert abs(spread(np.stack([3 * np.eye(2), np.eye(2)])) - 0.5) < 1e-12
  assert shift_error('circular', 8, 4, 0) < 1e-5 < 0.1 < shift_error('zero', 8, 4, 0)
