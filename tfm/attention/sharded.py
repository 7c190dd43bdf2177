"""What attention kernels need that run in a `shard_map` of their own: axes, specs, and what no mesh can share out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
from jax.sharding import PartitionSpec

from tfm.attention.masks import AttentionMask
from tfm.parallel.mesh import BATCH_AXES

if TYPE_CHECKING:
  from tfm.attention.attend import Request

CONTEXT, BATCH, HEADS = 'context', BATCH_AXES, 'tensor'
HEADED = PartitionSpec(BATCH, CONTEXT, HEADS)
"""How queries, keys, values and the output lie on the mesh."""
WHOLE = PartitionSpec(BATCH, None, HEADS)
"""The same for a kernel that wants whole sequences."""


def sharded_refusal(request: Request) -> str | None:
  """What no sequence-sharded attention can do, on the mesh that is set: the end of a sentence, or None."""
  if request.needs_whole_pattern is not None:
    return request.needs_whole_pattern
  mesh = jax.sharding.get_abstract_mesh()
  missing = {CONTEXT, HEADS, *BATCH} - set(mesh.axis_names)
  if missing:
    return f'there is no mesh with the axes {", ".join(sorted(missing))}; set one with jax.set_mesh'
  if mesh.manual_axes:
    return f'the mesh axes {", ".join(mesh.manual_axes)} are manual here; call it outside of shard_map and pmap'
  rows, tensor = math.prod(mesh.shape[name] for name in BATCH), mesh.shape[HEADS]
  if request.heads % request.key_heads:
    return f'{request.heads} query heads cannot share {request.key_heads} key/value heads; make one divide the other'
  if request.key_heads % tensor:
    return (f'{request.key_heads} key/value heads cannot be shared out over {tensor} devices of the mesh axis {HEADS}; '
            f'make them a multiple, or the axis smaller')
  if request.batch % rows:
    return (f'{request.batch} rows cannot be shared out over {rows} devices of the mesh axes {", ".join(BATCH)}; '
            f'make the batch a multiple')
  return None


def context_size() -> int:
  return jax.sharding.get_abstract_mesh().shape[CONTEXT]


def mask_specs(mask: AttentionMask, sequence: str | None = CONTEXT) -> AttentionMask:
  """A mask of partition specs, with segments sharded over `sequence`; what is not set is not there in either."""
  def given(array, *axes):
    return None if array is None else PartitionSpec(*axes)

  return mask.replace(
      offset=given(mask.offset), prefix_B=given(mask.prefix_B, BATCH), lengths_B=given(mask.lengths_B, BATCH),
      query_segments_BxT=given(mask.query_segments_BxT, BATCH, sequence),
      key_segments_BxS=given(mask.key_segments_BxS, BATCH, sequence))
