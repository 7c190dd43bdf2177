"""Read and replace any value inside a model, in one compiled program.

    run = tfm.load('runs/numbers')
    inputs = source_BxS, target_BxT
    read(run.model, run.params, inputs, where='decoder.layers[1].cross_attention.pattern')
    edit(run.model, run.params, inputs, Edit('encoder.layers.resid_post', at=is_there_Nx1xSx1, value=0.0))

An edit is data: which layers, heads and positions it touches are arrays, so that a new choice of them runs in the
program that the last one compiled, and can be mapped over, differentiated and sharded like any argument. The model
knows nothing of it: its `Tap` modules and scans let pass what stands here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from tfm.analysis.sites import (
    EDITS,
    HOLDS_PATTERN,
    READINGS,
    VALUE,
    Path,
    Site,
    as_inputs,
    find,
    intercepting,
    matching,
    sites,
    with_reference,
)

Reduce = Callable[[jax.Array], jax.Array]
"""What is kept of a value, applied layer by layer as it arises: entropies instead of patterns, one head of many."""

Where = str | Sequence[str] | Mapping[str, Reduce | None]

FIELDS = ('at', 'value', 'scale', 'add')


@struct.dataclass
class Edit:
  """What becomes of the values of one site: y -> where(at, value, scale * y) + add.

  Arrays have the axes of the site's value, 1 where they are the same all along; a site that is a row of layers, and is
  named without a number, has the axis N in front. Scalars, and N numbers for a row of layers, are allowed too. What is
  left out changes nothing; `at` without `value` puts zeros, `value` without `at` replaces everything.
  """

  site: str = struct.field(pytree_node=False)
  at: Any = None
  """bool: where the value is replaced."""
  value: Any = None
  scale: Any = None
  add: Any = None
  function: Callable[[jax.Array, jax.Array], jax.Array] | None = struct.field(pytree_node=False, default=None)
  """Instead of `value`: (y, layer int32 []) -> a new y of the same shape, used where `at` says. Another function
  is another program."""


@struct.dataclass
class Run:
  """What came of a pass."""

  output: Any
  """Of the method."""
  readings: dict[str, jax.Array]
  """By the name that was asked for; rows of layers have the axis N in front."""


def read(model: nn.Module, params: Any, inputs: Any, where: Where, *,
         method: str | None = None) -> dict[str, jax.Array]:
  """The values at some sites, by name. Arguments are those of `run`."""
  return run(model, params, inputs, where=where, method=method).readings


def edit(model: nn.Module, params: Any, inputs: Any, edits: Edit | Sequence[Edit], *, method: str | None = None) -> Any:
  """The output of a pass in which some values are replaced. Arguments are those of `run`."""
  return run(model, params, inputs, edits=edits, method=method).output


def run(model: nn.Module, params: Any, inputs: Any, *, edits: Edit | Sequence[Edit] = (), where: Where = (),
        method: str | None = None, start: jax.Array | int | None = None) -> Run:
  """One pass, with values replaced and read.

  It compiles once for each model, method, choice of sites and shapes of arguments; inside `jit`, `vmap` or `grad` it is
  part of what they make. Readings come after edits of the same site; edits of one site happen in their order.

  Args:
    model: of any family of the package, scanned or unrolled.
    params: its parameters, in its layout; sharded ones give sharded readings.
    inputs: the positional arguments of the method, a tuple; or the only one.
    edits: what to replace.
    where: names of sites to read, or a dict that has for each what to keep of it, a pure function (None: all).
    method: of the model; None is `__call__`.
    start: the edits are meant for the positions of a whole sequence, and this pass computes those from this one on: a
      step of cached decoding. None: the positions of edits and pass are the same.

  Raises:
    ValueError: a site that the pass does not reach, arrays that do not fit it.
  """
  inputs = as_inputs(inputs)
  known = sites(model, params, inputs, method)
  wanted = _wanted(where, known)
  variables, functions = _placed([edits] if isinstance(edits, Edit) else edits, known, start)
  if any(site.holds_pattern for _, site, *_ in wanted) or EDITS[True] in variables:
    model = with_reference(model)
  found = program(model, method, wanted, functions)(params, inputs, variables)
  return Run(found.output, {name: found.readings[name] for name, *_ in wanted})  # as asked, not by alphabet


@functools.lru_cache(maxsize=256)
def program(model: nn.Module, method: str | None, wanted: tuple, functions: tuple):
  """The compiled function behind `run`: (params, inputs, variables) -> Run. The interceptor stands inside, so that no
  program compiled without it, or with another, is ever used in its place."""
  readers = {path: reduce for _, site, _, reduce in wanted for path in site.paths}
  editors = {path: several for path, several in functions}
  collections = sorted({READINGS[site.holds_pattern] for _, site, *_ in wanted})

  def apply(params, inputs, variables):
    edited = set()

    def reached(module, value):
      if module.path in editors:
        edited.add(module.path)
        for i, function in enumerate(editors[module.path]):
          collection = EDITS[module.name in HOLDS_PATTERN]
          value = _edited(value, {name: module.scope.get_variable(collection, f'_{name}_{i}')
                                  for name in (*FIELDS, 'layer')
                                  if module.scope.has_variable(collection, f'_{name}_{i}')}, function, module.path)
      if module.path in readers:
        reduce = readers[module.path]
        module.sow(READINGS[module.name in HOLDS_PATTERN], VALUE, value if reduce is None else reduce(value))
      return value

    with intercepting(reached):
      output, state = model.apply({'params': params, **variables}, *inputs, method=method, mutable=collections)
    if missing := editors.keys() - edited:
      raise ValueError(f'The pass never reached {sorted(map("/".join, missing))}, which was to be edited.')
    found = {path: values for each in state.values() for path, values in flatten_dict(each).items()}
    return Run(output, {name: _collected(name, site, layer, found) for name, site, layer, _ in wanted})

  return jax.jit(apply)


def _edited(y: jax.Array, arrays: dict[str, jax.Array], function, path: Path) -> jax.Array:
  for name, array in arrays.items():
    if name != 'layer' and not all(a in (1, b) for a, b in zip(array.shape, y.shape)):
      raise ValueError(f'{name} of the edit at {"/".join(path)} has shape {array.shape}, and the value {y.shape}.')
  new = y if 'scale' not in arrays else y * arrays['scale'].astype(y.dtype)
  if function is not None:
    value = function(y, arrays['layer'])
    if value.shape != y.shape:
      raise ValueError(f'The function at {"/".join(path)} gives shape {value.shape} for {y.shape}.')
  else:
    value = arrays.get('value', None if 'at' not in arrays else jnp.zeros((), y.dtype))
  if value is not None:
    # A choice, not a sum with weights: masked scores are -inf.
    new = jnp.where(arrays.get('at', True), value.astype(y.dtype), new)
  return new if 'add' not in arrays else new + arrays['add'].astype(y.dtype)


def _collected(name: str, site: Site, layer: int | None, found: Mapping[Path, Any]) -> jax.Array:
  values = []
  for path in site.paths:
    several = found[(*path, VALUE)]
    if len(several) != 1:
      raise ValueError(f"'{name}' is reached {len(several)} times in one pass; read another site.")
    values.append(several[0])
  if site.layers is None:
    return values[0]
  if site.scanned:
    return values[0] if layer is None else values[0][layer]
  if layer is not None:
    return values[layer]
  if len({value.shape for value in values}) > 1:
    raise ValueError(f"The layers of '{name}' differ in shape; name one, with a number in brackets.")
  return jnp.stack(values)


def _wanted(where: Where, known: Mapping[str, Site]) -> tuple[tuple[str, Site, int | None, Reduce | None], ...]:
  if isinstance(where, str):
    where = [where]
  asked = where if isinstance(where, Mapping) else dict.fromkeys(where)
  wanted = {name: (name, *find(name, known), reduce)
            for each, reduce in asked.items() for name in matching(each, known)}
  reduces: dict[str, set] = {}
  for name, site, _, reduce in wanted.values():
    reduces.setdefault(site.name, set()).add(reduce)
    if len(reduces[site.name]) > 1:
      raise ValueError(f"'{name}' is asked for with two functions; read twice, or with one that keeps both.")
  return tuple(wanted.values())


# -- edits as data ----------------------------------------------------------------------------------------------------


def _placed(edits: Sequence[Edit], known: Mapping[str, Site], start) -> tuple[dict, tuple]:
  """Edits as a collection of variables, and which functions stand at which paths."""
  variables: dict[Path, jax.Array] = {}
  functions: dict[Path, list] = {}
  for each in edits:
    site, layer = find(each.site, known)
    if site.shape is None and layer is None:
      raise ValueError(f"The layers of '{each.site}' differ in shape; name one, with a number in brackets.")
    arrays = _arrays(each, site, layer, start)
    for number, path in enumerate(site.paths):
      if layer is not None and not site.scanned and number != layer:
        continue
      count = len(functions.setdefault(path, []))
      functions[path].append(each.function)
      for name, array in arrays.items():
        one = array if site.layers is None or site.scanned else array[number if layer is None else 0]
        variables[(EDITS[site.holds_pattern], *path, f'_{name}_{count}')] = one
  return unflatten_dict(variables), tuple((path, tuple(several)) for path, several in functions.items())


def _arrays(each: Edit, site: Site, layer: int | None, start) -> dict[str, jax.Array]:
  """The arrays of an edit with as many axes as the site's value, and N in front of them in a row of layers."""
  given = {name: jnp.asarray(getattr(each, name)) for name in FIELDS if getattr(each, name) is not None}
  if each.function is not None:
    if 'value' in given:
      raise ValueError(f"The edit of '{each.site}' has a value and a function; give one of them.")
    given.setdefault('at', jnp.asarray(True))
  if not given:
    raise ValueError(f"The edit of '{each.site}' changes nothing; give it {', '.join(FIELDS)} or function.")
  arrays = {name: _with_axes(array, name, each.site, site, layer, start) for name, array in given.items()}
  if site.layers is None:
    return arrays | ({'layer': jnp.int32(0)} if each.function else {})
  if layer is not None and site.scanned:
    # One layer of a loop is all of them, with the others as they were: the same program for every number.
    here = jnp.arange(site.layers) == layer
    arrays = {name: jnp.broadcast_to(array, (site.layers, *array.shape[1:])) for name, array in arrays.items()}
    here = here.reshape(-1, *[1] * (next(iter(arrays.values())).ndim - 1))
    for name, neutral in (('scale', 1), ('add', 0)):
      if name in arrays:
        arrays[name] = jnp.where(here, arrays[name], neutral)
    if 'value' in arrays or 'at' in arrays:
      arrays['at'] = jnp.logical_and(arrays.get('at', True), here)
  if each.function is not None:
    arrays['layer'] = jnp.arange(site.layers) if layer is None or site.scanned else jnp.full((1,), layer)
  return arrays


def _with_axes(array: jax.Array, name: str, asked: str, site: Site, layer: int | None, start) -> jax.Array:
  rows = 0 if site.layers is None else 1
  rank = len(site.shape)
  if array.ndim == 0 or (rows and layer is None and array.shape == (site.layers,)):
    array = array.reshape((-1,) * rows + (1,) * rank) if rows else array.reshape((1,) * rank)
  elif rows and layer is not None and array.ndim == rank:
    array = array[None]
  if array.ndim != rank + rows or (rows and layer is not None and array.shape[0] != 1):
    raise ValueError(
        f"{name} of the edit of '{asked}' has shape {array.shape}; give a scalar"
        f"{', a number for each layer' if rows and layer is None else ''} or the axes of the value, {site.shape}"
        f"{f', behind one for {site.layers} layers' if rows and layer is None else ''}, 1 where it is the same.")
  if start is not None and array.shape[site.query_axis] > 1:
    array = jax.lax.dynamic_slice_in_dim(array, start, site.shape[site.query_axis], array.ndim + site.query_axis)
  full = list(array.shape)
  if rows and layer is None:
    full[0] = site.layers
  if site.holds_pattern:
    full[-2] = site.shape[-2]  # a decoder that attends in a loop over time takes its slice of this axis
  return jnp.broadcast_to(array, full) if math.prod(full) >= array.size else array
