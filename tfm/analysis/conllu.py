"""Treebanks in CoNLL-U (universaldependencies.org/format.html), and what E10 asks of every word in them."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfm.errors import DataError

TASKS = {'word length': 'surface', 'position': 'surface', 'part of speech': 'syntactic', 'relation': 'syntactic',
         'distance of the head': 'syntactic', 'depth': 'syntactic', 'tense': 'semantic', 'number': 'semantic'}
"""Task -> its kind; tense and number are of the kind that Conneau et al. 2018 give them."""


class Word(NamedTuple):
  """A syntactic word."""

  form: str
  part_of_speech: str
  features: dict[str, str]
  """For example {'Number': 'Sing'}."""
  head: int
  """Its head counted from 1; 0 for the root."""
  relation: str
  """To its head, without the subtype."""


def parse(text: str, where: str = 'text') -> list[list[Word]]:
  """The sentences of a text.

  Tokens of several words (3-4) and empty nodes (8.1) are not words: their lines are passed over.

  Raises:
    DataError: a line has not ten columns, words are not counted 1, 2, ..., or a head is no word.
  """
  sentences: list[list[Word]] = [[]]
  for number, line in enumerate([*text.splitlines(), ''], 1):
    if not line.strip():
      if any(not 0 <= word.head <= len(sentences[-1]) for word in sentences[-1]):
        raise DataError(f'{where}: the sentence that ends in line {number - 1:,} has a head that is none of its words; '
                        'mend the file.')
      sentences.append([])
    elif not line.startswith('#'):
      columns = line.split('\t')
      if len(columns) != 10:
        raise DataError(f'{where}, line {number:,}: CoNLL-U has ten columns between tabs, not {len(columns)}; mend the '
                        'file.')
      index, form, _, part, _, features, head, relation, *_ = columns
      if not ('-' in index or '.' in index):
        if index != str(len(sentences[-1]) + 1) or not head.isdigit():
          raise DataError(f"{where}, line {number:,}: number '{index}', head '{head}'; words are counted 1, 2, ... and "
                          'have a number as head: mend the file.')
        pairs = dict(pair.split('=', 1) for pair in features.split('|')) if features != '_' else {}
        sentences[-1].append(Word(form, part, pairs, int(head), relation.split(':')[0]))
  return [sentence for sentence in sentences if sentence]


def read(path: Path) -> list[list[Word]]:
  """The sentences of a file in UTF-8, `.gz` or plain.

  Raises:
    DataError: there is no such file, or it is no CoNLL-U.
  """
  if not path.is_file():
    raise DataError(f'There is no treebank {path}; get it from universaldependencies.org, or set TFM_DATA to where '
                    'its folder is.')
  with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8') as file:
    return parse(file.read(), str(path))


def depths(sentence: Sequence[Word]) -> list[int]:
  """How many words stand between each word and the root, itself counted: 0 for the root."""
  def above(word: Word, seen: int) -> int:
    if seen > len(sentence):
      raise DataError(f"The heads of '{' '.join(word.form for word in sentence)}' go in a circle; mend the file.")
    return 0 if word.head == 0 else 1 + above(sentence[word.head - 1], seen + 1)

  return [above(word, 0) for word in sentence]


def labels(sentence: Sequence[Word]) -> dict[str, list[str | None]]:
  """The answer of each word to each task, None where it has none."""
  def bucket(value: int, edges: tuple[int, ...]) -> str:
    return f'{np.searchsorted(edges, value, side="right")}'

  away = [0 if word.head == 0 else word.head - place for place, word in enumerate(sentence, 1)]
  return {
      'word length': [bucket(len(word.form), (2, 3, 4, 5, 7)) for word in sentence],
      'position': [bucket(place, (2, 5, 9, 15)) for place in range(len(sentence))],
      'part of speech': [word.part_of_speech for word in sentence],
      'relation': [word.relation for word in sentence],
      'distance of the head': [bucket(distance, (-3, -1, 0, 1, 2, 4)) for distance in away],
      'depth': [bucket(depth, (1, 2, 3, 4)) for depth in depths(sentence)],
      'tense': [word.features.get('Tense') for word in sentence],
      'number': [word.features.get('Number') for word in sentence]}
