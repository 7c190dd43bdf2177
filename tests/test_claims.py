"""`tfm claims`: which experiments run, and what is refused before they do."""

from __future__ import annotations

import sys

import pytest

from tfm import cli
from tfm.analysis import claims
from tfm.analysis.result import Result


@pytest.fixture
def use(monkeypatch, tmp_path, capsys):
  """The command on experiments that are at once done; returns (names that ran, what was printed)."""
  ran = []

  class Quick(claims.Claim):

    def run(self, scale='cpu', seed=0):
      ran.append((self.says, scale, seed))
      return Result(self.says, 'a claim', 'a criterion', {}, 'holds', 'a control')

  monkeypatch.setattr(claims, 'CLAIMS', {
      'E1': Quick('E1', 'general_model.x'), 'E2': Quick('E2', 'a.b', trains=True),
      'E7c copy': Quick('E7c copy', 'long_range_recall.c', trains=True), 'E7c width': Quick('E7c width', 'a.d', True)})

  def run(*arguments):
    ran.clear()
    monkeypatch.setattr(sys, 'argv', ['tfm', 'claims', '--output', str(tmp_path / 'claims'), *arguments])
    try:
      cli.main()
    except SystemExit as ended:
      if ended.code:
        return [], str(ended.code)
    return list(ran), capsys.readouterr().out

  return run


def test_without_names_those_run_that_need_no_training(use, tmp_path):
  ran, out = use()
  assert ran == [('E1', 'cpu', 0)]
  assert 'E1: E1 ...\n  holds' in out and out.endswith('results.md\n')
  assert '| E1 | a claim | holds | a criterion | a control |' in (tmp_path / 'claims' / 'results.md').read_text()


def test_a_name_stands_for_all_that_begin_so(use):
  assert [each[0] for each in use('E7c', 'E2', '--seed', '3')[0]] == ['E7c copy', 'E7c width', 'E2']
  assert [each[0] for each in use('--all')[0]] == ['E1', 'E2', 'E7c copy', 'E7c width']
  assert use('E7c copy', '--scale', 'accel')[0] == [('E7c copy', 'accel', 0)]


@pytest.mark.parametrize('arguments, message', [
    (['E9'], "There is no experiment 'E9'"), (['E1', '--all'], 'give one of them'),
    (['E1', 'E7c copy', '--scale', 'accel'], 'E1 is the same at every scale')])
def test_bad_arguments_are_refused_before_anything_runs(use, arguments, message):
  ran, said = use(*arguments)
  assert not ran and message in said


def test_a_file_is_no_folder(use, tmp_path):
  (tmp_path / 'claims').write_text('')
  assert 'is a file; give a folder' in use()[1]
