"""Every leaf of the config changes something: initialisation, the step's program, data, decoding, or the loop."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

import tfm.training.loop
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
from tfm.models.build import build_model, initialize
from tfm.parallel.mesh import mesh_sizes
from tfm.special_ids import EOS
from tfm.text.corpora import build_corpus
from tfm.text.objectives import build_batches, build_evaluation_batches
from tfm.text.tokenizer import train_tokenizers
from tfm.training.step import build_step, new_state
from tfm.translator import Translator

BASE = Config(
    model=TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=8, d_ff=8, num_heads=2),
    tokenizer=TokenizerConfig(kind='char', vocab_size=290),
    data=DataConfig(limit=400, held_out=20, tokens_per_batch=512, buckets=1, max_length=64),
    optimizer=OptimizerConfig(warmup_steps=4),
    training=TrainingConfig(steps=4, log_every=2, validate_every=2, checkpoint_every=1, keep_last=2,
                            validation_sentences=4, samples=2),
    decoding=DecodingConfig(beam_size=2, extra_length=4))

FILES = dict(corpus='files', limit=None, held_out=None, train='train', validation='val', test='test')
"""Changes to BASE.data for the leaves that only matter with files; `root` is made by the test."""

# What a leaf is changed to (with what must change beside it), and where the change must show.
LEAVES = {
    'model.encoder_layers': (2, 'init'), 'model.decoder_layers': (2, 'init'), 'model.d_model': (16, 'init'),
    'model.d_ff': (16, 'init'), 'model.num_heads': (4, 'init'), 'model.d_k': (8, 'init'), 'model.d_v': (8, 'init'),
    'model.num_kv_heads': (1, 'init'), 'model.norm': ('pre', 'init'), 'model.norm_type': ('rms', 'init'),
    'model.norm_epsilon': (1e-3, 'step'), 'model.qk_norm': (True, 'init'), 'model.embedding_norm': (True, 'init'),
    'model.positions': ('learned', 'init'), 'model.max_positions': (128, 'init'), 'model.position_offset': (2, 'step'),
    'model.rope_base': (500.0, 'step'), 'model.rope_scaling': ('llama3', 'step'), 'model.rope_factor': (4.0, 'step'),
    'model.rope_original_length': (4000, 'step'), 'model.relative_buckets': (8, 'init'),
    'model.relative_max_distance': (20, 'step'), 'model.feed_forward': ('swiglu', 'init'),
    'model.biases': ('none', 'init'), 'model.experts': (4, 'init'), 'model.experts_per_token': (1, 'step'),
    'model.load_balance': (0.1, 'step'), 'model.convolution': ('after', 'init'), 'model.kernel_width': (3, 'init'),
    'model.window': (3, 'step'), 'model.attention_scale': (1.0, 'step'),
    'model.attention_softcap': (5.0, 'step'), 'model.attention_sinks': (True, 'init'), 'model.tying': ('none', 'init'),
    'model.scale_embeddings': (False, 'step'), 'model.scale_output': (True, 'step'),
    'model.output_bias': (True, 'init'), 'model.output_transform': (True, 'init'), 'model.logit_softcap': (5.0, 'step'),
    'model.token_types': (2, 'init'), 'model.pooling': ('first', 'vector'), 'model.pooler': (True, 'init'),
    'model.num_labels': (3, 'init'), 'model.pad_id': (3, 'step'),
    'model.dropout': (0.2, 'step'), 'model.attention_dropout': (0.2, 'step'),
    'model.activation_dropout': (0.2, 'step'), 'model.dtype': ('bfloat16', 'step'),
    'model.attention_backend': ('blockwise', 'step'),
    'model.vocab_multiple': (7, 'init'), 'model.scan_layers': (True, 'init'), 'model.remat': ('dots', 'step'),
    'tokenizer.kind': ('word', 'data'), 'tokenizer.vocab_size': (262, 'data'), 'tokenizer.joint': (False, 'data'),
    'tokenizer.extra_ids': (30, 'data'),
    'data.corpus': ('files', 'data'), 'data.source': ('fr', 'data'), 'data.target': ('es', 'data'),
    'data.limit': (500, 'data'), 'data.held_out': (30, 'data'), 'data.root': ('other', 'data'),
    'data.train': ('val', 'data'), 'data.validation': ('train', 'data'), 'data.test': ('train', 'data'),
    'data.validation_fraction': (0.5, 'data'), 'data.column': ('other', 'data'), 'data.documents': ('file', 'data'),
    'data.packing': ('packed', 'data'), 'data.mask_rate': (0.6, 'data'), 'data.mean_span': (1.0, 'data'),
    'data.tokens_per_batch': (1024, 'data'), 'data.buckets': (3, 'data'), 'data.max_length': (30, 'data'),
    'data.over_long': ('truncate', 'data'), 'data.rows_multiple': (4, 'loop'), 'data.width_multiple': (16, 'data'),
    'mesh.data': (2, 'mesh'), 'mesh.fsdp': (2, 'mesh'), 'mesh.tensor': (2, 'mesh'), 'mesh.context': (2, 'mesh'),
    'mesh.expert': (2, 'mesh'),
    'mesh.compiler': ('pmap', 'mesh'),
    'optimizer.schedule': ('linear', 'step'), 'optimizer.learning_rate': (2.0, 'step'),
    'optimizer.warmup_steps': (8, 'step'), 'optimizer.b1': (0.8, 'step'), 'optimizer.b2': (0.9, 'step'),
    'optimizer.epsilon': (1e-6, 'step'), 'optimizer.clip_norm': (1.0, 'step'),
    'optimizer.label_smoothing': (0.2, 'step'), 'optimizer.name': ('lion', 'step'),
    'optimizer.weight_decay': (0.1, 'step'), 'optimizer.ema_decay': (0.9, 'step'),
    'optimizer.final_fraction': (0.1, 'step'), 'optimizer.decay_fraction': (0.5, 'step'),
    'training.steps': (6, 'loop'), 'training.seed': (1, 'data'), 'training.accumulate': (2, 'step'),
    'training.log_every': (1, 'loop'), 'training.validate_every': (4, 'loop'),
    'training.validation_sentences': (2, 'loop'), 'training.patience': (1, 'loop'),
    'training.checkpoint_every': (2, 'loop'), 'training.keep_last': (3, 'loop'), 'training.keep_best': (0, 'loop'),
    'training.keep_best_by': ('chrf', 'loop'), 'training.samples': (1, 'loop'),
    'training.reuse_memory': (False, 'loop'),
    'decoding.beam_size': (3, 'decoding'), 'decoding.length_penalty': (2.0, 'decoding'),
    'decoding.length_penalty_form': ('power', 'decoding'), 'decoding.stop': ('full', 'decoding'),
    'decoding.extra_length': (8, 'decoding'), 'decoding.max_source_length': (3, 'decoding'),
    'decoding.batch_tokens': (16, 'decoding'),
}

LEARNED = {'model.positions': 'learned', 'model.max_positions': 70}
ROPE = {'model.positions': 'rope'}
YARN = {**ROPE, 'model.rope_scaling': 'yarn', 'model.rope_factor': 2.0, 'model.rope_original_length': 10}
RELATIVE = {'model.positions': 'relative'}
EXPERTS = {'model.experts': 4, 'model.biases': 'none'}
ENCODER_ONLY = {
    'model.decoder_layers': 0, 'tokenizer.extra_ids': 1,
    'training.validation_sentences': 200,
    **{f'data.{name}': value for name, value in dict(
        corpus='text', source=None, target=None, limit=None, held_out=None, root='r', train='t',
        validation='v').items()}}
"""A masked language model; its texts are not read."""

TEXT = {**{f'data.{name}': value for name, value in dict(
    corpus='text', source=None, target=None, limit=None, held_out=None, train='train.en', validation='val.en').items()},
        'training.validation_sentences': 200}
CAUSAL = {**TEXT, 'model.encoder_layers': 0}
BLOCKS = {**CAUSAL, 'data.packing': 'blocks', 'data.buckets': 4, 'data.max_length': 8, 'data.tokens_per_batch': 64}
SPANS = {**TEXT, 'tokenizer.extra_ids': 20, 'data.mask_rate': 0.5}

# Leaves that mean something only together with another setting: that setting, in both configs compared.
CONTEXT = {
    'model.max_positions': {'model.positions': 'learned', 'model.max_positions': 64},
    'model.position_offset': LEARNED, 'model.rope_base': ROPE, 'model.rope_scaling': YARN, 'model.rope_factor': YARN,
    'model.rope_original_length': YARN, 'model.relative_buckets': RELATIVE, 'model.relative_max_distance': RELATIVE,
    'model.experts_per_token': EXPERTS, 'model.load_balance': EXPERTS,
    'model.kernel_width': {'model.convolution': 'parallel'},
    **{f'model.{name}': ENCODER_ONLY
       for name in ('output_transform', 'token_types', 'pooling', 'pooler', 'num_labels')},
    'tokenizer.joint': {'model.tying': 'target'},
    'data.root': FILES, 'data.train': FILES, 'data.validation': FILES, 'data.test': FILES,
    'data.over_long': {'data.max_length': 30}, 'data.packing': {**CAUSAL, 'data.buckets': 4}, 'data.documents': BLOCKS,
    'data.validation_fraction': {**BLOCKS, 'data.validation': None, 'data.validation_fraction': 0.25},
    'data.column': {**CAUSAL, 'data.corpus': 'huggingface', 'data.column': 'text'},
    'data.mask_rate': SPANS, 'data.mean_span': SPANS, 'tokenizer.extra_ids': SPANS,
    'optimizer.weight_decay': {'optimizer.name': 'adamw'},
    'optimizer.final_fraction': {'optimizer.schedule': 'linear'},
    'optimizer.decay_fraction': {'optimizer.schedule': 'wsd', 'optimizer.decay_fraction': 0.25, 'training.steps': 40},
    'training.patience': {'optimizer.learning_rate': 1e-30, 'training.steps': 8},
    'training.keep_best_by': {'training.keep_last': 1},
    'training.keep_best': {'optimizer.learning_rate': 1e3, 'training.keep_last': 1},
}
# Settings that must change along with a leaf for the config to be valid.
ALONG = {
    'model.positions': {'model.max_positions': 64}, 'model.experts': {'model.biases': 'none'},
    'data.corpus': {f'data.{name}': value for name, value in FILES.items()},
    'mesh.data': {'mesh.fsdp': 4}, 'mesh.context': {'data.width_multiple': 4},
    'mesh.expert': {'model.experts': 4, 'model.biases': 'none'},
}


def changed(config: Config, values: dict) -> Config:
  sections: dict[str, dict] = {}
  for name, value in values.items():
    section, leaf = name.split('.')
    sections.setdefault(section, {})[leaf] = value
  return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **own)
                                        for section, own in sections.items()})


def test_every_leaf_has_a_case():
  leaves = {f'{section.name}.{leaf.name}' for section in dataclasses.fields(Config)
            for leaf in dataclasses.fields(getattr(BASE, section.name))}
  assert leaves == set(LEAVES)


@pytest.mark.parametrize('name', LEAVES)
def test_the_leaf_changes_something(name, tmp_path, monkeypatch):
  value, where = LEAVES[name]
  context = CONTEXT.get(name, {})
  context = {key if '.' in key else f'data.{key}': item for key, item in context.items()}
  if 'data.corpus' in {*context, name} or name == 'data.corpus':
    for root in ('files', 'other'):
      write_files(tmp_path / root)
    monkeypatch.setitem(sys.modules, 'datasets', SimpleNamespace(load_dataset=Table))
    along = {'data.root': str(tmp_path / 'files')}
    context = {**context, **(along if name != 'data.corpus' else {})}
  else:
    along = {}
  one = changed(BASE, context)
  value = str(tmp_path / value) if name == 'data.root' else value
  other = changed(one, {name: value, **ALONG.get(name, {}), **(along if name == 'data.corpus' else {})})
  before = seen(where, one, tmp_path / 'one', monkeypatch)
  assert seen(where, other, tmp_path / 'two', monkeypatch) != before


@pytest.mark.parametrize('where', ['init', 'step', 'data', 'decoding', 'loop', 'mesh'])
def test_an_observation_is_reproducible(where, tmp_path, monkeypatch):
  """Without this, a leaf could pass because the observation is noise."""
  assert OBSERVERS[where](BASE, tmp_path / 'once', monkeypatch) == seen(where, BASE, tmp_path / 'again', monkeypatch)


SEEN = {}


def seen(where, config, folder, monkeypatch):
  """What an observer sees; the config that most leaves are compared with is observed once."""
  if (where, config) not in SEEN:
    SEEN[where, config] = OBSERVERS[where](config, folder, monkeypatch)
  return SEEN[where, config]


def write_files(root):
  root.mkdir()
  for index, stem in enumerate(('train', 'val', 'test')):
    for language in ('en', 'de'):
      lines = [f'{root.name} {language} {stem} line {i}' for i in range(10 + index)]
      (root / f'{stem}.{language}').write_text('\n'.join(lines) + '\n')


class Table:
  """One of the folders of `write_files` as a data set: all splits have a line of each language in two columns."""

  column_names, data = ('text', 'other'), SimpleNamespace(nbytes=100)

  def __init__(self, folder, split):
    del split
    self.folder = Path(folder)

  def __iter__(self):
    sides = ((self.folder / f'train.{language}').read_text().splitlines() for language in ('en', 'de'))
    return (dict(zip(self.column_names, row)) for row in zip(*sides))

  def __len__(self):
    return 10


def model_of(config):
  return build_model(config.model, 30, 30)


def seen_in_init(config, folder, monkeypatch):
  del folder, monkeypatch
  params = jax.eval_shape(lambda: initialize(model_of(config), jax.random.key(0)))
  return str(params)


def seen_in_step(config, folder, monkeypatch):
  """The traced program; constants such as a schedule's factor are part of it."""
  del folder, monkeypatch
  model = model_of(config)
  state = jax.eval_shape(lambda: new_state(config, model, initialize(model, jax.random.key(0))))
  batch = (jax.ShapeDtypeStruct((4, 6), jnp.int32), jax.ShapeDtypeStruct((4, 7), jnp.int32))
  lowered = jax.jit(build_step(config, model)).lower(state, batch)
  return lowered.as_text()


def seen_in_vector(config, folder, monkeypatch):
  """The program that makes a vector of a sentence."""
  del folder, monkeypatch
  model = model_of(config)
  params = jax.eval_shape(lambda: initialize(model, jax.random.key(0)))
  ids_BxT = jax.ShapeDtypeStruct((4, 6), jnp.int32)
  return jax.jit(lambda params, ids_BxT: model.apply({'params': params}, ids_BxT, method='embed')).lower(
      params, ids_BxT).as_text()


def seen_in_data(config, folder, monkeypatch):
  del folder, monkeypatch
  corpus = build_corpus(config.data)
  tokenizers = train_tokenizers(config.tokenizer, corpus.tokenizer_texts())
  batches = build_batches(config, corpus, tokenizers)
  digest = hashlib.sha256(repr((tokenizers.source.vocabulary(), tokenizers.target.vocabulary(), batches.shapes,
                                tokenizers.joint, batches.report())).encode())
  held_out = [build_evaluation_batches(config, texts, tokenizers)
              for texts in (corpus.validation(), corpus.test()) if texts is not None]
  for batch in itertools.chain(map(batches.batch_at, range(batches.steps_per_epoch)), *held_out):
    for side in batch:
      digest.update(b'' if side is None else side.tobytes())
  return digest.hexdigest()


def seen_in_decoding(config, folder, monkeypatch):
  """The compiled search with its arguments, as `translate` would run it."""
  del folder
  import tfm.translator
  corpus = build_corpus(config.data)
  both = train_tokenizers(config.tokenizer, corpus.tokenizer_texts())
  model = build_model(config.model, both.source.vocab_size, both.target.vocab_size)
  calls = []

  def read(model, params, source_BxS):
    calls.append(source_BxS.tolist())
    return None, None

  def record(model, search, length, special, params, memory, source, limits_B, *rest):
    calls.append((search, length, limits_B.tolist()))
    B, M = len(limits_B), search.num_hypotheses
    return (jnp.full((B, M, length), EOS), jnp.ones((B, M), int), jnp.zeros((B, M)), jnp.zeros((B, M)),
            jnp.ones((B, M), bool))

  monkeypatch.setattr(tfm.translator, '_read_source', read)
  monkeypatch.setattr(tfm.translator, '_run_search', record)
  translator = Translator(model, initialize(model, jax.random.key(0)), both, config.decoding)
  with contextlib.suppress(ValueError):
    translator.translate(['one', 'two', 'three hundred'])
  return repr(calls)


def seen_in_loop(config, folder, monkeypatch):
  """All that a run leaves behind: files, metrics, what it said."""
  # Wall-clock figures differ from run to run; everything else must not.
  monkeypatch.setattr(tfm.training.loop, 'reuse_freed_memory', lambda: 'memory is reused')
  said, spoken = io.StringIO(), logging.getLogger('tfm')
  handler = logging.StreamHandler(said)
  spoken.addHandler(handler)
  level = spoken.level
  spoken.setLevel(logging.INFO)
  try:
    outcome = tfm.training.loop.train(config, str(folder / 'run'))
  finally:
    spoken.removeHandler(handler)
    spoken.setLevel(level)
  files = sorted(str(path.relative_to(folder)) for path in folder.rglob('*')
                 if path.is_dir() and path.parent.name == 'checkpoints' or path.parent.name == 'samples')
  samples = [path.read_text() for path in sorted((folder / 'run' / 'samples').iterdir())]
  return repr((files, samples, (folder / 'run' / 'metrics.jsonl').read_text(), outcome.reason,
               said.getvalue().replace(str(folder), '')))


def seen_in_mesh(config, folder, monkeypatch):
  """How eight devices are arranged, and which compiler the loop asks."""
  for name in ('jit_step', 'pmap_step'):
    monkeypatch.setattr(tfm.training.loop, name, mock.Mock(side_effect=InterruptedError(name)))
  alone = dataclasses.replace(config, mesh=MeshConfig(compiler=config.mesh.compiler))  # there is one device here
  with pytest.raises(InterruptedError) as asked:
    tfm.training.loop.train(alone, str(folder / 'run'))
  return repr((mesh_sizes(config.mesh, 8), str(asked.value)))


OBSERVERS = {'init': seen_in_init, 'step': seen_in_step, 'vector': seen_in_vector,
             'data': seen_in_data, 'decoding': seen_in_decoding,
             'loop': seen_in_loop, 'mesh': seen_in_mesh}
