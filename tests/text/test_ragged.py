from __future__ import annotations

import json
import os

import numpy as np
import pytest

from tfm.config import TokenizerConfig
from tfm.special_ids import BOS, EOS, PAD
from tfm.text import ragged
from tfm.text.ragged import Ragged, encode_texts
from tfm.text.text_files import Texts
from tfm.text.tokenizer import Tokenizer, train_tokenizer

WORDS = ['the dog', 'jumps', 'über the dog', 'a dog; dogs', 'x']


def texts_of(words=WORDS, identity='one') -> Texts:
  return Texts(lambda: (iter([word[:3], word[3:]]) for word in words), identity, sum(map(len, words)))


@pytest.fixture(scope='module')
def tokenizer():
  return train_tokenizer(TokenizerConfig(kind='char', vocab_size=300), WORDS)


@pytest.fixture
def cache(monkeypatch, tmp_path):
  """Everything is too large for memory; gives the folder of the files."""
  monkeypatch.setattr(ragged, 'IN_MEMORY', 0)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  return tmp_path / 'tfm' / 'tokens'


def same(one: Ragged, other: Ragged) -> bool:
  return all(np.array_equal(a, b) for a, b in zip(one, other))


def test_sequences_lie_end_to_end_and_are_padded_on_the_right():
  found = Ragged.of([[5, 6, 7], [], [8]])
  assert found.ids.tolist() == [5, 6, 7, 8] and found.lengths.tolist() == [3, 0, 1]
  padded = found.pad(np.array([2, 0]), 3, 4)
  assert padded.tolist() == [[8, PAD, PAD, PAD], [5, 6, 7, PAD], [PAD] * 4] and padded.dtype == np.int32
  assert Ragged.of([]).lengths.tolist() == []


def test_texts_are_framed_and_encoded_like_whole_ones(tokenizer):
  found = encode_texts(tokenizer, texts_of(), [BOS], [EOS])
  assert same(found, Ragged.of([[BOS, *tokenizer.encode(word), EOS] for word in WORDS]))
  assert same(encode_texts(tokenizer, texts_of()), Ragged.of([tokenizer.encode(word) for word in WORDS]))
  assert len(encode_texts(tokenizer, texts_of([])).lengths) == 0


@pytest.mark.parametrize(('vocab_size', 'kind'), [(300, np.uint16), (2**16 + 1, np.uint32)])
def test_a_file_holds_the_same_as_memory(tokenizer, cache, monkeypatch, vocab_size, kind):
  monkeypatch.setattr(tokenizer, 'vocab_size', vocab_size)
  stored = encode_texts(tokenizer, texts_of(), [BOS], [EOS])
  monkeypatch.setattr(ragged, 'IN_MEMORY', 10**9)
  held = encode_texts(tokenizer, texts_of(), [BOS], [EOS])
  assert isinstance(stored.ids, np.memmap) and stored.ids.dtype == kind and held.ids.dtype == np.int32
  assert same(stored, held)
  rows = np.array([4, 0, 2])
  assert np.array_equal(stored.pad(rows, 4, 20), held.pad(rows, 4, 20)) and stored.pad(rows, 4, 20).dtype == np.int32


def test_the_file_is_made_once_for_the_same_texts_tokenizer_and_frame(tokenizer, cache, tmp_path):
  first = encode_texts(tokenizer, texts_of())
  assert len(os.listdir(cache)) == 2

  def must_not_read():
    yield from pytest.fail('the texts were read again')

  assert same(first, encode_texts(tokenizer, Texts(must_not_read, 'one', 99)))
  unigram = train_tokenizer(TokenizerConfig(kind='unigram', vocab_size=270), WORDS)
  content = json.loads(unigram.to_json())
  content['model']['model']['vocab'][-1][1] -= 9.0  # other ids for the same vocabulary
  (tmp_path / 'other.json').write_text(json.dumps(content))
  for files, (other, texts, frame) in enumerate([
      (tokenizer, texts_of(identity='two'), []), (tokenizer, texts_of(), [[BOS], []]),
      (train_tokenizer(TokenizerConfig(kind='char', vocab_size=300), ['other öä']), texts_of(), []),
      (train_tokenizer(TokenizerConfig(kind='word', vocab_size=300), WORDS), texts_of(), []),
      (unigram, texts_of(), []), (Tokenizer.load(tmp_path / 'other.json'), texts_of(), [])], start=2):
    encode_texts(other, texts, *frame)
    assert len(os.listdir(cache)) == 2 * files


def test_what_was_broken_off_is_made_anew(tokenizer, cache):
  def broken():
    yield iter(['the dog'])
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    encode_texts(tokenizer, Texts(broken, 'one', 99))
  assert os.listdir(cache) == []
  assert same(encode_texts(tokenizer, texts_of()), Ragged.of([tokenizer.encode(word) for word in WORDS]))
