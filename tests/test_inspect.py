"""`tfm inspect`: the page of a run, and what is refused before the work."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import tfm
from tfm import cli
from tfm.analysis.inspection import inspect_page


@pytest.fixture
def inspect(monkeypatch, capsys):
  """`inspect(run, text, ...)`: what the program prints, or the sentence with which it ends."""

  def run(*arguments) -> str:
    monkeypatch.setattr(sys, 'argv', ['tfm', 'inspect', *map(str, arguments)])
    monkeypatch.setattr('tfm.training.compilation_cache.use_compilation_cache', lambda: None)
    capsys.readouterr()
    try:
      cli.main()
    except SystemExit as ended:
      return str(ended.code)
    return capsys.readouterr().out

  return run


def payload(path: Path) -> dict:
  return json.loads(re.search(r'id="payload">(.*?)</script>', path.read_text(encoding='utf-8'), re.DOTALL)[1])


def test_a_translator_shows_what_it_writes(inspect, numbers_run, tmp_path):
  path = tmp_path / 'page.html'
  assert inspect(numbers_run, 'forty-two', '--output', path) == f'{path}\n'
  found, run = payload(path), tfm.load(numbers_run)
  translation, = run.translate(['forty-two'])
  assert found['title'] == f'forty-two → {translation.text}'
  assert [each['name'] for each in found['attentions']] == ['Encoder', 'Decoder', 'Cross']
  assert found['attentions'][2]['keys'] == translation.source_tokens
  assert found['lens']['rows'] == ['layer 1'] and found['alignment']['attention'] == 'Cross'
  assert path.read_text(encoding='utf-8') == inspect_page(run, 'forty-two').html


def test_a_translator_shows_a_translation_that_is_given(inspect, numbers_run, tmp_path):
  path = tmp_path / 'page.html'
  inspect(numbers_run, 'forty-two', '--output', path, '--target', 'sechs', '--top-k', '2', '--step', '20')
  found = payload(path)
  assert found['title'] == 'forty-two → sechs'
  assert found['lens']['read'] == ['<s>', *'sechs'] and found['lens']['expected'] == [*'sechs', '</s>']
  assert {len(cell) for row in found['lens']['tokens'] for cell in row} == {2}


def test_a_language_model_shows_its_text(inspect, letters_run, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert inspect(letters_run, 'cdefg') == 'attention.html\n'
  found = payload(tmp_path / 'attention.html')
  assert [each['name'] for each in found['attentions']] == ['Decoder'] and found['alignment'] is None
  assert ''.join(found['lens']['read']).endswith('cdefg')
  assert 'leave it out' in inspect(letters_run, 'cde', '--target', 'f')


@pytest.mark.parametrize('arguments, sentence', [
    (['six', '--output', '.'], r'error: --output \. is a folder; give the name of a file in it\.'),
    (['six', '--output', 'missing/page.html'], r'error: There is no folder missing for --output missing/page\.html'),
    ([' '], 'error: The text is empty'),
])
def test_what_cannot_be_written_is_refused_before_a_run_is_opened(arguments, sentence, inspect, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('tfm.pipeline.load', None)
  assert re.match(sentence, inspect('run', *arguments))
  assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run_is_one_sentence(inspect, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert re.match(r'error: There is no folder \S*missing; give the folder', inspect('missing', 'six'))
