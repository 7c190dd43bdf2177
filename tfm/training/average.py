"""Averaging checkpoints: the mean weights of the last few (Vaswani et al. 2017, section 6.1: 5; 20 for big)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tfm.config import Config
from tfm.training.checkpoints import CheckpointError, Checkpoints
from tfm.training.run_folder import RunFolder, RunFolderError

Params = dict[str, Any]


def average_params(trees: Iterable[Params]) -> Params:
  """The mean of parameter trees, leaf by leaf: summed in float64 in the order given, returned in the leaf's type."""
  trees = iter(trees)
  first = next(trees, None)
  if first is None:
    raise ValueError('There is nothing to average; give at least one parameter tree.')
  total, count = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), first), 1
  for tree in trees:
    if jax.tree.map(np.shape, tree) != jax.tree.map(np.shape, first):
      raise ValueError('The parameter trees to average differ in structure or shape; average checkpoints of one run.')
    total, count = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64), total, tree), count + 1
  return jax.tree.map(lambda leaf, like: (leaf / count).astype(like.dtype), total, first)


def average_run(run: str | os.PathLike[str], *, last: int | None = None, steps: Sequence[int] | None = None,
                best: int | None = None, output: str | os.PathLike[str] | None = None) -> Path:
  """Write a run folder whose one checkpoint is the average of some of the checkpoints of `run`.

  It can be used like any run to translate and evaluate, and as --init-from; training cannot resume in it.

  Args:
    run: the run folder.
    last: average the newest so many checkpoints (those of the regular interval), ...
    steps: ... or these, ...
    best: ... or the best so many by `training.keep_best_by`. Give exactly one of the three.
    output: the folder to write, RUN/averaged by default. An earlier average there is replaced, nothing else is.

  Raises:
    CheckpointError: a checkpoint is missing or damaged.
    RunFolderError: `run` is no run, or `output` exists and is no average.
  """
  if sum(choice is not None for choice in (last, steps, best)) != 1:
    raise ValueError('Give exactly one of last, steps and best.')
  source = RunFolder(run)
  config, tokenizers = source.read_config(), source.read_tokenizers()
  target = RunFolder(source.path / 'averaged' if output is None else output)
  if target.path.exists() and not _is_average(target):
    raise RunFolderError(f'{target.path} exists and is not an average; choose another output folder.')

  checkpoints = run_checkpoints(source, config)
  chosen = _choose(checkpoints, last, steps, best)
  layouts = set()

  def load(step: int) -> Params:
    params, meta = checkpoints.restore_params(step)
    if 'averaged' in meta:
      raise CheckpointError(f'{source.path} is an average of steps {", ".join(map(str, meta["averaged"]))} already; '
                            'give the run that was trained.')
    layouts.add(meta['layout'])
    return params

  params = average_params(map(load, chosen))
  if len(layouts) != 1:
    raise CheckpointError(f'Steps {chosen} of {source.path} are stored in different layouts; resume and train on, '
                          'then average steps of one layout.')

  building = RunFolder(target.path.with_name(f'{target.path.name}.tmp'))
  if building.path.exists():
    shutil.rmtree(building.path)
  building.create(config, tokenizers)
  writer = Checkpoints(building.checkpoints)
  writer.save_params(chosen[-1], params, {'layout': layouts.pop(), 'averaged': chosen})
  writer.close()
  if target.path.exists():
    shutil.rmtree(target.path)
  os.rename(building.path, target.path)
  return target.path


def run_checkpoints(run: RunFolder, config: Config) -> Checkpoints:
  """The checkpoints of a run for reading: nothing is deleted, and 'best' means what its config says."""
  by = config.training.keep_best_by
  return Checkpoints(run.checkpoints, best_by=by, lower_is_better=by == 'nll')


def _choose(checkpoints: Checkpoints, last: int | None, steps: Sequence[int] | None, best: int | None) -> list[int]:
  """The steps to average, oldest first."""
  if steps is not None:
    if not steps:
      raise CheckpointError('There are no steps to average; name at least one.')
    return sorted(set(steps))
  count, what = (last, 'last') if last is not None else (best, 'best')
  if count < 1:
    raise CheckpointError(f'Cannot average the {what} {count} checkpoints; give 1 or more.')
  found = checkpoints.steps(scheduled_only=True) if last is not None else checkpoints.best_steps()
  if len(found) < count:
    raise CheckpointError(
        f'Cannot average the {what} {count} checkpoints: {checkpoints.folder} has {len(found)}'
        f'{" that were validated" if best is not None else ""}. '
        f'Ask for fewer, or train with training.{"keep_last" if last is not None else "keep_best"} >= {count}.')
  return sorted(found[-count:] if last is not None else found[:count])


def _is_average(run: RunFolder) -> bool:
  checkpoints = Checkpoints(run.checkpoints)
  steps = checkpoints.steps()
  return run.is_run() and bool(steps) and all('averaged' in checkpoints.read_meta(step) for step in steps)
