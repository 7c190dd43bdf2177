"""What a language model writes and scores does not depend on how it is cut into pieces, windows and batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import TransformerConfig
from tfm.generator import GenerationError, Generator
from tfm.models.build import build_model, initialize
from tfm.special_ids import SpecialIds
from tfm.text.tokenizer import Tokenizers

V = 40


class Letters:
  """One id for each letter, from 4 on."""

  def encode_batch(self, texts):
    return [[4 + ord(letter) - 97 for letter in text] for text in texts]

  def decode(self, ids):
    return ''.join(chr(97 + i - 4) if i >= 4 else '?' for i in ids)

  def tokens(self, ids):
    return [self.decode([i]) for i in ids]


def make(ends=(), prefix=(1,), **fields) -> Generator:
  config = TransformerConfig(**{**dict(encoder_layers=0, decoder_layers=2, d_model=16, d_ff=32, num_heads=2, norm='pre',
                                       positions='rope', dropout=0.0), **fields})
  model = build_model(config, V, V)
  # Far from uniform, so that greedy and sampled texts are not one letter over and over.
  params = jax.tree.map(lambda leaf: 3 * leaf, initialize(model, jax.random.key(1)))
  special = SpecialIds(ends=ends, forbidden=(0, 1, 2, 3, *range(30, V)), source_prefix=prefix, source_suffix=())
  return Generator(model, params, Tokenizers(Letters(), Letters()), special)


def by_hand(generator: Generator, prompt: str, count: int) -> str:
  """Greedy, the whole text read anew for every token."""
  ids = [*generator.special.source_prefix, *Letters().encode_batch([prompt])[0]]
  begin = len(ids)
  for _ in range(count):
    padded = np.zeros((1, 160), np.int32)
    padded[0, :len(ids)] = ids
    logits = generator.model.apply({'params': generator.params}, jnp.asarray(padded))[0, len(ids) - 1]
    logits = np.array(logits)
    logits[list(generator.special.forbidden)] = -np.inf
    ids.append(int(logits.argmax()))
  return Letters().decode(ids[begin:])


PROMPTS = ['a', 'hello', 'thequickbrownfoxjumpsoverthelazydogandthenitgoestosleep', '', 'zz']


@pytest.fixture(scope='module')
def generator() -> Generator:
  return make()


def test_greedy_is_the_most_probable_token_after_token(generator):
  found = generator.generate(PROMPTS[:3], max_new_tokens=37)
  assert [one.text for one in found] == [by_hand(generator, prompt, 37) for prompt in PROMPTS[:3]]
  assert all(len(one.tokens) == 37 and not one.finished for one in found)


@pytest.mark.parametrize('sampling', [{}, dict(sampling_temperature=0.8, sampling_topk=9, seed=5)], ids=str)
def test_a_text_depends_on_its_place_but_not_on_its_batch(generator, sampling):
  together = generator.generate(PROMPTS, max_new_tokens=20, **sampling)
  for rows in (1, 2):
    assert [one.text for one in generator.generate(PROMPTS, max_new_tokens=20, batch_rows=rows, **sampling)] == [
        one.text for one in together]
  short = generator.generate(PROMPTS, max_new_tokens=11, **sampling)
  assert [one.text for one in short] == [one.text[:11] for one in together]
  if sampling:
    assert len({one.text for one in generator.generate(['a'] * 4, max_new_tokens=20, **sampling)}) == 4
    assert generator.generate(['a'], max_new_tokens=20, sampling_temperature=0.8, seed=6)[0].text != together[0].text


@pytest.mark.parametrize('sampling', [{}, dict(sampling_temperature=1.0, seed=3)], ids=str)
def test_a_stream_is_the_same_text_in_pieces(generator, sampling):
  whole = generator.generate(['hello'], max_new_tokens=50, **sampling)[0].text
  pieces = list(generator.stream('hello', max_new_tokens=50, **sampling))
  assert ''.join(pieces) == whole and len(pieces) > 2
  stop = whole[23:26]
  assert ''.join(generator.stream('hello', max_new_tokens=50, stop=[stop], **sampling)) == whole[:whole.find(stop)]


def test_stop_strings_and_end_tokens_end_a_text(generator):
  whole = generator.generate(['hello'], max_new_tokens=50)[0]
  early, late = whole.text[5:8], whole.text[30:33]
  stopped = generator.generate(['hello'], max_new_tokens=50, stop=[late, early])[0]
  assert stopped.text == whole.text[:whole.text.find(early)] and stopped.finished
  end = Letters().encode_batch([whole.text[9]])[0][0]
  ended = make(ends=(end,)).generate(['hello'], max_new_tokens=50)[0]
  assert ended.text == whole.text[:whole.text.find(whole.text[9])] and ended.finished
  assert ended.tokens[-1] == whole.text[9]


def test_log_prob_is_the_score_of_what_was_written(generator):
  for one in generator.generate(PROMPTS[:3], max_new_tokens=20):
    both, prompt = generator.score([one.prompt + one.text, one.prompt])
    assert one.log_prob == pytest.approx(both.log_prob - prompt.log_prob, abs=1e-3)
    assert both.tokens == len(one.prompt) + 20
    assert both.perplexity == pytest.approx(np.exp(-both.log_prob / both.tokens))


def test_a_text_may_outgrow_a_table_of_positions(caplog):
  small = make(positions='learned', max_positions=64)
  large = make(positions='learned', max_positions=64)
  text = small.generate(['hello'], max_new_tokens=150)[0].text
  assert len(text) == 150 and text[:40] == large.generate(['hello'], max_new_tokens=40)[0].text
  # After it was full: as from the last 32 tokens alone.
  ids = [1, *Letters().encode_batch(['hello' + text])[0]]
  cut = make(positions='learned', max_positions=64, prefix=tuple(ids[32:65 - 1])).generate([''], max_new_tokens=10)
  assert text[58:68] == cut[0].text


def test_windows_of_a_score(generator):
  text = PROMPTS[2]
  whole, = generator.score([text])
  assert generator.score([text], window=64)[0] == whole
  first, = generator.score([text[:16]])
  windowed, = generator.score([text], window=16)
  assert windowed.tokens == whole.tokens and windowed.log_prob != whole.log_prob
  rest = make(prefix=()).score([text[8:]], window=16)[0].log_prob - make(prefix=()).score([text[8:16]])[0].log_prob
  assert windowed.log_prob == pytest.approx(first.log_prob + rest, abs=2e-3)


@pytest.mark.parametrize('arguments, sentence', [
    (dict(max_new_tokens=0), 'max_new_tokens is 0'), (dict(sampling_topk=3), 'need sampling_temperature'),
    (dict(sampling_temperature=0.0), 'sampling_temperature is 0.0'), (dict(stop='x'), 'stop is a list of strings'),
    (dict(stop=['']), 'stop is a list of strings'), (dict(batch_rows=0), 'batch_rows 0')])
def test_what_cannot_be_honoured_is_refused(generator, arguments, sentence):
  with pytest.raises(GenerationError, match=sentence):
    generator.generate(['a'], **arguments)


def test_prompts_are_checked(generator):
  with pytest.raises(GenerationError, match='a list of texts'):
    generator.generate('hello')
  with pytest.raises(GenerationError, match='Prompt 2 is empty'):
    make(prefix=()).generate(['a', ''])
  with pytest.raises(GenerationError, match='Text 1 has 1 tokens'):
    generator.score([''])
