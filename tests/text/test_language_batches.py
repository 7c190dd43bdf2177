from __future__ import annotations

import numpy as np
import pytest

from tfm.config import ConfigError, DataConfig
from tfm.errors import DataError
from tfm.special_ids import BOS, EOS, PAD
from tfm.text.buckets import Shape
from tfm.text.language_batches import Blocks, Packed, block_batches, pack, packed_rows
from tfm.text.ragged import Ragged

LENGTH = 16
LENGTHS = np.random.default_rng(0).integers(1, LENGTH - 2, 150)
TEXTS = Ragged.of([[BOS, *range(10 * i + 4, 10 * i + 4 + n), EOS] for i, n in enumerate(LENGTHS)])


def settings(**changes) -> DataConfig:
  return DataConfig(**{**dict(corpus='text', source=None, target=None, limit=None, held_out=None, root='r', train='t',
                              validation='v', packing='packed', tokens_per_batch=4 * LENGTH, max_length=LENGTH),
                       **changes})


def blocks(seed=0, *share, texts=None) -> Blocks:
  return Blocks(Ragged(np.arange(4, 1004), np.array([0, 1000])) if texts is None else texts, settings(), seed,
                *(share or (2,)))


def packed(seed=0, *share) -> Packed:
  return Packed(TEXTS, 0, settings(), seed, *(share or (2,)))


def epoch_of(batches, epoch: int) -> list:
  return [batches.batch_at(step) for step in range(epoch * batches.steps_per_epoch,
                                                   (epoch + 1) * batches.steps_per_epoch)]


def same(one, other) -> bool:
  return all(np.array_equal(a, b) for a, b in zip(one, other))


def texts_in(batch) -> list[list[int]]:
  """The texts of a packed batch, after a check that they lie side by side, numbered from 1."""
  found = []
  for ids, segments in zip(*batch):
    count, length = segments.max(initial=0), int((segments > 0).sum())
    assert (np.diff(segments[:length]) >= 0).all() and set(segments[:length]) == set(range(1, count + 1))
    assert not segments[length:].any() and (ids[length:] == PAD).all() and (ids[:length] != PAD).all()
    found += [ids[segments == number].tolist() for number in range(1, count + 1)]
  return found


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_every_token_is_a_label_once_an_epoch():
  batches, phases = blocks(), set()
  for epoch in range(6):
    made = epoch_of(batches, epoch)
    rows = np.concatenate([batch.ids_BxT for batch in made])
    assert rows.shape == (4 * batches.steps_per_epoch, LENGTH + 1) and rows.dtype == np.int32
    assert (np.diff(rows, axis=1) == 1).all(), 'a block is a piece of the stream'
    begins = np.sort(rows[:, 0])
    labels = rows[:, 1:].ravel()
    assert len(set(labels)) == len(labels) and len({int(begin - 4) % LENGTH for begin in begins}) == 1
    assert len(labels) > 1000 - 5 * LENGTH, 'but for a phase and what does not fill a batch'
    phases.add(int(begins[0] - 4) % LENGTH)
    assert all(batch.segments_BxT is None for batch in made)
  assert len(phases) > 3


@pytest.mark.parametrize('size', range(4 * LENGTH + 1, 6 * LENGTH + 1, 5))
def test_blocks_end_within_the_stream_whatever_the_phase(size):
  if size < 5 * LENGTH:
    with pytest.raises(DataError, match=f'has {size} tokens, too few for one batch of 4 blocks of 16'):
      blocks(texts=Ragged(np.arange(size), np.array([0, size])))
    return
  batches = blocks(texts=Ragged(np.arange(size), np.array([0, size])))
  for step in range(40):
    assert batches.batch_at(step).ids_BxT.shape == (4, LENGTH + 1)


def test_blocks_of_the_validation_set_follow_each_other():
  for size in (1, 2, LENGTH, LENGTH + 1, LENGTH + 2, 100):
    made = block_batches(Ragged(np.arange(4, 4 + size, dtype=np.uint16), np.array([0, size])), Shape(4, 0, LENGTH + 1))
    labels = np.concatenate([batch.ids_BxT[:, 1:].ravel() for batch in made]) if made else np.zeros(0)
    assert labels[labels != PAD].tolist() == list(range(5, 4 + size))
    assert all(batch.ids_BxT.shape == (4, LENGTH + 1) and batch.ids_BxT.dtype == np.int32 for batch in made)
    assert all(((batch.ids_BxT[:, 0] != PAD) == (batch.ids_BxT[:, 1] != PAD)).all() for batch in made), 'no idle rows'


# -- packed -----------------------------------------------------------------------------------------------------------


def test_every_text_once_an_epoch_and_little_padding():
  batches = packed()
  for epoch in range(3):
    made = epoch_of(batches, epoch)
    assert all(batch.ids_BxT.shape == batch.segments_BxT.shape == (4, LENGTH + 1) for batch in made)
    expected = [TEXTS.ids[a:b].tolist() for a, b in zip(TEXTS.starts, TEXTS.starts[1:])]
    assert sorted(text for batch in made for text in texts_in(batch)) == sorted(expected)
  empty = np.mean([(batch.ids_BxT == PAD).mean() for batch in made])
  assert empty < 0.15 and f'{empty:.1%} padding' in batches.report()


@pytest.mark.parametrize('room', [1, 7, 40, 1000])
def test_packs_are_best_fit_longest_first(room):
  lengths = np.random.default_rng(room).integers(1, room + 1, 120)
  left, expected = [], []  # by hand: room left and contents of every row
  for number in sorted(range(120), key=lambda number: -lengths[number]):
    fitting = [row for row in range(len(left)) if left[row] >= lengths[number]]
    if fitting:
      row = min(fitting, key=lambda row: left[row])
    else:
      row = len(left)
      left.append(room)
      expected.append([])
    left[row] -= lengths[number]
    expected[row].append(number)
  found = pack(lengths, room)
  assert sorted(number for row in found for number in row) == list(range(120))
  assert all(lengths[row].sum() <= room for row in found)
  # Rows with the same room left are alike; which is taken is free.
  assert sorted(lengths[row].sum() for row in found) == sorted(lengths[row].sum() for row in expected)
  assert pack(np.zeros(0, np.int64), room) == []


def test_rows_beyond_the_texts_are_padding():
  batch = packed_rows(TEXTS, [[3, 1]], 3, 2 * LENGTH)
  assert texts_in(batch) == [TEXTS.ids[TEXTS.starts[i]:TEXTS.starts[i + 1]].tolist() for i in (3, 1)]
  assert not batch.ids_BxT[1:].any() and batch.ids_BxT.shape == (3, 2 * LENGTH)


# -- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('make', [blocks, packed])
def test_a_batch_is_a_function_of_seed_and_step_alone(make):
  batches = make(3)
  steps = [0, 1, 9, 2, 40, 1, 0]
  forward = {step: batches.batch_at(step) for step in sorted(set(steps))}
  for step in steps:
    assert same(batches.batch_at(step), forward[step]) and same(make(3).batch_at(step), forward[step])
  for other in (make(4), make(-3), make(-1)):
    assert not all(same(other.batch_at(step), forward[step]) for step in forward)
  assert not all(same(make(-1).batch_at(step), make(-2).batch_at(step)) for step in range(3))
  first, second = epoch_of(batches, 0), epoch_of(batches, 1)
  assert not all(same(one, other) for one, other in zip(first, second))


@pytest.mark.parametrize('make', [blocks, packed])
@pytest.mark.parametrize('count', [2, 4])
def test_processes_share_the_global_batch_by_rows(make, count):
  whole = make(1, 4)
  parts = [make(1, 4, index, count) for index in range(count)]
  for step in range(2 * whole.steps_per_epoch):
    joined = [side if side[0] is None else np.concatenate(side)
              for side in zip(*(part.batch_at(step) for part in parts))]
    assert all(one is None and other[0] is None or np.array_equal(one, other)
               for one, other in zip(whole.batch_at(step), joined))


@pytest.mark.parametrize('make', [blocks, packed])
def test_budget_and_reports(make):
  with pytest.raises(ConfigError, match='data.tokens_per_batch 64 does not hold 8 rows .*raise it to 128'):
    make(0, 8)
  batches = make()
  assert batches.shapes == [Shape(4, 0, LENGTH + 1)] and f'{batches.steps_per_epoch:,} batches' in batches.report()


def test_over_long_texts_are_reported():
  assert '7 texts longer than 16 tokens were dropped' in Packed(TEXTS, 7, settings(), 0).report()
  with pytest.raises(DataError, match='no training text'):
    Packed(Ragged.of([]), 7, settings(), 0)
