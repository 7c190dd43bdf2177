"""Experiments at small scale: what they claim holds, and their controls fail."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis import attention_experiments as experiments
from tfm.analysis.attention_experiments import interval
from tfm.analysis.result import Result
from tfm.attention.alignments import soft
from tfm.attention.score_functions import general


@pytest.fixture(scope='module')
def swapped():
  return experiments.run_swapped(episodes=200, seeds=3)


def check(result: Result, tmp_path, verdict='holds'):
  """It passes, says what it measured, and can be drawn."""
  print(f'\n{result.name}: {result.verdict}\n  ' + '\n  '.join(f'{name}: {value}' for name, value in
                                                               result.measured.items()))
  assert result.verdict == verdict, result.measured
  pytest.importorskip('matplotlib')
  result.draw().savefig(tmp_path / 'figure.png')
  assert (tmp_path / 'figure.png').stat().st_size > 5000


def test_keys_are_not_values(tmp_path):
  """A short training on few pairs: the gap is there, and smaller than the criterion asks for."""
  result = experiments.run_roles(pairs=8, steps=300, seeds=2, batch=32, wider=(2.0,))
  found = result.measured
  assert found['accuracy, untied'][0] > 0.97 and found['gap'][1][0] > 0.03, found
  assert found['accuracy, key = value, 2.0 times as wide'][0] > 0.97
  assert found['accuracy, keys and values exchanged'][0] < 0.3
  assert found['asymmetry of scores'][0] > 0.1
  check(result, tmp_path, 'not supported at this scale')


@pytest.mark.slow  # two minutes
def test_keys_are_not_values_at_full_scale(tmp_path):
  check(experiments.run_roles(), tmp_path)


def test_who_asks_and_who_answers_is_not_symmetric(swapped, tmp_path):
  check(swapped, tmp_path)
  np.testing.assert_array_equal(swapped.measured['weights of one key'], [1.0])
  assert swapped.measured['asymmetry'][0] > 0.5 and swapped.measured['asymmetry, symmetric matrix'] < 1e-12
  assert swapped.measured['weights differ, symmetric matrix'][0] > 0.1
  assert swapped.measured['accuracy, support asks, skip'][0] > 0.6, 'a skip lets the query through'


def test_exact_facts_of_the_two_directions():
  """Length of the output, equivariance in queries, invariance in keys and values, constancy over one key."""
  random = np.random.default_rng(0)
  A, B, M = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((1, 4, 6), (1, 7, 6), (6, 6)))

  def cross(queries, keys):
    return soft(general(queries, keys, M)) @ keys

  assert cross(A, B).shape == A.shape and cross(B, A).shape == B.shape
  order = jnp.array([2, 0, 3, 1])
  np.testing.assert_allclose(cross(A[:, order], B), cross(A, B)[:, order], atol=1e-6)
  np.testing.assert_allclose(cross(B, A[:, order]), cross(B, A), atol=1e-5)
  np.testing.assert_array_equal(cross(B, A[:, :1]), np.repeat(A[:, :1], 7, axis=1))
  gradient = jax.grad(lambda M: jnp.sum(soft(general(B, A[:, :1], M)) @ A[:, :1]))(M)
  np.testing.assert_array_equal(gradient, 0)


def test_attention_is_a_soft_dictionary(tmp_path):
  result = experiments.run_dictionary(entries=32, width=32, betas=(10.0, 20.0, 40.0, 60.0), seeds=3)
  check(result, tmp_path)
  assert (result.measured['error'] <= result.measured['bound']).all()


def test_scores_without_their_scale_make_hard_attention(tmp_path):
  result = experiments.run_scale(seeds=2, queries=64)
  check(result, tmp_path)
  found = result.measured
  np.testing.assert_allclose(found['entropy, unscaled'], [2.73, 1.34, 0.54, 0.30, 0.14], atol=0.12)
  np.testing.assert_allclose(found['entropy, scaled'], 3.67, atol=0.04)
  np.testing.assert_allclose(found['Jacobian, scaled'], 0.184, atol=0.005)


def test_the_intervals_hold_the_mean_and_shrink_with_seeds():
  values = np.random.default_rng(0).standard_normal(100)
  mean, (low, high) = interval(values)
  assert mean == values.mean() and low < mean < high and abs((high - low) - 4 * values.std() / 10) < 0.1
  assert np.diff(interval(values[:10])[1]) > high - low
  assert interval([1.0, 1.0]) == (1.0, (1.0, 1.0))


def test_every_experiment_is_listed():
  assert set(experiments.EXPERIMENTS.values()) == {
      getattr(experiments, name) for name in dir(experiments) if name.startswith('run_')}
