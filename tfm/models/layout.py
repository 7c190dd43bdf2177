"""The two layouts of a parameter tree: one entry per layer (`layers_0`, `layers_1`, ...) or one stacked `layers`."""

from __future__ import annotations

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp

Layout = Literal['scanned', 'unrolled']
_LAYER = re.compile(r'layers_(\d+)')


def layout_of(params: dict[str, Any]) -> Layout:
  return 'scanned' if any('layers' in params.get(stack, ()) for stack in ('encoder', 'decoder')) else 'unrolled'


def to_layout(params: dict[str, Any], layout: Layout) -> dict[str, Any]:
  """The same parameters in the other layout (lossless), or unchanged if they are in it already."""
  convert = _stack if layout == 'scanned' else _unstack
  return {name: convert(module) if isinstance(module, dict) else module for name, module in params.items()}


def _stack(module: dict[str, Any]) -> dict[str, Any]:
  numbered = {int(match[1]): name for name in module if (match := _LAYER.fullmatch(name))}
  if not numbered:
    return module
  layers = [module[numbered[i]] for i in sorted(numbered)]
  rest = {name: value for name, value in module.items() if name not in numbered.values()}
  return {**rest, 'layers': jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def _unstack(module: dict[str, Any]) -> dict[str, Any]:
  if 'layers' not in module:
    return module
  count = jax.tree.leaves(module['layers'])[0].shape[0]
  rest = {name: value for name, value in module.items() if name != 'layers'}
  return {**rest, **{f'layers_{i}': jax.tree.map(lambda leaf, i=i: leaf[i], module['layers']) for i in range(count)}}
