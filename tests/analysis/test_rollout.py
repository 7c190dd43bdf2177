"""Rollout and flow on graphs small enough to do by hand."""

import numpy as np

from tfm.analysis.rollout import cross_rollout, flow, rollout


def patterns(N, H, T, S=None, seed=0):
  return np.random.default_rng(seed).dirichlet(np.ones(S or T), (N, H, T))


def test_rollout_of_one_layer_is_half_its_pattern_and_half_itself():
  found = rollout(patterns(1, 2, 4))
  np.testing.assert_allclose(found, (patterns(1, 2, 4)[0].mean(0) + np.eye(4)) / 2, atol=1e-6)


def test_rollout_multiplies_the_layers_last_on_the_left_and_keeps_rows_of_one():
  some = patterns(3, 2, 5)
  mixed = (some.mean(1) + np.eye(5)) / 2
  np.testing.assert_allclose(rollout(some), mixed[2] @ mixed[1] @ mixed[0], atol=1e-6)
  np.testing.assert_allclose(rollout(some).sum(-1), 1, atol=1e-6)
  assert np.allclose(np.triu(rollout(np.tril(np.ones((3, 1, 5, 5))) / np.arange(1, 6)[:, None]), 1), 0)


def test_cross_rollout_looks_through_the_encoder():
  identity = np.eye(4)[None, None]
  cross = patterns(1, 2, 3, 4)
  stays = np.broadcast_to(np.eye(3), (1, 2, 3, 3))
  np.testing.assert_allclose(cross_rollout(identity, stays, cross), cross[0].mean(0) / 2, atol=1e-6)
  mixing = patterns(2, 1, 4)
  np.testing.assert_allclose(cross_rollout(mixing, stays, cross), cross[0].mean(0) @ rollout(mixing) / 2, atol=1e-6)
  two = cross_rollout(identity, np.concatenate([stays] * 2), np.concatenate([cross] * 2))
  np.testing.assert_allclose(two, cross[0].mean(0) * 0.75, atol=1e-6)


def test_flow_of_one_layer_is_its_capacities_and_of_two_the_narrowest_way():
  one = patterns(1, 1, 3)
  np.testing.assert_allclose(flow(one), rollout(one), atol=1e-5)
  two = patterns(2, 1, 3, seed=1)
  low, high = (two[:, 0] + np.eye(3)) / 2
  # From s up through each middle position: the narrower of the two edges.
  expected = np.minimum(high[:, :, None], low[None]).sum(1)
  np.testing.assert_allclose(flow(two), expected, atol=1e-5)
