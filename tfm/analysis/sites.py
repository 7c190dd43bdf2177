"""Names of the places inside a model: `decoder.layers[3].cross_attention.pattern`.

A site is the output of a module, most often of a `Tap`, whose name says what passes there. Its name is the path of the
module in the model with dots; a number in brackets picks one of a row of layers, and without it all are meant, with a
leading axis N. Names and values are the same whether layers are scanned or unrolled. A `*` in a name that is read
stands for anything: `*.pattern` are the patterns of all attentions.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from tfm.section import nearest

Path = tuple[str, ...]
"""Of a module, as Linen names it: ('decoder', 'layers_3', 'cross_attention', 'pattern')."""

VALUE = '_value'
"""What a reading is called in its collection; no submodule has a name that begins with _."""

HOLDS_PATTERN = ('scores', 'pattern')
"""What only the reference kernel holds; whoever asks for it gets that kernel."""

READINGS = {True: 'intermediates', False: 'readings'}
EDITS = {True: 'taps', False: 'edits'}
"""Collections of sites that hold patterns, and of others. Attention looks for the first, to choose its kernel, and a
recurrent decoder attends in a loop over time that hands out slices of them."""


@dataclass(frozen=True)
class Site:
  """A place of one model, for one form of input."""

  name: str
  """Without the number of a layer."""
  paths: tuple[Path, ...]
  """The modules: one for each layer where layers are unrolled, otherwise one."""
  layers: int | None
  """How many there are in a row; None where there is no row."""
  shape: tuple[int, ...] | None
  """Of the value in one layer, in float or bool `dtype`; None where layers differ in it."""
  dtype: Any

  @property
  def scanned(self) -> bool:
    return self.layers is not None and 'layers' in self.paths[0]

  @property
  def holds_pattern(self) -> bool:
    return self.name.rsplit('.', 1)[-1] in HOLDS_PATTERN

  @property
  def query_axis(self) -> int:
    """The axis of the value along which positions run, from the right: BxHxTxS has it at -2, and BxT... at 1."""
    return -2 if self.holds_pattern else 1 - len(self.shape)


def parse(name: str) -> tuple[str, int | None]:
  """A name without its number, and the number: 'layers[3].z' is ('layers.z', 3).

  Raises:
    ValueError: it is not a name.
  """
  numbers = re.findall(r'\[(-?\d+)\]', name)
  bare = re.sub(r'\[-?\d+\]', '', name)
  if len(numbers) > 1 or not re.fullmatch(r'[\w*?]+(\.[\w*?]+)*', bare):
    raise ValueError(f"'{name}' is no name of a site; write it like decoder.layers[3].self_attention.pattern, with one "
                     'number at most.')
  return bare, int(numbers[0]) if numbers else None


def sites(model: nn.Module, params: Any, inputs: Any, method: str | None = None) -> dict[str, Site]:
  """All sites that a pass of these inputs reaches, by name, in alphabetical order.

  Args:
    model: of any family of the package.
    params: its parameters, in its layout.
    inputs: the positional arguments of the method, a tuple; or the only one.
    method: of the model; None is `__call__`.
  """
  leaves, tree = jax.tree.flatten((params, as_inputs(inputs)))
  shapes = tuple((leaf.shape, leaf.dtype) for leaf in map(_with_shape, leaves))
  return _sites(with_reference(model), method, tree, shapes)


def find(name: str, known: Mapping[str, Site]) -> tuple[Site, int | None]:
  """The site of a name, and the number of its layer, counted from 0.

  Raises:
    ValueError: the pass does not reach it, or it has no such layer.
  """
  bare, layer = parse(name)
  if bare not in known:
    raise ValueError(f"The pass never reaches '{name}'{nearest(bare, known) or '.'} `sites` lists all that it reaches.")
  site = known[bare]
  if layer is not None and site.layers is None:
    raise ValueError(f"'{name}' has a number, but '{bare}' is one place; leave the number out.")
  if layer is not None and not -site.layers <= layer < site.layers:
    raise ValueError(f"'{name}': there are {site.layers} layers, from 0.")
  return site, None if layer is None else layer % site.layers


def matching(name: str, known: Mapping[str, Site]) -> list[str]:
  """The names, each with the number if there is one, that a name with `*` stands for; the name itself without."""
  bare, layer = parse(name)
  if not set('*?') & set(bare):
    return [name]
  found = [each for each in known if fnmatch.fnmatchcase(each, bare)]
  if not found:
    raise ValueError(f"No site that the pass reaches is like '{name}'; `sites` lists them.")
  if layer is None:
    return found
  # The number belongs to the part that counts layers, whose place in the name is that of `layers` or of a last part.
  return [re.sub(r'(\blayers\b|\w+$)', rf'\1[{layer}]', each, count=1) for each in found
          if known[each].layers is not None]


def as_inputs(inputs: Any) -> tuple:
  """Arguments as a tuple."""
  return inputs if type(inputs) is tuple else (inputs,)


def named(path: Path, scanned: bool) -> tuple[str, int | None]:
  """The name of a module and its place in a row of layers: None where it stands alone, -1 for all of a scanned row."""
  for i, part in enumerate(path):
    if scanned and part == 'layers':
      return '.'.join(path), -1
    if match := re.fullmatch(r'(\w+?)_(\d+)', part):
      return '.'.join((*path[:i], match[1], *path[i + 1:])), int(match[2])
  return '.'.join(path), None


def intercepting(reached: Callable[[nn.Module, jax.Array], jax.Array]):
  """A context in which `reached` may replace the output of every module called."""

  def interceptor(call, args, kwargs, context):
    value = call(*args, **kwargs)
    # Layers also return what they do not have (None); their states pass a tap besides.
    if context.method_name != '__call__' or not isinstance(value, jax.Array) or not context.module.path:
      return value
    return reached(context.module, value)

  return nn.intercept_methods(interceptor)


def with_reference(model: nn.Module) -> nn.Module:
  """The model with the kernel that holds patterns, where it was told to use another."""
  if getattr(model.config, 'attention_backend', 'auto') in ('auto', 'reference'):
    return model
  return model.clone(config=dataclasses.replace(model.config, attention_backend='reference'))


def _with_shape(leaf):
  return leaf if hasattr(leaf, 'shape') and hasattr(leaf, 'dtype') else jax.numpy.asarray(leaf)


@functools.lru_cache(maxsize=256)
def _sites(model, method, tree, leaves) -> dict[str, Site]:
  params, inputs = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])

  def run(params, inputs):
    def reached(module, value):
      module.sow(READINGS[module.name in HOLDS_PATTERN], VALUE, value)
      return value

    with intercepting(reached):
      return model.apply({'params': params}, *inputs, method=method, mutable=list(READINGS.values()))[1]

  found = {path: values for collection in jax.eval_shape(run, params, inputs).values()
           for path, values in flatten_dict(collection).items()}
  scanned = getattr(model.config, 'scan_layers', False)
  rows: dict[str, list[tuple[int, Path, Any]]] = {}
  for path, values in found.items():
    name, number = named(path[:-1], scanned)
    rows.setdefault(name, []).append((number, path[:-1], values[0]))
  return {name: _site(name, row) for name, row in rows.items()}


def _site(name: str, row: Iterable[tuple[int | None, Path, Any]]) -> Site:
  row = sorted(row, key=lambda each: each[0] or 0)
  numbers, paths, values = zip(*row)
  if numbers[0] == -1:
    return Site(name, paths, values[0].shape[0], values[0].shape[1:], values[0].dtype)
  shapes = {value.shape for value in values}
  return Site(name, paths, None if numbers[0] is None else len(row), shapes.pop() if len(shapes) == 1 else None,
              values[0].dtype)
