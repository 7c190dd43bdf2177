"""Batches whose rows are full; of a causal language model: blocks of a stream, or several texts packed together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tfm.config import DataConfig, require
from tfm.errors import DataError
from tfm.special_ids import PAD
from tfm.text.batches import of_over_long, permutation, require_process
from tfm.text.buckets import Shape
from tfm.text.masking import CausalBatch
from tfm.text.ragged import Ragged

_ORDER, _PHASE = range(2)


class FullBatches:
  """`batch_at(step)` is a pure function of (texts, data, seed, step); every process keeps a slice of the rows."""

  def __init__(self, data: DataConfig, seed: int, rows_multiple: int, process_index: int, process_count: int):
    require_process(process_index, process_count)
    multiple = math.lcm(rows_multiple, process_count)
    rows = data.tokens_per_batch // data.max_length // multiple * multiple
    require(rows > 0, f'data.tokens_per_batch {data.tokens_per_batch} does not hold {multiple} rows (devices x '
                      f'micro-batches) of {data.max_length} tokens; raise it to {multiple * data.max_length}.')
    self.shapes = [Shape(rows, 0, data.max_length + 1)]
    self._length, self._seed = data.max_length, seed
    self._process_index, self._process_count = process_index, process_count
    self._order: tuple[int, np.ndarray] | None = None

  def batch_at(self, step: int) -> tuple:
    """This process's rows of batch `step` (from 0); may be called from any thread, in any order."""
    epoch, place = divmod(step, self.steps_per_epoch)
    rows = self.shapes[0].rows
    height = rows // self._process_count
    start = place * rows + self._process_index * height
    return self._rows(self._epoch_order(epoch)[start:start + height], epoch, height)

  def _epoch_order(self, epoch: int) -> np.ndarray:
    order = self._order
    if order is None or order[0] != epoch:
      order = self._order = epoch, permutation(self._bits(epoch, _ORDER), self._count)
    return order[1]

  def _bits(self, epoch: int, purpose: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([self._seed % 2**64, epoch, purpose]))

  @property
  def steps_per_epoch(self) -> int:
    raise NotImplementedError

  @property
  def _count(self) -> int:
    """Rows in an epoch."""
    raise NotImplementedError

  def _rows(self, numbers: np.ndarray, epoch: int, height: int) -> tuple:
    raise NotImplementedError


class Blocks(FullBatches):
  """The ids of all texts in a row, cut into blocks of `data.max_length` labels.

  Where the first block begins is drawn anew in every epoch, and so is their order. Blocks that do not fill a batch are
  left out of the epoch.
  """

  def __init__(self, texts: Ragged, data: DataConfig, seed: int, rows_multiple: int = 1, process_index: int = 0,
               process_count: int = 1):
    super().__init__(data, seed, rows_multiple, process_index, process_count)
    self._ids = texts.ids
    if self.steps_per_epoch < 1:
      raise DataError(f'the training text has {len(self._ids):,} tokens, too few for one batch of '
                      f'{self.shapes[0].rows} blocks of {self._length}; give more text or lower data.tokens_per_batch.')

  @property
  def steps_per_epoch(self) -> int:
    return self._count // self.shapes[0].rows

  @property
  def _count(self) -> int:
    return max(len(self._ids) - self._length, 0) // self._length  # whatever the phase

  def _rows(self, numbers, epoch, height):
    phase = int(self._bits(epoch, _PHASE).random_raw() % self._length)
    starts = phase + numbers * self._length
    return CausalBatch(np.stack([self._ids[at:at + self._length + 1] for at in starts]).astype(np.int32), None)

  def report(self) -> str:
    return (f'{len(self._ids):,} tokens in {self._count:,} blocks of {self._length}, {self.steps_per_epoch:,} batches '
            f'of {self.shapes[0].rows} an epoch.')


class PackedRows(FullBatches):
  """Rows of `_packs`, each of which says by number what shares a row; the last batch may have empty rows."""

  _packs: Sequence[Sequence[int]]

  @property
  def steps_per_epoch(self) -> int:
    return -(-self._count // self.shapes[0].rows)

  @property
  def _count(self) -> int:
    return len(self._packs)


class Packed(PackedRows):
  """Rows of several texts, which do not see each other, so that hardly anything is padding.

  Which texts share a row is settled once (best fit, longest first); the order of the rows is drawn for every epoch.
  """

  def __init__(self, texts: Ragged, over_long: int, data: DataConfig, seed: int, rows_multiple: int = 1,
               process_index: int = 0, process_count: int = 1):
    super().__init__(data, seed, rows_multiple, process_index, process_count)
    self._texts, self._left_out = texts, of_over_long(over_long, 'texts', data)
    self._packs = pack(texts.lengths, self._length + 1)
    if not self._packs:
      raise DataError(f'no training text has at most data.max_length = {data.max_length} tokens; raise it.')

  def _rows(self, numbers, epoch, height):
    del epoch
    return packed_rows(self._texts, [self._packs[number] for number in numbers], height, self._length + 1)

  def report(self) -> str:
    tokens, rows = int(self._texts.lengths.sum()), self.steps_per_epoch * self.shapes[0].rows
    return (f'{len(self._texts.starts) - 1:,} texts and {tokens:,} tokens in {len(self._packs):,} rows, '
            f'{self.steps_per_epoch:,} batches of {self.shapes[0]} an epoch, '
            f'{1 - tokens / (rows * (self._length + 1)):.1%} padding; {self._left_out}.')


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
  """Numbers of the sequences that share a row of `room` tokens: longest first, each into the fullest row it fits."""
  open_rows: list[list[int]] = [[] for _ in range(room + 1)]  # by the room that is left
  is_open = 0  # bit n: there are rows with room for n more
  packs: list[list[int]] = []
  for number in np.argsort(-lengths, kind='stable').tolist():
    length = int(lengths[number])
    if fitting := is_open >> length:
      left = length + (fitting & -fitting).bit_length() - 1
      row = open_rows[left].pop()
      is_open &= ~(0 if open_rows[left] else 1 << left)
    else:
      packs.append([])
      row, left = len(packs) - 1, room
    packs[row].append(number)
    open_rows[left - length].append(row)
    is_open |= 1 << left - length
  return packs


def packed_rows(texts: Ragged, packs: Sequence[Sequence[int]], height: int, width: int) -> CausalBatch:
  """Texts side by side, numbered from 1 on in every row."""
  ids_BxT, segments_BxT = np.full((height, width), PAD, np.int32), np.zeros((height, width), np.int32)
  for place, numbers in enumerate(packs):
    at = 0
    for segment, number in enumerate(numbers, 1):
      text = texts.ids[texts.starts[number]:texts.starts[number + 1]]
      ids_BxT[place, at:at + len(text)], segments_BxT[place, at:at + len(text)] = text, segment
      at += len(text)
  return CausalBatch(ids_BxT, segments_BxT)


def block_batches(texts: Ragged, shape: Shape) -> list[CausalBatch]:
  """All ids of the stream once, as labels of blocks that follow each other, for evaluation."""
  length = shape.target - 1
  starts = np.arange(0, max(len(texts.ids) - 1, 0), length)
  batches = []
  for begin in range(0, len(starts), shape.rows):
    ids_BxT = np.full((shape.rows, length + 1), PAD, np.int32)
    for place, at in enumerate(starts[begin:begin + shape.rows]):
      block = texts.ids[at:at + length + 1]
      ids_BxT[place, :len(block)] = block
    batches.append(CausalBatch(ids_BxT, None))
  return batches
