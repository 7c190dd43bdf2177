"""Where a run decides: start anew, start from another run's weights, or resume."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tfm.config import Config, ConfigError, require
from tfm.models.build import Model, build_model, count_parameters
from tfm.models.layout import to_layout
from tfm.parallel.compile import require_rows, share_of_rows
from tfm.parallel.mesh import build_mesh
from tfm.parallel.rules import shardings
from tfm.text.batches import Batches
from tfm.text.corpora import Corpus
from tfm.text.language_batches import FullBatches
from tfm.text.objectives import build_batches, build_evaluation_batches
from tfm.text.tokenizer import Tokenizers, train_tokenizers
from tfm.training.checkpoints import CheckpointError, Checkpoints, Damaged
from tfm.training.initialize import init_from
from tfm.training.named_arrays import is_key, place
from tfm.training.run_folder import RunFolder
from tfm.training.step import TrainState, fresh_state, new_state
from tfm.training.validation import BETTER_IS_LOWER

log = logging.getLogger('tfm')

MAY_CHANGE = {'training.steps', 'training.patience', 'training.samples', 'training.log_every', 'training.reuse_memory',
              'training.keep_last', 'data.root', 'model.remat', 'model.scan_layers', 'model.attention_backend'}
"""Fields that may differ when a run resumes, as may those of decoding and mesh. All others make it another run."""


@dataclass(frozen=True)
class Start:
  """What the loop begins with."""

  folder: RunFolder
  tokenizers: Tokenizers
  batches: Batches | FullBatches
  validation_batches: list[tuple]
  model: Model
  mesh: Mesh
  state: TrainState
  checkpoints: Checkpoints
  sentence: str
  """Which of the three it was."""


def start(config: Config, corpus: Corpus, run: str, init_run: str | None) -> Start:
  """Begin the run in folder `run`, or resume it where it is one already.

  Raises:
    ConfigError: the folder holds a run of another config or is beyond `training.steps`, `init_run` is given for a run
      that exists, or the validation set does not go with the config. Nothing was written.
  """
  folder = RunFolder(run)
  exists = folder.is_run()
  if exists:
    _require_same(folder.read_config(), config, folder)
    tokenizers = folder.read_tokenizers()
  else:
    tokenizers = train_tokenizers(config.tokenizer, corpus.tokenizer_texts())
  mesh = build_mesh(config.mesh)
  require_rows(config, mesh)
  batches = build_batches(config, corpus, tokenizers, *share_of_rows(mesh))
  validation_batches = _validation_batches(config, corpus, tokenizers, batches)
  model = build_model(config.model, tokenizers.source.vocab_size, tokenizers.target.vocab_size)
  training = config.training
  checkpoints = Checkpoints(folder.checkpoints, training.keep_last, training.keep_best, training.keep_best_by,
                            BETTER_IS_LOWER[training.keep_best_by])
  abstract = jax.eval_shape(partial(fresh_state, config, model))
  placed = shardings(mesh, abstract)
  abstract = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), abstract, placed)
  if init_run is not None and checkpoints.steps():
    raise ConfigError(f'{folder.path} is a run at step {checkpoints.steps()[-1]} already, so --init-from would have no '
                      'effect; leave it out to resume, or choose another --run.')
  restored = _restore(checkpoints, config, model, abstract)
  if restored is not None:
    state, step = restored
    require(step <= training.steps, f'{folder.path} is at step {step}, beyond training.steps={training.steps}; '
                                    'raise training.steps.')
    sentence = f'Resuming {folder.path} at step {step} of {training.steps}'
  else:
    state, sentence = fresh_state(config, model), f'Starting {folder.path}'
    if init_run is not None:
      params, report = init_from(init_run, state.params, tokenizers, config.model.vocab_multiple)
      state, sentence = new_state(config, model, params), f'{sentence} from the weights of {init_run}: {report}'
    state = jax.tree.map(_distribute, state, placed)
  # Only now that all of it is known to go together, in every process, is anything written.
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('start')
  if jax.process_index() == 0:
    if exists:
      folder.write_config(config)
    else:
      folder.create(config, tokenizers)
  where = f' on {mesh.size} devices, ' + ', '.join(f'{name} {n}' for name, n in mesh.shape.items() if n > 1)
  sentence += f': {count_parameters(state.params):,} parameters{where if mesh.size > 1 else ""}.'
  return Start(folder, tokenizers, batches, validation_batches, model, mesh, state, checkpoints, sentence)


def _validation_batches(config: Config, corpus: Corpus, tokenizers: Tokenizers, batches) -> list[tuple]:
  """The validation set; what could not be read or translated must show now, not at the first validation."""
  texts = corpus.validation()
  found = build_evaluation_batches(config, texts, tokenizers, batches.shapes)
  if config.objective != 'translation':
    return found
  table, refused = config.model.longest, config.decoding.max_source_length
  widest = max(max(batch.source_BxS.shape[1], batch.target_BxT.shape[1] - 1) for batch in found)
  require(table is None or widest <= table,
          f'The validation set has sentences of up to {widest} tokens, but model.max_positions is {table}; raise it or '
          'take them out.')
  decoded = [source for source, _ in texts[:config.training.validation_sentences]]
  longest = max(len(ids) + 1 for ids in tokenizers.source.encode_batch(decoded))
  require(refused is None or longest <= refused,
          f'A validation sentence has {longest} tokens, above decoding.max_source_length={refused}; raise it.')
  return found


def _distribute(leaf: jax.Array, where: jax.sharding.NamedSharding) -> jax.Array:
  """A leaf that every process has made, where it belongs."""
  if jax.process_count() == 1:
    return jax.device_put(leaf, where)
  if is_key(leaf):
    return jax.random.wrap_key_data(place(jax.device_get(jax.random.key_data(leaf)), where),
                                    impl=jax.random.key_impl(leaf))
  return place(jax.device_get(leaf), where)


def _restore(checkpoints, config, model, abstract) -> tuple[TrainState, int] | None:
  """The newest intact state in the layout of `config`, whichever layout it was saved in."""
  if not checkpoints.steps():
    return None
  layout = 'scanned' if config.model.scan_layers else 'unrolled'
  layouts = _layouts(checkpoints) or [layout]
  for found in layouts:
    try:
      asked = abstract if found == layout else jax.eval_shape(partial(_convert_state, layout=found), abstract)
      state, meta = checkpoints.restore_latest(asked)
    except CheckpointError:
      # The steps of the newest layout may all be damaged, and the newest intact one of the other.
      if found == layouts[-1]:
        raise
      continue
    if found == layout:
      return state, meta['step']
    log.warning('The checkpoint is %s and the config asks for %s layers; converted.', found, layout)
    converted = jax.jit(partial(_convert_state, layout=layout))(state)
    return jax.tree.map(lambda leaf, like: _distribute(leaf, like.sharding), converted, abstract), meta['step']


def _layouts(checkpoints: Checkpoints) -> list[str]:
  """The layouts of all steps, that of the newest first."""
  found = []
  for step in reversed(checkpoints.steps()):
    try:
      found.append(checkpoints.read_meta(step)['layout'])
    except Damaged:  # said when the state is restored
      continue
  return list(dict.fromkeys(found))


def _convert_state(state: TrainState, layout) -> TrainState:
  """Parameters, and every part of the optimizer state that is shaped like them, in another layout."""

  def is_params(node: Any) -> bool:
    return isinstance(node, dict) and ('encoder' in node or 'decoder' in node)

  return jax.tree.map(lambda node: to_layout(node, layout) if is_params(node) else node, state, is_leaf=is_params)


def _require_same(stored: Config, given: Config, folder: RunFolder) -> None:
  different = [f'{name} was {old!r} and is now {new!r}' for name, old, new in differences(stored, given)
               if name not in MAY_CHANGE and not name.startswith(('decoding.', 'mesh.'))]
  if different:
    raise ConfigError(f'{folder.path} is a run of another config: {"; ".join(different)}. '
                      'Give the same config to resume it, or another --run.')


def differences(one: Config, other: Config) -> list[tuple[str, Any, Any]]:
  """The leaves in which two configs differ: (dotted name, value in one, value in other)."""
  found = []
  for section in dataclasses.fields(Config):
    a, b = getattr(one, section.name), getattr(other, section.name)
    if type(a) is not type(b):
      found.append((f'{section.name}.kind', a.kind, b.kind))
      continue
    found += [(f'{section.name}.{leaf.name}', getattr(a, leaf.name), getattr(b, leaf.name))
              for leaf in dataclasses.fields(a) if getattr(a, leaf.name) != getattr(b, leaf.name)]
  return found
