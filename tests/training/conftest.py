"""Tiny runs, for the tests of tfm/training that train."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import tfm.text.batches
import tfm.training.loop
from tfm.config import (
  Config,
  DataConfig,
  DecodingConfig,
  OptimizerConfig,
  TokenizerConfig,
  TrainingConfig,
  TransformerConfig,
)
from tfm.training.checkpoints import Checkpoints
from tfm.training.loop import train
from tfm.training.run_folder import RunFolder

# Schedule 'constant', because then the compiled step does not depend on `training.steps`.
SECTIONS = {
    'model': (TransformerConfig, dict(encoder_layers=1, decoder_layers=1, d_model=8, d_ff=16, num_heads=2)),
    'tokenizer': (TokenizerConfig, dict(kind='char', vocab_size=300)),
    'data': (DataConfig, dict(limit=100, held_out=8, tokens_per_batch=256, buckets=1, max_length=32)),
    'optimizer': (OptimizerConfig, dict(schedule='constant', learning_rate=1e-2, warmup_steps=0)),
    'training': (TrainingConfig, dict(steps=6, log_every=2, validate_every=6, checkpoint_every=3, samples=1,
                                      validation_sentences=2, reuse_memory=False)),
    'decoding': (DecodingConfig, dict(beam_size=1, extra_length=2)),
}


class Killed(BaseException):
  """Stands for the end of the process."""


def tiny_config(**changes: dict) -> Config:
  """`tiny_config(model={'norm': 'pre'}, ...)`: six steps, checkpoints at 3 and 6, validation at 6, dropout 0.1."""
  return Config(**{name: section(**{**values, **changes.get(name, {})})
                   for name, (section, values) in SECTIONS.items()})


def contents(run: Path) -> dict[str, bytes]:
  """All that must not depend on how often a run was stopped: every array of every kept step, records and samples."""
  folder = RunFolder(run)
  checkpoints = Checkpoints(folder.checkpoints)
  found = {path.name: path.read_bytes() for path in (folder.metrics, *folder.samples.iterdir())}
  for step in checkpoints.steps():
    found |= {f'{step}/{name}': array.tobytes() for name, array in checkpoints.restore_arrays(step).items()}
  return found


def assert_same_bytes(one: Path, other: Path) -> None:
  a, b = contents(one), contents(other)
  assert a.keys() == b.keys()
  assert [name for name in a if a[name] != b[name]] == []


@pytest.fixture(name='tiny')
def _tiny():
  return tiny_config


@pytest.fixture(name='same_bytes')
def _same_bytes():
  return assert_same_bytes


@pytest.fixture(scope='session')
def compiled_programs(tmp_path_factory) -> Path:
  return tmp_path_factory.mktemp('compiled')


@pytest.fixture(scope='module')
def quick(compiled_programs) -> Iterator[None]:
  """Every program is compiled once a session, however many runs need it; shapes come from a smaller sample."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = {name: getattr(jax.config, name) for name in names}
  compilation_cache.reset_cache()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tfm.text.batches, 'SAMPLE_PAIRS', 500)
    for name, value in zip(names, (str(compiled_programs), 0.0)):
      jax.config.update(name, value)
    yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture
def at_step(monkeypatch) -> Callable[[int, Callable[[], None]], None]:
  """`at_step(5, action)`: act just before the fifth update of every run of this test; `at_step(0, ...)`: never."""
  prefetch = tfm.training.loop.prefetch

  def arrange(step: int, action: Callable[[], None]) -> None:
    def feed(*arguments):
      batches = prefetch(*arguments)
      try:
        for index, batch in batches:
          if index + 1 == step:
            action()
          yield index, batch
      finally:
        batches.close()

    monkeypatch.setattr(tfm.training.loop, 'prefetch', feed)

  return arrange


@pytest.fixture
def train_until(at_step) -> Callable[[int, Config, Path], None]:
  """`train_until(4, config, run)`: train, and lose everything since the last checkpoint just before update 4."""

  def train_and_die(step: int, config: Config, run: Path) -> None:
    def die():
      raise Killed

    at_step(step, die)
    with pytest.raises(Killed):
      train(config, run)
    at_step(0, die)

  return train_and_die


@pytest.fixture
def signal_at(at_step) -> Callable[[int, signal.Signals], None]:
  """`signal_at(4, SIGTERM)`: this process gets the signal just before the fourth update."""
  return lambda step, number: at_step(step, lambda: os.kill(os.getpid(), number))


@pytest.fixture
def validations(monkeypatch) -> Callable[..., list[float]]:
  """`validations(3.0, 2.0, ...)`: what the validations from now on find (nll, and bleu too), without any being made.

  Returns the figures that are still to come.
  """

  def script(*figures: float) -> list[float]:
    left = list(figures)

    def validate(model, params, batches, translator, pairs):
      figure = left.pop(0)
      return {'nll': figure, 'bleu': figure, 'chrf': 0.0, 'exact': 0.0}, ['?'] * len(pairs)

    monkeypatch.setattr(tfm.training.loop, 'validate', validate)
    return left

  return script


@pytest.fixture(scope='session')
def undisturbed_runs(tmp_path_factory) -> dict[Config, Path]:
  return {}


@pytest.fixture
def undisturbed(quick, undisturbed_runs, tmp_path_factory) -> Callable[[Config], Path]:
  """`undisturbed(config)`: the folder of a run of this config that nothing disturbed; for reading only."""

  def run(config: Config) -> Path:
    if config not in undisturbed_runs:
      undisturbed_runs[config] = train(config, tmp_path_factory.mktemp('undisturbed') / 'run').folder
    return undisturbed_runs[config]

  return run


@pytest.fixture
def finished(undisturbed, tmp_path) -> Path:
  """A finished run of `tiny_config()` to go on with."""
  return Path(shutil.copytree(undisturbed(tiny_config()), tmp_path / 'finished'))
