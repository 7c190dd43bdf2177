from __future__ import annotations

import dataclasses
import functools
import math
import sys

import pytest

from tfm import cli
from tfm.config import (
  Config,
  ConfigError,
  DataConfig,
  MeshConfig,
  TokenizerConfig,
  TrainingConfig,
  TransformerConfig,
)
from tfm.errors import UserError
from tfm.parallel import plan as module
from tfm.parallel.chips import CHIPS
from tfm.parallel.estimate import Estimate, estimate, other_meshes
from tfm.parallel.mesh import AXES, mesh_sizes
from tfm.parallel.plan import batch_for, plan, with_mesh

V, DEVICES = 2048, 4
SMALL = TransformerConfig(encoder_layers=2, decoder_layers=2, d_model=128, d_ff=512, num_heads=4, scan_layers=True)


def recipe(model=None, mesh=None, accumulate=1, **data) -> Config:
  data = dict(tokens_per_batch=4096, max_length=64, width_multiple=4) | data
  return Config(model=dataclasses.replace(SMALL, **(model or {})), mesh=MeshConfig(**(mesh or {})),
                tokenizer=TokenizerConfig(vocab_size=V), data=DataConfig(**data),
                training=TrainingConfig(accumulate=accumulate))


RECIPES = {
    'data 4': recipe(),
    'data 4, few tokens': recipe(tokens_per_batch=64, max_length=8),  # gradients, not activations, make the peak
    'data 4, unrolled, pre-norm, untied': recipe(dict(scan_layers=False, norm='pre', tying='none')),
    'data 2 x tensor 2, no dropout': recipe(dict(dropout=0.0), dict(tensor=2)),
    'fsdp 4, accumulate 2': recipe(None, dict(fsdp=4), accumulate=2, tokens_per_batch=16384),
    'fsdp 4, remat': recipe(dict(remat='full'), dict(fsdp=4), tokens_per_batch=16384),
}


FAST = ('data 4, few tokens', 'fsdp 4, remat')


def sizes_of(config: Config, devices: int) -> dict[str, int]:
  return dict(zip(AXES, mesh_sizes(config.mesh, devices)))


@functools.cache
def compiled(name: str) -> dict:
  """What the compiler says of a recipe."""
  config, shape = batch_for(RECIPES[name], DEVICES)
  return module._compile_elsewhere(config, DEVICES, V, shape)


def estimated(name: str) -> Estimate:
  config, shape = batch_for(RECIPES[name], DEVICES)
  return estimate(config, sizes_of(config, DEVICES), V, shape, CHIPS['h100'])


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in RECIPES])
def test_memory_from_shapes_alone_is_that_of_the_compiled_step(name):
  memory, real = estimated(name).memory, compiled(name)
  arguments, total = real['arguments'], real['arguments'] + real['temporaries']
  print(f'| {name} | {memory.total / 1e6:.1f} | {total / 1e6:.1f} | {memory.total / total - 1:+.1%} |')
  assert memory.parameters + memory.optimizer == pytest.approx(arguments, rel=0.01)  # the batch is the rest
  assert memory.total == pytest.approx(total, rel=0.10)


def test_data_parallel_gradients_are_added_up_once():
  name = 'data 4, few tokens'
  exchanges, parameters = compiled(name)['exchanges'], estimated(name).memory.parameters
  table = 4 * V * SMALL.d_model  # the shared one has three gradients, which XLA adds up only afterwards
  assert parameters <= sum(each['bytes'] * each['count'] for each in exchanges) <= 1.01 * (parameters + 2 * table)
  assert {each['kind'] for each in exchanges} == {'all-reduce'}


def test_sharded_parameters_are_gathered_in_every_layer():
  gathers = [each for each in compiled('fsdp 4, remat')['exchanges'] if each['kind'] == 'all-gather']
  expected = sum(each.bytes * each.count for each in estimated('fsdp 4, remat').exchanges if each.kind == 'all-gather')
  assert max(each['count'] for each in gathers) >= SMALL.decoder_layers
  assert sum(each['bytes'] * each['count'] for each in gathers) == pytest.approx(expected, rel=0.5)


# -- the whole command ------------------------------------------------------------------------------------------------


def test_the_command_prints_a_plan(tmp_path, monkeypatch, capsys):
  text = ('from tfm.config import Config, DataConfig, TokenizerConfig, TransformerConfig\n'
          'config = Config(model=TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=32, d_ff=64, '
          'num_heads=2, scan_layers=True), tokenizer=TokenizerConfig(vocab_size=300), data=DataConfig(max_length=32, '
          'tokens_per_batch=512))\n')
  (tmp_path / 'tiny.py').write_text(text)
  monkeypatch.setattr(sys, 'argv', ['tfm', 'plan', str(tmp_path / 'tiny.py'), '--devices', '64', '--chip', 'h100',
                                    '--fsdp', '2'])
  cli.main()
  printed = capsys.readouterr().out
  assert printed.startswith('64 x h100, data 32 x fsdp 2\nbatch         64 rows of 32 source and 32 target tokens')
  assert 'of 74.5 GiB a device: fits' in printed
  assert 'all-reduce' in printed and 'all-gather' in printed and 'limited by' in printed
  assert '--mesh.fsdp 2 --data.rows-multiple 64 --data.tokens-per-batch 2048' in printed


@pytest.fixture
def uncompiled(monkeypatch):
  """Plans without compiling: temporaries of 1 GiB and one exchange."""
  exchange = dataclasses.asdict(module.Collective('all-reduce', 1e6, 4, 1))
  monkeypatch.setattr(module, '_compile_elsewhere',
                      lambda *_: {'arguments': 0, 'temporaries': 2.0**30, 'exchanges': [exchange]})


def test_a_chip_too_small_is_said_to_be(uncompiled, monkeypatch):
  monkeypatch.setitem(CHIPS, 'h100', dataclasses.replace(CHIPS['h100'], memory=1e6))
  found = plan(recipe(), DEVICES, 'h100')
  assert not found.fits and found.best is None
  assert 'does NOT fit' in str(found) and 'no split of these devices fits' in str(found)


def test_the_best_mesh_is_the_fastest_that_fits(uncompiled, monkeypatch):
  # Over slow links data parallelism, which says least, is fastest; but it keeps every parameter on every chip.
  chip = dataclasses.replace(CHIPS['h100'], link=20e9)
  monkeypatch.setitem(CHIPS, 'slow', chip)
  config = recipe(tokens_per_batch=8192)
  found = plan(config, DEVICES, 'slow')
  assert found.best.mesh == found.estimate.mesh == dict(data=DEVICES, fsdp=1, expert=1, tensor=1, context=1)
  assert 'no other split' in str(found)
  assert 0 < found.mfu(found.roofline.serial) <= found.mfu(found.roofline.overlapped) < 1
  memory = 0.999 * found.best.memory.total / module.USABLE
  monkeypatch.setitem(CHIPS, 'small', dataclasses.replace(chip, memory=memory))
  other = plan(config, DEVICES, 'small').best
  assert other.memory.total < found.best.memory.total and other.roofline.serial > found.best.roofline.serial
  assert math.prod(other.mesh.values()) == DEVICES


def test_only_meshes_that_can_share_out_the_model_are_tried():
  config, shape = batch_for(recipe(dict(num_heads=4)), 64)
  meshes = list(other_meshes(config, 64, V, shape, domain=8))
  assert {mesh['tensor'] for mesh in meshes} == {1, 2, 4}  # not 8: there are 4 heads
  assert {mesh['context'] for mesh in meshes} == {1}  # 64 tokens are not worth cutting
  assert all(math.prod(mesh.values()) == 64 for mesh in meshes)
  assert len(meshes) == len({tuple(mesh.values()) for mesh in meshes})


def test_more_devices_than_rows_raise_the_budget():
  config, shape = batch_for(recipe(), 512)
  assert (shape.rows, config.data.rows_multiple, config.data.tokens_per_batch) == (512, 512, 512 * 64)
  config, shape = batch_for(recipe(accumulate=2), 4)
  assert (shape.rows, config.data.tokens_per_batch) == (64, 4096)


def test_a_mesh_brings_the_multiples_it_needs():
  config = with_mesh(recipe(width_multiple=2), tokens_per_batch=8192, tensor=4, context=2)
  assert (config.mesh.data, config.mesh.tensor, config.mesh.context) == (-1, 4, 2)
  assert (config.model.vocab_multiple, config.data.width_multiple, config.data.tokens_per_batch) == (4, 4, 8192)
  assert with_mesh(recipe()) == recipe()


def test_what_cannot_be_planned_is_refused_in_a_sentence():
  with pytest.raises(UserError, match="no chip 'v5'"):
    plan(recipe(), 4, 'v5')
  with pytest.raises(ConfigError, match='cannot be laid over 6 devices'):
    plan(recipe(mesh=dict(fsdp=4)), 6, 'v5p')
  with pytest.raises(ConfigError, match='heads'):
    plan(recipe(mesh=dict(tensor=8)), 8, 'v5p')
  with pytest.raises(ConfigError, match='give 1 or more'):
    plan(recipe(), 0, 'v5p')
