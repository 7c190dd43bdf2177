from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm
from tfm.config import DataConfig, TokenizerConfig, TransformerConfig
from tfm.loaded import assemble, framing
from tfm.models.build import build_model, initialize
from tfm.models.layout import to_layout
from tfm.special_ids import BOS, OURS, PAD, SpecialIds
from tfm.text.corpora import build_corpus
from tfm.text.objectives import build_evaluation_batches
from tfm.text.tokenizer import Tokenizers, train_tokenizer
from tfm.training.average import average_run
from tfm.training.checkpoints import CheckpointError, Checkpoints
from tfm.training.run_folder import RunFolder, RunFolderError


@flax.struct.dataclass
class State:
  params: dict
  step: jax.Array


@pytest.fixture
def copy(numbers_run, tmp_path) -> Path:
  """A copy of the run to break."""
  return Path(shutil.copytree(numbers_run, tmp_path / 'copy'))


def saved(run: Path, step: int) -> dict:
  return Checkpoints(RunFolder(run).checkpoints).restore_params(step)[0]


def assert_has(translator: tfm.Translator, params: dict) -> None:
  jax.tree.map(np.testing.assert_array_equal, translator.params, to_layout(params, 'unrolled'))


def test_the_newest_checkpoint_or_a_step_by_name(numbers_run):
  assert_has(tfm.load(numbers_run), saved(numbers_run, 60))
  assert_has(tfm.load(str(numbers_run), step=20), saved(numbers_run, 20))
  assert_has(tfm.load(os.path.relpath(numbers_run)), saved(numbers_run, 60))
  assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(saved(numbers_run, 20)),
                                            jax.tree.leaves(saved(numbers_run, 60))))
  with pytest.raises(CheckpointError, match='no step 30; there are 20, 40, 60'):
    tfm.load(numbers_run, step=30)


def test_the_best_checkpoint_is_the_best_validated_one(numbers_run, copy):
  shutil.rmtree(copy / 'checkpoints')
  writer = Checkpoints(RunFolder(copy).checkpoints)
  for step, nll in ((20, 2.0), (40, 1.0), (60, 3.0)):
    writer.save(step, State(saved(numbers_run, step), jnp.int32(step)), {'layout': 'unrolled'}, {'nll': nll})
  writer.close()
  assert_has(tfm.load(copy, 'best'), saved(numbers_run, 40))
  assert_has(tfm.load(copy), saved(numbers_run, 60))


def test_settings_are_those_of_the_run(numbers_run):
  translator, config = tfm.load(numbers_run), RunFolder(numbers_run).read_config()
  assert translator.decoding == config.decoding
  assert translator.model.config == config.model
  assert translator.tokenizers.source.vocab_size == translator.model.source_vocab_size
  assert isinstance(translator, tfm.Translator)


def test_scanned_weights_are_read_like_unrolled_ones(numbers_run, copy):
  shutil.rmtree(copy / 'checkpoints')
  writer = Checkpoints(RunFolder(copy).checkpoints)
  writer.save_params(7, to_layout(saved(numbers_run, 60), 'scanned'), {'layout': 'scanned'})
  writer.close()
  assert_has(tfm.load(copy), saved(numbers_run, 60))
  assert tfm.load(copy).model == tfm.load(numbers_run).model


def test_an_average_is_a_run_like_any_other(numbers_run, tmp_path):
  averaged = tfm.load(average_run(numbers_run, steps=[40, 60], output=tmp_path / 'averaged'))
  mean = jax.tree.map(lambda a, b: ((np.float64(a) + b) / 2).astype(a.dtype), saved(numbers_run, 40),
                      saved(numbers_run, 60))
  assert_has(averaged, mean)
  assert averaged.translate(['forty-two'])[0].tokens


def test_a_damaged_checkpoint_is_passed_over_and_said(copy, numbers_run, caplog):
  (copy / 'checkpoints' / '000060' / 'meta' / 'metadata').write_text('{')
  with caplog.at_level('WARNING', logger='tfm'):
    translator = tfm.load(copy)
  assert_has(translator, saved(numbers_run, 40))
  assert 'step 60' in caplog.text and 'Step 40 is used instead' in caplog.text


def test_folders_that_are_no_run(tmp_path, copy):
  with pytest.raises(RunFolderError, match=r'There is no folder .*missing; give the folder'):
    tfm.load(tmp_path / 'missing')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(RunFolderError, match=r'is not a run: it has no config\.json'):
    tfm.load(tmp_path / 'empty')
  with pytest.raises(RunFolderError, match='is not a run'):
    tfm.load(copy / 'checkpoints')
  shutil.rmtree(copy / 'tokenizer')
  with pytest.raises(RunFolderError, match='has no tokenizer'):
    tfm.load(copy)


def test_no_checkpoint_yet(copy):
  shutil.rmtree(copy / 'checkpoints')
  with pytest.raises(CheckpointError, match='holds no checkpoint yet; train'):
    tfm.load(copy)
  with pytest.raises(CheckpointError, match='none is best'):
    tfm.load(copy, 'best')


def test_a_run_of_a_newer_format(copy):
  file = copy / 'config.json'
  file.write_text(json.dumps({**json.loads(file.read_text()), 'format': 99, 'tfm': '7.0'}))
  with pytest.raises(RunFolderError, match=r'format 99, written by tfm 7\.0.*install a newer tfm'):
    tfm.load(copy)


# -- the other shapes -------------------------------------------------------------------------------------------------


def config_of(shape: str, **data) -> tfm.Config:
  layers = {'encoder_decoder': (1, 1), 'decoder_only': (0, 1), 'encoder_only': (1, 0)}[shape]
  extra_ids = {'encoder_decoder': 9, 'decoder_only': 0, 'encoder_only': 1}[shape]
  model = TransformerConfig(*layers, d_model=8, d_ff=8, num_heads=2)
  data = dict(corpus='text', source=None, target=None, limit=None, held_out=None, root='r', train='t', validation='v',
              **data)
  return tfm.Config(model=model, tokenizer=TokenizerConfig(kind='byte', vocab_size=None, extra_ids=extra_ids),
                    data=DataConfig(**data))


def made(config: tfm.Config):
  tokenizer = train_tokenizer(config.tokenizer, [])
  model = build_model(config.model, tokenizer.vocab_size, tokenizer.vocab_size)
  return assemble(config, model, initialize(model, jax.random.key(0)), Tokenizers(tokenizer, tokenizer))


@pytest.mark.parametrize(('shape', 'kind', 'special'), [
    ('encoder_decoder', tfm.Translator, OURS), ('encoder_only', tfm.Encoder, SpecialIds(source_prefix=(BOS,))),
    ('decoder_only', tfm.Generator, SpecialIds(source_prefix=(BOS,), source_suffix=()))])
def test_each_shape_has_its_own_user_and_frame(shape, kind, special):
  user = made(config_of(shape))
  assert isinstance(user, kind) and user.special == special == framing(config_of(shape))
  assert user.model.config == config_of(shape).model


def test_texts_are_framed_as_in_training(tmp_path):
  """What the model reads at use is how training texts begin, and end where the objective reads ends."""
  (tmp_path / 't').write_text('abc\n')
  for shape, data in (('decoder_only', {}), ('decoder_only', {'packing': 'packed'}),
                      ('decoder_only', {'packing': 'blocks'}), ('encoder_only', {}),
                      ('decoder_only', {'packing': 'blocks', 'documents': 'file'})):
    config = config_of(shape, **data)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(tmp_path), validation='t'))
    user, texts = made(config), build_corpus(config.data).train()
    batch = build_evaluation_batches(config, texts, user.tokenizers)[0]
    ids, asked = (side if side is None else side[0] for side in batch)
    if shape == 'encoder_only':
      ids = np.where(asked == PAD, ids, asked)
    prefix = user.special.source_prefix
    read = [*prefix, *user.tokenizers.source.encode('abc'), *user.special.source_suffix]
    assert ids[:len(read)].tolist() == read
    assert prefix == (() if data.get('documents') == 'file' else (BOS,))


def test_a_run_of_a_language_model_loads_as_a_generator(letters_run):
  generator = tfm.load(letters_run)
  assert isinstance(generator, tfm.Generator)
  found, = generator.generate(['abc'], max_new_tokens=12)
  assert 'abc' + found.text in 'abcdefghijklmnopqrstuvwxyz' and found.finished
  jax.tree.map(np.testing.assert_array_equal, generator.params, to_layout(saved(letters_run, 80), 'unrolled'))
