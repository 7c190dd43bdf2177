"""Probes read what is linear, and their control what they make up themselves."""

import numpy as np
import pytest

from tfm.analysis.probes import centre_of_gravity, control_labels, cumulative_scores, fit, probe_layers


def data(seed=0, rows=600, width=12, classes=3):
  rng = np.random.default_rng(seed)
  types = rng.integers(60, size=rows)
  labels = rng.integers(classes, size=60)[types]
  codes, classes_as_codes = rng.normal(size=(60, width)), rng.normal(size=(classes, width)) * 3
  return rng, types, labels, codes[types], codes[types] + classes_as_codes[labels]


def test_ridge_is_the_solution_of_the_normal_equations():
  rng, _, labels, x, _ = data()
  probe = fit(x, labels)
  centred, y = x - x.mean(0), np.eye(3)[labels] - np.eye(3)[labels].mean(0)
  scale = np.mean(centred**2) * len(x) * probe.penalty
  expected = np.linalg.solve(centred.T @ centred + scale * np.eye(12), centred.T @ y)
  np.testing.assert_allclose(probe.weights_DxK, expected, atol=1e-10)
  assert probe.accuracy(x, labels) == np.mean(probe.predict(x) == labels)


def test_selectivity_tells_a_property_from_a_lookup():
  rng, types, labels, without, with_class = data()
  test = np.isin(types, np.arange(60)) & (np.arange(600) % 4 == 0)
  scores = probe_layers(np.stack([without, with_class]), labels, types, test, rng)
  assert scores.accuracy_N[1] > 0.97 and scores.selectivity_N[1] > 0.25
  assert scores.selectivity_N[1] > scores.selectivity_N[0] + 0.15
  assert cumulative_scores(np.stack([without, with_class]), labels, test)[1] > 0.97


def test_control_labels_belong_to_types():
  types = np.array([3, 3, 9, 3, 9, 1])
  labels = control_labels(types, 5, np.random.default_rng(0))
  assert len({(t, l) for t, l in zip(types, labels)}) == 3


def test_gravity_is_where_the_score_grows():
  assert centre_of_gravity(np.array([0.2, 0.6, 0.6, 0.6])) == 1.0
  assert centre_of_gravity(np.array([0.2, 0.2, 0.2, 0.6])) == 3.0
  assert centre_of_gravity(np.array([0.25, 0.5, 0.75])) == 1.5
  assert np.isnan(centre_of_gravity(np.array([0.2, 0.2])))


def test_too_little_is_refused():
  with pytest.raises(ValueError, match='give one label for each'):
    fit(np.ones((5, 2)), np.ones(4, int))
  with pytest.raises(ValueError, match='give more'):
    fit(np.ones((1, 2)), np.zeros(1, int))
