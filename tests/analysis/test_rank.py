"""Rank residuals, and the sum over paths against the network itself."""

import jax
import jax.numpy as jnp
import numpy as np

from tfm.analysis.rank import by_length, composite_norm, paths, rank_residual, residual


def test_equal_tokens_have_no_residual_and_one_token_apart_has_all_but_its_part():
  assert rank_residual(jnp.ones((5, 3))) == 0
  x = jnp.zeros((4, 2)).at[0].set(1.0)
  np.testing.assert_allclose(residual(x).sum(0), 0, atol=1e-7)
  np.testing.assert_allclose(composite_norm(x), np.sqrt(1 * 2), rtol=1e-6)
  np.testing.assert_allclose(rank_residual(x), np.sqrt(1.5 * 1.5) / np.sqrt(2), rtol=1e-6)


def test_it_is_computed_for_all_that_stand_in_front():
  x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
  np.testing.assert_allclose(rank_residual(x)[1, 2], rank_residual(x[1, 2]), rtol=1e-6)


def network(x, projections, weights, skip):
  """Attention alone, with the patterns it made."""
  found = []
  for queries, each in zip(projections, weights):
    pattern_HxTxT = jax.nn.softmax(jnp.einsum('td,hde,se->hts', x, queries, x), axis=-1)
    mixed = jnp.einsum('hts,sd,hde->te', pattern_HxTxT, x, each)
    found.append(pattern_HxTxT)
    x = x + mixed if skip else mixed
  return x, jnp.stack(found)


def test_the_paths_sum_to_the_network():
  N, H, T, D = 4, 2, 6, 5
  keys = jax.random.split(jax.random.key(1), 3)
  with jax.enable_x64(True):
    x = jax.random.normal(keys[0], (T, D), jnp.float64)
    projections, weights = (jax.random.normal(key, (N, H, D, D), jnp.float64) * 0.4 for key in keys[1:])
    for skip, count, lengths in ((False, H**N, [0, 0, 0, 0, 16]), (True, (H + 1)**N, [1, 8, 24, 32, 16])):
      expected, patterns = network(x, projections, weights, skip)
      found = paths(patterns, weights, x, skip=skip)
      assert len(found) == count and [len(each) for each in by_length(found)] == lengths
      np.testing.assert_allclose(sum(found.values()), expected, atol=1e-12)
