"""The embedded corpus: numbers in words, in two languages, without end.

Spelling is that of `num2words`. It is a translation problem in small: German puts the units before the tens and
writes compounds, Japanese counts in ten-thousands, so the words of the two sides cross.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import num2words
import numpy as np

from tfm.config import ConfigError, DataConfig, nearest, require

if TYPE_CHECKING:
  from tfm.text.corpora import Pair

LARGEST_LIMIT = 10 ** 18
TOKENIZER_PAIRS = 10_000
TEMPERING = 0.4
HELD_OUT_SEED = 0x6E756D62
TOKENIZER_SEED = 0x746F6B65

# Languages in which, below a million, the words of 1000 h + l are the words of 1000 h and then what l > 0 adds to the
# words of 1000; a test compares them with num2words. Others are spelled by num2words number by number, slowly.
COMPOSED = frozenset(
  'az be bn ca ce cs cy de en en_IN en_NG eo es es_CO es_CR es_GT es_NI es_VE fa fi fr fr_BE fr_CH fr_DZ he id is it '
  'ja kn kz lt lv nl no pl pt pt_BR ro ru sk sl sr sv te tg th uk vi'.split())


class Speller:
  """Words of non-negative numbers in one language, exactly as num2words writes them.

  Raises:
    ConfigError: num2words does not offer the language, or not up to `limit - 1`.
  """

  def __init__(self, language: str, limit: int, name: str = 'language'):
    offered = num2words.CONVERTER_CLASSES
    require(language in offered, f"{name} '{language}' is no language of num2words{nearest(language, offered) or '.'} "
                                 f'It has {", ".join(sorted(offered))}.')
    self.language = language
    probes = {0, limit - 1} | {n for k in range(1, 19) for n in (10 ** k - 1, 10 ** k) if n < limit}
    for n in sorted(probes):
      try:
        num2words.num2words(n, lang=language)
      except (NotImplementedError, OverflowError, TypeError, ValueError, LookupError) as error:
        raise ConfigError(f"num2words cannot write {n:,} in '{language}' ({error}); lower data.limit to {n} or less, "
                          'or choose another language.') from error
    self._direct = lru_cache(maxsize=1 << 20)(self._spell)
    self._small: list[str] = []
    if language in COMPOSED:
      self._small = [self._spell(n) for n in range(min(limit, 1000))]
    if language in COMPOSED and limit > 1000:
      thousand = self._spell(1000)
      self._tails = [self._spell(1000 + n).removeprefix(thousand) for n in range(1000)]

  def __call__(self, n: int) -> str:
    if not self._small or n >= 1_000_000:
      return self._direct(n)
    if n < 1000:
      return self._small[n]
    tail = n % 1000
    return self._direct(n - tail) + self._tails[tail]

  def _spell(self, n: int) -> str:
    return num2words.num2words(n, lang=self.language)


class Numbers:
  """Pairs of number words; `draw` never gives one of the 2 x `held_out` numbers of `validation` and `test`.

  The held-out numbers are drawn uniformly from 0 ... limit - 1 and depend on `limit` and `held_out` alone. A training
  number is drawn in two steps: how many digits, in proportion to (count of such numbers) ** 0.4, then one of those.
  Drawn uniformly, nine of ten would be of the greatest length and the ten digits would hardly ever stand alone; so
  below a million 60 % have six digits, 24 % five, and 0.6 % one.
  """

  endless: Literal[True] = True

  def __init__(self, config: DataConfig):
    limit, held_out = config.limit, config.held_out
    if limit is None or held_out is None:
      raise ConfigError("data.corpus='numbers' needs data.limit and data.held_out.")
    require(limit <= LARGEST_LIMIT, f'data.limit is {limit:,}; give at most 10 ** 18.')
    self._name = (f'numbers in words, {config.source} to {config.target}, 0 to {limit - 1:,}; {held_out:,} held out '
                  f'for validation and {held_out:,} for the test')
    self._source = Speller(config.source, limit, 'data.source')
    self._target = Speller(config.target, limit, 'data.target')
    numbers = _held_out(limit, 2 * held_out)
    self._validation, self._test = numbers[:held_out], numbers[held_out:]
    self._excluded = np.sort(np.array(numbers, np.int64))
    # Lowest number of each length, and the limit; 0 has one digit.
    self._edges = np.array([0] + [10 ** k for k in range(1, 19) if 10 ** k < limit] + [limit], np.int64)
    weights = np.diff(self._edges).astype(np.float64) ** TEMPERING
    self._cumulative = np.cumsum(weights) / weights.sum()

  def draw_numbers(self, rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` training numbers, int64."""
    found = np.zeros(0, np.int64)
    while len(found) < count:
      digits = np.searchsorted(self._cumulative[:-1], rng.random(count), side='right')
      low, high = self._edges[digits], self._edges[digits + 1]
      numbers = rng.integers(low, high)
      place = np.searchsorted(self._excluded, numbers).clip(max=len(self._excluded) - 1)
      found = np.concatenate([found, numbers[self._excluded[place] != numbers]])
    return found[:count]

  def draw(self, rng: np.random.Generator, count: int) -> list[Pair]:
    """`count` training pairs."""
    return self._spell(self.draw_numbers(rng, count).tolist())

  def validation(self) -> list[Pair]:
    return self._spell(self._validation)

  def test(self) -> list[Pair]:
    return self._spell(self._test)

  def tokenizer_texts(self) -> list[Pair]:
    return self.draw(np.random.Generator(np.random.Philox(TOKENIZER_SEED)), TOKENIZER_PAIRS)

  def describe(self) -> str:
    return self._name

  def _spell(self, numbers: list[int]) -> list[Pair]:
    return [(self._source(n), self._target(n)) for n in numbers]


def _held_out(limit: int, count: int) -> list[int]:
  # Raw 64-bit words, because NumPy promises them for ever, which it does not for `choice` and its like: these
  # numbers must stay the same in every later version.
  bits = np.random.Philox(np.random.SeedSequence([HELD_OUT_SEED, limit, count]))
  numbers: dict[int, None] = {}
  while len(numbers) < count:
    numbers[int(bits.random_raw()) % limit] = None
  return list(numbers)
