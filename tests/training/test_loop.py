from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import tfm
import tfm.training.loop
from tfm.config import ConfigError
from tfm.errors import UserError
from tfm.parallel.compile import jit_step
from tfm.special_ids import PAD
from tfm.text.batches import Batches, encode_pairs, evaluation_batches
from tfm.text.corpora import build_corpus
from tfm.text.objectives import build_batches, build_evaluation_batches
from tfm.training.checkpoints import Checkpoints
from tfm.training.loop import TrainingDiverged, train
from tfm.training.run_folder import RunFolder
from tfm.training.validation import validation_nll

pytestmark = pytest.mark.usefixtures('quick')


def records(run: Path, kind: str) -> list[dict]:
  lines = [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]
  return [line for line in lines if line['kind'] == kind]


def steps_of(run: Path) -> list[int]:
  return Checkpoints(RunFolder(run).checkpoints).steps()


def must_not_train(*_):
  raise AssertionError('there was nothing left to train')


# -- killed and resumed -----------------------------------------------------------------------------------------------

OTHERS = dict(
    model=dict(norm='pre', tying='none', positions='learned', max_positions=64, dtype='bfloat16',
               attention_dropout=0.1),
    tokenizer=dict(joint=False), optimizer=dict(clip_norm=0.5), training=dict(accumulate=2))


def test_killed_and_resumed_is_bit_for_bit_never_killed(undisturbed, tiny, same_bytes, train_until, tmp_path):
  train_until(5, tiny(), tmp_path / 'run')
  assert steps_of(tmp_path / 'run') == [3]
  outcome = train(tiny(), tmp_path / 'run')
  assert (outcome.folder, outcome.step, outcome.reason) == (tmp_path / 'run', 6, 'finished')
  same_bytes(tmp_path / 'run', undisturbed(tiny()))


def test_so_it_is_with_other_axes(tiny, same_bytes, validations, train_until, tmp_path):
  validations(1.0, 1.0)
  config = tiny(**OTHERS)
  train(config, tmp_path / 'undisturbed')
  train_until(5, config, tmp_path / 'run')
  train(config, tmp_path / 'run')
  same_bytes(tmp_path / 'run', tmp_path / 'undisturbed')


def test_killed_before_the_first_checkpoint_it_starts_again(undisturbed, tiny, same_bytes, train_until, tmp_path):
  train_until(3, tiny(), tmp_path / 'run')
  assert steps_of(tmp_path / 'run') == []
  train(tiny(), tmp_path / 'run')
  same_bytes(tmp_path / 'run', undisturbed(tiny()))


def test_a_finished_run_is_left_as_it_is(finished, undisturbed, tiny, same_bytes, at_step, capsys):
  for step in range(1, 8):
    at_step(step, must_not_train)
  outcome = train(tiny(), finished)
  assert (outcome.step, outcome.reason) == (6, 'finished')
  assert f'Resuming {finished} at step 6 of 6' in capsys.readouterr().err
  same_bytes(finished, undisturbed(tiny()))


def test_the_step_is_compiled_once(tiny, caplog, tmp_path):
  """A second program for the same batch would double the start."""
  with jax.log_compiles(), caplog.at_level('WARNING', 'jax'):
    train(tiny(training=dict(steps=1)), tmp_path / 'run')
  said = [record.getMessage() for record in caplog.records if 'jit(step)' in record.getMessage()]
  assert sum('MLIR module conversion' in line for line in said) == 1
  assert sum('XLA compilation' in line for line in said) == 1


def test_more_steps_go_on_where_the_run_ended(finished, tiny, validations):
  validations(1.0)
  outcome = train(tiny(training=dict(steps=8)), finished)
  assert outcome.step == 8 and [record['step'] for record in records(finished, 'train')] == [2, 4, 6, 8]
  assert RunFolder(finished).read_config().training.steps == 8


# -- records ----------------------------------------------------------------------------------------------------------


def test_every_interval_and_the_last_step_are_recorded(undisturbed, tiny, validations, tmp_path):
  """Metrics are read a step late; none may get lost at a checkpoint, a validation or the end."""
  expected = records(undisturbed(tiny()), 'train')
  validations(2.0, 1.0)
  config = tiny(training=dict(steps=5, log_every=2, validate_every=4, checkpoint_every=1, keep_last=9))
  train(config, tmp_path / 'run')
  found = records(tmp_path / 'run', 'train')
  assert [record['step'] for record in found] == [2, 4, 5]
  assert found[:2] == expected[:2]
  assert [record['step'] for record in records(tmp_path / 'run', 'validation')] == [4, 5]

  tokenizers = RunFolder(tmp_path / 'run').read_tokenizers()
  batches = Batches(build_corpus(config.data), tokenizers, config.data, config.training.seed, config.data.rows_multiple)
  for record in found:  # each of its own step, not of a neighbour
    assert record['tokens'] == (batches.batch_at(record['step'] - 1).target_BxT[:, 1:] != PAD).sum()


def test_a_record_has_the_means_over_the_tokens(undisturbed, tiny):
  for record in records(undisturbed(tiny()), 'train'):
    assert set(record) == {'kind', 'step', 'loss', 'nll', 'accuracy', 'grad_norm', 'learning_rate', 'tokens'}
    assert 0 < record['nll'] < 2 * math.log(300) and 0 <= record['accuracy'] <= 1 and record['grad_norm'] > 0
    assert record['learning_rate'] == pytest.approx(0.01)
    # With random weights logits are about equal; then smoothing changes little.
    assert record['loss'] == pytest.approx(record['nll'], rel=0.1)


def test_validation_is_of_the_weights_that_are_saved(undisturbed, tiny):
  run, config = undisturbed(tiny()), tiny()
  (record,) = records(run, 'validation')
  translator = tfm.load(run, step=6)
  pairs = build_corpus(config.data).validation()
  batches = evaluation_batches(encode_pairs(translator.tokenizers, pairs), config.data)
  assert record['step'] == 6 and set(record) == {'kind', 'step', 'nll', 'bleu', 'chrf', 'exact'}
  assert record['nll'] == pytest.approx(validation_nll(translator.model, translator.params, batches), rel=1e-5)
  meta = Checkpoints(RunFolder(run).checkpoints).read_meta(6)
  assert meta['validation'] == {name: record[name] for name in ('nll', 'bleu', 'chrf', 'exact')}
  (sample,) = RunFolder(run).samples.iterdir()
  source, reference = pairs[0]
  (translation,) = translator.translate([source])
  assert sample.name == '000006.txt' and sample.read_text() == (
      f'source       {source}\nreference    {reference}\ntranslation  {translation.text}\n')


# -- texts of one language --------------------------------------------------------------------------------------------


@pytest.fixture
def of_texts(tiny, tmp_path):
  """`of_texts(model={...}, ...)`: the tiny config on a small text of one language."""
  (tmp_path / 'text').write_text(''.join(f'{"abc" * (i % 5 + 1)} {"de" * (i % 3 + 1)}\n' for i in range(200)))
  data = dict(corpus='text', source=None, target=None, limit=None, held_out=None, root=str(tmp_path), train='text',
              validation_fraction=0.1)

  def make(**changes):
    own = changes.get('data', {})
    buckets = 1 if own.get('packing', 'padded') == 'padded' else 4
    return tiny(**{**changes, 'data': {**data, 'buckets': buckets, **own},
                   'training': {'validation_sentences': 200, **changes.get('training', {})}})

  return make


def test_a_language_model_killed_and_resumed_is_one_that_was_not(of_texts, same_bytes, train_until, tmp_path):
  config = of_texts(model=dict(encoder_layers=0), data=dict(packing='blocks'))
  train(config, tmp_path / 'undisturbed')
  train_until(5, config, tmp_path / 'run')
  train(config, tmp_path / 'run')
  same_bytes(tmp_path / 'run', tmp_path / 'undisturbed')
  (sample,) = RunFolder(tmp_path / 'run').samples.iterdir()
  assert sample.read_text().startswith('text          ')
  (record,) = records(tmp_path / 'run', 'validation')
  assert set(record) == {'kind', 'step', 'nll', 'accuracy'}


@pytest.mark.parametrize(('objective', 'changes'), [
    ('causal', dict(model=dict(encoder_layers=0), data=dict(packing='packed'))),
    ('masked', dict(model=dict(decoder_layers=0), tokenizer=dict(extra_ids=1))),
    ('span_corruption', dict(tokenizer=dict(extra_ids=4)))])
def test_every_objective_is_learned(of_texts, tmp_path, objective, changes):
  config = of_texts(**changes, training=dict(steps=60, validate_every=60, log_every=5, samples=0),
                    optimizer=dict(label_smoothing=0.0))
  assert config.objective == objective
  train(config, tmp_path / 'run')
  nll = [record['nll'] for record in records(tmp_path / 'run', 'train')]
  (validation,) = records(tmp_path / 'run', 'validation')
  assert np.mean(nll[-3:]) < 0.6 * nll[0] and validation['nll'] < 0.6 * nll[0] and validation['accuracy'] > 0.2
  user = tfm.load(tmp_path / 'run')
  batches = build_evaluation_batches(config, build_corpus(config.data).validation(), user.tokenizers)
  assert validation_nll(user.model, user.params, batches) == pytest.approx(validation['nll'], rel=1e-5)


# -- packed pairs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def of_pairs(tiny, tmp_path):
  """`of_pairs(model={...}, ...)`: the tiny config on a few packed sentence pairs."""
  for name, count in (('train', 150), ('val', 12)):
    for language, letters in (('en', 'abc'), ('de', 'de')):
      (tmp_path / f'{name}.{language}').write_text(''.join(f'{letters[:i % 3 + 1] * (i % 4 + 1)}\n'
                                                           for i in range(count)))
  data = dict(corpus='files', limit=None, held_out=None, root=str(tmp_path), train='train', validation='val',
              packing='packed', buckets=4)
  return lambda **changes: tiny(**{**changes, 'data': {**data, **changes.get('data', {})}})


def test_packed_pairs_are_learned_and_judged_as_padded_ones(of_pairs, same_bytes, train_until, tmp_path):
  """In micro-batches, with dropout, killed and resumed; and nothing but the one shape is compiled."""
  config = of_pairs(training=dict(accumulate=2, steps=30, validate_every=15, checkpoint_every=5, log_every=5))
  train(config, tmp_path / 'undisturbed')
  train_until(18, config, tmp_path / 'run')
  train(config, tmp_path / 'run')
  same_bytes(tmp_path / 'run', tmp_path / 'undisturbed')
  nll = [record['nll'] for record in records(tmp_path / 'run', 'train')]
  assert nll[-1] < 0.8 * nll[0]
  *_, validation = records(tmp_path / 'run', 'validation')
  user, pairs = tfm.load(tmp_path / 'run', step=30), build_corpus(config.data).validation()
  padded = evaluation_batches(encode_pairs(user.tokenizers, pairs), config.data)
  assert validation['nll'] == pytest.approx(validation_nll(user.model, user.params, padded), rel=1e-5)
  batches = build_batches(config, build_corpus(config.data), user.tokenizers)
  shapes = {batch.source_BxS.shape + batch.target_BxT.shape for batch in (
      *map(batches.batch_at, range(2 * batches.steps_per_epoch)),
      *build_evaluation_batches(config, pairs, user.tokenizers, batches.shapes))}
  assert len(shapes) == len(batches.shapes) == 1


# -- when to stop, what to keep ---------------------------------------------------------------------------------------


def test_stops_early_and_stays_stopped(tiny, validations, at_step, tmp_path):
  config = tiny(training=dict(steps=20, validate_every=2, checkpoint_every=1, patience=2, keep_last=1, keep_best=1))
  left = validations(3.0, 1.0, 2.0, 1.5, 9.0)
  outcome = train(config, tmp_path / 'run')
  assert (outcome.step, outcome.reason, left) == (8, 'early stop', [9.0])
  assert steps_of(tmp_path / 'run') == [4, 8]  # the best and the last
  at_step(9, must_not_train)
  again = train(config, tmp_path / 'run')
  assert again == outcome and left == [9.0]


def test_keeps_the_best_and_the_last(tiny, validations, tmp_path):
  validations(2.0, 4.0, 1.0, 3.0)
  config = tiny(training=dict(steps=8, validate_every=2, checkpoint_every=1, keep_last=2, keep_best=2,
                              keep_best_by='bleu'))
  train(config, tmp_path / 'run')
  assert steps_of(tmp_path / 'run') == [4, 7, 8]  # by nll it would be 2, 6, 7, 8
  meta = Checkpoints(RunFolder(tmp_path / 'run').checkpoints).read_meta(4)
  assert meta['validation']['bleu'] == 4.0


# -- what must not happen ---------------------------------------------------------------------------------------------


@pytest.fixture
def spoil(monkeypatch):
  """`spoil(5, change)`: the fifth update leaves behind what `change(state, metrics)` makes of it."""

  def arrange(step: int, change) -> None:
    def spoiling(*arguments):
      compiled, calls = jit_step(*arguments), []

      def update(state, batch):
        calls.append(step)
        result = compiled(state, batch)
        return change(*result) if len(calls) == step else result

      return update

    monkeypatch.setattr(tfm.training.loop, 'jit_step', spoiling)

  return arrange


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('what', ['loss', 'gradient norm', 'weights'])
def test_what_is_no_number_stops_the_run_and_is_not_saved(tiny, spoil, tmp_path, what, bad):
  bad = jax.device_put(np.float32(bad))

  def change(state, metrics):
    if what == 'loss':
      return state, metrics.replace(sums=metrics.sums.replace(loss=bad))
    if what == 'gradient norm':
      return state, metrics.replace(grad_norm=bad)
    table = state.params['target_embedding']['table']
    return state.replace(params={**state.params, 'target_embedding': {'table': table * bad}}), metrics

  spoil(3, change)
  config = tiny(training=dict(checkpoint_every=1, validate_every=100))
  with pytest.raises(TrainingDiverged, match=f'Step 3 gave .*{what}.* last good checkpoint is step 2 in .*'
                                             'optimizer.learning_rate'):
    train(config, tmp_path / 'run')
  assert steps_of(tmp_path / 'run') == [1, 2]


def test_the_first_step_may_diverge_too(tiny, spoil, tmp_path):
  bad = jax.device_put(np.float32(math.nan))
  spoil(1, lambda state, metrics: (state, metrics.replace(grad_norm=bad)))
  with pytest.raises(TrainingDiverged, match='Step 1 gave .*No checkpoint was saved yet'):
    train(tiny(), tmp_path / 'run')


def test_a_validation_that_is_no_number_stops_before_it_is_saved(tiny, validations, tmp_path):
  validations(1.0, math.nan)
  config = tiny(training=dict(validate_every=2, checkpoint_every=1))
  with pytest.raises(TrainingDiverged, match='Step 4 gave a validation nll of nan.*last good checkpoint is step 3'):
    train(config, tmp_path / 'run')
  assert steps_of(tmp_path / 'run') == [1, 2, 3]
  assert [record['step'] for record in records(tmp_path / 'run', 'validation')] == [2]


def test_nothing_moves_to_the_device_unseen(tiny, monkeypatch, tmp_path):
  # The loop sends batches itself; here it forgets to.
  monkeypatch.setattr(tfm.training.loop, 'place_batch', lambda batch, *where: tuple(batch))
  with pytest.raises(RuntimeError, match='Disallowed host-to-device transfer'):
    train(tiny(), tmp_path / 'run')


@pytest.mark.parametrize('changes, sentence', [
    (dict(data=dict(tokens_per_batch=32)), 'data.tokens_per_batch 32 does not hold 8 rows'),
    (dict(data=dict(corpus='files', limit=None, held_out=None, root='nowhere', train='a', validation='b')), 'nowhere'),
    (dict(data=dict(max_length=3)), 'no training pair has at most'),
    (dict(model=dict(positions='learned', max_positions=12), data=dict(max_length=12)),
     'validation set has sentences of up to .* model.max_positions is 12'),
    (dict(decoding=dict(max_source_length=4)), 'above decoding.max_source_length=4'),
])
def test_what_cannot_work_leaves_no_folder_behind(tiny, tmp_path, changes, sentence):
  with pytest.raises(UserError, match=sentence):
    train(tiny(**changes), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_fewer_steps_than_were_made_are_refused_and_change_nothing(finished, tiny):
  before = RunFolder(finished).config_file.read_bytes()
  with pytest.raises(ConfigError, match='is at step 6, beyond training.steps=4'):
    train(tiny(training=dict(steps=4)), finished)
  assert RunFolder(finished).config_file.read_bytes() == before and steps_of(finished) == [3, 6]


@pytest.mark.parametrize('wanted', [True, False])
def test_memory_is_kept_only_where_the_config_says_so(tiny, monkeypatch, tmp_path, wanted):
  calls = []
  monkeypatch.setattr(tfm.training.loop, 'reuse_freed_memory', lambda: calls.append('kept') or 'memory is kept')
  monkeypatch.setattr(tfm.training.loop, 'start', must_not_train)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  with pytest.raises(AssertionError):
    train(tiny(training=dict(reuse_memory=wanted)), tmp_path / 'run')
  assert calls == ['kept'] * wanted
