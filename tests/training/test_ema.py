"""The moving average of the weights: its recurrence, its place on a mesh and in a checkpoint, and who uses it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import tfm
import tfm.training.loop
from tfm.models.build import build_model, initialize
from tfm.models.layout import to_layout
from tfm.parallel.mesh import AXES
from tfm.parallel.rules import shardings
from tfm.training.checkpoints import Checkpoints
from tfm.training.ema import next_average
from tfm.training.loop import train
from tfm.training.run_folder import RunFolder
from tfm.training.start import _convert_state
from tfm.training.step import build_step, new_state

V = 20


def state_of(config):
  model = build_model(config.model, V, V)
  return new_state(config, model, initialize(model, jax.random.key(0)))


def assert_equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize('decay', [0.3, 0.999])
def test_is_the_recurrence(decay):
  random = np.random.default_rng(0)
  weights = [{'a': random.normal(size=3), 'b': random.normal(size=(2, 2))} for _ in range(12)]
  average, expected = jax.tree.map(jnp.float32, weights[0]), weights[0]
  for step, now in enumerate(weights[1:]):
    average = next_average(average, jax.tree.map(jnp.float32, now), jnp.int32(step), decay)
    d = min(decay, (1 + step) / (10 + step))
    expected = {name: d * expected[name] + (1 - d) * now[name] for name in expected}
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), average, expected)


def test_the_step_averages_the_weights_that_it_made(tiny):
  config = tiny(optimizer=dict(ema_decay=0.5))
  plain, state = state_of(tiny()), state_of(config)
  assert plain.ema is None and plain.served_params is plain.params and state.served_params is state.ema
  assert_equal(state.ema, state.params)
  batch = (jnp.array([[5, 6, 2]] * 2), jnp.array([[1, 7, 8, 2]] * 2))
  step, without = (jax.jit(build_step(each, build_model(each.model, V, V))) for each in (config, tiny()))
  expected = jax.tree.map(np.asarray, state.ema)
  for t in range(3):
    state, plain = step(state, batch)[0], without(plain, batch)[0]
    expected = jax.tree.map(lambda e, p, d=(1 + t) / (10 + t): d * e + (1 - d) * np.asarray(p), expected, state.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), state.ema, expected)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), state.params, plain.params)


def test_lies_on_the_mesh_as_the_weights_do_and_follows_their_layout(tiny):
  state = state_of(tiny(model=dict(decoder_layers=2), optimizer=dict(ema_decay=0.5)))
  mesh = AbstractMesh(tuple(2 if name in ('fsdp', 'tensor') else 1 for name in AXES), AXES,
                      axis_types=(AxisType.Auto,) * len(AXES))
  placed = shardings(mesh, state)
  assert placed.ema == placed.params and any('fsdp' in leaf.spec for leaf in jax.tree.leaves(placed.ema))
  assert_equal(_convert_state(state, 'scanned').ema, to_layout(state.ema, 'scanned'))


def test_resumes_bit_for_bit_and_is_what_is_validated_and_loaded(quick, tiny, train_until, same_bytes, monkeypatch,
                                                                 tmp_path):
  config, validated = tiny(optimizer=dict(ema_decay=0.9)), []
  validate = tfm.training.loop.validate

  def spy(model, params, *rest):
    validated.append(jax.device_get(params))
    return validate(model, params, *rest)

  monkeypatch.setattr(tfm.training.loop, 'validate', spy)
  whole = train(config, tmp_path / 'whole').folder
  train_until(5, config, tmp_path / 'cut')
  train(config, tmp_path / 'cut')
  same_bytes(whole, tmp_path / 'cut')
  checkpoints = Checkpoints(RunFolder(whole).checkpoints)
  arrays = checkpoints.restore_arrays(6)
  params, _ = checkpoints.restore_params(6)
  assert sorted(path.name for path in (checkpoints.folder / '000006').iterdir() if path.is_dir()) == [
      'ema', 'meta', 'params', 'rest']
  name = 'encoder/layers_0/mlp/inner/kernel'
  kernel = params['encoder']['layers_0']['mlp']['inner']['kernel']
  np.testing.assert_array_equal(kernel, arrays[f'ema/{name}'])
  assert not np.array_equal(kernel, arrays[f'params/{name}'])
  assert_equal(validated[0], params)
  assert_equal(tfm.load(whole).params, params)
