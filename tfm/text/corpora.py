"""Corpora: where texts come from. Parallel files here; numbers in words and files of one language beside."""

from __future__ import annotations

import codecs
import gzip
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from tfm.config import DataConfig
from tfm.errors import DataError as DataError
from tfm.text.numbers import Numbers
from tfm.text.text_files import HuggingFaceTexts, TextFiles, Texts, find_file, not_intact, similar_names

Pair = tuple[str, str]


class FiniteCorpus(Protocol):
  """A corpus with a fixed list of training pairs; an epoch goes through all of them once."""

  endless: Literal[False]

  def train(self) -> list[Pair] | Texts:
    """All training pairs, in their own order; of one language, its texts."""

  def validation(self) -> list[Pair] | Texts:
    """What to choose the model by."""

  def test(self) -> list[Pair] | Texts | None:
    """For the final figure; None where there is nothing."""

  def tokenizer_texts(self) -> Iterable[tuple[str, ...]]:
    """What tokenizers are trained on: always the same, from training data alone."""

  def describe(self) -> str:
    """One phrase for reports."""


class EndlessCorpus(Protocol):
  """A corpus whose training pairs are drawn; the other methods are those of `FiniteCorpus`."""

  endless: Literal[True]

  def draw(self, rng: np.random.Generator, count: int) -> list[Pair]:
    """`count` training pairs, from `rng` alone."""

  def validation(self) -> list[Pair]: ...

  def test(self) -> list[Pair] | None: ...

  def tokenizer_texts(self) -> list[Pair]: ...

  def describe(self) -> str: ...


Corpus = FiniteCorpus | EndlessCorpus


def build_corpus(config: DataConfig) -> Corpus:
  """The corpus of `config`; raises `ConfigError` or `DataError`."""
  kinds = {'numbers': Numbers, 'files': ParallelFiles, 'text': TextFiles, 'huggingface': HuggingFaceTexts}
  return kinds[config.corpus](config)


class ParallelFiles:
  """Parallel text: line i of ROOT/train.de and line i of ROOT/train.en are a pair; plain or .gz.

  All files are read and checked when the corpus is built, so that a bad line in the test set shows before training.

  Raises:
    DataError: a file is missing, is not intact, has an empty line or not as many lines as its partner.
  """

  endless: Literal[False] = False

  def __init__(self, config: DataConfig):
    if config.root is None or config.train is None or config.validation is None:
      raise DataError("data.corpus='files' needs data.root, data.train and data.validation.")
    root, languages = Path(config.root), (config.source, config.target)
    self._train = _read_pairs(root, config.train, *languages)
    self._validation = _read_pairs(root, config.validation, *languages)
    self._test = None if config.test is None else _read_pairs(root, config.test, *languages)
    self._name = f'{root / config.train}, {config.source} to {config.target}'

  def train(self) -> list[Pair]:
    return self._train

  def validation(self) -> list[Pair]:
    return self._validation

  def test(self) -> list[Pair] | None:
    return self._test

  def tokenizer_texts(self) -> list[Pair]:
    return self._train

  def describe(self) -> str:
    test = 'no test set' if self._test is None else f'{len(self._test):,} for the test'
    return f'{self._name}; {len(self._train):,} pairs, {len(self._validation):,} for validation, {test}'


def read_lines(path: str | os.PathLike) -> list[str]:
  """The lines of a UTF-8 file, plain or .gz, without their line ends.

  Only LF ends a line and a CR before it goes; other separators of Unicode are text, so that both sides of a corpus
  are counted as `wc -l` counts them. A byte order mark at the start of the file is left out.

  Raises:
    DataError: missing file, damaged gzip, or bytes that are not UTF-8.
  """
  path = Path(path)
  try:
    data = path.read_bytes()
    if path.suffix == '.gz':
      data = gzip.decompress(data)
  except FileNotFoundError:
    raise DataError(f'there is no file {path}{similar_names(path.parent, path.name)}') from None
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise not_intact(path, error) from error
  except OSError as error:
    raise DataError(f'{path} cannot be read: {error.strerror}.') from error
  data = data.removeprefix(codecs.BOM_UTF8)
  try:
    text = data.decode('utf-8')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    byte = error.start - data.rfind(b'\n', 0, error.start)
    raise DataError(f'{path}, line {line:,}: byte {byte} (0x{data[error.start]:02x}) is not UTF-8; convert the file, '
                    'for example with `iconv -t utf-8`.') from None
  lines = text.split('\n')
  if not lines[-1]:
    lines.pop()
  return [line.removesuffix('\r') for line in lines]


def _read_pairs(root: Path, stem: str, source: str, target: str) -> list[Pair]:
  paths = [find_file(root, f'{stem}.{language}') for language in (source, target)]
  sides = [read_lines(path) for path in paths]
  if len(sides[0]) != len(sides[1]):
    raise DataError(f'{paths[0]} has {len(sides[0]):,} lines, {paths[1].name} {len(sides[1]):,}; line i of one must '
                    'translate line i of the other.')
  for path, lines in zip(paths, sides):
    if not lines:
      raise DataError(f'{path} has no lines; give at least one sentence.')
    for number, line in enumerate(lines, start=1):
      if not line.strip():
        raise DataError(f'{path}, line {number:,} is empty; remove that line from both files of the pair.')
  return list(zip(*sides))
