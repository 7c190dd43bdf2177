from __future__ import annotations

import flax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm.text.tokenizer
from tfm.config import Config, TokenizerConfig, TransformerConfig
from tfm.training.average import average_params, average_run
from tfm.training.checkpoints import CheckpointError, Checkpoints, Damaged
from tfm.training.run_folder import RunFolder, RunFolderError

CONFIG = Config(model=TransformerConfig(d_model=8, num_heads=2),
                tokenizer=TokenizerConfig(kind='byte', vocab_size=None))


@flax.struct.dataclass
class State:
  params: dict
  opt_state: tuple
  step: jnp.ndarray


def weights(step: int) -> dict:
  return {'decoder': {'kernel': jnp.full((3, 2), step, jnp.float32)}, 'bias': jnp.arange(4, dtype=jnp.float32) * step}


def state(step: int) -> State:
  return State(weights(step), (weights(step),), jnp.int32(step))


@pytest.fixture
def run(tmp_path):
  """Steps 1 to 5; 2, 3 and 5 were validated, 3 is best; 5 was saved on a signal."""
  folder = RunFolder(tmp_path / 'run')
  folder.create(CONFIG, tfm.text.tokenizer.train_tokenizers(CONFIG.tokenizer, [('a', 'b')]))
  checkpoints = Checkpoints(folder.checkpoints)
  for step in range(1, 6):
    validation = {'nll': abs(step - 3) + 1.0} if step in (2, 3) else None
    checkpoints.save(step, state(step), {'layout': 'unrolled'}, validation, scheduled=step != 5)
  checkpoints.close()
  return folder


def averaged(path) -> tuple[dict, dict]:
  return Checkpoints(RunFolder(path).checkpoints).restore_params()


def assert_mean(path, steps: list[int]) -> None:
  params, meta = averaged(path)
  assert meta['averaged'] == steps
  np.testing.assert_array_equal(params['decoder']['kernel'], np.full((3, 2), np.mean(steps), np.float32))
  np.testing.assert_array_equal(params['bias'], (np.arange(4) * np.mean(steps)).astype(np.float32))


def test_mean_is_exact_to_the_last_float32_bit():
  rng = np.random.default_rng(0)
  trees = [{'a': rng.normal(size=(50,)).astype(np.float32) * 10.0**k} for k in range(7)]
  exact = np.mean([tree['a'].astype(np.float64) for tree in trees], axis=0).astype(np.float32)
  result = average_params(iter(trees))['a']
  assert result.dtype == np.float32
  np.testing.assert_array_equal(result, exact)
  np.testing.assert_array_equal(average_params([trees[3]])['a'], trees[3]['a'])


def test_nothing_or_different_trees():
  with pytest.raises(ValueError, match='nothing to average'):
    average_params([])
  with pytest.raises(ValueError, match='differ'):
    average_params([{'a': np.ones(2)}, {'a': np.ones(3)}])


def test_last_steps_and_best(run, tmp_path):
  assert average_run(run.path, last=3) == run.path / 'averaged'
  assert_mean(run.path / 'averaged', [2, 3, 4])  # 5 was saved on a signal: an uninterrupted run has no such step.
  assert_mean(average_run(run.path, steps=[5, 1], output=tmp_path / 'x'), [1, 5])
  assert_mean(average_run(run.path, best=1, output=tmp_path / 'y'), [3])


def test_the_output_is_a_run_and_replaces_only_averages(run, tmp_path):
  path = average_run(run.path, last=2)
  assert RunFolder(path).read_config() == CONFIG
  assert RunFolder(path).read_tokenizers().source.vocabulary() == run.read_tokenizers().source.vocabulary()
  average_run(run.path, last=3)
  assert_mean(path, [2, 3, 4])
  other, unsaved = tmp_path / 'thesis', RunFolder(tmp_path / 'unsaved')
  other.mkdir()
  unsaved.create(CONFIG, run.read_tokenizers())  # A run that has not saved a checkpoint yet.
  for target in (other, run.path, unsaved.path):
    with pytest.raises(RunFolderError, match='is not an average'):
      average_run(run.path, last=2, output=target)


def test_an_average_is_not_averaged_again(run, tmp_path):
  path = average_run(run.path, last=2)
  for output in (tmp_path / 'z', path):
    with pytest.raises(CheckpointError, match='is an average of steps 3, 4 already'):
      average_run(path, last=1, output=output)
  assert_mean(path, [3, 4])


def test_training_cannot_resume_in_an_average(run):
  with pytest.raises(CheckpointError, match='average of steps 3, 4'):
    Checkpoints(RunFolder(average_run(run.path, last=2)).checkpoints).restore_latest(state(0))


@pytest.mark.parametrize('choice, sentence', [
    ({'last': 9}, 'has 4. Ask for fewer, or train with training.keep_last >= 9'),
    ({'best': 3}, 'has 2 that were validated.*training.keep_best >= 3'),
    ({'last': 0}, 'give 1 or more'),
    ({'steps': [2, 77]}, 'no step 77'),
    ({'steps': []}, 'name at least one'),
])
def test_what_is_not_there(run, choice, sentence):
  with pytest.raises(CheckpointError, match=sentence):
    average_run(run.path, **choice)
  assert not (run.path / 'averaged').exists()


def test_exactly_one_choice(run):
  for choice in ({}, {'last': 1, 'best': 1}):
    with pytest.raises(ValueError, match='exactly one'):
      average_run(run.path, **choice)


def test_a_damaged_step_is_not_left_out_in_silence(run):
  (run.checkpoints / '000003' / 'meta' / 'metadata').write_text('{')
  with pytest.raises(Damaged, match='step 3'):
    average_run(run.path, last=3)
