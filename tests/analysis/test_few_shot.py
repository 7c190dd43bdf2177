"""E3, trained: episodes, and what no training can change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis.few_shot import CONTROL, FEATURES, ITEM, SHOTS, SUPPORT, WAYS, _first, _logits, episodes, run_few_shot


def test_an_item_has_no_label_and_is_nearest_to_its_class():
  support, item, answer_B = episodes(jax.random.key(0), 200)
  assert not item[..., FEATURES:].any()
  labels_BxS = np.argmax(support[..., FEATURES:], axis=-1)
  np.testing.assert_array_equal(np.bincount(labels_BxS[0]), [SHOTS] * WAYS)
  means_BxWxF = support[..., :FEATURES].reshape(200, WAYS, SHOTS, FEATURES).mean(axis=2)
  nearest_B = np.linalg.norm(means_BxWxF - item[..., :FEATURES], axis=-1).argmin(axis=1)
  assert np.mean(nearest_B == answer_B) > 0.95


def test_a_support_that_asks_one_item_never_sees_a_label():
  params = _first(jax.random.key(0))
  support, item, _ = episodes(jax.random.key(1), 8)
  other_labels = support.at[..., FEATURES:].set(jnp.roll(support[..., FEATURES:], 1, axis=-1))
  for arm, blind in ((SUPPORT, True), (ITEM, False), (CONTROL, False)):
    change = jnp.abs(_logits(params, arm, support, item) - _logits(params, arm, other_labels, item)).max()
    assert (change == 0) == blind, arm.name


@pytest.mark.slow  # half a minute
def test_what_has_learned_nothing_does_not_hold():
  result = run_few_shot(seeds=1, steps=5)
  assert result.verdict == 'fails' and result.measured['chance'] == 1 / WAYS
