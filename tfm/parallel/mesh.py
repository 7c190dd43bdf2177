"""The devices as a mesh with the axes data, fsdp, expert, tensor and context."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tfm.config import MeshConfig, require

AXES = ('data', 'fsdp', 'expert', 'tensor', 'context')
"""Outermost first: devices that are neighbours, and so best connected, talk along the last axes."""

BATCH_AXES = ('data', 'fsdp', 'expert')
"""The axes along which devices hold different rows of the batch."""


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of `config` over `devices`, all there are by default; a -1 becomes what the other axes leave.

  Raises:
    ConfigError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(config, len(devices))
  # `jax.make_mesh` knows how a TPU pod is wired; its default axis type, Explicit, does not go with Linen.
  if math.prod(sizes) == len(jax.devices()) == len(devices) and jax.default_backend() == 'tpu':
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
  """Devices along each of `AXES`."""
  sizes = dataclasses.asdict(config)
  fixed = math.prod(sizes[name] for name in AXES if sizes[name] != -1)
  asked = ', '.join(f'mesh.{name}={sizes[name]}' for name in AXES)
  require(devices % fixed == 0 and (-1 in sizes.values() or fixed == devices),
          f'{asked} cannot be laid over {devices} device{"s" if devices > 1 else ""}; change the axes so that they '
          f'multiply to {devices}, or set one of them to -1.')
  return tuple(devices // fixed if sizes[name] == -1 else sizes[name] for name in AXES)


def row_shards(mesh: Mesh) -> int:
  """Into how many parts the rows of a batch are cut."""
  return math.prod(mesh.shape[name] for name in BATCH_AXES)
