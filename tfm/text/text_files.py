"""Corpora of one language: text files, or a data set of Hugging Face. Texts are read one after another, never all."""

from __future__ import annotations

import codecs
import contextlib
import difflib
import gzip
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from tfm.config import DataConfig
from tfm.errors import DataError

SAMPLE = 64 * 2**20
"""How many characters of the training text a tokenizer is learned from, from the beginning on."""

PIECE = 2**20
"""A text that is a whole file is read in pieces of about so many characters, cut at line ends."""


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
    self._path = find_file(root, str(config.train))
    size = _size(self._path)
    # Of the bytes, and then on to a line's end, as the text is read: nothing is decoded to find the place.
    cut = size if config.validation_fraction is None else int(size * (1 - config.validation_fraction))
    self._train = self._texts(self._path, 0, cut)
    self._validation = (self._texts(self._path, cut, size) if config.validation is None else
                        self._whole(find_file(root, config.validation)))
    self._test = None if config.test is None else self._whole(find_file(root, config.test))
    _require_texts(config, self._train, self._validation, self._test)

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

  def _whole(self, path: Path) -> Texts:
    return self._texts(path, 0, _size(path))

  def _texts(self, path: Path, start: int, stop: int) -> Texts:
    stat = path.stat()
    identity = f'{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {start} {stop} {self._config.documents}'

    def pieces() -> Iterator[Iterator[str]]:
      if self._config.documents == 'line':
        return (iter([line]) for line in _lines(path, start, stop) if line.strip())
      whole = _joined(_lines(path, start, stop, ends=True))
      first = next(whole, None)
      return iter(()) if first is None else iter([itertools.chain([first], whole)])

    return Texts(pieces, identity, stop - start)


class HuggingFaceTexts:
  """A column of a data set that the package `datasets` reads; its splits are named like files.

  Raises:
    ModuleNotFoundError: the package is not installed.
    DataError: there is no such split or column, or no text in it.
  """

  endless: Literal[False] = False

  def __init__(self, config: DataConfig):
    self._config = config
    splits = [self._split(name) for name in (config.train, config.validation)]
    self._train, self._validation = splits
    self._test = None if config.test is None else self._split(config.test)
    _require_texts(config, self._train, self._validation, self._test)

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
      saved = Path(root or '', 'dataset_dict.json').exists()  # by `save_to_disk`; else a name, or a folder of files
      table = datasets.load_from_disk(root)[name] if saved else datasets.load_dataset(root, split=name)
    except (ValueError, KeyError, FileNotFoundError) as error:
      raise DataError(f'The data set {root} has no split {name!r} that could be read ({error}).') from error
    if column not in table.column_names:
      raise DataError(f'{root} has no column {column!r}; data.column must be one of {", ".join(table.column_names)}.')

    def pieces() -> Iterator[Iterator[str]]:
      return (iter([row[column]]) for row in table if (row[column] or '').strip())

    identity = f'{root} {name} {column} {getattr(table, "_fingerprint", len(table))}'
    return Texts(pieces, identity, table.data.nbytes)


def _require_texts(config: DataConfig, *sets: Texts | None) -> None:
  for name, texts in zip(('training', 'validation', 'test'), sets):
    if texts is not None and next(texts.pieces(), None) is None:
      raise DataError(f'{config.root} has no text for the {name} set; give at least one line that is not blank.')


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
  try:
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file:
      yield file
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise not_intact(path, error) from error


def _lines(path: Path, start: int, stop: int, ends: bool = False) -> Iterator[str]:
  """Lines whose first byte is in start ... stop - 1, decoded one by one, with their line ends or without."""
  with _opened(path) as file:
    place = 0
    for number, line in enumerate(file, 1):
      begin, place = place, place + len(line)
      if begin < start:
        continue
      if begin >= stop:
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
    if size >= PIECE:
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
      if size >= SAMPLE:
        return


def find_file(root: Path, name: str) -> Path:
  """ROOT/name or ROOT/name.gz; raises `DataError` where there is neither or both."""
  if not root.is_dir():
    raise DataError(f'data.root {root} is not a folder; set it to where {name} lies.')
  found = [path for path in (root / name, root / f'{name}.gz') if path.is_file()]
  if len(found) > 1:
    raise DataError(f'{root} has both {name} and {name}.gz; remove the one that is not meant.')
  if not found:
    raise DataError(f'{root} has neither {name} nor {name}.gz{similar_names(root, name)}')
  return found[0]


def similar_names(folder: Path, name: str) -> str:
  """The end of a sentence about a file that is not there."""
  names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
  close = difflib.get_close_matches(name, names, n=4, cutoff=0.4)
  return f'; similar names there: {", ".join(close)}.' if close else '; nothing there has a similar name.'


def not_intact(path: Path, error: Exception) -> DataError:
  return DataError(f'{path} is not an intact gzip file ({error}); fetch it again, or drop .gz from its name if it is '
                   'plain text.')


def _size(path: Path) -> int:
  """Bytes of the text; of a .gz file they are counted."""
  if path.suffix != '.gz':
    return path.stat().st_size
  with _opened(path) as file:
    return sum(len(block) for block in iter(lambda: file.read(PIECE), b''))


def fingerprint(*parts: str) -> str:
  return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:32]
