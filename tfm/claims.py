"""`tfm claims`: what is said of attention, put to the test."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import tyro

from tfm.errors import UserError


def claims(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    output: Path = Path('runs/claims'),
    scale: Literal['cpu', 'accel'] = 'cpu',
    seed: int = 0,
    all: bool = False,
) -> None:
  """Run experiments on what is said of attention, and write a page of verdicts, figures and measurements.

  Without names it runs those that need no training.

  Args:
    names: Of experiments: E1, E7c (all that begin so), 'E7c copy'.
    output: Folder for results.md, results.json and a picture of each, beside those of earlier runs.
    scale: 'accel' trains larger models, where an experiment has them.
    seed: First seed.
    all: All of them; those that train take minutes each.
  """
  from tfm.analysis.claims import CLAIMS
  from tfm.analysis.report import read, write
  from tfm.config import nearest
  from tfm.training.compilation_cache import use_compilation_cache
  if names and all:
    raise UserError('Names are given, and --all; give one of them.')
  chosen = [name for name, claim in CLAIMS.items() if all or not (names or claim.trains)]
  for name in names:
    found = [each for each in CLAIMS if each == name or each.startswith(f'{name} ')]
    if not found:
      raise UserError(f"There is no experiment '{name}'{nearest(name, CLAIMS) or '.'} There are {', '.join(CLAIMS)}.")
    chosen += [each for each in found if each not in chosen]
  if scale != 'cpu' and (same := [name for name in chosen if not CLAIMS[name].scales]):
    raise UserError(f"{', '.join(same)} {'is' if len(same) == 1 else 'are'} the same at every scale; leave --scale "
                    'out, or name others.')
  if output.exists() and not output.is_dir():
    raise UserError(f'--output {output} is a file; give a folder.')
  read(output)  # what is no folder of ours is refused before the work
  use_compilation_cache()
  for name in chosen:
    print(f'{name}: {CLAIMS[name].says} ...', flush=True)
    began = time.monotonic()
    result = CLAIMS[name].run(scale=scale, seed=seed)
    write([result], output)
    print(f'  {result.verdict} ({time.monotonic() - began:.0f} s). Control: {result.control}', flush=True)
  print(output / 'results.md')
