"""Batches of a translation model whose rows hold several sentence pairs, so that hardly anything is padding and all
have one shape."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from tfm.config import DataConfig
from tfm.errors import DataError
from tfm.text.batches import Encoded, of_over_long, permutation, require_room
from tfm.text.buckets import Shape, padded_shape, round_up
from tfm.text.language_batches import PackedRows, packed_rows

_DEAL = 2
"""Beside the purposes of `tfm.text.language_batches`."""


class PackedBatch(NamedTuple):
  """Ids, int32, as in `tfm.text.batches.Batch`, but a row holds several pairs: sources 'a </s> b </s>' beside targets
  '<s> a </s> <s> b </s>'. Inputs are target[:, :-1], labels target[:, 1:], of the segments likewise."""

  source_BxS: np.ndarray
  target_BxT: np.ndarray
  source_segments_BxS: np.ndarray
  """1 for the first pair of a row, 2, ..., 0 for padding; the same numbers on both sides."""
  target_segments_BxT: np.ndarray


class PackedPairs(PackedRows):
  """Rows of several pairs, which do not see each other.

  How many pairs of which lengths share a row is settled once, so every epoch has as many rows; which pairs these are is
  drawn anew among those of the same two lengths, and so is the order of the rows.

  The side with more tokens is `data.max_length` wide, the other as much narrower as it has less to hold.
  """

  def __init__(self, pairs: Encoded, over_long: int, data: DataConfig, seed: int, rows_multiple: int = 1,
               process_index: int = 0, process_count: int = 1):
    super().__init__(data, seed, rows_multiple, process_index, process_count)
    require_room(data)
    if not len(pairs):
      raise DataError(f'no training pair has at most data.max_length = {data.max_length} tokens; raise it.')
    self._pairs, self._left_out = pairs, of_over_long(over_long, 'pairs', data)
    shape, self._packs = _fewest_positions(pairs, self.shapes[0], data.width_multiple)
    self.shapes = [shape]
    self._lengths = pairs.source_lengths * (shape.target + 1) + pairs.target_lengths  # a number for each two lengths
    self._by_lengths = np.argsort(self._lengths, kind='stable')
    self._dealt: tuple[int, np.ndarray] | None = None

  def _rows(self, numbers, epoch, height):
    dealt = self._deal(epoch)
    return packed_pairs(self._pairs, [dealt[self._packs[number]] for number in numbers],
                        self.shapes[0]._replace(rows=height))

  def _deal(self, epoch: int) -> np.ndarray:
    """Which pair takes the place of each in this epoch: one of the same lengths."""
    dealt = self._dealt
    if dealt is None or dealt[0] != epoch:
      shuffled = permutation(self._bits(epoch, _DEAL), len(self._pairs))
      in_place_of = np.empty_like(shuffled)
      in_place_of[self._by_lengths] = shuffled[np.argsort(self._lengths[shuffled], kind='stable')]
      dealt = self._dealt = epoch, in_place_of
    return dealt[1]

  def report(self) -> str:
    pairs, shape = self._pairs, self.shapes[0]
    real = int(pairs.source_lengths.sum() + pairs.target_lengths.sum()) - len(pairs)
    padding = 1 - real / (self.steps_per_epoch * shape.rows * shape.positions)
    return (f'{len(pairs):,} pairs and {real:,} tokens in {self._count:,} rows, {self.steps_per_epoch:,} batches an '
            f'epoch, rows x (source + target) {shape}, {padding:.1%} padding and places between pairs; '
            f'{self._left_out}.')


def pack_pairs(sources: np.ndarray, targets: np.ndarray, S: int, T: int) -> list[np.ndarray]:
  """Numbers of the pairs that share a row of S source and T target tokens; every pair once.

  Rows are filled one after another (bin-centric, as the dot product heuristic of Panigrahy et al. 2011, section 3):
  each time by the pair that leaves the least share of the emptier side, of those by the one with most tokens. This
  depends on the lengths alone, so rows are made for all pairs of the same lengths at once, as often as there are
  enough: it takes as long as there are different lengths, not pairs.

  Args:
    sources, targets: lengths, at most S and T.
  """
  keys, kind_of, count = np.unique(sources * (T + 1) + targets, return_inverse=True, return_counts=True)
  waiting = np.split(np.argsort(kind_of, kind='stable'), np.cumsum(count)[:-1]) if len(keys) else []
  source, target = keys // (T + 1), keys % (T + 1)
  kinds = np.argsort(-(source * T + target * S), kind='stable')  # `argmin` finds the first of several
  packs: list[np.ndarray] = []
  while len(kinds):
    a, b, left = source[kinds], target[kinds], count[kinds]
    row, left_S, left_T = [], S, T
    while True:
      fits = (a <= left_S) & (b <= left_T) & (left > 0)
      if not fits.any():
        break
      at = int(np.where(fits, np.maximum((left_S - a) * T, (left_T - b) * S), S * T + 1).argmin())
      row.append(int(kinds[at]))
      left[at] -= 1
      left_S, left_T = left_S - int(a[at]), left_T - int(b[at])
    uses = Counter(row)
    times = min(int(count[kind]) // uses[kind] for kind in uses)
    columns = []
    for kind in row:
      columns.append(waiting[kind][:times])
      waiting[kind] = waiting[kind][times:]
      count[kind] -= times
    packs += list(np.stack(columns, axis=1))
    kinds = kinds[count[kinds] > 0]
  return packs


def packed_pairs(pairs: Encoded, packs: list[np.ndarray], shape: Shape) -> PackedBatch:
  """Pairs side by side, numbered from 1 on in every row of both sides."""
  source_BxS, source_segments_BxS = packed_rows(pairs.source, packs, shape.rows, shape.source)
  target_BxT, target_segments_BxT = packed_rows(pairs.target, packs, shape.rows, shape.target)
  return PackedBatch(source_BxS, target_BxT, source_segments_BxS, target_segments_BxT)


def packed_evaluation(pairs: Encoded, data: DataConfig, shape: Shape) -> list[PackedBatch]:
  """All `pairs` once, in rows of `shape` (that of training, so nothing new is compiled); none is dropped.

  Pairs too long for it get one more, as wide as the longest of them.
  """
  sources, targets = pairs.source_lengths, pairs.target_lengths
  fits = (sources <= shape.source) & (targets <= shape.target)
  parts = [(shape, np.flatnonzero(fits))]
  if not fits.all():
    parts.append((padded_shape(int(sources[~fits].max()), int(targets[~fits].max()), data), np.flatnonzero(~fits)))
  return [packed_pairs(pairs, [numbers[row] for row in packs[begin:begin + each.rows]], each)
          for each, numbers in parts
          for packs in [pack_pairs(sources[numbers], targets[numbers], each.source, each.target)]
          for begin in range(0, len(packs), each.rows)]


def _fewest_positions(pairs: Encoded, widest: Shape, multiple: int) -> tuple[Shape, list[np.ndarray]]:
  """The shape, at most `widest`, in which the pairs take the fewest positions, and how they are packed."""
  sources, targets = pairs.source_lengths, pairs.target_lengths
  most = widest.target - 1  # of either side, and labels are one less than target tokens
  longest = int(sources.max()), int(targets.max()) - 1
  full = sources.sum() / most, targets.sum() / (most + 1)  # rows that a side takes alone
  narrow = 0 if full[0] < full[1] else 1
  # The width at which both sides would be full; the narrower one is widened while that saves rows enough.
  width = max(round_up(int(full[narrow] / max(full) * most), multiple), round_up(longest[narrow], multiple))
  best = None
  while True:
    widths = [most, most]
    widths[narrow] = min(width, most)
    shape = Shape(widest.rows, widths[0], widths[1] + 1)
    packs = pack_pairs(sources, targets, shape.source, shape.target)
    positions = len(packs) * shape.positions
    if best is not None and positions >= best[0]:
      return best[1:]
    best = positions, shape, packs
    if width >= most:
      return best[1:]
    width += multiple
