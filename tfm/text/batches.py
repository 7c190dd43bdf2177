"""Batches as a pure function of (corpus, seed, step), so that a run resumes from one integer."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from tfm.config import DataConfig, require
from tfm.special_ids import BOS, EOS
from tfm.text.buckets import Shape, choose_shapes, cut, fit, padded_shape
from tfm.text.corpora import Corpus, DataError, EndlessCorpus, Pair
from tfm.text.ragged import Ragged as Ragged
from tfm.text.tokenizer import Tokenizers

SAMPLE_PAIRS = 10_000
GROUP_BATCHES = 16
MARGIN = 4
_PAIRS, _BATCHES, _DRAW, _SAMPLE = range(4)


class Batch(NamedTuple):
  """Ids, int32. Target is <s> ids </s>: inputs are target[:, :-1], labels target[:, 1:]. An empty row is all PAD."""

  source_BxS: np.ndarray
  target_BxT: np.ndarray


class Examples(Protocol):
  """What training learns from, a row of a batch each."""

  @property
  def source_lengths(self) -> np.ndarray: ...

  @property
  def target_lengths(self) -> np.ndarray:
    """One more than there are labels."""

  def __len__(self) -> int: ...

  def at(self, seed: int, epoch: int) -> Examples:
    """As they are in an epoch: masks and spans are drawn anew in each."""

  def batch(self, shape: Shape, rows: np.ndarray) -> tuple:
    """Those with the numbers `rows`, and empty rows up to shape.rows."""


@dataclass(frozen=True)
class Encoded:
  """Sentence pairs as ids: sources end with </s>, targets begin with <s> and end with </s>."""

  source: Ragged
  target: Ragged

  @property
  def source_lengths(self) -> np.ndarray:
    return self.source.lengths

  @property
  def target_lengths(self) -> np.ndarray:
    return self.target.lengths

  def __len__(self) -> int:
    return len(self.source.starts) - 1

  def at(self, seed: int, epoch: int) -> Encoded:
    del seed, epoch
    return self

  def batch(self, shape: Shape, rows: np.ndarray) -> Batch:
    return Batch(self.source.pad(rows, shape.rows, shape.source), self.target.pad(rows, shape.rows, shape.target))


_Cuts = list[tuple[Shape, np.ndarray]]  # batches: the shape and the numbers of the pairs in it
_Plan = tuple[Examples, _Cuts]


def encode_pairs(tokenizers: Tokenizers, pairs: Sequence[Pair]) -> Encoded:
  """Sentence pairs as ids, of any length."""
  return _join(*_encode(tokenizers, pairs))


def fitting_pairs(tokenizers: Tokenizers, pairs: Sequence[Pair], data: DataConfig) -> tuple[Encoded, int]:
  """Those of at most `data.max_length` tokens a side, the others dropped or truncated, and how many those were."""
  sources, targets = _encode(tokenizers, pairs)
  most = data.max_length
  fits = [len(source) <= most and len(target) <= most for source, target in zip(sources, targets)]
  if data.over_long == 'truncate':
    sources, targets = ([ids if len(ids) <= most else [*ids[:most - 1], EOS] for ids in side]
                        for side in (sources, targets))
  else:
    sources, targets = ([ids for ids, keep in zip(side, fits) if keep] for side in (sources, targets))
  return _join(sources, targets), len(fits) - sum(fits)


class Batches:
  """The training batches of a run; `batch_at(step)` is a pure function of (corpus, tokenizers, data, seed, step).

  Steps are grouped into epochs of `steps_per_epoch` batches. A finite corpus gives every pair once per epoch, in an
  order that depends on (seed, epoch); no pair is left out but those longer than `data.max_length`, which are dropped or
  truncated as configured, counted and reported. Of an endless corpus an epoch is a small group of batches, so many of
  each shape, filled with the pairs that (seed, epoch) draws.

  Every process makes the same global batch and keeps a contiguous slice of its rows. Rows are a multiple of
  lcm(rows_multiple, process_count): with `rows_multiple` a multiple of every process count in question, the global
  batch is the same for all of them.

  Args:
    examples: what to learn from and how many were too long for it, where that is not the corpus's pairs.

  Raises:
    ConfigError: `data.tokens_per_batch` is too small for one row per device and micro-batch.
    DataError: no training pair is short enough.
  """

  def __init__(self, corpus: Corpus, tokenizers: Tokenizers, data: DataConfig, seed: int, rows_multiple: int = 1,
               process_index: int = 0, process_count: int = 1, examples: tuple[Examples, int] | None = None):
    require_process(process_index, process_count)
    require_room(data)
    self._corpus, self._tokenizers, self._data, self._seed = corpus, tokenizers, data, seed
    self._process_index, self._process_count = process_index, process_count
    self._lock = threading.Lock()
    self._noun = 'pairs' if examples is None else 'texts'
    self._plans: dict[int, _Plan] = {}
    self._left_out: dict[int, np.ndarray] = {}  # by epoch: pairs over max_length, pairs over every shape
    multiple = math.lcm(rows_multiple, process_count)
    if corpus.endless:
      self.shapes, self._counts = self._compose(corpus, multiple)
      self.steps_per_epoch = sum(self._counts)
    else:
      self._train, over_long = fitting_pairs(tokenizers, corpus.train(), data) if examples is None else examples
      self._require_pairs(self._train)
      self._left_out[0] = np.array([over_long, 0])
      sources, targets = self._train.source_lengths, self._train.target_lengths
      self.shapes = choose_shapes(sources, targets, data, multiple)
      self._buckets = fit(sources, targets, self.shapes)
      self.steps_per_epoch = len(cut(np.arange(len(self._train)), self._buckets, self.shapes))

  def batch_at(self, step: int) -> Batch:
    """This process's rows of batch `step` (from 0); may be called from any thread, in any order."""
    epoch, place = divmod(step, self.steps_per_epoch)
    pairs, batches = self._plan(epoch)
    shape, rows = batches[place]
    height = shape.rows // self._process_count
    start = self._process_index * height
    return pairs.batch(shape._replace(rows=height), rows[start:start + height])

  def report(self) -> str:
    """One sentence: how much data, which shapes, how much padding, what did not fit."""
    pairs, batches = self._plan(0)
    used = np.concatenate([rows for _, rows in batches])
    real = int(pairs.source_lengths[used].sum() + pairs.target_lengths[used].sum()) - len(used)
    padding = 1 - real / sum(shape.rows * shape.positions for shape, _ in batches)
    over_long, unfit = sum(list(self._left_out.values()), np.zeros(2, np.int64))
    left_out = of_over_long(over_long, self._noun, self._data)
    if unfit:
      left_out += f', {unfit:,} drawn pairs longer than every shape were skipped'
    scope = 'a group' if self._corpus.endless else 'an epoch'
    return (f'{len(used):,} {self._noun} and {real:,} tokens in {len(batches):,} batches {scope}, '
            'rows x (source + target) '
            f'{", ".join(map(str, self.shapes))}, {padding:.1%} padding; {left_out}.')

  def _require_pairs(self, pairs: Examples) -> None:
    if not len(pairs):
      raise DataError(f'no training {self._noun[:-1]} has at most data.max_length = {self._data.max_length} '
                      'tokens; raise it.')

  def _plan(self, epoch: int) -> _Plan:
    # The newest two are kept: the one in use, and the one before for a thread that is behind.
    with self._lock:
      if epoch not in self._plans:
        while len(self._plans) > 1:
          del self._plans[next(iter(self._plans))]
        self._plans[epoch] = self._make_plan(epoch)
      return self._plans[epoch]

  def _make_plan(self, epoch: int) -> _Plan:
    if self._corpus.endless:
      pairs, batches, left_out = self._fill(self._corpus, np.random.Generator(self._bits(epoch, _DRAW)))
      if left_out.any():
        self._left_out[epoch] = left_out
    else:
      pairs = self._train.at(self._seed, epoch)
      batches = cut(permutation(self._bits(epoch, _PAIRS), len(pairs)), self._buckets, self.shapes)
    return pairs, [batches[i] for i in permutation(self._bits(epoch, _BATCHES), len(batches))]

  def _bits(self, epoch: int, purpose: int) -> np.random.Philox:
    # A seed may be negative, entropy may not.
    return np.random.Philox(np.random.SeedSequence([self._seed % 2 ** 64, epoch, purpose]))

  def _compose(self, corpus: EndlessCorpus, multiple: int) -> tuple[list[Shape], list[int]]:
    # Shapes of an endless corpus and how many batches of each make a group, from a sample that no seed changes.
    sample, _ = fitting_pairs(
        self._tokenizers, corpus.draw(np.random.Generator(np.random.Philox(_SAMPLE)), SAMPLE_PAIRS), self._data)
    self._require_pairs(sample)
    sources, targets = sample.source.lengths, sample.target.lengths
    # One pair that stands for the longest still to come; of the sample's own buckets it becomes the last.
    most = self._data.max_length
    sources = np.append(sources, min(sources.max() + MARGIN, most))
    targets = np.append(targets, min(targets.max() + MARGIN, most))
    shapes = choose_shapes(sources, targets, self._data, multiple)
    shares = np.bincount(fit(sources, targets, shapes), minlength=len(shapes)) / len(sources)
    group = GROUP_BATCHES / sum(share / shape.rows for share, shape in zip(shares, shapes))
    counts, carried = [], 0.0
    for share, shape in zip(shares * group, shapes):  # what is less than a batch moves on, as in `_fill`
      carried += share
      counts.append(int(carried / shape.rows))
      carried -= counts[-1] * shape.rows
    counts[-1] = max(counts[-1], 1)
    used = [i for i, count in enumerate(counts) if count]
    return [shapes[i] for i in used], [counts[i] for i in used]

  def _fill(self, corpus: EndlessCorpus, rng: np.random.Generator) -> tuple[Encoded, _Cuts, np.ndarray]:
    # A pair that finds its bucket full moves on to the next wider one; one that finds all full is not used.
    room = [count * shape.rows for count, shape in zip(self._counts, self.shapes)]
    buckets: list[list[int]] = [[] for _ in room]
    parts: list[Encoded] = []
    drawn, left_out = 0, np.zeros(2, np.int64)
    while missing := sum(room) - sum(map(len, buckets)):
      part, over_long = fitting_pairs(self._tokenizers, corpus.draw(rng, missing + 16), self._data)
      parts.append(part)
      narrowest = fit(part.source.lengths, part.target.lengths, self.shapes)
      left_out += over_long, (narrowest == len(room)).sum()
      for pair, first in enumerate(narrowest.tolist(), start=drawn):
        for bucket in range(first, len(room)):
          if len(buckets[bucket]) < room[bucket]:
            buckets[bucket].append(pair)
            break
      drawn += len(part)
    batches = [(shape, rows) for shape, count, bucket in zip(self.shapes, self._counts, buckets)
               for rows in np.split(np.array(bucket), count)]
    return _concatenate(parts), batches, left_out


def evaluation_batches(pairs: Examples, data: DataConfig, shapes: Sequence[Shape] = (), rows_multiple: int = 1,
                       process_index: int = 0, process_count: int = 1) -> list[Batch]:
  """All `pairs` once, in batches of `shapes` (those of training, so nothing new is compiled); none is dropped.

  Pairs too long for every shape get one more, as wide as the longest of them. As in training, every process keeps a
  contiguous slice of the rows.

  Raises:
    ConfigError: a shape cannot be shared out; it was made for another `rows_multiple` or number of processes.
  """
  multiple = math.lcm(rows_multiple, process_count)
  for shape in shapes:
    require(shape.rows % multiple == 0, f'{shape.rows} rows of an evaluation batch cannot be shared out by {multiple}; '
                                        'give Batches and evaluation_batches the same rows_multiple and processes.')
  sources, targets = pairs.source_lengths, pairs.target_lengths
  buckets = fit(sources, targets, shapes) if shapes else np.zeros(len(pairs), np.int64)
  shapes = list(shapes)
  if (buckets == len(shapes)).any():
    wide = max([sources.max(), *(shape.source for shape in shapes)])
    long = max([targets.max(), *(shape.target for shape in shapes)])
    shapes.append(padded_shape(int(wide), int(long), data, multiple))
  batches = []
  for shape, rows in cut(np.arange(len(pairs)), buckets, shapes):
    height = shape.rows // process_count
    start = process_index * height
    batches.append(pairs.batch(shape._replace(rows=height), rows[start:start + height]))
  return batches


def prefetch(batches: Batches, start: int, stop: int, depth: int = 2) -> Generator[tuple[int, Batch], None, None]:
  """(step, batch) for start <= step < stop, made ahead by one thread; an error there is raised here.

  Closing the iterator ends the thread; so does leaving a `for` loop over it, once it is collected.
  """
  ready: queue.Queue = queue.Queue(depth)
  closed = threading.Event()

  def put(item) -> None:
    while not closed.is_set():
      try:
        return ready.put(item, timeout=0.05)
      except queue.Full:
        continue

  def work() -> None:
    try:
      for step in range(start, stop):
        if closed.is_set():
          return
        put((step, batches.batch_at(step)))
      put(None)
    except BaseException as error:  # whatever it is, the reader raises it
      put(error)

  thread = threading.Thread(target=work, name='prefetch', daemon=True)
  thread.start()
  try:
    while (item := ready.get()) is not None:
      if isinstance(item, BaseException):
        raise item
      yield item
  finally:
    closed.set()
    thread.join()


def _encode(tokenizers: Tokenizers, pairs: Sequence[Pair]) -> tuple[list[list[int]], list[list[int]]]:
  sources = tokenizers.source.encode_batch([source for source, _ in pairs])
  targets = tokenizers.target.encode_batch([target for _, target in pairs])
  return [[*ids, EOS] for ids in sources], [[BOS, *ids, EOS] for ids in targets]


def _join(sources: list[list[int]], targets: list[list[int]]) -> Encoded:
  return Encoded(Ragged.of(sources), Ragged.of(targets))


def _concatenate(parts: Sequence[Encoded]) -> Encoded:
  def chain(ragged: list[Ragged]) -> Ragged:
    starts = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in ragged]))])
    return Ragged(np.concatenate([part.ids for part in ragged]), starts)

  return Encoded(chain([part.source for part in parts]), chain([part.target for part in parts]))


def require_process(index: int, count: int) -> None:
  require(0 <= index < count, f'process_index {index} is not below process_count {count}; number the processes from 0.')


def of_over_long(count: int, noun: str, data: DataConfig) -> str:
  """What became of those that are too long, for a report."""
  done = {'drop': 'dropped', 'truncate': 'truncated'}[data.over_long]
  return f'{count:,} {noun} longer than {data.max_length} tokens were {done}'


def require_room(data: DataConfig) -> None:
  require(data.max_length > 2, f'data.max_length {data.max_length} has no room beside <s> and </s>; raise it.')


def permutation(bits: np.random.Philox, count: int) -> np.ndarray:
  # Raw words are promised to stay the same in every NumPy; `permutation` is not.
  return np.argsort(bits.random_raw(count), kind='stable')
