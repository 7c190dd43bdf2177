"""What one language gives to learn from: texts as they are, with hidden tokens, or with spans cut out.

All that is drawn depends on (seed, epoch, number of the text) alone, not on the batch that a text falls into.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from tfm.special_ids import BOS, EOS, PAD, UNK
from tfm.text.batches import Batch
from tfm.text.buckets import Shape
from tfm.text.ragged import Ragged

FIRST_WORD = UNK + 1


class CausalBatch(NamedTuple):
  """Ids, int32; one column more than is computed: inputs are [:, :-1], labels [:, 1:], of the segments likewise."""

  ids_BxT: np.ndarray
  segments_BxT: np.ndarray | None
  """Where a row holds several texts: 1 for the first, 2, ..., 0 for padding."""


class MaskedBatch(NamedTuple):
  """Ids, int32: what is read, and at the chosen positions what stood there, PAD at the others."""

  inputs_BxT: np.ndarray
  labels_BxT: np.ndarray


@dataclass(frozen=True)
class Plain:
  """Texts in full, <s> and </s> included, for a causal language model."""

  texts: Ragged

  @property
  def source_lengths(self) -> np.ndarray:
    return np.zeros(len(self), np.int64)

  @property
  def target_lengths(self) -> np.ndarray:
    return self.texts.lengths

  def __len__(self) -> int:
    return len(self.texts.starts) - 1

  def at(self, seed: int, epoch: int) -> Plain:
    del seed, epoch
    return self

  def batch(self, shape: Shape, rows: np.ndarray) -> CausalBatch:
    return CausalBatch(self.texts.pad(rows, shape.rows, shape.target), None)


@dataclass(frozen=True)
class Masked:
  """Texts of which some tokens are hidden (BERT, Devlin et al. 2019, section 3.1, task 1).

  Of the chosen tokens 80 % become the mask, 10 % a random one and 10 % stay; at least one of a text is chosen.
  """

  texts: Ragged
  rate: float
  mask_id: int
  """All ids below it but the special ones are words."""
  seed: int = 0
  epoch: int = 0

  @property
  def source_lengths(self) -> np.ndarray:
    return self.texts.lengths

  @property
  def target_lengths(self) -> np.ndarray:
    return np.ones(len(self), np.int64)

  def __len__(self) -> int:
    return len(self.texts.starts) - 1

  def at(self, seed: int, epoch: int) -> Masked:
    return replace(self, seed=seed, epoch=epoch)

  def batch(self, shape: Shape, rows: np.ndarray) -> MaskedBatch:
    inputs_BxT = self.texts.pad(rows, shape.rows, shape.source)
    labels_BxT = np.full_like(inputs_BxT, PAD)
    for place, row in enumerate(rows):
      words = int(self.texts.starts[row + 1] - self.texts.starts[row]) - 2  # neither <s> nor </s>
      bits = _bits(self.seed, self.epoch, row)
      chosen = 1 + _choose(bits, words, max(round(self.rate * words), 1))
      labels_BxT[place, chosen] = inputs_BxT[place, chosen]
      fate = bits.random_raw(len(chosen)) % 10
      other = FIRST_WORD + bits.random_raw(len(chosen)) % (self.mask_id - FIRST_WORD)
      inputs_BxT[place, chosen] = np.where(
          fate < 8, self.mask_id, np.where(fate == 8, other, inputs_BxT[place, chosen].astype(np.uint64)))
    return MaskedBatch(inputs_BxT, labels_BxT)


@dataclass(frozen=True)
class Spans:
  """Texts with spans cut out: the source has a sentinel for each, the target says what stood there (T5, Raffel et al.
  2020, section 3.1.4).

  'w1 w2 w3 w4 w5' without w2 and w4 w5: source 'w1 <0> w3 <1> </s>', target '<s> <0> w2 <1> w4 w5 <2> </s>'. How many
  tokens and spans go depends on the length of the text alone.
  """

  texts: Ragged
  """Words only."""
  rate: float
  mean_span: float
  first_sentinel: int
  seed: int = 0
  epoch: int = 0

  def counts(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of texts of so many words: tokens that are cut out, and spans."""
    noise = np.clip(np.round(words * self.rate).astype(np.int64), 1, np.maximum(words - 1, 1))
    spans = np.clip(np.round(noise / self.mean_span).astype(np.int64), 1, np.maximum(words - noise, 1))
    return noise, spans

  @property
  def source_lengths(self) -> np.ndarray:
    words = self.texts.lengths
    noise, spans = self.counts(words)
    return words - noise + spans + 1

  @property
  def target_lengths(self) -> np.ndarray:
    noise, spans = self.counts(self.texts.lengths)
    return noise + spans + 3

  def __len__(self) -> int:
    return len(self.texts.starts) - 1

  def at(self, seed: int, epoch: int) -> Spans:
    return replace(self, seed=seed, epoch=epoch)

  def batch(self, shape: Shape, rows: np.ndarray) -> Batch:
    starts = self.texts.starts
    found = [self._cut(*each) for each in zip(rows, *self.counts(starts[rows + 1] - starts[rows]))]
    sides = [Ragged.of([pair[side] for pair in found]) for side in (0, 1)]
    every = np.arange(len(rows))
    return Batch(sides[0].pad(every, shape.rows, shape.source), sides[1].pad(every, shape.rows, shape.target))

  def _cut(self, row: int, noise: int, spans: int) -> tuple[list[int], list[int]]:
    words = self.texts.ids[self.texts.starts[row]:self.texts.starts[row + 1]].tolist()
    bits = _bits(self.seed, self.epoch, row)
    kept_parts = _partition(bits, len(words) - noise, spans)
    cut_parts = _partition(bits, noise, spans)
    source, target, at = [], [BOS], 0
    for number, (kept, cut) in enumerate(zip(kept_parts, cut_parts)):
      sentinel = self.first_sentinel + number
      source += [*words[at:at + kept], sentinel]
      target += [sentinel, *words[at + kept:at + kept + cut]]
      at += kept + cut
    return [*source, EOS], [*target, self.first_sentinel + spans, EOS]


def _bits(seed: int, epoch: int, row: int) -> np.random.Philox:
  # A counter for each text, far from the others'; only raw words are promised to stay the same in every NumPy.
  return np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64), counter=[0, 0, int(row), 0])


def _choose(bits: np.random.Philox, count: int, chosen: int) -> np.ndarray:
  """`chosen` different numbers below `count`, rising."""
  return np.sort(np.argsort(bits.random_raw(count), kind='stable')[:chosen])


def _partition(bits: np.random.Philox, total: int, parts: int) -> list[int]:
  """`total` as a sum of `parts` numbers above 0 (0 where the total is 0), each way as likely as any other."""
  if total == 0:
    return [0] * parts
  cuts = 1 + _choose(bits, total - 1, parts - 1)
  return np.diff([0, *cuts.tolist(), total]).tolist()
