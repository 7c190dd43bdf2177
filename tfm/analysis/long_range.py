"""Length and distance (E7): how far back models of each family see, learn to remember, and what that costs.

    python -m tfm.analysis.long_range --output FOLDER [--scale cpu] [--seed 0] [--only gradient cost ...]

Sentences of Multi30k are too short to tell, so tasks are made up (`tfm.analysis.memory_tasks`). It writes results.json,
results.md and a PNG for each experiment, after each one. The order is from seconds to minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

from tfm.analysis.long_range_recall import (
  SCALES,
  Scale,
  associative_recall_by_distance,
  memory_width,
  recall_by_distance,
  recency_bias,
)
from tfm.analysis.long_range_regular import dyck, parity
from tfm.analysis.long_range_structure import cost_by_length, gradient_by_distance, receptive_fields
from tfm.analysis.result import Result

EXPERIMENTS: dict[str, Callable[[str | Scale, int], Result]] = {
    'gradient': lambda scale, seed: gradient_by_distance(seed),
    'reach': lambda scale, seed: receptive_fields(seed),
    'cost': lambda scale, seed: cost_by_length(),
    'parity': parity,
    'dyck': dyck,
    'copy': partial(recall_by_distance, task='copy'),
    'recall': partial(recall_by_distance, task='first-token recall'),
    'marked': partial(recall_by_distance, task='marked recall'),
    'recency': recency_bias,
    'associative': associative_recall_by_distance,
    'width': memory_width,
}
"""'recency' reads the models that 'marked' has trained."""


def as_json(result: Result) -> dict:
  return {field.name: getattr(result, field.name) for field in fields(result) if field.name != 'draw'}


def markdown(results: Sequence[Result]) -> str:
  """A table of verdicts, and one of accuracies by distance for each experiment that has them."""
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
  return '\n'.join(lines) + '\n'


def write(results: Sequence[Result], folder: Path) -> None:
  """results.json and results.md of all, and the figure of the last."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'results.json').write_text(json.dumps([as_json(result) for result in results], indent=1) + '\n')
  (folder / 'results.md').write_text(markdown(results))
  if results[-1].draw is not None:
    results[-1].draw().savefig(folder / f'{results[-1].name.replace(" ", "_")}.png', dpi=120)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
  parser = argparse.ArgumentParser(prog='python -m tfm.analysis.long_range', description=__doc__.split('\n')[0])
  parser.add_argument('--output', type=Path, default=Path('runs/long_range'), help='folder for what is found')
  parser.add_argument('--scale', choices=SCALES, default='cpu')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', nargs='+', choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar='NAME',
                      help=f'of {", ".join(EXPERIMENTS)}')
  options = parser.parse_args(arguments)
  results = []
  for name in options.only:
    began = time.monotonic()
    results.append(EXPERIMENTS[name](options.scale, options.seed))
    write(results, options.output)
    print(f'{results[-1].name}: {results[-1].verdict} ({time.monotonic() - began:.0f} s)\n  {results[-1].control}',
          flush=True)
  return results


if __name__ == '__main__':
  main()
