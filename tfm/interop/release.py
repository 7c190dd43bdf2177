"""A release: weights to hand on, in a folder that needs neither Orbax nor what training left behind.

    config.json         as in a run folder (tfm/training/run_folder.py)
    tokenizer/          the same
    model.safetensors   the weights, float32, unrolled, named by their path: 'encoder/layers_0/mlp/inner/kernel'

`tfm.load` opens it like a run. The header of model.safetensors has the version of this format, the sizes of the
vocabularies and the special ids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

import tfm
from tfm.config import Config, TransformerConfig
from tfm.errors import UserError
from tfm.model_section import ModelSection
from tfm.models.build import Model, build_model, initialize, with_layout
from tfm.models.layout import to_layout
from tfm.special_ids import OURS, SpecialIds
from tfm.text.tokenizer import Tokenizers
from tfm.training.named_arrays import named_leaves
from tfm.training.run_folder import RunFolder

FORMAT = 1
"""Version of the folder; raised when an older tfm could no longer read what this one writes."""

WEIGHTS = 'model.safetensors'


class ReleaseError(UserError):
  """A release that cannot be written or read; the message says why and what to do."""


@dataclass(frozen=True)
class Release:
  """A trained model and all that is needed to use it."""

  config: Config
  params: dict[str, Any]
  """In either layout."""
  tokenizers: Tokenizers | None
  """None: the model's texts become ids elsewhere."""
  vocab_sizes: tuple[int, int]
  """Of source and target."""
  special: SpecialIds = OURS

  @property
  def model(self) -> Model:
    return with_layout(build_model(self.config.model, *self.vocab_sizes), False)

  def named(self) -> dict[str, np.ndarray]:
    """The weights by path, unrolled, float32; `ReleaseError` unless they are those of the config's model."""
    arrays = {name: np.ascontiguousarray(leaf, np.float32)
              for name, leaf in named_leaves(to_layout(self.params, 'unrolled')).items()}
    _check(self.model, {name: ('F32', array.shape) for name, array in arrays.items()}, 'The parameters')
    return arrays


def require_transformer(config: ModelSection, error: type[UserError], format: str) -> None:
  """Raise `error` unless the model is of the family that other programs have."""
  if not isinstance(config, TransformerConfig):
    raise error(f'{format} takes Transformers, but this model is {config.kind}; export it to safetensors.')


def is_release(folder: str | os.PathLike[str]) -> bool:
  return Path(folder, WEIGHTS).is_file()


def write_release(release: Release, folder: str | os.PathLike[str]) -> Path:
  """Write a new folder, whole or not at all; `ReleaseError` if it exists or the weights are not the model's."""
  with new_folder(folder) as building:
    fill(release, building)
  return Path(folder)


def fill(release: Release, folder: Path) -> None:
  """The files of a release, in a folder that is being written."""
  from safetensors.numpy import save_file
  arrays, run = release.named(), RunFolder(folder)
  if release.tokenizers is None:
    run.write_config(release.config)
  else:
    run.create(release.config, release.tokenizers)
  save_file(arrays, folder / WEIGHTS, {'format': str(FORMAT), 'tfm': tfm.__version__,
                                       'vocab_sizes': json.dumps(release.vocab_sizes),
                                       'special': json.dumps(dataclasses.asdict(release.special))})


def read_release(folder: str | os.PathLike[str]) -> Release:
  """What `write_release` wrote.

  Raises:
    RunFolderError: no such folder, or its config or tokenizers are damaged.
    ReleaseError: the weights are damaged, of a newer format, or not those of the config's model.
  """
  from safetensors import SafetensorError, safe_open
  run = RunFolder(folder)
  config, file = run.read_config(), run.path / WEIGHTS
  try:
    with safe_open(file, framework='numpy') as weights:
      header = weights.metadata() or {}
      if int(header['format']) > FORMAT:
        raise ReleaseError(f'{file} has format {header["format"]}, written by tfm {header.get("tfm", "?")}, but tfm '
                           f'{tfm.__version__} reads formats up to {FORMAT}; install a newer tfm.')
      special = {name: tuple(value) if isinstance(value, list) else value
                 for name, value in json.loads(header['special']).items()}
      release = Release(config, {}, run.read_tokenizers() if run.tokenizer.exists() else None,
                        tuple(json.loads(header['vocab_sizes'])), SpecialIds(**special))
      slices = {name: weights.get_slice(name) for name in weights.keys()}
      _check(release.model, {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()},
             f'The weights in {file}')
      arrays = {name: weights.get_tensor(name) for name in slices}
  except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
    raise ReleaseError(f'{file} is missing or damaged ({error}); restore it from a copy.') from error
  return dataclasses.replace(release, params=unflatten_dict(arrays, sep='/'))


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
  """A folder to fill, that gets its name when all is in it."""
  path = Path(os.path.abspath(folder))
  if path.exists():
    raise ReleaseError(f'{path} exists; choose another folder.')
  building = path.with_name(f'{path.name}.tmp')
  if building.exists():
    shutil.rmtree(building)
  building.mkdir(parents=True)
  try:
    yield building
  except BaseException:
    shutil.rmtree(building)
    raise
  os.rename(building, path)


def _check(model: Model, found: Mapping[str, tuple[str, tuple[int, ...]]], what: str) -> None:
  """One error with every name that is missing, too many, or of another type or shape."""
  abstract = jax.eval_shape(lambda key: initialize(model, key), jax.random.key(0))
  expected = {name: ('F32', leaf.shape) for name, leaf in named_leaves(abstract).items()}
  wrong = [f'{name} is missing' for name in expected if name not in found]
  wrong += [f'{name} is not of this model' for name in found if name not in expected]
  wrong += [f'{name} is {_text(found[name])}, not {_text(expected[name])}' for name in expected
            if name in found and found[name] != expected[name]]
  if wrong:
    raise ReleaseError(f'{what} are not those of the model in the config: {"; ".join(wrong)}. Give weights and config '
                       'of one model.')


def _text(kind: tuple[str, tuple[int, ...]]) -> str:
  return f'{kind[0]}{list(kind[1])}'
