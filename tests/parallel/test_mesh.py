from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from tfm.config import ConfigError, MeshConfig
from tfm.parallel.mesh import AXES, build_mesh, mesh_sizes, row_shards


@pytest.mark.parametrize('fields, devices, sizes', [
    ({}, 1, (1, 1, 1, 1, 1)), ({}, 8, (8, 1, 1, 1, 1)), (dict(fsdp=4), 8, (2, 4, 1, 1, 1)),
    (dict(data=2, tensor=-1), 8, (2, 1, 1, 4, 1)), (dict(data=1, fsdp=2, tensor=2, context=2), 8, (1, 2, 1, 2, 2)),
    (dict(data=1, context=-1), 6, (1, 1, 1, 1, 6)), (dict(expert=4), 8, (2, 1, 4, 1, 1))])
def test_the_rest_goes_to_the_axis_that_asks_for_it(fields, devices, sizes):
  assert mesh_sizes(MeshConfig(**fields), devices) == sizes


@pytest.mark.parametrize('fields, devices', [(dict(data=2), 1), (dict(fsdp=3), 8), (dict(data=1), 8),
                                             (dict(data=2, tensor=2), 8)])
def test_axes_that_do_not_multiply_to_the_devices_are_refused_by_name(fields, devices):
  name, size = next(iter(fields.items()))
  with pytest.raises(ConfigError, match=rf'mesh\.{name}={size}.* cannot be laid over {devices} device'):
    mesh_sizes(MeshConfig(**fields), devices)


def test_the_mesh_keeps_the_order_of_devices_and_never_has_explicit_axes():
  mesh = build_mesh(MeshConfig(), jax.devices()[:1])
  assert mesh.axis_names == AXES and mesh.axis_types == (AxisType.Auto,) * 5 and row_shards(mesh) == 1
  assert np.array(mesh.devices).reshape(-1).tolist() == jax.devices()[:1]


def test_rows_are_shared_out_by_all_axes_that_hold_copies_or_experts():
  assert row_shards(jax.sharding.AbstractMesh((2, 3, 5, 7, 11), AXES)) == 2 * 3 * 5


@pytest.mark.parametrize('fields, sentence', [
    (dict(tensor=0), r'mesh\.tensor is 0; give a number of devices'),
    (dict(data=-2), r'mesh\.data is -2'),
    (dict(fsdp=-1), r'mesh\.data and mesh\.fsdp are both -1'),
    (dict(compiler='pmap', tensor=2), r"mesh\.compiler='pmap' knows the data axis alone"),
    (dict(compiler='pmap', expert=2), r"mesh\.compiler='pmap' knows the data axis alone")])
def test_a_mesh_that_means_nothing_is_refused(fields, sentence):
  with pytest.raises(ConfigError, match=sentence):
    MeshConfig(**fields)
