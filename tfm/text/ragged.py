"""Sequences of ids of different lengths, end to end in one array: in memory, or in a file where they are too many."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfm.special_ids import PAD
from tfm.text.text_files import Texts, fingerprint
from tfm.text.tokenizer import Tokenizer

IN_MEMORY = 256 * 2**20
"""Texts of more bytes than this have their ids in a file."""


class Ragged(NamedTuple):
  """Sequence i is ids[starts[i]:starts[i + 1]]."""

  ids: np.ndarray
  starts: np.ndarray

  @staticmethod
  def of(sequences: Sequence[Sequence[int]]) -> Ragged:
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])]).astype(np.int64)
    return Ragged(np.fromiter((i for ids in sequences for i in ids), np.int32, starts[-1]), starts)

  @property
  def lengths(self) -> np.ndarray:
    return np.diff(self.starts)

  def pad(self, rows: np.ndarray, height: int, width: int) -> np.ndarray:
    """The sequences `rows`, one under the other, filled up with PAD to (height, width)."""
    padded = np.full((height, width), PAD, np.int32)
    for place, row in enumerate(rows):
      sequence = self.ids[self.starts[row]:self.starts[row + 1]]
      padded[place, :len(sequence)] = sequence
    return padded


def encode_texts(tokenizer: Tokenizer, texts: Texts, before: Sequence[int] = (), after: Sequence[int] = ()) -> Ragged:
  """The ids of all texts, each between `before` and `after`.

  Large ones are kept in a file of the user's cache, which is made once for the same texts and tokenizer.
  """
  sequences = _sequences(tokenizer, texts, before, after)
  if texts.size <= IN_MEMORY:
    return _concatenated(sequences)
  key = fingerprint(texts.identity, tokenizer.to_json(), f'{before} {after}')
  home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
  return _stored(sequences, home / 'tfm' / 'tokens' / key, np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def made_of(texts: Ragged, sequences: Iterable[np.ndarray], name: str) -> Ragged:
  """Sequences that are parts of those of `texts`; in a file beside theirs, called by `name`, where they are in one."""
  if isinstance(texts.ids, np.memmap):
    file = Path(texts.ids.filename)
    return _stored(([ids] for ids in sequences), file.with_name(f'{file.stem}-{name}'), texts.ids.dtype.type)
  parts = list(sequences)
  return Ragged(np.concatenate(parts), np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64))


def _sequences(tokenizer, texts, before, after) -> Iterator[Iterator[list[int]]]:
  def parts(pieces: Iterator[str]) -> Iterator[list[int]]:
    yield list(before)
    yield from tokenizer.encode_pieces(pieces)
    yield list(after)

  return (parts(pieces) for pieces in texts.pieces())


def _concatenated(sequences: Iterable[Iterable[list[int]]]) -> Ragged:
  parts, starts = [], [0]
  for sequence in sequences:
    ids = np.fromiter((i for part in sequence for i in part), np.int32)
    parts.append(ids)
    starts.append(starts[-1] + len(ids))
  return Ragged(np.concatenate(parts) if parts else np.zeros(0, np.int32), np.array(starts, np.int64))


def _stored(sequences: Iterable[Iterable[list[int]]], stem: Path, kind: type) -> Ragged:
  """The same in two files, mapped into memory; the first one is whole when the second has its name."""
  ids_file, starts_file = files = stem.with_suffix('.ids'), stem.with_suffix('.starts')
  if not starts_file.exists():
    stem.parent.mkdir(parents=True, exist_ok=True)
    own = [file.with_suffix(f'{file.suffix}.{os.getpid()}') for file in files]  # another process may be at it too
    try:
      with open(own[0], 'wb') as ids, open(own[1], 'wb') as starts:
        total = np.zeros(1, np.int64)
        total.tofile(starts)
        for sequence in sequences:
          for part in sequence:
            np.array(part, kind).tofile(ids)
            total += len(part)
          total.tofile(starts)
      for file, name in zip(own, files):
        os.replace(file, name)
    finally:
      for file in own:
        file.unlink(missing_ok=True)
  return Ragged(np.memmap(ids_file, kind, 'r'), np.memmap(starts_file, np.int64, 'r'))
