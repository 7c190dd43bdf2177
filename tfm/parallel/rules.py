"""The one table of sharding: parameter path -> logical axes -> mesh axes; and the same for activations.

Parameters are matched by path, so model code names no devices; activations are named where they arise, by
`constrain`. Both refuse what they cannot place: an array no rule covers, a name no table has, two dimensions on one
mesh axis, a dimension that its devices do not divide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tfm.config import ConfigError
from tfm.parallel.mesh import BATCH_AXES

PARAMETER_AXES: dict[str, tuple[str, ...]] = {
    r'(query|key|value)/kernel': ('embed', 'heads', 'head_width'),
    r'(query|key|value)/bias': ('heads', 'head_width'),
    r'(self|cross)_attention/output/kernel': ('heads', 'head_width', 'embed'),
    r'(self|cross)_attention/output/bias': ('bias',),
    r'(self|cross)_attention/sinks': ('heads',),
    r'(macaron_)?mlp/(inner|gate)/kernel': ('embed', 'mlp'),
    r'(macaron_)?mlp/(inner|gate)/bias': ('mlp',),
    r'(macaron_)?mlp/outer/kernel': ('mlp', 'embed'),
    r'(macaron_)?mlp/outer/bias': ('bias',),
    r'(macaron_)?mlp/router': ('embed', 'bias'),
    r'(macaron_)?mlp/(inner|gate)': ('experts', 'embed', 'mlp'),
    r'(macaron_)?mlp/outer': ('experts', 'mlp', 'embed'),
    r'convolution/(inner|gate)/kernel': ('embed', 'channels'),
    r'convolution/depthwise/kernel': ('kernel_width', 'channels'),
    r'convolution/(inner|gate|depthwise)/bias': ('channels',),
    r'convolution/outer/kernel': ('channels', 'embed'),
    r'convolution/outer/bias': ('bias',),
    r'convolution/kernel': ('kernel_width', 'states', 'states'),
    r'input_projection/kernel': ('embed', 'states'),
    r'(encoder|decoder)/output_projection/kernel': ('states', 'embed'),
    r'query_projection/kernel': ('states', 'embed'),
    r'cross_attention/output_projection/kernel': ('embed', 'states'),
    r'(convolution|\w+_projection)/(scale|bias)': ('bias',),
    r'(forward|backward|(decoder/(layers|bridge)_\d+)|maps)/(kernel|recurrent|context)': ('gates', 'states', 'states'),
    r'(forward|backward|(decoder/(layers|bridge)_\d+)|maps)/bias': ('gates', 'bias'),
    r'candidate_bias': ('bias',),
    r'cross_attention/(score/(query_kernel|key_kernel|weight)|centre/kernel)': ('states', 'states'),
    r'cross_attention/(score/(bias|output)|centre/output)': ('bias',),
    r'\w*norm/(scale|bias)': ('bias',),
    r'((source|target)_embedding|output)/table': ('vocab', 'embed'),
    r'output_bias': ('vocab',),
    r'(source|target)_positions/table': ('positions', 'embed'),
    r'relative_bias/table': ('positions', 'heads'),
    r'token_types/table': ('positions', 'embed'),
    r'(output_transform|pooler)/kernel': ('embed', 'bias'),
    r'classifier/kernel': ('embed', 'bias'),
    r'(output_transform|pooler|classifier)/bias': ('bias',),
}
"""End of a parameter's path -> its logical axes. Stacked layers have 'layers' in front."""

REPLICATED_STATE = r'(^|/)(v|v_row|v_col)/|(^|/)ns_coeffs$'
"""Optimizer state that is small and not shaped like parameters: Adafactor's means, Muon's coefficients."""

MeshAxes = str | tuple[str, ...] | None

PARAMETER_MESH: dict[str, MeshAxes] = {
    'embed': 'fsdp', 'heads': 'tensor', 'mlp': 'tensor', 'channels': 'tensor', 'vocab': 'tensor',
    'experts': 'expert', 'head_width': None, 'kernel_width': None, 'positions': None, 'states': None, 'gates': None,
    'bias': None, 'layers': None,
}
"""Logical axis of a parameter -> mesh axes; None is not cut. Small vectors ('bias') are worth no communication."""

ACTIVATION_MESH: dict[str, MeshAxes] = {
    'batch': BATCH_AXES, 'length': 'context', 'heads': 'tensor', 'mlp': 'tensor', 'channels': 'tensor',
    'vocab': 'tensor', 'embed': None, 'head_width': None,
}
"""Logical axis of an activation -> mesh axes."""


# -- parameters -------------------------------------------------------------------------------------------------------


def logical_axes(path: str, ndim: int) -> tuple[str, ...]:
  """Logical axes of the parameter (or of the moment shaped like it) at `path`; scalars have none.

  Raises:
    ConfigError: no rule covers the path, or the rule is for another number of dimensions.
  """
  if ndim == 0:
    return ()
  if re.search(REPLICATED_STATE, path):
    return ('bias',) * ndim
  for pattern, axes in PARAMETER_AXES.items():
    if re.search(f'(^|/){pattern}$', path):
      axes = ('layers', *axes) if re.search('(^|/)layers/', path) else axes
      if len(axes) != ndim:
        raise ConfigError(f'{path} has {ndim} dimensions, but its sharding rule names {len(axes)}: {axes}; mend '
                          'PARAMETER_AXES in tfm/parallel/rules.py.')
      return axes
  raise ConfigError(f'No sharding rule covers {path}; add one to PARAMETER_AXES in tfm/parallel/rules.py.')


def shardings(mesh: Mesh, tree: Any) -> Any:
  """A `NamedSharding` for every leaf of `tree`: parameters, or a whole training state (leaves need shapes only).

  Raises:
    ConfigError: names the first parameter that cannot be placed, and why.
  """

  def place(path, leaf) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    spec = partition(logical_axes(name, leaf.ndim), PARAMETER_MESH, name)
    for size, axis, names in zip(leaf.shape, logical_axes(name, leaf.ndim), spec):
      _require_divisible(mesh, name, axis, size, names)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place, tree)


def partition(axes: tuple[str, ...], table: Mapping[str, MeshAxes], name: str) -> PartitionSpec:
  """Mesh axes of an array with these logical axes.

  Raises:
    ConfigError: `table` lacks an axis, or cuts two dimensions along one mesh axis.
  """
  if unknown := [axis for axis in axes if axis not in table]:
    raise ConfigError(f"{name} has the logical axis '{unknown[0]}', which no rule knows; add it to the tables of "
                      'tfm/parallel/rules.py.')
  spec = tuple(table[axis] for axis in axes)
  used = [each for names in spec if names is not None for each in ((names,) if isinstance(names, str) else names)]
  for each in used:
    if used.count(each) > 1:
      raise ConfigError(f"{name} with axes {axes} would be cut twice along mesh axis '{each}'; mend the tables of "
                        'tfm/parallel/rules.py.')
  return PartitionSpec(*spec)


_REMEDIES = {
    'vocab': 'set model.vocab_multiple to a multiple of it (the added rows are masked)',
    'heads': 'choose model.num_heads as a multiple of it', 'mlp': 'choose model.d_ff as a multiple of it',
    'embed': 'choose model.d_model as a multiple of it', 'channels': 'choose model.d_model as a multiple of it',
    'batch': 'choose data.rows_multiple as a multiple of it',
    'length': 'choose data.width_multiple as a multiple of it', 'experts': 'choose model.experts as a multiple of it',
}


def _require_divisible(mesh: Any, name: str, axis: str, size: int, names: MeshAxes) -> None:
  if names is None:
    return
  names = (names,) if isinstance(names, str) else names
  devices = math.prod(mesh.shape[each] for each in names)
  if size % devices:
    raise ConfigError(f'{name}: its {axis} axis has {size} entries, which the {devices} devices of mesh.'
                      f'{" x mesh.".join(names)} cannot share; {_REMEDIES[axis]}, or use fewer devices.')


# -- batches and activations ------------------------------------------------------------------------------------------


def batch_shardings(mesh: Mesh, shape: str) -> tuple[NamedSharding, ...]:
  """Of the arrays of a batch for a model of this shape (`TransformerConfig.shape`): two, and for an encoder-decoder two
  more, which only packed pairs have, the segments of both sides. What a decoder learns from is one longer than what is
  computed of it, so it is cut by rows alone; so are segments, in which every position looks for the beginning of its
  own."""
  rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  positions = NamedSharding(mesh, PartitionSpec(BATCH_AXES, 'context'))
  return {'encoder_decoder': (positions, rows, rows, rows), 'decoder_only': (rows, rows),
          'encoder_only': (positions,) * 2}[shape]


def constrain(x: jax.Array, *axes: str) -> jax.Array:
  """Say how an activation lies on the mesh of `jax.set_mesh`; x itself where there is none, or a single device.

  Args:
    x: any array inside a jitted function.
    axes: a logical axis for each of its dimensions, from `ACTIVATION_MESH`.

  Raises:
    ConfigError: the names do not fit the array, or its devices do not divide it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  name = f'An activation of shape {x.shape}'
  if len(axes) != x.ndim:
    raise ConfigError(f'{name} was given {len(axes)} logical axes: {axes}; name one for each dimension.')
  free = {each for each in mesh.axis_names if each not in mesh.manual_axes}  # inside shard_map the others are local
  spec = []
  for size, axis, names in zip(x.shape, axes, partition(axes, ACTIVATION_MESH, name)):
    names = tuple(each for each in ((names,) if isinstance(names, str) else names or ()) if each in free)
    _require_divisible(mesh, name, axis, size, names)
    spec.append(names or None)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
