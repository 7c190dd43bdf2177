from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.models.positions import (
    LearnedPositions,
    RelativeBias,
    alibi,
    alibi_slopes,
    relative_bucket,
    rope,
    rope_frequencies,
    sinusoidal,
)

PACKED = jnp.array([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])  # positions begin again with every segment


@pytest.mark.parametrize('d_model', [2, 6, 16])
def test_sinusoids_are_interleaved_as_in_section_3_5(d_model):
  positions = [0, 1, 2, 5, 37]
  expected = np.zeros((len(positions), d_model))
  for row, position in enumerate(positions):
    for i in range(d_model // 2):
      angle = position / 10000 ** (2 * i / d_model)
      expected[row, 2 * i], expected[row, 2 * i + 1] = math.sin(angle), math.cos(angle)
  np.testing.assert_allclose(sinusoidal(jnp.array(positions), d_model), expected, atol=1e-5)


def test_halves_are_the_same_columns_in_another_order():
  table_TxD = sinusoidal(jnp.arange(9), 6)
  order = [0, 2, 4, 1, 3, 5]
  np.testing.assert_array_equal(sinusoidal(jnp.arange(9), 6, halves=True), table_TxD[:, order])


@pytest.mark.parametrize('halves', [False, True])
def test_rows_may_have_positions_of_their_own(halves):
  table_TxD = sinusoidal(jnp.arange(5), 6, halves)
  np.testing.assert_array_equal(sinusoidal(PACKED, 6, halves), table_TxD[PACKED])
  module = LearnedPositions(5, 6)
  variables = module.init(jax.random.key(0), PACKED)
  np.testing.assert_array_equal(module.apply(variables, PACKED), variables['params']['table'][PACKED])


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


# -- turned into queries and keys --

SCALINGS = {'none': {}, 'linear': dict(factor=4.0), 'llama3': dict(factor=8.0, original_length=64),
            'yarn': dict(factor=4.0, original_length=64)}


def heads(T=5, H=3, C=8, dtype=jnp.float32, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal((2, T, H, C)), dtype)


def test_rope_turns_pair_i_as_a_complex_number():
  """Equation 16 of Su et al.: x_m e^(i m theta), with columns i and i + C/2 as real and imaginary part."""
  x, base = heads(), 100.0
  complex_x = np.asarray(x[..., :4], np.complex128) + 1j * np.asarray(x[..., 4:])
  theta = np.array([base ** (-2 * i / 8) for i in range(4)])
  for positions in (PACKED, jnp.array([7, 0, 1, 30, 2])):
    turned = complex_x * np.exp(1j * np.broadcast_to(positions, (2, 5))[:, :, None, None] * theta)
    np.testing.assert_allclose(rope(x, positions, base=base), np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


@pytest.mark.parametrize('scaling', SCALINGS)
def test_scores_of_rope_depend_on_the_distance_only(scaling):
  q, k = heads(seed=1)[:, :1], heads(seed=2)[:, :1]

  def scores(query, key):
    options = dict(base=50.0, scaling=scaling, **SCALINGS[scaling])
    return jnp.sum(rope(q, jnp.array([query]), **options) * rope(k, jnp.array([key]), **options), axis=-1)

  np.testing.assert_allclose(scores(9, 4), scores(105, 100), atol=1e-4)
  assert np.abs(scores(9, 4) - scores(9, 5)).max() > 0.01


def test_rope_keeps_lengths_and_type_and_takes_traced_positions():
  x = heads(dtype=jnp.bfloat16)
  turned = jax.jit(lambda offset: rope(x, offset + jnp.arange(5)))(jnp.int32(70000))
  assert turned.dtype == jnp.bfloat16
  # Angles in bfloat16 would be whole turns off.
  np.testing.assert_allclose(turned.astype(jnp.float32), rope(x.astype(jnp.float32), 70000 + jnp.arange(5)), atol=0.02)
  turned, still = rope(heads(), PACKED), heads()
  np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(still, axis=-1), rtol=1e-5)


def test_scaled_frequencies_lie_between_those_of_short_and_of_stretched_texts():
  plain, amplitude = rope_frequencies(64, 10000.0)
  assert plain.dtype == np.float32 and amplitude == 1
  np.testing.assert_allclose(plain, [10000.0 ** (-2 * i / 64) for i in range(32)], rtol=1e-6)
  np.testing.assert_allclose(rope_frequencies(64, 10000.0, 'linear', 4.0)[0], plain / 4, rtol=1e-6)
  turns = 256 * plain / (2 * math.pi)
  for scaling, slow, fast in (('llama3', 1, 4), ('yarn', 0.7, 50)):  # yarn rounds outwards to whole pairs
    scaled, amplitude = rope_frequencies(64, 10000.0, scaling, 4.0, 256)
    stretch = plain / scaled
    assert (np.diff(stretch) >= -1e-5).all()
    np.testing.assert_allclose(stretch[turns > fast], 1, rtol=1e-6)
    np.testing.assert_allclose(stretch[turns < slow], 4, rtol=1e-6)
    assert ((stretch > 1.01) & (stretch < 3.99)).any()
    assert amplitude == pytest.approx(1 if scaling == 'llama3' else 1 + 0.1 * math.log(4))


def test_yarn_turns_scores_up():
  x = heads()
  np.testing.assert_allclose(rope(x, jnp.zeros(5, jnp.int32), scaling='yarn', factor=4.0, original_length=64),
                             x * (1 + 0.1 * math.log(4)), rtol=1e-6)


def test_an_unknown_scaling_is_refused():
  with pytest.raises(ValueError, match="no rope scaling 'dynamic'; choose 'none', 'linear', 'llama3' or 'yarn'"):
    rope_frequencies(8, scaling='dynamic')


# -- a bias on the scores --

SHAPES = [(5, 5, 0), (1, 9, 4), (3, 8, 5), (6, 2, 3), (4, 7, -2)]


@pytest.mark.parametrize('num_heads, slopes', [
    (1, [2**-8]), (2, [2**-4, 2**-8]), (8, [2.0**-i for i in range(1, 9)]),
    (3, [2**-4, 2**-8, 2**-2]), (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    (12, [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])])
def test_alibi_slopes_are_a_geometric_sequence(num_heads, slopes):
  np.testing.assert_allclose(alibi_slopes(num_heads), slopes, rtol=1e-6)


@pytest.mark.parametrize('T, S, offset', SHAPES)
def test_alibi_is_minus_slope_times_distance(T, S, offset):
  slopes_H = alibi_slopes(3)
  bias = jax.jit(lambda offset: alibi(slopes_H, T, S, offset))(jnp.int32(offset))
  assert bias.shape == (1, 3, T, S) and bias.dtype == jnp.float32
  for h, t, s in np.ndindex(3, T, S):
    assert bias[0, h, t, s] == -slopes_H[h] * abs(t + offset - s)


def test_buckets_are_single_first_and_then_wider():
  """Section 2.1: 32 of them, up to an offset of 128; one direction, by hand."""
  bucket = np.asarray(relative_bucket(-jnp.arange(300), 32, 128, bidirectional=False))
  assert bucket.dtype == np.int32
  np.testing.assert_array_equal(bucket[:17], range(17))
  assert bucket[127] == 31 and (bucket[128:] == 31).all() and bucket[112] == 30
  widths = np.bincount(bucket[:128])
  assert (widths[:16] == 1).all() and (np.diff(widths[16:]) >= -1).all() and widths[31] > 10
  np.testing.assert_array_equal(relative_bucket(jnp.arange(1, 9), 32, 128, bidirectional=False), 0)


def test_half_of_the_buckets_are_for_keys_after_the_query():
  distance = jnp.arange(1, 300)
  after, before = (np.asarray(relative_bucket(sign * distance, 32, 128, bidirectional=True)) for sign in (1, -1))
  np.testing.assert_array_equal(after, before + 16)
  np.testing.assert_array_equal(before[:8], range(1, 9))
  assert before.max() == 15 and relative_bucket(jnp.int32(0), 32, 128, True) == 0


@pytest.mark.parametrize('bidirectional', [True, False])
@pytest.mark.parametrize('T, S, offset', SHAPES)
def test_a_relative_bias_is_looked_up_for_every_pair(T, S, offset, bidirectional):
  module = RelativeBias(8, 6, 3)
  variables = module.init(jax.random.key(0), T, S)
  assert variables['params']['table'].shape == (8, 3)

  def bias(variables, offset):
    return module.apply(variables, T, S, offset, bidirectional)

  def pair_by_pair(variables, offset):
    table = variables['params']['table']
    bucket_TxS = relative_bucket(jnp.array([[s - t - offset for s in range(S)] for t in range(T)]), 8, 6, bidirectional)
    return table[bucket_TxS].transpose(2, 0, 1)[None]

  found, pull = jax.vjp(lambda variables: jax.jit(bias)(variables, jnp.int32(offset)), variables)
  expected, pull_expected = jax.vjp(lambda variables: pair_by_pair(variables, offset), variables)
  np.testing.assert_array_equal(found, expected)
  weights = jnp.asarray(np.random.default_rng(0).standard_normal(found.shape), jnp.float32)
  jax.tree.map(lambda *two: np.testing.assert_allclose(*two, atol=1e-5), pull(weights), pull_expected(weights))
