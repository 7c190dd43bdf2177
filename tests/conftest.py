"""What several tests share."""

import importlib
import os
import shutil
import sys
from pathlib import Path

if shutil.which('nvidia-smi') is None:
  # Most of the suite's time is compilation: with these it takes a third, to code that runs slower. XLA reads them once,
  # when JAX is imported, here and in the processes that tests start.
  os.environ['XLA_FLAGS'] = ' '.join(filter(None, [
      os.environ.get('XLA_FLAGS'), '--xla_backend_optimization_level=0', '--xla_cpu_use_fusion_emitters=false']))

import jax
import pytest

# Parity tests compare to 1e-5, so matrix products must not be rounded to TF32 where a GPU is found.
jax.config.update('jax_default_matmul_precision', 'highest')

# What another test, worker or run has compiled is not compiled again.
jax.config.update('jax_compilation_cache_dir', str(Path(__file__).parents[1] / '.pytest_cache' / 'xla'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)

DATA = Path(os.environ.get('TFM_DATA', Path(__file__).parents[2] / 'shared' / 'data'))


LONGEST = 'test_multi_device.py', 'test_notebooks.py', 'test_processes.py'
"""A worker takes a whole file: one of these at the end would leave the other with nothing to do for minutes."""


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope='module', autouse=True)
def _programs_are_forgotten():
  """Every compiled program holds some six mappings of memory, of which Linux allows a process 65,530: with those of the
  whole suite a worker would die in the middle of a test, and hold 6 GiB before."""
  yield
  maps = Path('/proc/self/maps')
  if maps.exists() and maps.read_bytes().count(b'\n') > 10_000:
    jax.clear_caches()


def _data(name: str) -> Path:
  folder = DATA / name
  if not folder.is_dir():
    pytest.skip(f'needs real data: there is no {folder} (set TFM_DATA)')
  return folder


@pytest.fixture
def multi30k() -> Path:
  """The folder of the Multi30k files; the test is skipped where they are not."""
  return _data('multi30k')


@pytest.fixture
def ud_english_ewt() -> Path:
  """The folder of the English Web Treebank; the test is skipped where it is not."""
  return _data('ud_english_ewt')


@pytest.fixture
def traces():
  """For tests that put something in a layer's place: no layer is known from a trace made before, nor after."""
  from tfm.models.traced_once import forget
  forget()
  yield forget
  forget()


@pytest.fixture
def benchmark_script(monkeypatch):
  """Imports a script of `benchmarks/` by name, as if it were run in its folder."""
  folder = Path(__file__).parents[1] / 'benchmarks'
  monkeypatch.syspath_prepend(str(folder))
  before = set(sys.modules)
  yield importlib.import_module
  for name in set(sys.modules) - before:
    if getattr(sys.modules[name], '__file__', None) and Path(sys.modules[name].__file__).parent == folder:
      del sys.modules[name]


@pytest.fixture(scope='session')
def numbers_run(tmp_path_factory) -> Path:
  """A run folder for reading: a tiny model that has begun to spell numbers below 100 (60 steps; saved every 20)."""
  from tfm.config import (
    Config,
    DataConfig,
    DecodingConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
    TransformerConfig,
  )
  from tfm.training.loop import train
  config = Config(
      model=TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=32, d_ff=64, num_heads=2, norm='pre',
                              dropout=0.0),
      tokenizer=TokenizerConfig(kind='char', vocab_size=300),
      data=DataConfig(limit=100, held_out=10, tokens_per_batch=512, buckets=1, max_length=32),
      optimizer=OptimizerConfig(schedule='cosine', learning_rate=1e-2, warmup_steps=10),
      training=TrainingConfig(steps=60, log_every=20, validate_every=60, checkpoint_every=20, validation_sentences=1,
                              samples=1, reuse_memory=False),
      decoding=DecodingConfig(beam_size=1, extra_length=20))
  return train(config, tmp_path_factory.mktemp('numbers') / 'run').folder


@pytest.fixture(scope='session')
def letters_run(tmp_path_factory) -> Path:
  """A run folder for reading: a tiny language model that has learned how the alphabet goes on (80 steps)."""
  from tfm.config import Config, DataConfig, OptimizerConfig, TokenizerConfig, TrainingConfig, TransformerConfig
  from tfm.training.loop import train
  root = tmp_path_factory.mktemp('letters')
  alphabet = 'abcdefghijklmnopqrstuvwxyz'
  (root / 'train.txt').write_text(''.join(f'{alphabet[i % 20:i % 20 + 6]}\n' for i in range(400)))
  config = Config(
      model=TransformerConfig(encoder_layers=0, decoder_layers=1, d_model=32, d_ff=64, num_heads=2, norm='pre',
                              dropout=0.0),
      tokenizer=TokenizerConfig(kind='char', vocab_size=300),
      data=DataConfig(corpus='text', source=None, target=None, limit=None, held_out=None, root=str(root),
                      train='train.txt', validation_fraction=0.1, packing='blocks', tokens_per_batch=512,
                      max_length=32),
      optimizer=OptimizerConfig(schedule='cosine', learning_rate=1e-2, warmup_steps=10),
      training=TrainingConfig(steps=80, log_every=40, validate_every=80, checkpoint_every=40, samples=0,
                              reuse_memory=False))
  return train(config, root / 'run').folder
