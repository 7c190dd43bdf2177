from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.models.positions import LearnedPositions, sinusoidal


@pytest.mark.parametrize('d_model', [2, 6, 16])
def test_sinusoids_are_interleaved_as_in_section_3_5(d_model):
  positions = [0, 1, 2, 5, 37]
  expected = np.zeros((len(positions), d_model))
  for row, position in enumerate(positions):
    for i in range(d_model // 2):
      angle = position / 10000 ** (2 * i / d_model)
      expected[row, 2 * i], expected[row, 2 * i + 1] = math.sin(angle), math.cos(angle)
  np.testing.assert_allclose(sinusoidal(jnp.array(positions), d_model), expected, atol=1e-5)


def test_a_shift_of_sinusoids_is_a_rotation_of_each_pair():
  """Section 3.5: PE(pos + k) is a linear function of PE(pos), the same for every pos."""
  table_TxD = np.asarray(sinusoidal(jnp.arange(12), 8), np.float64).reshape(12, 4, 2)
  for i in range(4):
    angle = 3 / 10000 ** (i / 4)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    np.testing.assert_allclose(table_TxD[3:, i], table_TxD[:-3, i] @ rotation.T, atol=1e-5)


def test_learned_positions_are_rows_of_a_table():
  module = LearnedPositions(6, 4)
  variables = module.init(jax.random.key(0), jnp.arange(2))
  table = variables['params']['table']
  assert table.shape == (6, 4)
  np.testing.assert_array_equal(module.apply(variables, jnp.array([5, 0, 2])), table[np.array([5, 0, 2])])


@pytest.mark.parametrize('side', ['source', 'target'])
def test_more_positions_than_the_learned_table_has_are_refused(tiny, ids, side):
  longest = 5
  model, variables = tiny(positions='learned', max_positions=longest)
  source, target = (rows[:, :longest] for rows in ids)
  jax.eval_shape(lambda: model.apply(variables, source, target))
  longer = jnp.ones((3, longest + 1), jnp.int32)
  with pytest.raises(ValueError, match=f'6 {side} positions .*max_positions=5'):
    jax.eval_shape(lambda: model.apply(variables, *((longer, target) if side == 'source' else (source, longer))))


def test_a_cache_longer_than_the_learned_table_is_refused(tiny, ids):
  model, variables = tiny(positions='learned', max_positions=5)

  def start(length):
    memory = model.apply(variables, ids[0][:, :5], method='encode')
    return model.apply(variables, memory, length, method='init_cache')

  jax.eval_shape(lambda: start(5))
  with pytest.raises(ValueError, match='6 target positions .*max_positions=5'):
    jax.eval_shape(lambda: start(6))


def test_sinusoidal_positions_have_no_limit(tiny):
  model, variables = tiny()
  ids = jnp.ones((1, 3000), jnp.int32)
  assert jax.eval_shape(lambda: model.apply(variables, ids[:, :2], ids)).shape == (1, 3000, 17)
