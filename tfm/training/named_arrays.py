"""The arrays of a state by name, as checkpoints store them: host copies, checksums, and the way back."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

PyTree = Any
Arrays = dict[str, np.ndarray]
"""Keyed by path: 'params/encoder/...', 'opt_state/0/mu/...'."""


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """Leaves of a pytree keyed by their path."""
  pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in pairs}


def snapshot(state: PyTree) -> Arrays:
  """Host copies of all leaves. Real copies: on a CPU a view would share memory with the buffer.

  Where a leaf is cut over several processes, all of them must call this together.
  """
  leaves = {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in named_leaves(state).items()}
  for name, leaf in leaves.items():
    if isinstance(leaf, jax.Array):
      if leaf.is_fully_replicated or leaf.is_fully_addressable:
        leaf.copy_to_host_async()
      else:
        leaves[name] = multihost_utils.process_allgather(leaf, tiled=True)
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
  found = {name: jax.eval_shape(lambda data, name=name: jax.random.wrap_key_data(data, impl=keys[name]), array)
           if name in keys else array for name, array in arrays.items()}
  differences = [f'{name} is new' for name in leaves if name not in found]
  differences += [f'{name} is gone' for name in found if name not in leaves]
  differences += [f'{name} is {value.dtype}{value.shape}, not {leaves[name].dtype}{leaves[name].shape}'
                  for name, value in found.items() if name in leaves
                  and (value.shape, value.dtype) != (leaves[name].shape, leaves[name].dtype)]
  if differences:
    return None, differences
  values = [place(arrays[name], getattr(leaf, 'sharding', None)) for name, leaf in leaves.items()]
  values = [jax.random.wrap_key_data(value, impl=keys[name]) if name in keys else value
            for name, value in zip(leaves, values)]
  return jax.tree.unflatten(jax.tree.structure(abstract), values), []


def is_key(leaf: Any) -> bool:
  """Whether a leaf is a typed random key."""
  return jax.dtypes.issubdtype(getattr(leaf, 'dtype', np.float32), jax.dtypes.prng_key)


def crc(array: np.ndarray) -> int:
  """CRC-32 of the bytes of an array."""
  return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def place(value: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
  """An array that every process has, on the devices that `sharding` names; None is the default device."""
  if sharding is None:
    return jax.device_put(value)
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
