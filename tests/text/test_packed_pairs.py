from __future__ import annotations

import numpy as np
import pytest

from tfm.config import ConfigError, DataConfig
from tfm.errors import DataError
from tfm.special_ids import BOS, EOS, PAD
from tfm.text.batches import Encoded
from tfm.text.buckets import Shape
from tfm.text.packed_pairs import PackedPairs, pack_pairs, packed_evaluation, packed_pairs
from tfm.text.ragged import Ragged

LENGTH = 24
COUNT = 400


def pairs_of(counts) -> Encoded:
  """Pair i says i on both sides; `counts` are its words, of the source and of the target."""
  return Encoded(Ragged.of([[*[i + 10] * a, EOS] for i, (a, _) in enumerate(counts)]),
                 Ragged.of([[BOS, *[i + 10] * b, EOS] for i, (_, b) in enumerate(counts)]))


def drawn(count: int = COUNT, most: int = 9) -> np.ndarray:
  """Targets of about the length of their sources, and a word longer."""
  random = np.random.default_rng(0)
  sources = random.integers(1, most, count)
  return np.stack([sources, np.maximum(sources + 1 + random.integers(-1, 2, count), 1)], axis=1)


PAIRS = pairs_of(drawn())


def settings(**changes) -> DataConfig:
  return DataConfig(**{**dict(corpus='files', limit=None, held_out=None, root='r', train='t', validation='v',
                              packing='packed', tokens_per_batch=4 * LENGTH, max_length=LENGTH), **changes})


def packed(seed=0, *share, pairs=PAIRS, **changes) -> PackedPairs:
  return PackedPairs(pairs, 3, settings(**changes), seed, *(share or (2,)))


def epoch_of(batches, epoch: int = 0) -> list:
  return [batches.batch_at(epoch * batches.steps_per_epoch + step) for step in range(batches.steps_per_epoch)]


def same(one, other) -> bool:
  return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def rows_in(batch) -> list[list[tuple[list[int], list[int]]]]:
  """The pairs of each row, after a check that both sides lie side by side and are numbered alike, from 1 on."""
  rows = []
  for ids_S, ids_T, segments_S, segments_T in zip(*batch, strict=True):
    count = segments_S.max(initial=0)
    for ids, segments in ((ids_S, segments_S), (ids_T, segments_T)):
      length = int((segments > 0).sum())
      assert set(segments[:length]) == set(range(1, count + 1)) and (np.diff(segments[:length]) >= 0).all()
      assert not segments[length:].any() and (ids[length:] == PAD).all() and (ids[:length] != PAD).all()
    rows.append([(ids_S[segments_S == n].tolist(), ids_T[segments_T == n].tolist()) for n in range(1, count + 1)])
  return rows


def all_pairs(pairs: Encoded) -> list[tuple[list[int], list[int]]]:
  return sorted(zip(*([side.ids[a:b].tolist() for a, b in zip(side.starts, side.starts[1:])]
                      for side in (pairs.source, pairs.target))))


# -- which pairs share a row ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('S', 'T'), [(12, 12), (20, 23), (60, 64), (13, 400)])
def test_every_row_is_filled_by_what_leaves_the_emptier_side_fullest(S, T):
  """By hand, a pair at a time; rows with the same lengths may change places."""
  counts = np.random.default_rng(S).integers(1, 13, (300, 2))
  found = pack_pairs(counts[:, 0], counts[:, 1], S, T)
  assert sorted(np.concatenate(found).tolist()) == list(range(300))
  assert all((counts[row].sum(0) <= (S, T)).all() for row in found)
  left, expected = [tuple(pair) for pair in counts.tolist()], []
  while left:
    row, room = [], (S, T)
    while fitting := [(a, b) for a, b in left if a <= room[0] and b <= room[1]]:
      # Of those that leave the same: the one with most tokens, and then the one with the shorter source.
      a, b = min(fitting, key=lambda pair: (max((room[0] - pair[0]) * T, (room[1] - pair[1]) * S),
                                            -pair[0] * T - pair[1] * S, pair))
      left.remove((a, b))
      row, room = [*row, (a, b)], (room[0] - a, room[1] - b)
    expected.append(row)
  assert sorted([tuple(pair) for pair in counts[row].tolist()] for row in found) == sorted(expected)


def test_no_pairs_take_no_rows():
  assert pack_pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), 5, 5) == []


def test_rows_beyond_the_pairs_are_padding():
  batch = packed_pairs(PAIRS, [np.array([3, 1])], Shape(3, 40, 50))
  rows = rows_in(batch)
  assert rows[1:] == [[], []] and [source[0] for source, _ in rows[0]] == [13, 11]
  assert [array.shape for array in batch] == [(3, 40), (3, 50)] * 2 and {array.dtype for array in batch} == {
      np.dtype('int32')}


@pytest.mark.parametrize('longer', ['target', 'source'])
@pytest.mark.parametrize('multiple', [1, 2, 5])
def test_widths_are_as_the_sides_need_them(longer, multiple):
  counts = np.stack([drawn()[:, 0], 2 * drawn()[:, 0]], axis=1)
  pairs = pairs_of(counts if longer == 'target' else counts[:, ::-1])
  batches = packed(pairs=pairs, width_multiple=multiple)
  widths = {'source': batches.shapes[0].source, 'target': batches.shapes[0].target - 1}
  narrow = widths.pop('source' if longer == 'target' else 'target')
  assert widths == {longer: LENGTH} and narrow % multiple == 0 and LENGTH // 2 <= narrow <= LENGTH - 4
  assert batches.shapes[0].rows == 4 and len(batches.shapes) == 1


def test_a_side_is_never_narrower_than_its_longest_example():
  counts = drawn()
  counts[7] = 20, 1  # of sources that are else half as long as their targets
  counts[:, 1] *= 2
  batches = packed(pairs=pairs_of(counts))
  assert 21 <= batches.shapes[0].source < batches.shapes[0].target - 1 == LENGTH
  full = packed(pairs=pairs_of([(LENGTH - 1, LENGTH - 2)] * 3))  # as long as max_length on both sides
  assert full.shapes == [Shape(4, LENGTH, LENGTH + 1)] and len(rows_in(full.batch_at(0))[0]) == 1


# -- batches ----------------------------------------------------------------------------------------------------------


def test_every_pair_once_an_epoch_and_little_padding():
  batches = packed()
  for epoch in range(3):
    made = epoch_of(batches, epoch)
    assert {tuple(array.shape for array in batch) for batch in made} == {
        ((4, batches.shapes[0].source), (4, LENGTH + 1)) * 2}
    assert sorted(pair for batch in made for row in rows_in(batch) for pair in row) == all_pairs(PAIRS)
  learned = sum((batch.source_BxS != PAD).sum() + sum(len(target) - 1 for row in rows_in(batch) for _, target in row)
                for batch in made)
  idle = 1 - learned / sum(batch.source_BxS.size + batch.target_BxT[:, 1:].size for batch in made)
  assert idle < 0.15 and f'{idle:.1%} padding' in batches.report()
  assert '400 pairs' in batches.report() and '3 pairs longer than 24 tokens were dropped' in batches.report()


def test_pairs_have_other_company_in_every_epoch():
  batches = packed()
  rows = [[row for batch in epoch_of(batches, epoch) for row in rows_in(batch)] for epoch in range(2)]
  company = [{frozenset(source[0] for source, _ in row) for row in each} for each in rows]
  assert len(company[0] & company[1]) < 0.1 * len(company[0])
  lengths = [sorted(sorted((len(a), len(b)) for a, b in row) for row in each) for each in rows]
  assert lengths[0] == lengths[1]


def test_a_batch_is_a_function_of_seed_and_step_alone():
  batches = packed(3)
  steps = [0, 1, 9, 2, 40, 1, 0]
  forward = {step: batches.batch_at(step) for step in sorted(set(steps))}
  for step in steps:
    assert same(batches.batch_at(step), forward[step]) and same(packed(3).batch_at(step), forward[step])
  for other in (packed(4), packed(-3), packed(-1)):
    assert not all(same(other.batch_at(step), forward[step]) for step in forward)


@pytest.mark.parametrize('count', [2, 4])
def test_processes_share_the_global_batch_by_rows(count):
  whole, parts = packed(1, 4), [packed(1, 4, index, count) for index in range(count)]
  for step in range(2 * whole.steps_per_epoch):
    assert same([np.concatenate(side) for side in zip(*(part.batch_at(step) for part in parts))],
                whole.batch_at(step))


def test_what_cannot_be_packed_is_refused():
  with pytest.raises(ConfigError, match='data.tokens_per_batch 96 does not hold 8 rows .*raise it to 192'):
    packed(0, 8)
  with pytest.raises(ConfigError, match='data.max_length 2 has no room beside <s> and </s>; raise it'):
    packed(max_length=2)
  with pytest.raises(DataError, match='no training pair has at most data.max_length = 24 tokens; raise it'):
    packed(pairs=pairs_of([]))


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_has_every_pair_once_in_the_shape_of_training():
  shape = packed().shapes[0]
  made = packed_evaluation(PAIRS, settings(), shape)
  assert {tuple(array.shape for array in batch) for batch in made} == {((4, shape.source), (4, shape.target)) * 2}
  assert sorted(pair for batch in made for row in rows_in(batch) for pair in row) == all_pairs(PAIRS)


@pytest.mark.parametrize('long', [(50, 2), (2, 50), (50, 60)])
def test_evaluation_drops_no_long_pair(long):
  counts = drawn(30).tolist()
  counts[4] = long
  pairs, shape = pairs_of(counts), packed().shapes[0]
  made = packed_evaluation(pairs, settings(), shape)
  assert sorted(pair for batch in made for row in rows_in(batch) for pair in row) == all_pairs(pairs)
  assert [batch.source_BxS.shape[1] > shape.source or batch.target_BxT.shape[1] > shape.target
          for batch in made] == [False] * (len(made) - 1) + [True]
