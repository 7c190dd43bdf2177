"""Weights from Hugging Face and back: MarianMT, T5, BART, BERT, RoBERTa, GPT-2, Llama, Mistral, Qwen 2 and 3.

Both ways are exact: what was read is written again to the last bit, also what has no place in our model (`Extra`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tfm.config import Config, DataConfig, DecodingConfig, TokenizerConfig, TransformerConfig
from tfm.errors import UserError
from tfm.interop.huggingface_config import Fields, HuggingFaceError
from tfm.interop.huggingface_families import FAMILIES, Family, Tensors
from tfm.interop.huggingface_special import read_special, tokenizer_tokens, write_special
from tfm.interop.huggingface_weights import (
  SAFETENSORS,
  buffer_problem,
  first_names,
  grouped,
  read_tensors,
  their_shape,
  to_ours,
  to_theirs,
)
from tfm.interop.release import Release, new_folder, require_transformer
from tfm.models.build import build_model, initialize
from tfm.models.layout import to_layout
from tfm.special_ids import SpecialIds
from tfm.text.huggingface_tokenizer import load_tokenizers

RUNNING = ('dropout', 'attention_dropout', 'activation_dropout', 'load_balance', 'attention_backend', 'dtype',
           'scan_layers', 'remat', 'vocab_multiple')
"""Fields of ours that change no logits of the exact model; families have them in part, or not at all."""
UNREADABLE = 'parts that exclude each other there'


@dataclass(frozen=True)
class Extra:
  """What a folder of Hugging Face has beside our model, so that it can be written again."""

  config: dict[str, Any] = field(default_factory=dict)
  generation: dict[str, Any] = field(default_factory=dict)
  stored: dict[str, str] = field(default_factory=dict)
  """The type of every tensor in the files, by name."""
  arrays: dict[str, np.ndarray] = field(default_factory=dict)
  """Tensors without a place in our model, by name: buffers, a next-sentence head."""


@dataclass(frozen=True)
class Imported:
  """A model of Hugging Face as one of ours."""

  config: TransformerConfig
  params: dict[str, Any]
  """Unrolled, float32."""
  special: SpecialIds
  vocab_size: int
  family: str
  """Its `model_type`."""
  extra: Extra


def from_huggingface(name_or_folder: str | os.PathLike[str]) -> Imported:
  """Read a model: a folder with config.json and weights, or the name of one on the hub, which is downloaded.

  Raises:
    HuggingFaceError: no such folder, a family or a field that our model has not, or tensors (all are listed) that are
      missing, too many or of another shape.
  """
  return _read(_local(name_or_folder))


def load_release(name_or_folder: str | os.PathLike[str]) -> Release:
  """`from_huggingface` with the tokenizer, if there is one: its special tokens frame the texts then.

  Searches take `num_beams` and `length_penalty` from generation_config.json where it has them.
  """
  folder = _local(name_or_folder)
  found, tokenizers = _read(folder), load_tokenizers(folder)
  special, generation = found.special, found.extra.generation
  if tokenizers is not None:
    before, behind = tokenizers.source.framing
    special = dataclasses.replace(special, source_prefix=before, source_suffix=behind)
  decoding = DecodingConfig(beam_size=generation.get('num_beams') or 1, length_penalty_form='power',
                            length_penalty=float(generation.get('length_penalty') or 1.0))
  config = Config(model=found.config, decoding=decoding, data=_no_data(found.config),
                  tokenizer=TokenizerConfig(extra_ids=int(found.config.shape == 'encoder_only')))
  return Release(config, found.params, tokenizers, (found.vocab_size,) * 2, special)


def to_huggingface(folder: str | os.PathLike[str], config: TransformerConfig, params: Any, special: SpecialIds,
                   family: str | None = None, *, vocab_size: int | None = None, extra: Extra | None = None) -> Path:
  """Write a new folder that `transformers` opens with `AutoModelFor...from_pretrained`.

  Args:
    folder: to write; it must not exist.
    config, params, special: of the model; parameters in either layout. Dropout and the like go along only where the
      family has a field for it.
    family: the `model_type`; None takes that of `extra`, or the first that has all that the config asks for.
    vocab_size: of the tokenizer; None: every row of the tables is a token.
    extra: of the model that was imported: its tensors without a place here, fields and types are written again. A type
      that cannot hold the parameters exactly any more becomes float32, for all tensors.

  Raises:
    HuggingFaceError: no family can be this model (the fields are named), or the parameters are not the config's.
  """
  require_transformer(config, HuggingFaceError, 'The export to Hugging Face')
  extra = extra or Extra()
  config, leaves, vocab_size = _checked(config, params, vocab_size)
  name = family or extra.config.get('model_type') or _choose(config, leaves)
  if name != extra.config.get('model_type', name):
    raise HuggingFaceError(f"family is '{name}', but extra is of '{extra.config['model_type']}'; leave one out.")
  if name not in FAMILIES:
    raise HuggingFaceError(f"There is no family '{name}'; choose {', '.join(FAMILIES)}.")
  wrong = _differences(FAMILIES[name], config, leaves)
  if wrong:
    raise HuggingFaceError(f"The family '{name}' has no model with {', '.join(wrong)}.")
  theirs = _theirs(FAMILIES[name], config, leaves)
  tensors = _with_extra(theirs, FAMILIES[name], extra)
  in_old_types = {key: array.astype(extra.stored.get(key, array.dtype), copy=False) for key, array in tensors.items()}
  exact = all(np.array_equal(old.astype(array.dtype, copy=False), array)
              for old, array in zip(in_old_types.values(), tensors.values()))
  values, generation = (_old_settings(FAMILIES[name], config, special, theirs, extra) if extra.config else
                        _settings(FAMILIES[name], config, special))
  if not exact:
    values = {key: value for key, value in values.items() if key != 'torch_dtype'} | {'dtype': 'float32'}
  from safetensors.numpy import save_file
  with new_folder(folder) as building:
    save_file(in_old_types if exact else tensors, building / SAFETENSORS, {'format': 'pt'})
    _write_json(building / 'config.json', {'model_type': name, 'vocab_size': vocab_size, **values})
    if generation:
      _write_json(building / 'generation_config.json', generation)
  return Path(folder)


def plain(config: TransformerConfig) -> TransformerConfig:
  """The same model, and of all ways to say it the shortest."""
  c, width = config, config.d_model / config.num_heads
  return dataclasses.replace(
      c, d_k=None if c.key_width == width else c.d_k, d_v=None if c.value_width == width else c.d_v,
      num_kv_heads=None if c.key_heads == c.num_heads else c.num_kv_heads,
      attention_scale=None if c.attention_scale == c.key_width**-0.5 else c.attention_scale,
      tying='all' if c.tying == 'target' and c.shape != 'encoder_decoder' else c.tying, vocab_multiple=1)


# -- in ----------------------------------------------------------------------------------------------------------------


def _local(name_or_folder) -> Path:
  folder = Path(name_or_folder)
  if folder.is_dir():
    return folder
  name = os.fspath(name_or_folder)
  if folder.is_absolute() or name.startswith('.') or name.count('/') > 1:
    raise HuggingFaceError(f"There is no folder {name}; give one, or a name on the hub such as 'owner/model'.")
  try:
    from huggingface_hub import snapshot_download
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError("Downloading needs huggingface_hub: pip install 'tfm[huggingface]'.") from error
  small = ['*.json', '*.txt', '*.model', '*.spm']
  try:
    # Many repositories have the weights twice; those in safetensors are enough.
    path = Path(snapshot_download(name, allow_patterns=[*small, 'model*.safetensors']))
    if not any(path.glob('model*.safetensors')):
      path = Path(snapshot_download(name, allow_patterns=[*small, 'pytorch_model*.bin']))
  except (OSError, ValueError) as error:  # what huggingface_hub raises
    raise HuggingFaceError(f'There is no folder {name}, and the hub did not give a model of that name ({error}); check '
                           'the name and the connection.') from error
  return path


def _no_data(config: TransformerConfig) -> DataConfig:
  """What a `Config` must say of its training, which is not known here."""
  longest = min(DataConfig.max_length, config.longest or DataConfig.max_length)
  if config.shape == 'encoder_decoder':
    return DataConfig(max_length=longest)
  return DataConfig(corpus='text', source=None, target=None, limit=None, held_out=None, root='unknown', train='unknown',
                    validation_fraction=0.01, max_length=longest)


def _read(folder: Path) -> Imported:
  values, generation = _read_json(folder / 'config.json'), {}
  if (folder / 'generation_config.json').is_file():
    generation = _read_json(folder / 'generation_config.json')
  name = values.get('model_type')
  if name not in FAMILIES:
    raise HuggingFaceError(f'{folder} is of model_type {name!r}; tfm reads {", ".join(FAMILIES)}.')
  if values.get('quantization_config'):
    raise HuggingFaceError(f'{folder} has quantized weights (quantization_config); give those it was made from.')
  family, arrays = FAMILIES[name], read_tensors(folder)
  firsts = first_names(arrays, family)
  tensors = {first: arrays[name] for name, first in firsts.items()}
  for second, first in family.ties.items():
    if first not in tensors and second in tensors:
      tensors[first] = tensors[second]
  fields = Fields({**family.ids, **values})
  fields.only('is_encoder_decoder', family.shape == 'encoder_decoder')
  config, vocab_size = plain(family.read(fields, tensors)), fields('vocab_size')
  if fields.unread():
    logging.getLogger('tfm').warning(
        '%s: config.json has fields that tfm does not know and leaves aside: %s.', folder,
        ', '.join(f'{name}={fields.values[name]!r}' for name in fields.unread()))
  leaves, homeless = _fit(folder, tensors, family, config, vocab_size)
  extra = Extra(values, generation, {name: str(array.dtype) for name, array in arrays.items()},
                {name: arrays[name] for name, first in firsts.items() if first in homeless})
  special = read_special(fields.values, generation, config.shape, family.framing, tokenizer_tokens(folder))
  return Imported(config, unflatten_dict(leaves, sep='/'), special, vocab_size, name, extra)


def _fit(folder: Path, tensors: dict[str, np.ndarray], family: Family, config: TransformerConfig,
         vocab_size: int) -> tuple[dict[str, np.ndarray], set[str]]:
  """Our parameters by path, and the names of the tensors that are none; every disagreement in one error."""
  shapes, leaves, wrong = _shapes(config, vocab_size), {}, []
  groups = grouped(shapes, family, config)
  for name, paths in groups.items():
    of_paths = {path: shapes[path] for path in paths}
    shape = their_shape(name, of_paths, family)
    if name not in tensors:
      wrong.append(f'{name} is missing')
    elif tensors[name].shape != shape:
      wrong.append(f'{name} has shape {tensors[name].shape}, not {shape}')
    elif str(tensors[name].dtype) not in ('float32', 'bfloat16', 'float16'):
      wrong.append(f'{name} is {tensors[name].dtype}, not float32 or shorter')
    else:
      leaves |= to_ours(name, tensors[name], of_paths, family)
  homeless = set()
  for name in tensors.keys() - groups.keys():
    first = family.ties.get(name)
    if first in tensors:
      if not np.array_equal(tensors[name], tensors[first]):
        wrong.append(f'{name} differs from {first}, to which it is tied')
      continue
    problem = buffer_problem(name, tensors[name], family, config)
    homeless.add(name)
    wrong += [problem] if problem else []
  if wrong:
    raise HuggingFaceError(f'The weights in {folder} are not those of its config.json: {"; ".join(sorted(wrong))}. '
                           'Give weights and config of one model.')
  return leaves, homeless


def _shapes(config: TransformerConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
  model = build_model(config, vocab_size, vocab_size)
  abstract = jax.eval_shape(lambda key: initialize(model, key), jax.random.key(0))
  return {path: leaf.shape for path, leaf in flatten_dict(abstract, sep='/').items()}


# -- out ---------------------------------------------------------------------------------------------------------------


def _checked(config, params, vocab_size: int | None) -> tuple[TransformerConfig, dict[str, np.ndarray], int]:
  """The config in short, the parameters by path and without added rows, and the number of tokens."""
  leaves = {path: np.asarray(leaf, np.float32)
            for path, leaf in flatten_dict(to_layout(params, 'unrolled'), sep='/').items()}
  tables = [f'{name}/table' for name in ('source_embedding', 'target_embedding', 'output')] + ['output_bias']
  if vocab_size is None:
    if config.vocab_multiple > 1:
      raise HuggingFaceError(f'vocab_size is missing: with model.vocab_multiple={config.vocab_multiple} the tables may '
                             'have rows that are no tokens.')
    vocab_size = max((len(leaves[table]) for table in tables if table in leaves), default=1)
  leaves |= {table: leaves[table][:vocab_size] for table in tables if table in leaves}
  config = plain(dataclasses.replace(config, scan_layers=False))
  expected = _shapes(config, vocab_size)
  wrong = [f'{path} is missing' for path in expected.keys() - leaves.keys()]
  wrong += [f'{path} is not of this model' for path in leaves.keys() - expected.keys()]
  wrong += [f'{path} has shape {leaves[path].shape}, not {expected[path]}' for path in expected.keys() & leaves.keys()
            if leaves[path].shape != expected[path]]
  if wrong:
    raise HuggingFaceError(f'The parameters are not those of the config: {"; ".join(sorted(wrong))}.')
  return config, leaves, vocab_size


def _theirs(family: Family, config: TransformerConfig, leaves: Tensors) -> dict[str, np.ndarray]:
  return {name: to_theirs(name, {path: leaves[path] for path in paths}, family)
          for name, paths in grouped(leaves, family, config).items() if name is not None}


def _outlines(family: Family, config: TransformerConfig, leaves: Tensors) -> dict[str, np.ndarray]:
  """The names and shapes of `_theirs`, holding NaN, which equals nothing: no two of them are tied."""
  nan = np.float32(np.nan)
  return {name: np.broadcast_to(nan, their_shape(name, {path: leaves[path].shape for path in paths}, family))
          for name, paths in grouped(leaves, family, config).items() if name is not None}


def _choose(config: TransformerConfig, leaves: Tensors) -> str:
  wrong = {name: _differences(family, config, leaves) for name, family in FAMILIES.items()
           if family.shape == config.shape}
  nearest = min(wrong, key=lambda name: (UNREADABLE in wrong[name], len(wrong[name])))
  if wrong[nearest]:
    raise HuggingFaceError(f"No family of Hugging Face is this model; the nearest, '{nearest}', has none with "
                           f'{", ".join(wrong[nearest])}.')
  return nearest


def _differences(family: Family, config: TransformerConfig, leaves: Tensors) -> list[str]:
  """The fields of the config that the family cannot say."""
  if family.shape != config.shape:
    return [f'encoder_layers={config.encoder_layers}, decoder_layers={config.decoder_layers}']
  written = {**family.write(config), 'vocab_size': 0, 'pad_token_id': config.pad_id}
  try:
    back = plain(family.read(Fields(written), _outlines(family, config, leaves)))
  except UserError as error:
    return [UNREADABLE, str(error)]
  unused = () if config.pooler or config.num_labels else ('pooling',)
  return [f'{each.name}={getattr(config, each.name)!r}' for each in dataclasses.fields(config)
          if each.name not in (*RUNNING, *unused) and getattr(config, each.name) != getattr(back, each.name)
          ] + grouped(leaves, family, config).get(None, [])


def _with_extra(tensors: dict[str, np.ndarray], family: Family, extra: Extra) -> dict[str, np.ndarray]:
  """The tensors under the names of the files that were read, with those that have no place in our model."""
  firsts = first_names(extra.stored, family)
  found, told = {}, set()
  for name, first in firsts.items():
    if name in extra.arrays:
      found[name] = extra.arrays[name]
      continue
    first = first if first in tensors else family.ties.get(first, first)
    if first in tensors:
      found[name] = tensors[first]
      told.add(first)
  return found | {name: array for name, array in tensors.items() if name not in told}


def _settings(family: Family, config: TransformerConfig,
              special: SpecialIds) -> tuple[dict[str, Any], dict[str, Any]]:
  """config.json and generation_config.json of a model that was no import."""
  fields, generation = write_special(special, config, family.framing)
  found = read_special(fields, generation, config.shape, family.framing, {})
  lost = [] if config.shape == 'decoder_only' or family.framing[0] == 'cls' else [
      f'{name}={getattr(special, name)}' for name in ('source_prefix', 'source_suffix')
      if getattr(special, name) != getattr(found, name)]
  if lost:
    logging.getLogger('tfm').warning('config.json has no place for %s of the special ids; whoever turns texts into ids '
                                     'must know it.', ' and '.join(lost))
  return {**family.write(config), **fields, 'dtype': 'float32'}, {} if config.shape == 'encoder_only' else generation


def _old_settings(family: Family, config: TransformerConfig, special: SpecialIds, tensors: Tensors,
                  extra: Extra) -> tuple[dict[str, Any], dict[str, Any]]:
  """config.json and generation_config.json as they were read, but for what has changed since."""
  present = {first: tensors.get(first, tensors.get(family.ties.get(first)))
             for first in first_names(extra.stored, family).values()}
  was = {**family.ids, **extra.config}
  old = plain(family.read(Fields(was), {name: array for name, array in present.items() if array is not None}))
  old_special = read_special(was, extra.generation, old.shape, family.framing, {})
  (fields, generation), (old_fields, old_generation) = (
      write_special(*each, family.framing) for each in ((special, config), (old_special, old)))
  values = dict(extra.config)
  for name, value in {**family.write(config), **fields}.items():
    if value != {**family.write(old), **old_fields}.get(name):
      values[name] = value
      if name == 'rope_parameters':
        values = {name: value for name, value in values.items() if name not in ('rope_theta', 'rope_scaling')}
  changed = {name: value for name, value in generation.items() if value != old_generation.get(name)}
  gone = {name for name in old_generation if name not in generation}
  return values, {name: value for name, value in {**extra.generation, **changed}.items() if name not in gone}


def _read_json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise HuggingFaceError(f'There is no {path}; give the folder of a model of Hugging Face.') from None
  except ValueError as error:
    raise HuggingFaceError(f'{path} is damaged ({error}); restore it from a copy.') from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
