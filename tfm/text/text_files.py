"""Corpora of one language: text files, or a data set of Hugging Face. Texts are read one after another, never all."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tfm.config import DataConfig
from tfm.errors import DataError

SAMPLE_BYTES = 64 * 2**20
"""How much of the training text a tokenizer is learned from, from the beginning on."""

PIECE_BYTES = 2**20
"""A text that is a whole file is read in pieces of about so much, cut at line ends."""


@dataclass(frozen=True)
class Texts:
  """Texts that can be gone through again and again."""

  pieces: Callable[[], Iterator[Iterator[str]]]
  """Starts anew at each call: the texts, each as an iterator of its pieces."""
  identity: str
  """Changes when the texts do."""
  size: int
  """About how many bytes they have."""

  def __iter__(self) -> Iterator[str]:
    return (''.join(pieces) for pieces in self.pieces())


class TextFiles:
  """Text files, plain or .gz: a text for each line that is not blank, or the whole file as one.

  Raises:
    DataError: a file is missing or has no text. (What is not UTF-8 shows when it is read: when ids are made of it,
      before training begins.)
  """

  endless: Literal[False] = False

  def __init__(self, config: DataConfig):
    self._config, root = config, Path(config.root or '.')
    self._path = _find(root, config.train)
    size = _size(self._path)
    # Of the bytes, and then back to a line's end, as the text is read: nothing is decoded to find the place.
    cut = None if config.validation_fraction is None else int(size * (1 - config.validation_fraction))
    self._train = self._texts(self._path, 0, cut)
    self._validation = (self._texts(self._path, cut, None) if config.validation is None else
                        self._texts(_find(root, config.validation), 0, None))
    self._test = None if config.test is None else self._texts(_find(root, config.test), 0, None)
    for name, texts in (('training', self._train), ('validation', self._validation), ('test', self._test)):
      if texts is not None and next(texts.pieces(), None) is None:
        raise DataError(f'{self._path.parent} has no text for the {name} set; give at least one line.')

  def train(self) -> Texts:
    return self._train

  def validation(self) -> Texts:
    return self._validation

  def test(self) -> Texts | None:
    return self._test

  def tokenizer_texts(self) -> Iterator[tuple[str]]:
    return _sample(self._train)

  def describe(self) -> str:
    part = self._config.validation_fraction
    held_out = 'its last part' if part else self._config.validation
    return f'{self._path}, about {self._train.size:,} bytes; validation on {held_out}'

  def _texts(self, path: Path, start: int, stop: int | None) -> Texts:
    stat = path.stat()
    identity = f'{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {start} {stop} {self._config.documents}'
    size = (_size(path) if stop is None else stop) - start

    def pieces() -> Iterator[Iterator[str]]:
      if self._config.documents == 'line':
        return (iter([line]) for line in _lines(path, start, stop) if line.strip())
      whole = _joined(_lines(path, start, stop, ends=True))
      first = next(whole, None)
      return iter(()) if first is None else iter([itertools.chain([first], whole)])

    return Texts(pieces, identity, size)


class HuggingFaceTexts:
  """A column of a data set that the package `datasets` reads; its splits are named like files.

  Raises:
    ModuleNotFoundError: the package is not installed.
    DataError: there is no such split or column.
  """

  endless: Literal[False] = False

  def __init__(self, config: DataConfig):
    self._config = config
    splits = [self._split(name) for name in (config.train, config.validation)]
    self._train, self._validation = splits
    self._test = None if config.test is None else self._split(config.test)

  train, validation, test = TextFiles.train, TextFiles.validation, TextFiles.test
  tokenizer_texts = TextFiles.tokenizer_texts

  def describe(self) -> str:
    return f'{self._config.root}, {self._config.train}; validation on {self._config.validation}'

  def _split(self, name: str | None) -> Texts:
    try:
      import datasets
    except ModuleNotFoundError:
      raise ModuleNotFoundError("data.corpus='huggingface' needs the package datasets: pip install 'tfm[datasets]'"
                                ) from None
    root, column = self._config.root, self._config.column
    try:
      local = Path(root or '').is_dir()
      table = datasets.load_from_disk(root)[name] if local else datasets.load_dataset(root, split=name)
    except (ValueError, KeyError, FileNotFoundError) as error:
      raise DataError(f'The data set {root} has no split {name!r} that could be read ({error}).') from error
    if column not in table.column_names:
      raise DataError(f'{root} has no column {column!r}; data.column must be one of {", ".join(table.column_names)}.')

    def pieces() -> Iterator[Iterator[str]]:
      return (iter([row[column]]) for row in table if row[column].strip())

    identity = f'{root} {name} {column} {getattr(table, "_fingerprint", len(table))}'
    return Texts(pieces, identity, table.dataset_size or 0)


def _lines(path: Path, start: int, stop: int | None, ends: bool = False) -> Iterator[str]:
  """Lines whose first byte is in start ... stop - 1, decoded one by one, with their line ends or without."""
  with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file:
    place = 0
    for number, line in enumerate(file, 1):
      begin, place = place, place + len(line)
      if begin < start:
        continue
      if stop is not None and begin >= stop:
        return
      if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
      try:
        text = line.decode('utf-8')
      except UnicodeDecodeError as error:
        raise DataError(f'{path}, line {number:,}: byte {error.start + 1} is not UTF-8; convert the file, for example '
                        'with `iconv -t utf-8`.') from None
      yield text if ends else text.removesuffix('\n').removesuffix('\r')


def _joined(lines: Iterator[str]) -> Iterator[str]:
  piece: list[str] = []
  size = 0
  for line in lines:
    piece.append(line)
    size += len(line)
    if size >= PIECE_BYTES:
      yield ''.join(piece)
      piece, size = [], 0
  if piece:
    yield ''.join(piece)


def _sample(texts: Texts) -> Iterator[tuple[str]]:
  size = 0
  for pieces in texts.pieces():
    for piece in pieces:
      yield (piece,)
      size += len(piece)
      if size >= SAMPLE_BYTES:
        return


def _find(root: Path, name: str | None) -> Path:
  for path in (root / str(name), root / f'{name}.gz'):
    if path.is_file():
      return path
  raise DataError(f'there is no file {root / str(name)}, nor with .gz; set data.root and the name of the file.')


def _size(path: Path) -> int:
  """Bytes of the text; of a .gz file they are counted."""
  if path.suffix != '.gz':
    return path.stat().st_size
  with gzip.open(path, 'rb') as file:
    return sum(len(block) for block in iter(lambda: file.read(PIECE_BYTES), b''))


def fingerprint(*parts: str) -> str:
  return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:32]
