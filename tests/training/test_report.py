from __future__ import annotations

import dataclasses
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import tfm
from tfm.config import DecodingConfig, TokenizerConfig
from tfm.special_ids import BOS, EOS
from tfm.text.buckets import Shape
from tfm.text.corpora import build_corpus
from tfm.text.language_batches import block_batches
from tfm.text.ragged import Ragged
from tfm.text.tokenizer import Tokenizers, train_tokenizer
from tfm.training import report
from tfm.training.run_folder import RunFolder

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


# -- texts of one language --------------------------------------------------------------------------------------------


def probability_by_hand(generator: tfm.Generator, texts: list[str]) -> tuple[float, int]:
  """nll in nats of the texts, their ends included, and how many tokens that is; every text alone."""
  nll = tokens = 0
  for text in texts:
    ids = np.array([[BOS, *generator.tokenizers.target.encode(text), EOS]])
    logits = np.asarray(generator.model.apply({'params': generator.params}, ids[:, :-1])[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll -= log_p[range(ids.shape[1] - 1), ids[0, 1:]].sum()
    tokens += ids.shape[1] - 1
  return nll, tokens


@pytest.mark.parametrize('packing', ['padded', 'packed'])
def test_figures_of_a_language_model_are_those_of_its_texts(letters_run, monkeypatch, packing):
  monkeypatch.setattr(report, 'describe_rows', lambda user, batch, shown: f'{shown} rows')
  generator, config = tfm.load(letters_run), RunFolder(letters_run).read_config()
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing))
  texts = list(build_corpus(config.data).validation())
  nll, tokens = probability_by_hand(generator, texts)
  size = sum(len(text) + 1 for text in texts)
  title, figures, rows = report.text_report(generator, config).splitlines()
  assert (title, rows) == ('Validation set, causal:', '2 rows')
  found = re.fullmatch(r'  nll (.*) nats a token, perplexity (.*), accuracy (.*) %, (.*) bits a byte', figures)
  assert [float(found[i]) for i in (1, 2, 4)] == pytest.approx(
      [nll / tokens, math.exp(nll / tokens), nll / size / math.log(2)], rel=2e-3)
  assert 50 < float(found[3]) <= 100


def test_bits_a_byte_do_not_depend_on_where_blocks_are_cut(letters_run):
  """Letters of several bytes may be cut too."""
  generator = tfm.load(letters_run)
  tokenizer = train_tokenizer(TokenizerConfig(kind='byte', vocab_size=None), [])
  generator.tokenizers = Tokenizers(tokenizer, tokenizer)
  text = 'äöü 数 x' * 9
  ids = np.array([tokenizer.encode(text)], np.int32)
  for length in (5, 7, 11):
    batches = block_batches(Ragged.of([ids[0]]), Shape(4, 0, length + 1))
    size = len(tokenizer.decode(ids[0, 1:].tolist()).encode())
    assert report.bits_a_byte(generator, 2.0, batches) == pytest.approx(2 * (ids.size - 1) / size / math.log(2))
