"""A run is a folder that needs nothing else: this file names every file in it.

    config.json       every hyper-parameter, with the version of this format
    tokenizer/        the trained tokenizers
    checkpoints/      one folder a step (tfm/training/checkpoints.py)
    metrics.jsonl     figures that depend on nothing but config and seed
    timing.jsonl      wall-clock figures
    tensorboard/      both, for TensorBoard
    samples/          validation translations

`config.json` is written last, so a folder that has one is complete. Files appear whole or not at all, whenever the
process is killed.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tfm
from tfm.config import Config, ConfigError, from_json, to_json
from tfm.errors import UserError

if TYPE_CHECKING:
  from tfm.text.tokenizer import Tokenizers

FORMAT = 1
"""Version of the run folder; raised when an older tfm could no longer read what this one writes."""


class RunFolderError(UserError):
  """A folder that cannot be used as a run; the message says what is missing and what to do."""


def write_whole(path: Path, content: str | bytes) -> None:
  """Write a file so that a kill or a power cut at any moment leaves the old file or the whole new one."""
  data = content.encode() if isinstance(content, str) else content
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{path.name}.tmp')
  with open(temporary, 'wb') as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
  _sync(path.parent)


@dataclass(frozen=True)
class RunFolder:
  """The paths of a run. Building one touches nothing on disk; the path is made absolute."""

  path: Path

  def __init__(self, path: str | os.PathLike[str]):
    object.__setattr__(self, 'path', Path(os.path.abspath(path)))

  @property
  def config_file(self) -> Path:
    return self.path / 'config.json'

  @property
  def tokenizer(self) -> Path:
    return self.path / 'tokenizer'

  @property
  def checkpoints(self) -> Path:
    return self.path / 'checkpoints'

  @property
  def metrics(self) -> Path:
    return self.path / 'metrics.jsonl'

  @property
  def timing(self) -> Path:
    return self.path / 'timing.jsonl'

  @property
  def tensorboard(self) -> Path:
    return self.path / 'tensorboard'

  @property
  def samples(self) -> Path:
    return self.path / 'samples'

  def is_run(self) -> bool:
    return self.config_file.is_file()

  def require_run(self) -> None:
    """Raise `RunFolderError` unless this folder is a run."""
    if not self.path.exists():
      raise RunFolderError(f'There is no folder {self.path}; give the folder that train.py --run wrote.')
    if not self.is_run():
      raise RunFolderError(f'{self.path} is not a run: it has no {self.config_file.name}; '
                           'give the folder that train.py --run wrote.')

  def create(self, config: Config, tokenizers: Tokenizers) -> None:
    """Start a run here: the tokenizers, then the config that makes the folder a run.

    Refuses a folder that is a run already. Leftovers of a start that was killed half-way are replaced.
    """
    if self.is_run():
      raise RunFolderError(f'{self.path} is a run already; resume it or choose another folder.')
    self.path.mkdir(parents=True, exist_ok=True)
    temporary = self.path / 'tokenizer.tmp'
    for leftover in (temporary, self.tokenizer):
      if leftover.exists():
        shutil.rmtree(leftover)
    temporary.mkdir()
    tokenizers.save(temporary)
    for file in temporary.iterdir():
      _sync(file)
    os.rename(temporary, self.tokenizer)
    self.write_config(config)

  def write_config(self, config: Config) -> None:
    wrapped = {'format': FORMAT, 'tfm': tfm.__version__, 'config': json.loads(to_json(config))}
    write_whole(self.config_file, json.dumps(wrapped, indent=2) + '\n')

  def read_config(self) -> Config:
    """The config of the run; `RunFolderError` where it is missing, damaged or of a newer format."""
    self.require_run()
    try:
      wrapped = json.loads(self.config_file.read_text())
      version, values = int(wrapped['format']), wrapped['config']
    except (ValueError, KeyError, TypeError) as error:
      raise RunFolderError(f'{self.config_file} is damaged ({error}); restore it from a copy of the run.') from error
    if version > FORMAT:
      raise RunFolderError(f'{self.config_file} has format {version}, written by tfm {wrapped.get("tfm", "?")}, '
                           f'but tfm {tfm.__version__} reads formats up to {FORMAT}; install a newer tfm.')
    try:
      return from_json(json.dumps(values))
    except ConfigError as error:
      raise RunFolderError(f'{self.config_file}: {error}') from error

  def read_tokenizers(self) -> Tokenizers:
    """The tokenizers of the run; `RunFolderError` where they are missing."""
    from tfm.text.huggingface_tokenizer import open_tokenizers
    self.require_run()
    if not self.tokenizer.is_dir() or not any(self.tokenizer.iterdir()):
      raise RunFolderError(f'{self.path} has no tokenizer: {self.tokenizer} is missing or empty; '
                           'restore it from a copy of the run, for without it the ids mean nothing.')
    return open_tokenizers(self.tokenizer)


def _sync(path: Path) -> None:
  # For a folder it makes a rename in it survive a power cut; only POSIX systems let a folder be opened.
  if os.name == 'posix':
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
