from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import tfm
from tfm.config import DecodingConfig
from tfm.training import report

PAIRS = [('one hundred and one', 'ein hundert und eins'), ('two', 'zwei'), ('three', 'drei'), ('four', 'vier')]


class Dictionary:
  """Translates what it knows."""

  def __init__(self, entries: dict[str, str]):
    self.entries, self.decoding = entries, DecodingConfig(beam_size=3)

  def translate(self, sentences):
    return [SimpleNamespace(text=self.entries.get(sentence, '?')) for sentence in sentences]


def test_scores_all_pairs_and_shows_the_first():
  translator = Dictionary({**dict(PAIRS), 'two': 'zwölf', 'four': 'viel'})
  text = report.test_report(translator, PAIRS, shown=3)
  lines = text.splitlines()
  assert lines[0] == 'Test set, 4 sentences, beam 3:'
  assert lines[1].strip() == 'exact match 50.0 %'
  for metric in ('BLEU', 'chrF2'):
    (line,) = [line for line in lines if metric in line and 'version:' in line]  # with the signature
    assert '+-' in line
  shown = text[text.index('one hundred'):]
  assert shown == ('one hundred and one\n  -> ein hundert und eins\n'
                   'two\n  -> zwölf   (reference: zwei)\n'
                   'three\n  -> drei')


def test_bleu_is_left_out_where_it_cannot_be_counted():
  text = report.test_report(Dictionary(dict(PAIRS)), PAIRS[1:])
  assert 'no BLEU' in text and 'BLEU 0.00' not in text and 'exact match 100.0 %' in text and 'chrF2 100.00' in text


def test_without_matplotlib_it_says_how_to_install_it(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  path = tmp_path / 'attention.png'
  assert "pip install 'tfm[plot]'" in report.picture(Dictionary({}), 'two', path)
  assert not path.exists()


def test_draws_the_attention(numbers_run, tmp_path):
  pytest.importorskip('matplotlib', reason="needs matplotlib: pip install 'tfm[plot]'")
  path = tmp_path / 'attention.png'
  sentence = report.picture(tfm.load(numbers_run), 'forty-two', path)
  assert str(path) in sentence and 'forty-two' in sentence
  data = path.read_bytes()
  assert data.startswith(b'\x89PNG\r\n') and len(data) > 5000
