import numpy as np
import pytest
from num2words import num2words

from tfm.config import ConfigError, DataConfig
from tfm.text import numbers as module
from tfm.text.numbers import Numbers, Speller


def generator(seed):
  return np.random.Generator(np.random.Philox(seed))


@pytest.fixture(scope='module')
def corpus():
  return Numbers(DataConfig())


def some_numbers(seed, count, limit=1_000_000):
  """Of all lengths, many of them round or just beside."""
  rng = generator(seed)
  numbers = rng.integers(0, (10 ** rng.integers(1, 7, count)).clip(max=limit))
  high, low = rng.integers(1, 120, count), rng.choice([0, 1, 2, 3, 10, 11, 21, 80, 99, 100, 101, 200, 999], count)
  return [int(n) for n in [0, 1, 999, 1000, 1001, limit - 1, *numbers, *(1000 * high + low)] if n < limit]


@pytest.mark.parametrize('language', sorted(module.COMPOSED))
def test_composed_words_are_those_of_num2words(language):
  spell = Speller(language, 1_000_000)
  for n in some_numbers(1, 40):
    assert spell(n) == num2words(n, lang=language), n


@pytest.mark.slow
@pytest.mark.parametrize('language', sorted(module.COMPOSED))
def test_composed_words_are_those_of_num2words_on_a_large_sample(language):
  spell = Speller(language, 1_000_000)
  for n in some_numbers(2, 5000):
    assert spell(n) == num2words(n, lang=language), n


@pytest.mark.parametrize('language', ['en', 'de'])
def test_default_languages_on_a_larger_sample(language):
  spell = Speller(language, 1_000_000)
  for n in some_numbers(3, 1500):
    assert spell(n) == num2words(n, lang=language), n


@pytest.mark.parametrize('language', ['da', 'ko', 'tr', 'en', 'de'])
def test_other_languages_and_great_numbers_are_spelled_directly(language):
  spell = Speller(language, 10 ** 10)
  for n in (0, 7, 97_107, 999_999, 1_000_000, 5_000_200, 9_999_999_999):
    assert spell(n) == num2words(n, lang=language)


def test_unknown_languages_and_too_great_limits_are_errors():
  with pytest.raises(ConfigError, match="data.target 'dee' is no language of num2words; did you mean 'de'"):
    Numbers(DataConfig(target='dee'))
  with pytest.raises(ConfigError, match=r"cannot write [0-9,]+ in 'te'.*lower data.limit to"):
    Numbers(DataConfig(target='te', limit=10 ** 12))
  with pytest.raises(ConfigError, match="in 'am'"):
    Numbers(DataConfig(target='am'))
  with pytest.raises(ConfigError, match='at most 10'):
    Numbers(DataConfig(limit=10 ** 19))


def test_held_out_numbers_are_never_drawn(corpus):
  held_out = set(corpus._validation) | set(corpus._test)
  assert len(corpus._validation) == len(corpus._test) == 1000 and len(held_out) == 2000
  for seed in range(3):
    drawn = corpus.draw_numbers(generator(seed), 300_000)
    assert held_out.isdisjoint(drawn.tolist())
    assert drawn.min() >= 0 and drawn.max() < 1_000_000
  texts = {source for source, _ in corpus.validation() + corpus.test()}
  assert texts.isdisjoint(source for source, _ in corpus.tokenizer_texts())


def test_everything_but_the_held_out_numbers_is_drawn():
  corpus = Numbers(DataConfig(limit=200, held_out=50))
  drawn = set(corpus.draw_numbers(generator(0), 20_000).tolist())
  assert drawn == set(range(200)) - set(corpus._validation) - set(corpus._test)


def test_held_out_numbers_depend_on_the_corpus_alone(corpus):
  again = Numbers(DataConfig(target='fr', tokens_per_batch=100, max_length=50))
  assert (again._validation, again._test) == (corpus._validation, corpus._test)
  assert [source for source, _ in again.test()] == [source for source, _ in corpus.test()]
  assert Numbers(DataConfig(limit=999_999))._test != corpus._test


def test_test_numbers_are_uniform(corpus):
  numbers = np.array(corpus._validation + corpus._test)
  counts, _ = np.histogram(numbers, bins=10, range=(0, 1_000_000))
  assert (np.abs(counts - 200) < 5 * 200 ** 0.5).all()


def test_short_numbers_are_present_and_long_ones_dominate(corpus):
  drawn = corpus.draw_numbers(generator(0), 100_000)
  shares = [((drawn >= low) & (drawn < high)).mean() for low, high in zip(corpus._edges, corpus._edges[1:])]
  assert shares == sorted(shares)
  assert 0.003 < shares[0] < 0.02 and 0.5 < shares[-1] < 0.7


@pytest.mark.parametrize('limit', [4, 10, 11, 1000, 1001, 123_457, 10 ** 12])
def test_any_limit(limit):
  corpus = Numbers(DataConfig(limit=limit, held_out=1))
  drawn = corpus.draw_numbers(generator(0), 500)
  assert len(drawn) == 500 and drawn.min() >= 0 and drawn.max() < limit
  if limit > 100:
    assert len(set(drawn.tolist())) > 40


def test_draws_depend_on_the_generator_alone(corpus):
  assert corpus.draw(generator(5), 100) == Numbers(DataConfig()).draw(generator(5), 100)
  assert corpus.draw(generator(5), 100) != corpus.draw(generator(6), 100)
  assert corpus.tokenizer_texts() == corpus.tokenizer_texts()


def test_description_names_languages_and_sizes(corpus):
  assert 'en to de' in corpus.describe() and '999,999' in corpus.describe() and '1,000' in corpus.describe()
