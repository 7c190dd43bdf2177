import itertools

import numpy as np
import pytest

from tfm.config import ConfigError, DataConfig
from tfm.text.buckets import Shape, choose_shapes, cut, fit, padded_shape

WIDTH_MULTIPLE = DataConfig().width_multiple


def lengths(seed, count=500, most=40):
  rng = np.random.default_rng(seed)
  sources = rng.integers(2, most, count)
  return sources, (sources + rng.integers(-5, 6, count)).clip(2, most)


def config(**changes):
  return DataConfig(**{**dict(tokens_per_batch=512, max_length=64, buckets=4), **changes})


def positions(sources, targets, shapes):
  return sum(shapes[i].positions for i in fit(sources, targets, shapes))


@pytest.mark.parametrize('seed', range(4))
def test_shapes_are_a_chain_that_holds_everything(seed):
  sources, targets = lengths(seed)
  shapes = choose_shapes(sources, targets, config(), 4)
  assert 1 <= len(shapes) <= 4
  assert (fit(sources, targets, shapes) < len(shapes)).all()
  for shape in shapes:
    assert shape.rows % 4 == 0 and 0 < shape.rows * max(shape.source, shape.target - 1) <= 512
    assert shape.source % WIDTH_MULTIPLE == 0 and (shape.target - 1) % WIDTH_MULTIPLE == 0
  for narrow, wide in itertools.pairwise(shapes):
    assert narrow.source <= wide.source and narrow.target <= wide.target and narrow != wide


def test_shapes_are_as_good_as_the_best_of_all_square_ones():
  sources, targets = lengths(0, most=20)
  widths = range(2, 22, WIDTH_MULTIPLE)
  best = min(positions(sources, targets, [Shape(1, w, w + 1) for w in chosen])
             for chosen in itertools.combinations(widths, 3) if chosen[-1] == 20)
  assert positions(sources, targets, choose_shapes(sources, targets, config(buckets=3))) <= best


def test_more_buckets_pad_less():
  sources, targets = lengths(1)
  totals = [positions(sources, targets, choose_shapes(sources, targets, config(buckets=k))) for k in (1, 2, 4, 8)]
  assert totals == sorted(totals, reverse=True) and totals[-1] < totals[0]


def test_widths_never_exceed_max_length():
  sources, targets = np.array([3, 7, 7]), np.array([4, 7, 5])
  for shape in choose_shapes(sources, targets, config(max_length=7)):
    assert shape.source <= 7 and shape.target <= 7
  assert (fit(sources, targets, choose_shapes(sources, targets, config(max_length=7))) < 4).all()


def test_a_budget_without_room_is_an_error():
  sources, targets = np.array([60]), np.array([60])
  with pytest.raises(ConfigError, match=r'data\.tokens_per_batch 512 does not hold 16 rows .* raise it to 960'):
    choose_shapes(sources, targets, config(), 16)


@pytest.mark.parametrize('seed', range(4))
def test_cut_uses_every_pair_once_in_a_shape_that_fits(seed):
  sources, targets = lengths(seed, 777)
  shapes = choose_shapes(sources, targets, config())
  order = np.random.default_rng(seed).permutation(777)
  batches = cut(order, fit(sources, targets, shapes), shapes)
  assert sorted(np.concatenate([rows for _, rows in batches])) == list(range(777))
  for shape, rows in batches:
    assert 0 < len(rows) <= shape.rows
    assert sources[rows].max() <= shape.source and targets[rows].max() <= shape.target


def test_the_number_of_batches_does_not_depend_on_the_order():
  sources, targets = lengths(5, 777)
  shapes = choose_shapes(sources, targets, config())
  buckets = fit(sources, targets, shapes)
  made = {tuple(shape for shape, _ in cut(np.random.default_rng(seed).permutation(777), buckets, shapes))
          for seed in range(5)}
  assert len(made) == 1


def test_a_small_rest_moves_on_and_a_large_one_stays():
  shapes = [Shape(8, 4, 5), Shape(4, 8, 9)]
  for rest, expected in ((1, [8, 4]), (7, [8, 7, 3])):
    buckets = np.array([0] * (8 + rest) + [1] * 3)
    assert [len(rows) for _, rows in cut(np.arange(len(buckets)), buckets, shapes)] == expected


def test_padded_shape_holds_a_sentence_beyond_the_budget():
  shape = padded_shape(1001, 900, config(), 4)
  assert shape.rows == 4 and shape.source >= 1001 and shape.target >= 900
