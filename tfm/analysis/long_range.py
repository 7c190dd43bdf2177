"""Length and distance (E7): how far back models of each family see, learn to remember, and what that costs.

    python -m tfm.analysis.long_range --output FOLDER [--scale cpu] [--seed 0] [--only gradient cost ...]

Sentences of Multi30k are too short to tell, so tasks are made up (`tfm.analysis.memory_tasks`). It writes results.json,
results.md and a PNG for each experiment, after each one. The order is from seconds to minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
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
from tfm.analysis.report import write
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
