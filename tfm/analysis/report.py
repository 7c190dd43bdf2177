"""What experiments found, as JSON, as a page and as figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from tfm.analysis.result import Result
from tfm.errors import UserError


def as_json(result: Result) -> dict[str, Any]:
  return {field.name: _plain(getattr(result, field.name)) for field in fields(result) if field.name != 'draw'}


def _plain(value: Any) -> Any:
  """The same in lists, dicts and numbers."""
  if isinstance(value, dict):
    return {str(name): _plain(each) for name, each in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(each) for each in value]
  return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def markdown(results: Sequence[Result], figures: Sequence[str] = ()) -> str:
  """A table of verdicts, one of accuracies by distance for each experiment that has them, and the figures."""
  lines = ['| experiment | claim | verdict | conditions | control |', '|---|---|---|---|---|']
  for result in results:
    conditions = result.measured.get('conditions')
    told = result.criterion if conditions is None else '<br>'.join(
        f'{"yes" if met else "NO"}: {name}' for name, met in conditions.items())
    cells = result.name, result.claim, result.verdict, told, result.control
    lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |')
  for result in results:
    accuracy, distances = result.measured.get('accuracy'), result.measured.get('distances')
    if accuracy and distances:
      sizes = result.measured['parameters']
      lines += ['', f'{result.name}: accuracy by distance (chance {result.measured["chance"]:.3f}, seeds '
                f'{result.measured["seeds"]})', '', f'| family | parameters | {" | ".join(map(str, distances))} |',
                '|---|---' + '|---' * len(distances) + '|']
      lines += [f'| {name} | {sizes[name]} | {" | ".join(f"{v:.3f}" for v in values)} |'
                for name, values in accuracy.items()]
  for figure in figures:
    lines += ['', f'![{Path(figure).stem.replace("_", " ")}]({figure})']
  return '\n'.join(lines) + '\n'


def figure_name(result: Result) -> str:
  return f'{result.name.replace(" ", "_")}.png'


def read(folder: Path) -> list[Result]:
  """What was written into a folder, without figures to draw; nothing if there is nothing.

  Raises:
    UserError: its results.json is something else.
  """
  file = folder / 'results.json'
  if not file.is_file():
    return []
  try:
    return [Result(**each) for each in json.loads(file.read_text())]
  except (ValueError, TypeError) as error:
    raise UserError(f'{file} is not what an earlier run wrote; move it away, or give another folder.') from error


def write(results: Sequence[Result], folder: Path) -> None:
  """results.json and results.md of these and of what the folder has under other names, and a figure of each; without
  matplotlib no figures."""
  folder.mkdir(parents=True, exist_ok=True)
  for result in results:
    if result.draw is not None:
      try:
        result.draw().savefig(folder / figure_name(result), dpi=120)
      except ModuleNotFoundError:
        pass  # the page says which figures there are
  named = {result.name: result for result in [*read(folder), *results]}
  everything = [named[name] for name in sorted(named, key=_by_number)]
  (folder / 'results.json').write_text(json.dumps([as_json(result) for result in everything], indent=1) + '\n')
  figures = [name for name in map(figure_name, everything) if (folder / name).is_file()]
  (folder / 'results.md').write_text(markdown(everything, figures))


def _by_number(name: str) -> tuple[int, str]:
  """E2 before E10."""
  return int(''.join(filter(str.isdigit, name.split()[0])) or 0), name
