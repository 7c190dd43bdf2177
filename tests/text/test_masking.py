from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tfm.special_ids import BOS, EOS, PAD, UNK
from tfm.text.buckets import Shape
from tfm.text.masking import CausalBatch, Masked, MaskedBatch, Plain, Spans
from tfm.text.ragged import Ragged

MASK = 60
"""The words are 4 ... 59; sentinels come from here on too."""


def words(lengths, seed=0) -> list[list[int]]:
  random = np.random.default_rng(seed)
  return [random.integers(UNK + 1, MASK, length).tolist() for length in lengths]


def framed(lengths) -> Ragged:
  return Ragged.of([[BOS, *text, EOS] for text in words(lengths)])


def all_rows(examples, rows=None):
  """A batch of everything, or of `rows`, at the greatest widths."""
  rows = np.arange(len(examples)) if rows is None else np.array(rows)
  return examples.batch(Shape(len(rows), int(examples.source_lengths.max()), int(examples.target_lengths.max())), rows)


def test_plain_texts_are_rows_as_they_are():
  plain = Plain(framed([3, 1, 2]))
  batch = plain.at(5, 6).batch(Shape(3, 0, 6), np.array([2, 0]))
  assert isinstance(batch, CausalBatch) and batch.segments_BxT is None
  first, second, _ = words([3, 1, 2])[2], words([3, 1, 2])[0], None
  assert batch.ids_BxT.tolist() == [[BOS, *first, EOS, PAD, PAD], [BOS, *second, EOS, PAD], [PAD] * 6]
  assert plain.target_lengths.tolist() == [5, 3, 4] and not plain.source_lengths.any() and len(plain) == 3


# -- masked -----------------------------------------------------------------------------------------------------------


def test_shares_are_those_of_the_paper():
  texts = framed([100] * 1000)
  inputs, labels = all_rows(Masked(texts, 0.15, MASK))
  original = texts.pad(np.arange(1000), 1000, 102)
  chosen = labels != PAD
  assert (chosen.sum(1) == 15).all()
  assert (labels[chosen] == original[chosen]).all() and (inputs[~chosen] == original[~chosen]).all()
  assert set(original[chosen]) <= set(range(UNK + 1, MASK)), 'neither <s> nor </s> nor padding'
  masked, kept = (inputs[chosen] == MASK).mean(), (inputs[chosen] == original[chosen]).mean()
  assert masked == pytest.approx(0.8, abs=0.015)
  assert kept == pytest.approx(0.1 + 0.1 / 56, abs=0.015), 'a random word may be the old one'
  others = inputs[chosen & (inputs != MASK) & (inputs != original)]
  assert set(others) == set(range(UNK + 1, MASK)), 'every word, and nothing else, is drawn'
  places = chosen[:, 1:-1].mean(0)
  assert places.min() > 0.1 and places.max() < 0.2, 'all places alike'


def test_at_least_one_token_of_a_text_is_chosen():
  lengths = [1, 2, 3, 4, 30]
  for epoch in range(5):
    inputs, labels = all_rows(Masked(framed(lengths), 0.15, MASK).at(0, epoch))
    assert (labels != PAD).sum(1).tolist() == [1, 1, 1, 1, 4]
    assert (inputs != PAD).sum(1).tolist() == [length + 2 for length in lengths]
    assert (inputs[:, 0] == BOS).all() and (labels[:, 0] == PAD).all()


@pytest.mark.parametrize('seed', [0, 3, -1, 2**63 - 1])
@pytest.mark.parametrize('make', [
    lambda: Masked(framed([9, 30, 5, 12, 30, 7]), 0.3, MASK),
    lambda: Spans(Ragged.of(words([9, 30, 5, 12, 30, 7])), 0.3, 2.0, MASK)])
def test_draws_depend_on_seed_epoch_and_text_alone(make, seed):
  examples = make()
  whole = all_rows(examples.at(seed, 2))
  for rows in ([3], [5, 0, 3], [1, 4]):
    part = all_rows(make().at(seed, 2), rows)
    for one, other in zip(whole, part):
      width = min(one.shape[1], other.shape[1])
      assert np.array_equal(one[rows][:, :width], other[:, :width])
  for other in (examples.at(seed, 3), examples.at(seed - 1, 2), examples.at(seed + 1, 2)):
    assert any((one[row] != two[row]).any() for row in range(6) for one, two in zip(whole, all_rows(other)))
  same = dataclasses.replace(examples, texts=Ragged.of([words([20])[0]] * 2)) if isinstance(examples, Spans) else (
      dataclasses.replace(examples, texts=Ragged.of([[BOS, *words([20])[0], EOS]] * 2)))
  first, second = zip(*all_rows(same.at(seed, 0)))
  assert any((one != two).any() for one, two in zip(first, second)), 'equal texts draw for themselves'


def test_rows_beyond_the_texts_are_padding():
  shape = Shape(4, 12, 12)
  for examples in (Masked(framed([5, 6]), 0.15, MASK), Spans(Ragged.of(words([5, 6])), 0.3, 2.0, MASK)):
    for side in examples.batch(shape, np.array([1])):
      assert side.dtype == np.int32 and side.shape == (4, 12) and (side[0] != PAD).any() and not side[1:].any()
  assert isinstance(Masked(framed([5]), 0.15, MASK).batch(shape, np.array([0])), MaskedBatch)


# -- spans ------------------------------------------------------------------------------------------------------------


def parts(row, begin: int) -> list[list[int]]:
  """What stands before, between and behind the sentinels, which must come in order from `begin` on."""
  found, number = [[]], 0
  for i in row:
    if i >= MASK:
      assert i == begin + number, 'sentinels in order'
      found.append([])
      number += 1
    else:
      found[-1].append(int(i))
  return found


@pytest.mark.parametrize(('rate', 'mean_span'), [(0.15, 3.0), (0.5, 1.0), (0.9, 2.5), (0.01, 10.0), (0.3, 1.0)])
def test_source_and_target_together_are_the_text(rate, mean_span):
  lengths = [*range(1, 41)]
  examples = Spans(Ragged.of(words(lengths)), rate, mean_span, MASK).at(1, 4)
  noise, spans = examples.counts(np.array(lengths))
  batch = all_rows(examples)
  for number, (source, target) in enumerate(zip(*batch)):
    source, target = source[source != PAD].tolist(), target[target != PAD].tolist()
    assert len(source) == examples.source_lengths[number] and len(target) == examples.target_lengths[number]
    assert len(target) <= lengths[number] + 3 or lengths[number] == 1
    assert source[-1] == EOS and (target[0], target[-1]) == (BOS, EOS) and EOS not in source[:-1] + target[1:-1]
    kept, cut = parts(source[:-1], MASK), parts(target[1:-1], MASK)
    assert kept[-1] == cut[0] == cut[-1] == [] and len(kept) == spans[number] + 1 == len(cut) - 1
    assert all(cut[1:-1]) and (all(kept[:-1]) or lengths[number] == 1), 'no span is empty, and none touches the next'
    assert sum(map(len, cut)) == noise[number]
    assert [i for pair in zip(kept, cut[1:]) for part in pair for i in part] == words(lengths)[number]


def test_rates_are_those_that_were_asked_for():
  lengths = np.full(300, 200)
  examples = Spans(Ragged.of(words(lengths)), 0.15, 3.0, MASK)
  noise, spans = examples.counts(lengths)
  assert (noise == 30).all() and (spans == 10).all()
  cut = [len(part) for row in all_rows(examples).target_BxT for part in parts(row[row > UNK], MASK)[1:-1]]
  assert np.mean(cut) == 3.0 and 1 == min(cut) < 8 < max(cut)
  begins = [row[1:].tolist().index(MASK) for row in np.insert(all_rows(examples).source_BxS, 0, 0, axis=1)]
  assert len(set(begins)) > 20, 'spans begin anywhere'
