"""`tfm evaluate` from Python; tests/test_cli.py has what a shell sees of translators."""

from __future__ import annotations

import pytest

import tfm
from tfm.errors import UserError
from tfm.evaluate import evaluate
from tfm.training.report import text_report
from tfm.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _no_cache_for_the_process(monkeypatch):
  monkeypatch.setattr('tfm.training.compilation_cache.use_compilation_cache', lambda: None)
  monkeypatch.setattr('tfm.training.report.describe_rows', lambda user, batch, shown: f'{shown} rows')


def test_language_models_are_reported_one_after_the_other(letters_run, capsys):
  config = RunFolder(letters_run).read_config()
  reports = [text_report(tfm.load(letters_run, step), config) for step in (None, 40)]
  assert 'nats a token' in reports[0] and reports[0] != reports[1]
  evaluate((str(letters_run),))
  assert capsys.readouterr().out == f'{letters_run}\n{reports[0]}\n'
  evaluate((str(letters_run), f'{letters_run}/'), step=40)
  assert capsys.readouterr().out == f'{letters_run}\n{reports[1]}\n{letters_run}/\n{reports[1]}\n'


def test_what_has_no_effect_on_a_language_model_is_refused(letters_run, tmp_path):
  for name in ('source', 'reference', 'output'):
    with pytest.raises(UserError, match=f'does not translate, so --{name} would have no effect'):
      evaluate((str(letters_run),), **{name: tmp_path / 'x'})
  with pytest.raises(UserError, match='so --beam-size and --length-penalty would have no effect; leave them out'):
    evaluate((str(letters_run),), beam_size=2, length_penalty=1.0)


def test_models_of_different_use_are_not_compared(letters_run, numbers_run):
  with pytest.raises(UserError, match='translates and cannot be compared with .*letters'):
    evaluate((str(letters_run), str(numbers_run)))
  with pytest.raises(UserError, match='does not translate and cannot be compared with .*numbers'):
    evaluate((str(numbers_run), str(letters_run)))
