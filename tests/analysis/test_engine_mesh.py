"""Reading and replacing on several devices: the values of one device, and patterns that stay shared out by heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis.engine import Edit, run
from tfm.config import MeshConfig
from tfm.parallel.mesh import build_mesh
from tfm.parallel.rules import batch_shardings, shardings

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason='needs 8 devices: tests/test_multi_device.py has them')


@pytest.mark.parametrize('layout', ['scanned', 'unrolled'])
@pytest.mark.parametrize('family', ['encoder_decoder', 'decoder_only', 'encoder_only'])
def test_sharded_parameters_read_and_edit_the_same(case, family, layout):
  changes = dict(vocab_multiple=4) | (dict(num_kv_heads=4) if family == 'decoder_only' else {})
  model, params, inputs = case(family, layout, **changes)
  inputs = tuple(jnp.concatenate([each, each[:1]]) for each in inputs)  # four rows for two devices
  stack = 'encoder' if family == 'encoder_only' else 'decoder'
  where = f'{stack}.layers.self_attention.pattern'
  length = inputs[-1].shape[1]
  edits = [Edit(where, at=(jnp.arange(4) == 2).reshape(4, 1, 1, 1, 1), value=jnp.eye(length)[None, None, None]),
           Edit(f'{stack}.layers[1].mlp', scale=0.5)]
  expected = run(model, params, inputs, edits=edits, where=where)
  mesh = build_mesh(MeshConfig(data=2, tensor=4))
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, shardings(mesh, params))
    rows = jax.device_put(inputs, batch_shardings(mesh, 'encoder_decoder')[:len(inputs)])
    found = run(model, placed, rows, edits=edits, where=where)
  np.testing.assert_allclose(found.output, expected.output, atol=2e-5)
  np.testing.assert_allclose(found.readings[where], expected.readings[where], atol=1e-5)
  # A device holds the patterns of its heads and of its rows.
  shard = found.readings[where].addressable_shards[0].data.shape
  assert shard == (4, 2, 1, length, length), shard
