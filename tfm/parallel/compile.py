"""Two compilers for one training step: `jit` over the mesh, and `pmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tfm.config import Config, require
from tfm.models.build import Model
from tfm.parallel.mesh import BATCH_AXES, row_shards
from tfm.parallel.rules import batch_shardings, shardings
from tfm.training.objectives import Batch
from tfm.training.step import StepMetrics, TrainState, build_step

Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def jit_step(config: Config, model: Model, mesh: Mesh, abstract_state: TrainState) -> Any:
  """The step compiled for `mesh`; call or lower it inside `jax.set_mesh(mesh)`. The state is donated.

  Args:
    abstract_state: shapes of the state (`jax.eval_shape`).

  Raises:
    ConfigError: a parameter or the batch cannot be shared out over this mesh.
  """
  require_rows(config, mesh)
  placed = shardings(mesh, abstract_state)
  return jax.jit(build_step(config, model), donate_argnums=0,
                 in_shardings=(placed, batch_shardings(mesh, config.model.shape)[:4 if config.packs_pairs else 2]),
                 out_shardings=(placed, NamedSharding(mesh, PartitionSpec())))


def pmap_step(config: Config, model: Model, mesh: Mesh) -> Step:
  """The classic front: every device runs the step on its own rows, and `psum` adds up what they found.

  The same numbers as `jit_step` without dropout; with it every device draws its own masks.

  Raises:
    ConfigError: the rows cannot be shared out, or there is more than one process.
  """
  require_rows(config, mesh)
  require(jax.process_count() == 1, "mesh.compiler='pmap' runs in one process; use 'jit' for several.")
  step = jax.pmap(build_step(config, model, axis_name='data'), axis_name='data', in_axes=(None, 0), out_axes=None,
                  devices=list(mesh.devices.flat))

  def share_out(rows: np.ndarray) -> np.ndarray:
    return rows.reshape((mesh.size, -1) + rows.shape[1:])

  return lambda state, batch: step(state, jax.tree.map(share_out, batch))


def require_rows(config: Config, mesh: Mesh) -> None:
  shards, micro = row_shards(mesh), config.training.accumulate
  require(config.data.rows_multiple % (shards * micro) == 0,
          f'data.rows_multiple {config.data.rows_multiple} does not share out among mesh.{" x mesh.".join(BATCH_AXES)} '
          f'= {shards} devices and {micro} micro-batches; set it to a multiple of {shards * micro}.')


def place_batch(batch: Batch, first_row: int, rows: int, mesh: Mesh, shape: str) -> Batch:
  """A global batch on the mesh from the rows that this process has: `first_row` ... of `rows` in all.

  Args:
    shape: of the model, `TransformerConfig.shape`.
  """

  def place(array: np.ndarray | None, sharding: NamedSharding) -> jax.Array | None:
    if array is None:
      return None

    def part(index):
      own, rest = index[0], index[1:]
      start, stop, _ = own.indices(rows)
      return array[(slice(start - first_row, stop - first_row), *rest)]

    return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, part)

  return tuple(place(array, sharding) for array, sharding in zip(batch, batch_shardings(mesh, shape)))


def share_of_rows(mesh: Mesh) -> tuple[int, int]:
  """(index, count): this process needs part `index` of the rows of every batch cut into `count` equal parts."""
  position = {device: place for place, device in np.ndenumerate(mesh.devices)}
  shards = row_shards(mesh)
  part_of = np.arange(shards).reshape([mesh.shape[name] for name in BATCH_AXES])
  own = sorted({int(part_of[position[device][:part_of.ndim]]) for device in mesh.local_devices})
  # Contiguous for every mesh over whole hosts in the order of their devices; otherwise it takes all rows.
  if shards % len(own) or own[0] % len(own) or own != list(range(own[0], own[0] + len(own))):
    return 0, 1
  return own[0] // len(own), shards // len(own)
