"""The two properties of E13, and the sizes of its arms."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from tfm.analysis.hybrids import KINDS, MARKED, SCALES, SYMBOLS, _arms, _logits, draw, run_hybrids
from tfm.models.build import count_parameters, initialize

SIZE = SCALES['cpu']


def test_labels_say_what_is_there():
  ids, labels = (np.asarray(x) for x in draw(jax.random.key(0), SIZE, 400, 0.5))
  for row, (local, same, both) in zip(ids, labels):
    assert local == bool(re.search('1,2,3,', ','.join(map(str, row)) + ','))
    left, right = (row[(row >= first) & (row < first + KINDS)] - first for first in (MARKED, MARKED + KINDS))
    assert len(left) == len(right) == 1
    assert same == (left[0] == right[0]) and both == (local and same)
    assert sorted(row[row < 4]) == [1, 2, 3] and row.max() < SYMBOLS
  assert (abs(labels[:, :2].mean(axis=0) - 0.5) < 0.1).all() and abs(labels[:, 2].mean() - 0.25) < 0.1


def test_arms_have_the_same_size_and_the_convolution_alone_sees_its_neighbours_only():
  arms = _arms(SIZE)
  params = {name: initialize(model, jax.random.key(0)) for name, (model, _) in arms.items()}
  sizes = [count_parameters(each) for each in params.values()]
  assert max(sizes) <= 1.05 * min(sizes)
  ids = np.asarray(draw(jax.random.key(1), SIZE, 1, 0.5)[0])
  # The mean over positions adds up what they say: two changes far apart add up as well, unless attention ties them.
  one, two = ids.copy(), ids.copy()
  one[0, 2], two[0, 20] = 5, 6
  both = one.copy()
  both[0, 20] = 6
  for name, (model, alone) in arms.items():
    a, b, ab, none = (np.asarray(_logits(params[name], model, alone, x)) for x in (one, two, both, ids))
    tied = np.abs((ab - none) - (a - none) - (b - none)).max()
    assert (tied < 1e-4) == (name == 'convolution'), name



@pytest.mark.slow  # a minute
def test_what_has_learned_nothing_supports_nothing():
  result = run_hybrids(replace(SIZE, steps=2, seeds=2, examples=(50,)))
  assert result.verdict == 'not supported at this scale'
