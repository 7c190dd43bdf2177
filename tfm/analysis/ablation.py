"""Edits that take something away: heads, layers, positions, single looks.

What stands in the place of what is gone decides what the answer means (Chan et al. 2022, "Causal scrubbing"): zeros may
be a value that the model never saw, a mean keeps what is always there, the identity pattern keeps the value path and
takes the mixing of tokens alone (Menta et al. 2025, "attention short-circuit").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tfm.analysis.engine import Edit, read
from tfm.analysis.sites import Site, find, sites

Some = int | Sequence[int] | np.ndarray | jax.Array | None
"""Numbers of layers, heads or positions, or bool for each; None: all."""


def mask(site: Site, *, layers: Some = None, heads: Some = None, positions: Some = None) -> jax.Array:
  """bool with the axes of the site's value, N in front of a row of layers: where all three conditions hold.

  Args:
    site: from `sites`.
    layers, heads, positions: which; of the queries where the value is a pattern.

  Raises:
    ValueError: the value has no such axis, or a number is out of range.
  """
  axes = len(site.shape) + (site.layers is not None)
  found = jnp.ones((1,) * axes, bool)
  for name, which, axis in (('layers', layers, None if site.layers is None else -axes), ('heads', heads, _heads(site)),
                            ('positions', positions, site.query_axis)):
    if which is None:
      continue
    if axis is None:
      raise ValueError(f"{name} are given, but '{site.name}' has none; leave them out.")
    size = site.layers if name == 'layers' else site.shape[axis]
    found = found & _chosen(name, which, size, site.name).reshape(-1, *[1] * (-axis - 1))
  return found


def zero(site: Site, **which: Some) -> Edit:
  """Zeros in the place of the values that `mask(site, **which)` picks."""
  return Edit(site.name, at=mask(site, **which), value=0.0)


def mean(site: Site, means: jax.Array, **which: Some) -> Edit:
  """`means`, from `mean_value`, in the place of what `mask(site, **which)` picks."""
  return Edit(site.name, at=mask(site, **which), value=means)


def mean_value(model, params: Any, batches: Sequence[tuple], name: str, real: Sequence[jax.Array] | None = None,
               method: str | None = None) -> jax.Array:
  """The mean of a site's values over rows and positions, 1 along those axes: what is there whatever the text.

  Args:
    batches: inputs of passes; `real` has for each a bool array, rows x positions, that is False at padding.

  Raises:
    ValueError: the site holds patterns, whose positions differ in how many keys they have.
  """
  site, layer = find(name, sites(model, params, batches[0], method))
  if site.holds_pattern:
    raise ValueError(f"The mean of '{name}' over positions is no pattern: they differ in how far they see. Use "
                     '`short_circuit` or `uniform`.')
  total = count = 0
  for i, inputs in enumerate(batches):
    value = read(model, params, inputs, name, method=method)[name]
    rows = 0 if site.layers is None or layer is not None else 1
    shape = value.shape[rows:rows + 2]
    weight = jnp.ones(shape) if real is None else real[i].astype(jnp.float32)
    weight = weight.reshape((1,) * rows + shape + (1,) * (value.ndim - rows - 2))
    total = total + jnp.sum(value * weight, axis=(rows, rows + 1), keepdims=True)
    count = count + weight.sum()
  return total / count


def short_circuit(site: Site, layers: Some = None, heads: Some = None) -> Edit:
  """Every position attends to itself alone: pattern := identity (Menta et al. 2025). Values, output projection, norms,
  MLP and skip connection stay; only the mixing of tokens is gone.

  Raises:
    ValueError: the site is no pattern of self-attention.
  """
  T, S = _pattern(site)
  if T != S:
    raise ValueError(f"'{site.name}' is {T} x {S}: queries are no keys there, so none can attend to itself. Choose "
                     'self-attention.')
  return Edit(site.name, at=mask(site, layers=layers, heads=heads), value=_behind(jnp.eye(T), site))


def uniform(site: Site, allowed: jax.Array, layers: Some = None, heads: Some = None) -> Edit:
  """Every position attends equally to all that it may see.

  Args:
    allowed: bool, broadcastable to BxHxTxS and of four axes.
  """
  _pattern(site)
  weights = allowed / jnp.maximum(allowed.sum(-1, keepdims=True), 1)
  return Edit(site.name, at=mask(site, layers=layers, heads=heads), value=_behind(weights, site))


def knock_out(site: Site, queries: Some, keys: Some, layers: Some = None, heads: Some = None) -> Edit:
  """Queries no longer see keys (Geva et al. 2023, "attention knock-out"). Of a site of scores they become -inf, so that
  the other keys share what is freed; of a pattern they become 0, and the row sums to less."""
  _pattern(site)
  seen = _chosen('keys', keys, site.shape[-1], site.name)
  gone = mask(site, layers=layers, heads=heads, positions=queries) & seen
  return Edit(site.name, at=gone, value=-jnp.inf if site.name.endswith('scores') else 0.0)


def _heads(site: Site) -> int | None:
  if site.holds_pattern:
    return -3
  return -2 if site.name.rsplit('.', 1)[-1] in ('z', 'query', 'key', 'value') and len(site.shape) == 4 else None


def _chosen(name: str, which: Some, size: int, site: str) -> jax.Array:
  if which is None:
    return jnp.ones(size, bool)
  which = jnp.asarray(which)
  if which.dtype == bool:
    if which.shape != (size,):
      raise ValueError(f"{name} of '{site}' has shape {which.shape}; give {size} of bool, or numbers.")
    return which
  if not isinstance(which, jax.core.Tracer) and which.size and not (-size <= int(which.min()) and
                                                                    int(which.max()) < size):
    raise ValueError(f"{name} of '{site}' are {which.tolist()}; there are {size}, from 0.")
  return jnp.isin(jnp.arange(size), jnp.atleast_1d(which).astype(int) % size)


def _pattern(site: Site) -> tuple[int, int]:
  if not site.holds_pattern:
    raise ValueError(f"'{site.name}' is no pattern; choose a site that ends in .pattern or .scores.")
  return site.shape[-2:]


def _behind(array: jax.Array, site: Site) -> jax.Array:
  """With ones in front, as many axes as the site has."""
  axes = len(site.shape) + (site.layers is not None)
  return array.reshape((1,) * (axes - array.ndim) + array.shape)
