from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tfm.config import Config, ConfigError
from tfm.models.layout import layout_of, to_layout
from tfm.text.corpora import build_corpus
from tfm.training.checkpoints import CheckpointError, Checkpoints
from tfm.training.loop import train
from tfm.training.named_arrays import named_leaves
from tfm.training.run_folder import RunFolder, RunFolderError
from tfm.training.start import MAY_CHANGE, differences, start

pytestmark = pytest.mark.usefixtures('quick')


def begin(config: Config, run: Path, init_run: Path | None = None):
  return start(config, build_corpus(config.data), run, init_run)


def assert_equal(a, b) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


# -- which of the three -----------------------------------------------------------------------------------------------


def test_starts_in_a_new_folder(tiny, tmp_path):
  begun = begin(tiny(), tmp_path / 'run')
  assert int(begun.state.step) == 0 and begun.sentence.startswith(f'Starting {tmp_path / "run"}: ')
  assert RunFolder(tmp_path / 'run').read_config() == tiny()
  assert begin(tiny(), tmp_path / 'run').sentence == begun.sentence  # nothing was saved: it starts again


def test_the_seed_sets_the_weights_and_nothing_else_does(tiny, tmp_path):
  one, same, other = (begin(tiny(training=dict(seed=seed)), tmp_path / str(i)).state.params
                      for i, seed in enumerate((0, 0, 1)))
  assert_equal(one, same)
  assert not np.array_equal(one['target_embedding']['table'], other['target_embedding']['table'])


def test_resumes_an_existing_run(finished, tiny):
  begun = begin(tiny(), finished)
  assert begun.sentence.startswith(f'Resuming {finished} at step 6 of 6: ')
  stored = Checkpoints(RunFolder(finished).checkpoints).restore_arrays(6)
  found = {name: leaf for name, leaf in named_leaves(begun.state).items() if name != 'key'}
  assert all(np.asarray(leaf).tobytes() == stored[name].tobytes() for name, leaf in found.items())


# -- with another config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('changes, sentence', [
    (dict(training=dict(seed=3)), 'training.seed was 0 and is now 3'),
    (dict(optimizer=dict(learning_rate=0.5)), 'optimizer.learning_rate was 0.01 and is now 0.5'),
    (dict(model=dict(norm='pre')), "model.norm was 'post' and is now 'pre'"),
    (dict(data=dict(tokens_per_batch=512)), 'data.tokens_per_batch was 256 and is now 512'),
    (dict(tokenizer=dict(vocab_size=290)), 'tokenizer.vocab_size was 300 and is now 290'),
    (dict(training=dict(seed=3, accumulate=2)), 'training.seed was 0 and is now 3; training.accumulate was 1'),
])
def test_a_change_that_makes_it_another_run_is_refused(finished, tiny, changes, sentence):
  before = RunFolder(finished).config_file.read_bytes()
  with pytest.raises(ConfigError) as error:
    begin(tiny(**changes), finished)
  assert sentence in str(error.value) and str(finished) in str(error.value)
  assert RunFolder(finished).config_file.read_bytes() == before


def test_a_change_that_leaves_the_run_the_same_is_taken_over(finished, tiny):
  config = tiny(training=dict(steps=12, patience=3, log_every=5, samples=2, keep_last=9, reuse_memory=True),
                decoding=dict(beam_size=5, length_penalty=1.0, extra_length=9), model=dict(remat='full'))
  begun = begin(config, finished)
  assert int(begun.state.step) == 6 and f'of {config.training.steps}' in begun.sentence
  assert RunFolder(finished).read_config() == config


def test_differences_name_every_leaf(tiny):
  config = tiny()
  assert differences(config, tiny()) == []
  for section in dataclasses.fields(Config):
    for leaf in dataclasses.fields(getattr(config, section.name)):
      other = tiny()
      before = getattr(getattr(other, section.name), leaf.name)
      object.__setattr__(getattr(other, section.name), leaf.name, 'other')
      assert differences(config, other) == [(f'{section.name}.{leaf.name}', before, 'other')]


def test_what_may_change_exists(tiny):
  leaves = {f'{section}.{leaf}' for section, values in dataclasses.asdict(tiny()).items() for leaf in values}
  assert MAY_CHANGE <= leaves


# -- from the weights of another run ----------------------------------------------------------------------------------


def test_init_from_takes_weights_alone(finished, tiny, tmp_path):
  config = tiny(training=dict(seed=7), optimizer=dict(learning_rate=0.5))
  begun = begin(config, tmp_path / 'new', finished)
  assert_equal(begun.state.params, jax.tree.map(np.asarray, begin(tiny(), finished).state.params))
  fresh = begin(config, tmp_path / 'fresh').state
  assert_equal(begun.state.opt_state, fresh.opt_state)
  assert int(begun.state.step) == 0 and jax.random.key_data(begun.state.key).tolist() == (
      jax.random.key_data(fresh.key).tolist())
  assert begun.sentence.startswith(f'Starting {tmp_path / "new"} from the weights of {finished}: Took ')
  # Killed before its first checkpoint, the same command takes them again.
  assert_equal(begin(config, tmp_path / 'new', finished).state.params, begun.state.params)


def test_init_from_is_refused_where_there_is_a_run(finished, undisturbed, tiny):
  before = RunFolder(finished).config_file.read_bytes()
  with pytest.raises(ConfigError, match='is a run at step 6 already, so --init-from would have no effect'):
    begin(tiny(training=dict(steps=9)), finished, undisturbed(tiny()))
  assert RunFolder(finished).config_file.read_bytes() == before


def test_init_from_what_does_not_fit_leaves_no_folder_behind(finished, tiny, tmp_path):
  with pytest.raises(RunFolderError, match='There is no folder'):
    begin(tiny(), tmp_path / 'new', tmp_path / 'nowhere')
  with pytest.raises(CheckpointError, match='do not fit this model'):
    begin(tiny(model=dict(d_ff=8)), tmp_path / 'new', finished)
  assert not (tmp_path / 'new').exists()


# -- what lies in the folder ------------------------------------------------------------------------------------------


def damage(run: Path, step: int) -> None:
  """Flip a bit of the weights of a step."""
  folder = RunFolder(run).checkpoints / f'{step:06d}' / 'params'
  path = max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_a_damaged_newest_checkpoint_costs_time_but_no_bits(finished, undisturbed, tiny, same_bytes, caplog):
  damage(finished, 6)
  with caplog.at_level(logging.WARNING, 'tfm'):
    train(tiny(), finished)
  (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
  assert 'step 6' in warning and 'step 3 is used instead' in warning
  same_bytes(finished, undisturbed(tiny()))


UNROLLED = dict(model=dict(decoder_layers=2), optimizer=dict(epsilon=1e-2))
"""With Adam's usual epsilon the rounding error of a gradient that should be 0 becomes a full step."""
SCANNED = dict(model=dict(decoder_layers=2, scan_layers=True), optimizer=dict(epsilon=1e-2))


@pytest.fixture
def unrolled_run(undisturbed, tiny, validations) -> Path:
  validations(1.0)
  return undisturbed(tiny(**UNROLLED))


@pytest.mark.parametrize('first, then', [(SCANNED, UNROLLED), (UNROLLED, SCANNED)], ids=['to unrolled', 'to scanned'])
def test_a_run_goes_on_in_another_layout(unrolled_run, tiny, validations, train_until, tmp_path, caplog, first, then):
  validations(1.0)
  train_until(5, tiny(**first), tmp_path / 'run')
  with caplog.at_level(logging.WARNING, 'tfm'):
    train(tiny(**then), tmp_path / 'run')
  assert 'converted' in caplog.text
  layout = 'scanned' if then is SCANNED else 'unrolled'
  params, meta = Checkpoints(RunFolder(tmp_path / 'run').checkpoints).restore_params(6)
  assert meta['layout'] == layout_of(params) == layout
  expected, _ = Checkpoints(RunFolder(unrolled_run).checkpoints).restore_params(6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), to_layout(params, 'unrolled'), expected)


def test_the_optimizer_state_follows_the_layout(unrolled_run, tiny, tmp_path):
  run = Path(shutil.copytree(unrolled_run, tmp_path / 'run'))
  unrolled = begin(tiny(**UNROLLED), run).state
  scanned = begin(tiny(**SCANNED), run).state
  for tree in ('mu', 'nu'):
    assert_equal(to_layout(getattr(scanned.opt_state[0], tree), 'unrolled'), getattr(unrolled.opt_state[0], tree))
  assert_equal(to_layout(scanned.params, 'unrolled'), unrolled.params)


def test_falls_back_to_a_step_of_the_other_layout(tiny, validations, train_until, tmp_path, caplog):
  run = tmp_path / 'run'
  validations(1.0)
  train_until(5, tiny(**SCANNED), run)
  train(tiny(**UNROLLED), run)
  damage(run, 6)
  with caplog.at_level(logging.WARNING, 'tfm'):
    begun = begin(tiny(**UNROLLED), run)
  assert int(begun.state.step) == 3 and layout_of(begun.state.params) == 'unrolled'
  assert 'step 3 is used instead' in caplog.text
