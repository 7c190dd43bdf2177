"""A language made up, with its translation and the exact word alignment of every pair.

Real corpora with gold alignments are small and are not free; here the links are known because the same derivation
writes both sides. A synchronous grammar (Aho & Ullman 1969; Chiang 2007) gives the source by its weights, as a
probabilistic context-free grammar, and the target by the order of each rule's right side. The target puts the verb's
first word second and its others last, fronts the adverb, sets adjectives, articles and prepositions behind the noun
and a modifying phrase before it; a source word becomes 0 to 3 target words. A source sentence has one derivation, so a
translator can be right always.

The language is the same for every seed; seeds choose sentences.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfm.errors import DataError

SHORTEST, LONGEST = 4, 14
"""Words of a source sentence."""

_PIECES = {'': slice(None), 'first': slice(1), 'rest': slice(1, None)}
_DRAW, _SPLIT = range(2)


class Rule(NamedTuple):
  """`weight` in proportion to its probability; `.first` and `.rest` are the target words of one source word."""

  weight: int
  source: str
  target: str


GRAMMAR: dict[str, tuple[Rule, ...]] = {
    'sentence': (Rule(3, 'clause', 'clause'),
                 Rule(1, 'clause addition', 'clause addition')),
    'addition': (Rule(1, 'conjunction clause', 'conjunction clause'),),
    'clause': (Rule(1, 'subject intransitive', 'subject intransitive'),
               Rule(1, 'subject adverb intransitive', 'adverb intransitive.first subject intransitive.rest'),
               Rule(4, 'subject transitive object', 'subject transitive.first object transitive.rest'),
               Rule(2, 'subject adverb transitive object',
                    'adverb transitive.first subject object transitive.rest')),
    'subject': (Rule(1, 'phrase', 'phrase'),),
    'object': (Rule(1, 'phrase', 'phrase'),),
    'phrase': (Rule(4, 'article nominal', 'nominal article'),
               Rule(1, 'article nominal modifier', 'modifier nominal article')),
    'nominal': (Rule(2, 'noun', 'noun'),
                Rule(1, 'adjective nominal', 'nominal adjective')),
    'modifier': (Rule(1, 'preposition phrase', 'phrase preposition'),),
}

_WEIGHTED = {symbol: [rule for rule in rules for _ in range(rule.weight)] for symbol, rules in GRAMMAR.items()}

FERTILITIES: dict[str, tuple[int, ...]] = {
    'article': (0, 1, 1, 1), 'noun': (1, 1, 1, 2) * 6, 'adjective': (1, 1, 2) * 4, 'transitive': (1, 2, 3) * 4,
    'intransitive': (1, 2) * 3, 'adverb': (1, 3, 1, 1, 1), 'preposition': (1, 0, 1, 1, 1), 'conjunction': (1, 1)}
"""Of every word of a class: how many words its translation has."""


class AlignedPair(NamedTuple):
  """A sentence, its translation, and the links (source word, target word), both counted from 0."""

  source: tuple[str, ...]
  target: tuple[str, ...]
  links: frozenset[tuple[int, int]]

  @property
  def texts(self) -> tuple[str, str]:
    return ' '.join(self.source), ' '.join(self.target)


def _word(number: int, ending: str) -> str:
  """A word of two syllables; different numbers below 3600 give different ones."""
  number = number * 1271 % 3600
  return ''.join('bdfgklmnprst'[n // 5] + 'aeiou'[n % 5] for n in divmod(number, 60)) + ending


def _make_lexicon() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
  classes, lexicon, shared = {}, {}, {}
  for name, fertilities in FERTILITIES.items():
    words = []
    for index, fertility in enumerate(fertilities):
      number = len(lexicon)
      # The last word of a translation is its own. Those before are shared within the class, so that they do not tell
      # what will follow: it has to be looked up in the source.
      before = [shared.setdefault((name, place, index % 2), _word(len(shared), 'n')) for place in range(fertility - 1)]
      words.append(_word(number, ''))
      lexicon[words[-1]] = (*before, *[_word(number, 's')] * (fertility > 0))
    classes[name] = tuple(words)
  return classes, lexicon


CLASSES, LEXICON = _make_lexicon()
"""The words of every class; the translation of every word."""


def aligned_pairs(seed: int, count: int) -> list[AlignedPair]:
  """`count` sentences as the grammar's weights give them, some of them more than once."""
  sentence = _sentences(seed, _DRAW)
  return [sentence() for _ in range(count)]


def aligned_splits(seed: int, **counts: int) -> dict[str, list[AlignedPair]]:
  """Sets of so many sentences each, all of them different: none of a test is seen in training.

  Short sentences, of which there are few, are therefore rarer than in `aligned_pairs`.
  """
  sentence, seen, splits = _sentences(seed, _SPLIT), set(), {}
  for name, count in counts.items():
    splits[name] = []
    while len(splits[name]) < count:
      pair = sentence()
      if pair.source not in seen:
        seen.add(pair.source)
        splits[name].append(pair)
  return splits


def write_corpus(folder: str | os.PathLike, splits: dict[str, list[AlignedPair]]) -> None:
  """Parallel files for `data.corpus='files'`: FOLDER/NAME.source, NAME.target, and NAME.links, a line of i-j each.

  Raises:
    DataError: the folder cannot be written to.
  """
  try:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, pairs in splits.items():
      sides = {'source': [' '.join(pair.source) for pair in pairs], 'target': [' '.join(pair.target) for pair in pairs],
               'links': [' '.join(f'{i}-{j}' for i, j in sorted(pair.links)) for pair in pairs]}
      for side, lines in sides.items():
        Path(folder, f'{name}.{side}').write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
  except OSError as error:
    raise DataError(f'{folder} cannot be written to: {error.strerror}.') from error


def _sentences(seed: int, purpose: int) -> Callable[[], AlignedPair]:
  # Raw words are promised to stay the same in every NumPy; what else a generator draws is not.
  bits = np.random.Philox(np.random.SeedSequence([seed % 2 ** 64, purpose]))

  words = (word for block in iter(lambda: bits.random_raw(1024).tolist(), None) for word in block)

  def below(count: int) -> int:
    return next(words) % count

  def sentence() -> AlignedPair:
    while True:
      source, target = _expand('sentence', below)
      if SHORTEST <= len(source) <= LONGEST:
        return AlignedPair(tuple(source), tuple(word for _, word in target),
                           frozenset((i, j) for j, (i, _) in enumerate(target)))

  return sentence


def _expand(symbol: str, below: Callable[[int], int]) -> tuple[list[str], list[tuple[int, str]]]:
  """Source words, and target words with the place of the source word that each comes from."""
  if symbol in CLASSES:
    words = CLASSES[symbol]
    word = words[below(len(words))]
    return [word], [(0, part) for part in LEXICON[word]]
  rules = _WEIGHTED[symbol]
  rule = rules[below(len(rules))]
  source, translated = [], {}
  for child in rule.source.split():
    words, parts = _expand(child, below)
    translated[child] = [(len(source) + place, word) for place, word in parts]
    source += words
  target = []
  for item in rule.target.split():
    child, _, piece = item.partition('.')
    target += translated[child][_PIECES[piece]]
  return source, target
