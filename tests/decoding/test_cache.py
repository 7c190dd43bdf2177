import jax
import jax.numpy as jnp
import numpy as np

from tfm.decoding.cache import Cache


def test_reorder_moves_the_rows_of_every_leaf_of_steps_and_nothing_else():
  cache = Cache(index=jnp.int32(3), source={'memory': jnp.arange(2.)},
                steps={'keys': jnp.arange(24.).reshape(4, 3, 2), 'more': [jnp.arange(4)]})
  rows_R = jnp.array([1, 1, 3, 2])
  moved = jax.jit(lambda cache: cache.reorder(rows_R))(cache)
  for before, after in zip(jax.tree.leaves(cache.steps), jax.tree.leaves(moved.steps)):
    np.testing.assert_array_equal(after, np.asarray(before)[[1, 1, 3, 2]])
  np.testing.assert_array_equal(moved.source['memory'], cache.source['memory'])
  assert moved.index == 3


def test_steps_of_one_token_equal_one_step_of_many(toy):
  model = toy()
  tokens_RxT = jnp.array([[1, 4, 5], [1, 3, 4]])
  cache = model.init_cache(model.sources(2))
  whole_RxTxV, _ = model.step(tokens_RxT, cache)
  for t in range(3):
    logits_RxTxV, cache = model.step(tokens_RxT[:, t:t + 1], cache)
    np.testing.assert_allclose(logits_RxTxV[:, 0], whole_RxTxV[:, t], rtol=1e-6)
  assert cache.index == 3
