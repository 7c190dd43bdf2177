"""The two kinds of text of E11, and what counts as known."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis.memorisation import (
    AGAIN,
    MEMORY,
    RULE,
    SCALES,
    _accuracy,
    _asked,
    _copies,
    _strings,
    _whole,
    run_memorisation,
)

SIZE = replace(SCALES['cpu'], length=12, prefix=4, strings=5)


def test_a_copy_is_said_again_and_only_what_follows_from_it_is_asked():
  ids = np.asarray(_copies(jax.random.key(0), SIZE, 3))
  assert (ids[:, 0] == RULE).all() and (ids[:, 6] == AGAIN).all()
  np.testing.assert_array_equal(ids[:, 1:6], ids[:, 7:])
  # Positions 6 to 10 are asked for the tokens at 7 to 11.
  np.testing.assert_array_equal(np.flatnonzero(_asked(ids, SIZE)[0]), np.arange(6, 11))


def test_a_string_is_known_if_all_behind_its_prefix_comes_out():
  ids = jnp.asarray(_strings(np.random.default_rng(0), SIZE))
  assert (ids[:, 0] == MEMORY).all()
  np.testing.assert_array_equal(np.flatnonzero(_asked(ids, SIZE)[0]), np.arange(4, 11))
  right = jax.nn.one_hot(jnp.roll(ids, -1, axis=1), 64)
  before = right.at[0, 3].set(right[0, 2] * 0)  # wrong where nothing is asked
  behind = before.at[1, 7].set(0).at[1, 7, 0].set(1.0)
  assert _whole(before, ids, SIZE.prefix) == 1.0 and abs(_whole(behind, ids, SIZE.prefix) - 0.8) < 1e-6
  assert _accuracy(before, ids, SIZE) == 1.0 and abs(_accuracy(behind, ids, SIZE) - 34 / 35) < 1e-6


@pytest.mark.slow  # a minute and a half
def test_what_has_learned_nothing_supports_nothing():
  result = run_memorisation(replace(SCALES['cpu'], layers=4, width=32, steps=20, rows=8, seeds=1, strings=16))
  assert result.verdict == 'not supported at this scale'
  assert len(result.measured['left of it']['rule']) == 10
