"""Length buckets: the few static shapes that batches have, and which pair goes into which.

Shapes form a chain: each is at least as wide as the one before on both sides. So what fits one fits all after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tfm.config import DataConfig, require


class Shape(NamedTuple):
  """Of a batch: rows B, source width S and target width T. The step shifts the target, so it trains T - 1 labels."""

  rows: int
  source: int
  target: int

  @property
  def positions(self) -> int:
    """Positions of one row that are computed: S + (T - 1)."""
    return self.source + self.target - 1

  def __str__(self):
    return f'{self.rows}x({self.source}+{self.target})'


def choose_shapes(sources: np.ndarray, targets: np.ndarray, data: DataConfig, rows_multiple: int = 1) -> list[Shape]:
  """At most `data.buckets` shapes, narrowest first, that hold all pairs with the fewest padded positions.

  Pairs are ordered by max(source, labels) and cut into intervals; the best cuts are found by dynamic programming
  over the histogram, then moved while that helps. Widths are multiples of `data.width_multiple`, but never beyond
  `data.max_length` (a table of learned positions may end there); rows are the multiple of `rows_multiple` that
  `data.tokens_per_batch` allows.

  Args:
    sources: length of every source, </s> included.
    targets: length of every target, <s> and </s> included; there is one label less.

  Raises:
    ConfigError: the token budget does not hold `rows_multiple` rows.
  """
  labels, multiple = targets - 1, data.width_multiple
  keys = -(-np.maximum(sources, labels) // multiple)
  size = int(keys.max()) + 1
  count = np.bincount(keys, minlength=size)
  widest = np.zeros((2, size), np.int64)
  np.maximum.at(widest[0], keys, sources)
  np.maximum.at(widest[1], keys, labels)

  # cost[start]: positions of the pairs with start <= key < stop in one bucket; best[n, stop]: with n buckets.
  best = np.full((data.buckets + 1, size + 1), np.inf)
  best[0, 0] = 0
  start_of = np.zeros(best.shape, np.int64)
  for stop in range(1, size + 1):
    longest = np.maximum.accumulate(widest[:, :stop][:, ::-1], axis=1)[:, ::-1]
    pairs = np.cumsum(count[:stop][::-1])[::-1]
    cost = pairs * round_up(longest, multiple).sum(0)
    totals = best[:-1, :stop] + cost
    start_of[1:, stop] = totals.argmin(1)
    best[1:, stop] = totals.min(1)

  widths, stop = [], size
  for buckets in range(int(best[:, size].argmin()), 0, -1):
    # Over all narrower ones too: this makes the chain.
    widths.append(np.array(round_up(widest[:, :stop].max(1), multiple)))
    stop = start_of[buckets, stop]
  return [_shape(source, label, data, rows_multiple)
          for source, label in _refine(widths[::-1], sources, labels, multiple)]


def _refine(widths: list[np.ndarray], sources: np.ndarray, labels: np.ndarray, multiple: int) -> list[np.ndarray]:
  # The cuts above give a bucket room for the longest of both sides; where one side is mostly the shorter one, its few
  # long sentences are better off in the next bucket. So move each width by a step as long as padding shrinks.
  cells, count = np.unique(round_up(np.stack([sources, labels], 1), multiple), axis=0, return_counts=True)

  def positions(widths: list[np.ndarray]) -> int:
    inside = (cells[:, None] <= np.stack(widths)).all(-1)
    return int((np.stack(widths).sum(1)[inside.argmax(1)] * count).sum())

  least, better = positions(widths), True
  while better:
    better = False
    for i in range(len(widths) - 1):
      for move in multiple * np.array([(-1, 0), (0, -1), (1, 0), (0, 1)]):
        moved = np.add(widths[i], move)
        if (moved <= 0).any() or (moved > widths[i + 1]).any() or (i > 0 and (moved < widths[i - 1]).any()):
          continue
        trial = [*widths[:i], moved, *widths[i + 1:]]
        if (total := positions(trial)) < least:
          widths, least, better = trial, total, True
  return widths


def fit(sources: np.ndarray, targets: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
  """Index of the narrowest shape that holds each pair; len(shapes) where none does."""
  too_long = [(sources > shape.source) | (targets > shape.target) for shape in shapes]
  return np.sum(too_long, axis=0, dtype=np.int64)


def cut(order: np.ndarray, buckets: np.ndarray, shapes: Sequence[Shape]) -> list[tuple[Shape, np.ndarray]]:
  """Cut pairs into batches: a list of (shape, at most shape.rows numbers of pairs), every pair once.

  What is left over after the full batches of a bucket makes a partial batch, or moves on to the next wider bucket
  where that costs fewer positions. How many batches of each shape come out depends on counts alone, not on `order`.

  Args:
    order: numbers of the pairs, in the order in which they are to be taken.
    buckets: index of the shape of every pair, by number.
  """
  batches, carried = [], order[:0]
  for i, shape in enumerate(shapes):
    queue = np.concatenate([carried, order[buckets[order] == i]])
    left = len(queue) % shape.rows
    wider = shapes[i + 1].positions - shape.positions if i + 1 < len(shapes) else math.inf
    move = 0 < left and left * wider < (shape.rows - left) * shape.positions
    carried = queue[len(queue) - left:] if move else order[:0]
    stop = len(queue) - len(carried)
    batches += [(shape, queue[start:min(start + shape.rows, stop)]) for start in range(0, stop, shape.rows)]
  return batches


def padded_shape(source: int, target: int, data: DataConfig, rows_multiple: int = 1) -> Shape:
  """A shape for evaluation, where nothing is dropped: as wide as asked, of one `rows_multiple` at least."""
  width = max(source, target - 1)
  rows = max(data.tokens_per_batch // width // rows_multiple, 1) * rows_multiple
  source, label = (int(round_up(count, data.width_multiple)) for count in (source, target - 1))
  return Shape(rows, source, label + 1)


def _shape(source: int, label: int, data: DataConfig, rows_multiple: int) -> Shape:
  # Where the multiple divides max_length both sides may fill it; there is one label less than there are tokens.
  most = data.max_length - bool(data.max_length % data.width_multiple)
  source = min(int(round_up(source, data.width_multiple)), data.max_length)
  label = min(int(round_up(label, data.width_multiple)), max(most, 1))
  width = max(source, label)
  rows = data.tokens_per_batch // width // rows_multiple * rows_multiple
  require(rows > 0, f'data.tokens_per_batch {data.tokens_per_batch} does not hold {rows_multiple} rows (devices x '
                    f'micro-batches) of {width} tokens; raise it to {rows_multiple * width} or lower data.max_length.')
  return Shape(rows, source, label + 1)


def round_up(width: Any, multiple: int) -> Any:
  """The next multiple that is not below `width`."""
  return -(-width // multiple) * multiple
