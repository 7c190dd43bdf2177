from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.models.dropout import dropout, keep_mask

SHAPE = (256, 256)
N = SHAPE[0] * SHAPE[1]
BOUND = 4 / N**0.5
"""Four standard deviations of the correlation of two independent masks."""


def correlation(a, b) -> float:
  return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def mask(key, rate=0.5, shape=SHAPE) -> np.ndarray:
  return np.asarray(keep_mask(key, shape, rate))


@pytest.mark.parametrize('rate', [0.01, 0.1, 0.3, 0.5, 0.9])
def test_each_element_is_dropped_with_the_given_probability(rate):
  kept = mask(jax.random.key(3), rate)
  deviation = (rate * (1 - rate) / N)**0.5
  assert abs(kept.mean() - (1 - rate)) < 4 * deviation
  # Rows and columns are binomial as well: their sums scatter as 256 coins do, neither more nor less.
  for axis in (0, 1):
    scatter = kept.sum(axis).var() / (SHAPE[axis] * rate * (1 - rate))
    assert abs(scatter - 1) < 4 * (2 / SHAPE[1 - axis])**0.5


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_what_is_kept_is_scaled_so_that_the_mean_stays(rate):
  x = jnp.full(SHAPE, 3.0)
  dropped = np.asarray(dropout(x, rate, jax.random.key(0)))
  kept = mask(jax.random.key(0), rate)
  np.testing.assert_array_equal(dropped, np.where(kept, np.float32(3) / np.float32(1 - rate), 0))
  assert abs(dropped.mean() - 3) < 4 * 3 * (rate / (1 - rate) / N)**0.5
  assert abs(dropped.var() / (9 * rate / (1 - rate)) - 1) < 0.05


def test_without_a_key_or_a_rate_it_is_the_identity():
  x = jnp.arange(6.)
  assert dropout(x, 0.5, None) is x
  assert dropout(x, 0.0, jax.random.key(0)) is x


def test_the_type_of_the_values_stays():
  for dtype in (jnp.float32, jnp.bfloat16):
    assert dropout(jnp.ones((4, 4), dtype), 0.3, jax.random.key(0)).dtype == dtype


def test_masks_of_different_keys_steps_and_sites_are_uncorrelated():
  keys = [jax.random.key(seed) for seed in range(4)]
  keys += [jax.random.fold_in(jax.random.fold_in(keys[0], step), site) for step in range(3) for site in range(3)]
  masks = [mask(key, 0.3) for key in keys]
  for a, b in combinations(masks, 2):
    assert abs(correlation(a, b)) < BOUND


def test_masks_of_consecutive_seeds_are_no_rearrangements_of_each_other():
  """A hash of (index xor key) would give the second key the first one's mask with indices swapped."""
  flat, other = (mask(jax.random.key(seed)).ravel() for seed in (0, 1))
  for swap in range(64):
    assert abs(correlation(flat[np.arange(N) ^ swap], other)) < BOUND


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_elements_of_a_mask_are_independent_of_their_neighbours(rate):
  kept = mask(jax.random.key(1), rate)
  for step in (1, 2, 3, 4, 8, 16, 32, 64, 128):
    assert abs(correlation(kept[:, step:], kept[:, :-step])) < 1.5 * BOUND
    assert abs(correlation(kept[step:], kept[:-step])) < 1.5 * BOUND


def test_every_axis_of_a_shape_counts():
  kept = mask(jax.random.key(1), shape=(8, 16, 4, 32))
  assert np.array_equal(kept.ravel(), mask(jax.random.key(1), shape=(8 * 16 * 4 * 32,)))
  for axis in range(4):
    first, second = np.take(kept, 0, axis), np.take(kept, 1, axis)
    assert abs(correlation(first, second)) < 4 / first.size**0.5


def test_the_mask_does_not_depend_on_compilation():
  key = jax.random.fold_in(jax.random.key(1), 5)
  np.testing.assert_array_equal(jax.jit(lambda key: keep_mask(key, (33, 7), 0.3))(key), mask(key, 0.3, (33, 7)))


SHARDED = """
import hashlib
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tfm.config import TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.models.dropout import dropout, keep_mask

assert len(jax.devices()) == 8
mesh = jax.make_mesh((4, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
key = jax.random.key(7)
one = dropout(jnp.ones((16, 6, 32)), 0.3, key)
for spec in (P('data'), P('data', None, 'tensor'), P(None, 'tensor', 'data')):
  sharding = NamedSharding(mesh, spec)
  x = jax.device_put(jnp.ones((16, 6, 32)), sharding)
  many = jax.jit(lambda x, key: dropout(x, 0.3, key), out_shardings=sharding)(x, key)
  assert len(many.sharding.device_set) == 8
  np.testing.assert_array_equal(many, one)

model = build_model(TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=16, d_ff=16, num_heads=2, dropout=0.3,
                                      attention_dropout=0.3, activation_dropout=0.3), 11, 11)
random = np.random.default_rng(0)
params = jax.tree.map(lambda leaf: random.normal(1, 0.5, leaf.shape), jax.eval_shape(lambda: initialize(model, key)))
ids = jnp.asarray(random.integers(4, 11, (8, 5)), jnp.int32)
forward = jax.jit(lambda params, ids, key: model.apply({'params': params}, ids, ids, dropout_key=key))
one = forward(params, ids, key)
many = forward(params, jax.device_put(ids, NamedSharding(mesh, P('data'))), key)
assert len(many.sharding.device_set) == 8
np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)
assert np.abs(one - forward(params, ids, jax.random.key(8))).max() > 1
print(hashlib.sha256(np.asarray(keep_mask(key, (33, 7), 0.3)).tobytes()).hexdigest())
"""


def test_masks_do_not_depend_on_the_number_of_devices():
  flags = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
  environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, '-c', SHARDED], env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  # A process with one device draws the same mask as one with eight.
  assert done.stdout.strip() == hashlib.sha256(mask(jax.random.key(7), 0.3, (33, 7)).tobytes()).hexdigest()
