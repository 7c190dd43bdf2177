"""Checkpoints: one folder a step, written in the background by Orbax, checked byte for byte when read.

    checkpoints/000300/params/    the weights
    checkpoints/000300/ema/       their moving average, where the run keeps one
    checkpoints/000300/rest/      optimizer state, step, random key
    checkpoints/000300/meta/      JSON: format, layout, validation, versions, and shape, type, CRC-32 of every array
    checkpoints/bad-000400/       a step that could not be read, moved aside when a run resumed

Orbax writes under a temporary name and renames, so a killed save leaves no step. What a kill cannot explain (a cut
file, a flipped bit, a missing part) the CRC finds; the loader then says so and takes the newest intact step.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp

import tfm
from tfm.errors import UserError
from tfm.training.named_arrays import Arrays, PyTree, crc, is_key, named_leaves, rebuild, snapshot

FORMAT = 1
"""Version of a step's folder; raised when an older tfm could no longer read what this one writes."""

ITEMS = ('params', 'ema', 'rest')
"""Parts of a step that are read apart; only those that have arrays are written."""

RESERVED = {'format', 'step', 'scheduled', 'validation', 'versions', 'keys', 'arrays'}
"""Entries of the meta data that are not the caller's."""

log = logging.getLogger('tfm')



class CheckpointError(UserError):
  """A checkpoint that cannot be used as asked; the message names the step and says what to do."""


class Damaged(CheckpointError):
  """One step that is truncated, corrupted, incomplete or of a newer format; another step may be intact."""


class Checkpoints:
  """The checkpoints of a run, for one writer and any number of readers.

  Of the processes of a run all call `save` together; process 0 writes.

  Kept are the newest `keep_last` steps and, by the figure `best_by` of the validation given at `save`, the best
  `keep_best` (ties: the earlier step). Both are functions of the history of saves alone, so a run that was killed
  and resumed ends with the same steps. With `keep_last=None`, for readers, nothing is deleted.

  Only `save`, `restore_latest`, `wait` and `close` change the folder; readers may look in while a run is training.
  `warnings` collects what was said about damaged steps.
  """

  def __init__(self, folder: str | os.PathLike[str], keep_last: int | None = None, keep_best: int = 0,
               best_by: str = 'nll', lower_is_better: bool = True):
    # Orbax accepts a relative path and then fails in its background thread alone.
    self.folder = Path(os.path.abspath(folder))
    self.keep_last, self.keep_best = keep_last, keep_best
    self.best_by, self.lower_is_better = best_by, lower_is_better
    self.warnings: list[str] = []
    self._writer: ocp.AsyncCheckpointer | None = None

  # -- writing --------------------------------------------------------------------------------------------------------

  def save(self, step: int, state: PyTree, metadata: Mapping[str, Any], validation: Mapping[str, float] | None = None,
           *, scheduled: bool = True) -> None:
    """Start saving `state` (a dataclass with a `params` field); its buffers may be donated once this returns.

    Args:
      step: number of updates made.
      state: pytree of arrays.
      metadata: JSON values kept beside it; 'layout' ('scanned' or 'unrolled') must be among them.
      validation: figures of the validation at this step, if there was one.
      scheduled: False for a save forced by a signal. It is kept only while it is the newest, so that interrupted and
        uninterrupted runs keep the same steps.
    """
    self._write(step, state, metadata, validation, scheduled)

  def save_params(self, step: int, params: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Start saving weights alone: good for translating, but not for resuming."""
    self._write(step, {'params': params}, metadata, None, True)

  def wait(self) -> None:
    """Block until the last save is on disk, then delete the steps that need not be kept.

    Raises `CheckpointError` if that save failed. `save` begins with it, so an error shows at the next save.
    """
    if self._writer is not None:
      self._settle()
      self._prune()

  def close(self) -> None:
    """`wait`, and end the background threads."""
    if self._writer is not None:
      self.wait()
      self._writer.close()
      self._writer = None

  def _write(self, step: int, state: PyTree, metadata: Mapping[str, Any], validation: Mapping[str, float] | None,
             scheduled: bool) -> None:
    if metadata.get('layout') not in ('scanned', 'unrolled'):
      raise CheckpointError(f"metadata['layout'] is {metadata.get('layout')!r}; give 'scanned' or 'unrolled'.")
    if taken := RESERVED & set(metadata):
      raise CheckpointError(f'metadata has {_listing(sorted(taken))}, which the checkpoint sets itself; rename it.')
    if jax.process_index() > 0:
      snapshot(state)  # process 0 writes, but cannot gather alone what is cut over all
      return
    if self._writer is None:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._writer = ocp.AsyncCheckpointer(
          ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=_alone())),
          multiprocessing_options=_alone())
    self.wait()
    path = self._path(step)
    if path.exists():
      raise CheckpointError(f'Step {step} is saved already ({path}); a step is never overwritten.')
    arrays = snapshot(state)
    meta = {
        **metadata, 'format': FORMAT, 'step': step, 'scheduled': scheduled,
        'validation': _finite(validation) if validation else None,
        'versions': {'tfm': tfm.__version__, 'jax': jax.__version__, 'flax': flax.__version__},
        'keys': {name: str(jax.random.key_impl(leaf)) for name, leaf in named_leaves(state).items() if is_key(leaf)},
        'arrays': {name: {'shape': list(array.shape), 'dtype': str(array.dtype), 'crc32': crc(array)}
                   for name, array in arrays.items()}}
    items: dict[str, Any] = {
        item: ocp.args.StandardSave(flax.traverse_util.unflatten_dict(part, sep='/'))
        for item, part in _items(arrays).items()}
    items['meta'] = ocp.args.JsonSave({'content': meta, 'crc32': zlib.crc32(_canonical(meta))})
    self._writer.save(path, args=ocp.args.Composite(**items))

  def _settle(self) -> None:
    if self._writer is not None:
      try:
        self._writer.wait_until_finished()
      except Exception as error:  # Whatever TensorStore met in the background: a full disk, a lost mount, ...
        raise CheckpointError(f'Saving a checkpoint in {self.folder} failed: {error}') from error

  def _prune(self) -> None:
    """Delete what need not be kept, and the leftovers of killed saves and deletions; no save may be under way."""
    for pattern in ('*.orbax-checkpoint-tmp*', 'deleted-*'):
      for leftover in self.folder.glob(pattern):
        shutil.rmtree(leftover)
    steps = self.steps()
    for step in set(steps) - self._kept(steps):
      # Renamed first: a kill in the middle of the deletion must not leave half a step behind.
      gone = self.folder / f'deleted-{step:06d}'
      os.rename(self._path(step), gone)
      shutil.rmtree(gone)

  def _kept(self, steps: list[int]) -> set[int]:
    if self.keep_last is None:
      return set(steps)
    scheduled = [step for step in steps if self._outline(step)['scheduled']]
    return {*scheduled[-self.keep_last:], *self._ranked(steps)[:self.keep_best], *steps[-1:]}

  # -- what there is --------------------------------------------------------------------------------------------------

  def steps(self, scheduled_only: bool = False) -> list[int]:
    """Saved steps in order, intact or not."""
    found = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
    steps = sorted(int(name) for name in found if re.fullmatch(r'\d{6,}', name))
    return [step for step in steps if not scheduled_only or self._outline(step)['scheduled']]

  def best_steps(self) -> list[int]:
    """Validated steps that are still there, best first."""
    return self._ranked(self.steps())

  def best_step(self) -> int | None:
    """The best validated step that is still there."""
    return next(iter(self.best_steps()), None)

  def read_meta(self, step: int) -> dict[str, Any]:
    """What was stored beside the arrays of a step; `Damaged` if it cannot be trusted."""
    path = self._path(step)
    try:
      stored = json.loads((path / 'meta' / 'metadata').read_text())
      meta, crc = stored['content'], stored['crc32']
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise Damaged(f'step {step} ({path}) has no readable meta data: {error!r}') from error
    if zlib.crc32(_canonical(meta)) != crc:
      raise Damaged(f'step {step} ({path}) has corrupted meta data: its checksum does not match')
    if meta['format'] > FORMAT:
      raise Damaged(f'step {step} ({path}) has format {meta["format"]}, written by tfm {meta["versions"]["tfm"]}, '
                    f'but tfm {tfm.__version__} reads formats up to {FORMAT}; install a newer tfm to use it')
    if meta['step'] != step:
      raise Damaged(f'step {step} ({path}) holds step {meta["step"]}: the folder was renamed')
    return meta

  def _outline(self, step: int) -> dict[str, Any]:
    """'scheduled' and 'validation' of a step, as of one never validated where they cannot be read."""
    try:
      return self.read_meta(step)
    except Damaged:  # Reported when somebody wants to load the step; it only must never count as the best one.
      return {'scheduled': True, 'validation': None}

  def _ranked(self, steps: Iterable[int]) -> list[int]:
    figures = {step: (self._outline(step)['validation'] or {}).get(self.best_by) for step in steps}
    sign = 1 if self.lower_is_better else -1
    return sorted((step for step in figures if figures[step] is not None), key=lambda s: (sign * figures[s], s))

  # -- reading --------------------------------------------------------------------------------------------------------

  def restore_latest(self, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
    """The newest intact state and its meta data, or None if nothing was ever saved.

    Args:
      abstract_state: the structure, with shape, dtype and (optional) sharding in every leaf (`jax.eval_shape`, or a
        state): arrays are placed as its shardings say.

    Raises:
      CheckpointError: there are steps but none is intact, or they are those of another model, or averaged weights.

    Damaged steps newer than the one used are reported and moved to `bad-...`, so that the resumed run can save them
    anew.
    """
    self._settle()
    problems: list[tuple[int, str]] = []
    for step in reversed(self.steps()):
      try:
        meta = self.read_meta(step)
        self._require_trainable(step, meta)
        state, differences = rebuild(abstract_state, self._read(step, meta, ITEMS), meta['keys'])
      except Damaged as problem:
        problems.append((step, str(problem)))
        continue
      if differences:
        raise CheckpointError(f'step {step} ({self._path(step)}) was saved by another model or optimizer than the '
                              f'config describes ({_listing(differences, 5)}); resume with the config of the run.')
      if jax.process_index() == 0:
        for bad, sentence in problems:
          self._warn(f'{sentence}. Moved to {self._set_aside(bad)}; step {step} is used instead.')
        self._prune()
      return state, meta
    self._require_none_lost(problems)
    return None

  def restore_params(self, step: int | Literal['best'] | None = None) -> tuple[PyTree, dict[str, Any]]:
    """Weights alone, as nested dicts of NumPy arrays, and the meta data of the step.

    Where the run keeps a moving average of its weights (`optimizer.ema_decay`), it is that average.
    `step` is a number, 'best', or None for the newest intact step (damaged ones are reported, but left in place).
    """
    if step is None:
      problems: list[tuple[int, str]] = []
      for candidate in reversed(self.steps()):
        try:
          found = self.restore_params(candidate)
        except Damaged as problem:
          problems.append((candidate, str(problem)))
          continue
        for _, sentence in problems:
          self._warn(f'{sentence}. Step {candidate} is used instead.')
        return found
      self._require_none_lost(problems)
      raise CheckpointError(f'{self.folder} holds no checkpoint yet; train until the first one is saved.')
    if step == 'best':
      step = self.best_step()
      if step is None:
        raise CheckpointError(f"No step in {self.folder} was validated by '{self.best_by}', so none is best; "
                              'name a step or take the newest.')
    if step not in self.steps():
      raise CheckpointError(f'{self.folder} has no step {step}; there are {_listing(self.steps())}.')
    meta = self.read_meta(step)
    item = 'ema' if any(name.startswith('ema/') for name in meta['arrays']) else 'params'
    arrays = self._read(step, meta, (item,))
    return flax.traverse_util.unflatten_dict(arrays, sep='/')[item], meta

  def restore_arrays(self, step: int) -> Arrays:
    """Every array of a step by name, checked; for comparing runs."""
    return self._read(step, self.read_meta(step), ITEMS)

  def _read(self, step: int, meta: Mapping[str, Any], items: tuple[str, ...]) -> Arrays:
    """The arrays of a step, each with the shape, type and checksum it was saved with; otherwise `Damaged`."""
    wanted = {name: np.broadcast_to(np.zeros((), jax.numpy.dtype(entry['dtype'])), entry['shape'])
              for name, entry in meta['arrays'].items()}
    arrays: Arrays = {}
    for item, part in _items(wanted).items():
      if item not in items:
        continue
      path = self._path(step) / item
      if not path.is_dir():
        raise Damaged(f'step {step} ({self._path(step)}) is incomplete: {item}/ is missing')
      try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler(multiprocessing_options=_alone()),
                              multiprocessing_options=_alone()) as reader:
          wanted_tree = flax.traverse_util.unflatten_dict(part, sep='/')
          tree = reader.restore(path, args=ocp.args.StandardRestore(wanted_tree))
      except Exception as error:  # Orbax and TensorStore raise many kinds; all mean that the files cannot be read.
        reason = str(error).strip().split('\n')[0][:200]
        raise Damaged(f'step {step} ({path}) cannot be read: {type(error).__name__}: {reason}') from error
      arrays.update(flax.traverse_util.flatten_dict(tree, sep='/'))
    for name, array in arrays.items():
      entry = meta['arrays'][name]
      same = list(array.shape) == entry['shape'] and str(array.dtype) == entry['dtype']
      if not same or crc(array) != entry['crc32']:
        raise Damaged(f'step {step} ({self._path(step)}) is corrupted: the checksum of {name} does not match')
    return arrays

  def _require_trainable(self, step: int, meta: Mapping[str, Any]) -> None:
    if meta.get('averaged'):
      raise CheckpointError(f'{self.folder} holds the average of steps {_listing(meta["averaged"])}, without optimizer '
                            'state, so training cannot resume from it; use it to translate, or start a new run with '
                            '--init-from.')
    if not any(not name.startswith('params/') for name in meta['arrays']):
      raise CheckpointError(f'Step {step} in {self.folder} holds weights only, so training cannot resume from it; '
                            'start a new run with --init-from.')

  def _require_none_lost(self, problems: list[tuple[int, str]]) -> None:
    if problems:
      raise CheckpointError(f'None of the {len(problems)} checkpoints in {self.folder} is intact: '
                            + '; '.join(sentence for _, sentence in problems)
                            + '. Restore a copy, or remove the folder to start over.')

  def _set_aside(self, step: int) -> Path:
    target = self.folder / f'bad-{step:06d}'
    for count in range(2, 1000):
      if not target.exists():
        break
      target = self.folder / f'bad-{step:06d}-{count}'
    os.rename(self._path(step), target)
    return target

  def _warn(self, sentence: str) -> None:
    self.warnings.append(sentence)
    log.warning(sentence)

  def _path(self, step: int) -> Path:
    return self.folder / f'{step:06d}'


def _alone() -> ocp.options.MultiprocessingOptions:
  """Orbax must not wait for other processes: one writes, and each reads by itself."""
  own = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})


def _items(arrays: Mapping[str, np.ndarray]) -> dict[str, Arrays]:
  """Weights and their average apart from the rest, so that they can be read alone."""
  parts: dict[str, Arrays] = {item: {} for item in ITEMS}
  for name, array in arrays.items():
    top = name.split('/')[0]
    parts[top if top in parts else 'rest'][name] = array
  return {item: part for item, part in parts.items() if part}


def _canonical(meta: Mapping[str, Any]) -> bytes:
  return json.dumps(meta, sort_keys=True).encode()


def _finite(figures: Mapping[str, Any]) -> dict[str, float | None]:
  # A NaN is no figure to be best by, and no JSON.
  return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}


def _listing(values: Iterable[Any], most: int = 20) -> str:
  values = list(values)
  rest = f' and {len(values) - most} more' if len(values) > most else ''
  return ', '.join(map(str, values[:most])) + rest if values else 'none'
