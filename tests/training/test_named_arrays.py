from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tfm.training.named_arrays import crc, is_key, named_leaves, rebuild, snapshot


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  opt_state: Any
  key: Any


@pytest.fixture
def state() -> State:
  params = {'encoder': {'kernel': jnp.arange(6.0).reshape(2, 3)}, 'bias': jnp.arange(3).astype(jnp.bfloat16)}
  return State(jnp.int32(7), params, optax.adam(0.1).init(params), jax.random.key(5))


def test_names_are_paths(state):
  assert set(named_leaves(state)) == {
      'step', 'params/encoder/kernel', 'params/bias', 'key', 'opt_state/0/count', 'opt_state/0/mu/encoder/kernel',
      'opt_state/0/mu/bias', 'opt_state/0/nu/encoder/kernel', 'opt_state/0/nu/bias'}


def test_there_and_back(state):
  arrays = snapshot(state)
  assert all(type(array) is np.ndarray for array in arrays.values())
  keys = {'key': str(jax.random.key_impl(state.key))}
  for abstract in (state, jax.eval_shape(lambda: state)):
    found, differences = rebuild(abstract, arrays, keys)
    assert differences == [] and jax.tree.structure(found) == jax.tree.structure(state)
    for (name, a), b in zip(named_leaves(found).items(), named_leaves(state).values()):
      assert a.dtype == b.dtype and a.shape == b.shape and isinstance(a, jax.Array), name
      a, b = (jax.random.key_data(x) if is_key(x) else x for x in (a, b))
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name
  assert float(jax.random.uniform(found.key)) == float(jax.random.uniform(state.key))


def test_arrays_go_where_the_sharding_says(state):
  mesh = jax.make_mesh((1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
  found, _ = rebuild(abstract, snapshot(state), {'key': str(jax.random.key_impl(state.key))})
  assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {sharding}


def test_a_snapshot_outlives_its_buffers(state):
  arrays = snapshot(state)
  jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state.params)
  np.testing.assert_array_equal(arrays['params/encoder/kernel'], np.arange(6.0).reshape(2, 3))


def test_what_does_not_fit_is_named(state):
  arrays, keys = snapshot(state), {'key': str(jax.random.key_impl(state.key))}
  other = state.replace(params={'encoder': {'kernel': jnp.zeros((2, 4))}, 'bias': jnp.zeros(3), 'extra': jnp.zeros(1)},
                        opt_state=())
  found, differences = rebuild(other, arrays, keys)
  assert found is None
  assert set(differences) == {
      'params/extra is new', 'params/encoder/kernel is float32(2, 3), not float32(2, 4)',
      'params/bias is bfloat16(3,), not float32(3,)',
      *(f'opt_state/0/{name} is gone' for name in ('count', 'mu/encoder/kernel', 'mu/bias', 'nu/encoder/kernel',
                                                   'nu/bias'))}


def test_is_key(state):
  assert [name for name, leaf in named_leaves(state).items() if is_key(leaf)] == ['key']
  assert not is_key(np.zeros(2, np.uint32)) and not is_key(3)


@pytest.mark.parametrize('array', [np.arange(12.0).reshape(3, 4), np.arange(5).astype(jnp.bfloat16), np.int32(4)])
def test_a_flipped_bit_changes_the_checksum(array):
  array = np.asarray(array)
  flipped = bytearray(array.tobytes())
  for position in range(len(flipped)):
    flipped[position] ^= 1
    assert crc(np.frombuffer(bytes(flipped), array.dtype).reshape(array.shape)) != crc(array)
    flipped[position] ^= 1
  assert crc(np.asfortranarray(array)) == crc(array)  # of the values in order, not of how they lie in memory
