from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention import masks

B, H, T, S = 2, 3, 4, 5
LENGTHS = [3, 5]
ANY = np.random.default_rng(0).random((B, H, T, S)) < 0.5


def allowed(condition) -> np.ndarray:
  """bool BxHxTxS by asking for every pair."""
  return np.array([[[[condition(b, h, t, s) for s in range(S)] for t in range(T)] for h in range(H)] for b in range(B)])


def as_array(mask: masks.AttentionMask) -> np.ndarray:
  return np.broadcast_to(mask.to_array(T, S), (B, H, T, S))


KINDS = {
    'everything': (masks.everything, lambda b, h, t, s: True),
    'causal': (masks.causal, lambda b, h, t, s: s <= t),
    'continued': (lambda: masks.causal(2), lambda b, h, t, s: s <= t + 2),
    'lengths': (lambda: masks.lengths(jnp.array(LENGTHS)), lambda b, h, t, s: s < LENGTHS[b]),
    'dense': (lambda: masks.dense(jnp.array(ANY)), lambda b, h, t, s: ANY[b, h, t, s]),
}


@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind != 'everything'])
def test_a_mask_says_for_every_pair_whether_the_query_may_see_the_key(kind):
  make, condition = KINDS[kind]
  np.testing.assert_array_equal(as_array(make()), allowed(condition))


def test_everybody_sees_everybody_without_an_array():
  assert masks.everything().to_array(T, S) is None
  assert (masks.everything() & masks.everything()).to_array(T, S) is None


@pytest.mark.parametrize('first, second', [pair for pair in itertools.permutations(KINDS, 2)
                                           if set(pair) not in ({'causal', 'continued'}, {'everything'})])
def test_and_is_the_conjunction(first, second):
  (make, condition), (make_other, other_condition) = KINDS[first], KINDS[second]
  expected = allowed(lambda *pair: condition(*pair) and other_condition(*pair))
  np.testing.assert_array_equal(as_array(make() & make_other()), expected)


def test_two_of_a_kind_and_three_kinds_combine_too():
  shorter = masks.lengths(jnp.array([4, 2]))
  np.testing.assert_array_equal(as_array(KINDS['lengths'][0]() & shorter), allowed(lambda b, h, t, s: s < [3, 2][b]))
  even = masks.dense(jnp.arange(S) % 2 == 0)
  np.testing.assert_array_equal(as_array(KINDS['dense'][0]() & even), ANY & (np.arange(S) % 2 == 0))
  three = masks.causal(1) & KINDS['lengths'][0]() & even
  expected = allowed(lambda b, h, t, s: s <= t + 1 and s < LENGTHS[b] and s % 2 == 0)
  np.testing.assert_array_equal(as_array(three), expected)


def test_two_causal_masks_with_different_offsets_are_refused():
  with pytest.raises(ValueError, match='different offsets'):
    masks.causal() & masks.causal(2)
  np.testing.assert_array_equal(as_array(masks.causal(2) & masks.causal(2)), allowed(lambda b, h, t, s: s <= t + 2))


def test_masks_pass_through_jit_with_traced_lengths_and_offset():
  mask = masks.causal(jnp.int32(1)) & masks.lengths(jnp.array(LENGTHS))
  array = jax.jit(lambda mask: mask.to_array(T, S))(mask)
  np.testing.assert_array_equal(np.broadcast_to(array, (B, H, T, S)),
                                allowed(lambda b, h, t, s: s <= t + 1 and s < LENGTHS[b]))


def test_padding_reads_lengths_off_the_ids():
  ids_BxS = jnp.array([[5, 6, 7, 0, 0],   # padded on the right
                       [5, 6, 7, 8, 9],   # full
                       [0, 0, 0, 0, 0],   # empty
                       [5, 0, 7, 0, 0]])  # a pad inside is inside
  np.testing.assert_array_equal(masks.padding(ids_BxS, 0).lengths_B, [3, 5, 0, 3])
  np.testing.assert_array_equal(masks.padding(ids_BxS, 9).lengths_B, [5, 4, 5, 5])
  np.testing.assert_array_equal(masks.padding(ids_BxS[:, :0], 0).lengths_B, [0, 0, 0, 0])
