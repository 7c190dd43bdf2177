"""A run saved on one mesh resumes on another: other devices, other axes, the same rows in the same order."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from tfm.config import (
    Config,
    DataConfig,
    DecodingConfig,
    MeshConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
    TransformerConfig,
)
from tfm.training.average import run_checkpoints
from tfm.training.loop import train
from tfm.training.run_folder import RunFolder

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason='needs 8 devices: tests/test_multi_device.py has them')

PLAIN, EXPERTS = {}, dict(experts=4, biases='none')


def config_of(steps: int, model: dict, **mesh) -> Config:
  return Config(
      model=TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=16, d_ff=32, num_heads=4, dropout=0.1,
                              vocab_multiple=8, **model),
      tokenizer=TokenizerConfig(kind='char', vocab_size=290),
      data=DataConfig(limit=100, held_out=10, tokens_per_batch=512, buckets=1, max_length=32, width_multiple=8),
      optimizer=OptimizerConfig(schedule='constant', learning_rate=1e-3, warmup_steps=2), mesh=MeshConfig(**mesh),
      training=TrainingConfig(steps=steps, log_every=1, validate_every=9, checkpoint_every=3, validation_sentences=2,
                              samples=1, reuse_memory=False),
      decoding=DecodingConfig(beam_size=1, extra_length=4))


@pytest.fixture
def on(monkeypatch, tmp_path):
  """`on(4, steps, model, **mesh)`: go on with the run of this test on so many devices."""
  everything = jax.devices()

  def go_on(devices: int, steps: int, model: dict = PLAIN, **mesh) -> Path:
    monkeypatch.setattr(jax, 'devices', lambda: everything[:devices])
    return train(config_of(steps, model, **mesh), str(tmp_path / 'run')).folder

  return go_on


@pytest.fixture(scope='module')
def never_moved(tmp_path_factory):
  """`never_moved(**model)`: the same nine steps on one device."""

  @cache
  def stay(**model):
    with pytest.MonkeyPatch.context() as patch:
      first = jax.devices()[:1]
      patch.setattr(jax, 'devices', lambda: first)
      return figures(train(config_of(9, model), str(tmp_path_factory.mktemp('alone') / 'run')).folder)

  return stay


def figures(folder: Path):
  arrays = run_checkpoints(RunFolder(folder), RunFolder(folder).read_config()).restore_arrays(9)
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()], arrays


@pytest.mark.parametrize('model, stations', [
    (PLAIN, [(8, dict()), (4, dict()), (1, dict())]),
    (PLAIN, [(1, dict()), (8, dict(fsdp=4, tensor=2)), (4, dict(context=4))]),
    (PLAIN, [(8, dict(data=1, fsdp=2, tensor=2, context=2)), (8, dict(data=4, context=2)), (2, dict(fsdp=2, data=1))]),
    (EXPERTS, [(8, dict(expert=4)), (1, dict()), (8, dict(data=1, fsdp=2, expert=2, tensor=2))])])
def test_a_run_that_moves_trains_like_one_that_stays(on, never_moved, model, stations):
  for leg, (devices, mesh) in enumerate(stations):
    folder = on(devices, 3 * (leg + 1), model, **mesh)
  records, arrays = figures(folder)
  expected, weights = never_moved(**model)
  records = [record for record in records if record['kind'] == 'train' or record['step'] == 9]  # each leg is validated
  assert [(record['kind'], record['step']) for record in records] == [(r['kind'], r['step']) for r in expected]
  for record, other in zip(records, expected):
    assert record.get('tokens') == other.get('tokens')  # the same rows
    if record['kind'] == 'train':
      np.testing.assert_allclose(record['loss'], other['loss'], rtol=1e-5)
  assert arrays.keys() == weights.keys()
  for name, array in arrays.items():
    np.testing.assert_allclose(array, weights[name], atol=1e-5, err_msg=name)


def test_pmap_takes_up_a_run_of_the_mesh_and_hands_it_back(on):
  on(4, 3, fsdp=2)
  on(4, 6, compiler='pmap')
  folder = on(2, 9, fsdp=-1, data=1)
  assert [record['step'] for record in figures(folder)[0] if record['kind'] == 'train'] == list(range(1, 10))
