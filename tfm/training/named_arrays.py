"""The arrays of a state by name, as checkpoints store them: host copies, checksums, and the way back."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

PyTree = Any
Arrays = dict[str, np.ndarray]
"""Keyed by path: 'params/encoder/...', 'opt_state/0/mu/...'."""


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """Leaves of a pytree keyed by their path."""
  pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in pairs}


def snapshot(state: PyTree) -> Arrays:
  """Host copies of all leaves. Real copies: on a CPU a view would share memory with the buffer."""
  leaves = {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in named_leaves(state).items()}
  for leaf in leaves.values():
    if isinstance(leaf, jax.Array):
      leaf.copy_to_host_async()
  return {name: np.array(leaf, copy=True, order='C') for name, leaf in jax.device_get(leaves).items()}


def rebuild(abstract: PyTree, arrays: Arrays, keys: Mapping[str, str]) -> tuple[PyTree, list[str]]:
  """The pytree `abstract` with the values of `arrays`, each on the devices that its sharding names.

  Args:
    abstract: leaves with shape, dtype and (optional) sharding.
    arrays: what `snapshot` made.
    keys: which arrays are the data of typed random keys, and their implementation.

  Returns:
    The pytree and no differences, or None and what is new, gone or of another shape or type.
  """
  leaves = named_leaves(abstract)
  found = {name: jax.random.wrap_key_data(array, impl=keys[name]) if name in keys else array
           for name, array in arrays.items()}
  differences = [f'{name} is new' for name in leaves if name not in found]
  differences += [f'{name} is gone' for name in found if name not in leaves]
  differences += [f'{name} is {value.dtype}{value.shape}, not {leaves[name].dtype}{leaves[name].shape}'
                  for name, value in found.items() if name in leaves
                  and (value.shape, value.dtype) != (leaves[name].shape, leaves[name].dtype)]
  if differences:
    return None, differences
  values = [_place(found[name], getattr(leaf, 'sharding', None)) for name, leaf in leaves.items()]
  return jax.tree.unflatten(jax.tree.structure(abstract), values), []


def is_key(leaf: Any) -> bool:
  """Whether a leaf is a typed random key."""
  return jax.dtypes.issubdtype(getattr(leaf, 'dtype', np.float32), jax.dtypes.prng_key)


def crc(array: np.ndarray) -> int:
  """CRC-32 of the bytes of an array."""
  return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _place(value: np.ndarray | jax.Array, sharding: jax.sharding.Sharding | None) -> jax.Array:
  if sharding is None or is_key(value):
    return jax.device_put(value, sharding)
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
