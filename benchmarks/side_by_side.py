"""What the benchmarks share: engines side by side, each a process of its own, in turn.

An engine is a command that ends in `serve`: it prepares, says what it is, and then answers each number N on its
standard input with the seconds of N calls. Waiting, it blocks on a pipe, so that its idle threads take nothing from
the engine whose turn it is; `PAUSE` is for pools that spin for a while after their last task (OpenMP: 0.2 s).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / 'results'
PAUSE = 0.3
PACKAGES = ('tfm', 'jax', 'jaxlib', 'flax', 'numpy', 'torch', 'transformers', 'ctranslate2',
            'transformer-lens')

Prepare = Callable[[], tuple[dict, Callable[[int], list[float]]]]
"""Gives facts for the parent (`work`: what one call does, by unit) and what times so many calls, in seconds."""
Rounds = list[list[float]]
"""Seconds of every call, by round."""


def serve(prepare: Prepare) -> None:
  """The engine's side: facts first, then answers, until the parent closes the pipe."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what libraries print is no answer
  facts, run = prepare()
  print(json.dumps(facts), file=answers, flush=True)
  for line in sys.stdin:
    print(json.dumps(run(int(line))), file=answers, flush=True)


def each(call: Callable[[], object]) -> Callable[[int], list[float]]:
  """Times every call by itself."""

  def run(count: int) -> list[float]:
    seconds = []
    for _ in range(count):
      began = time.perf_counter()
      call()
      seconds.append(time.perf_counter() - began)
    return seconds

  return run


class Engine:
  """The parent's side of one engine, ready when built; `RuntimeError` if the process ends instead of answering."""

  def __init__(self, name: str, command: Sequence[str]):
    self.name = name
    self.process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    text=True)
    self.facts = self._answer()

  def go(self, count: int) -> list[float]:
    print(count, file=self.process.stdin, flush=True)
    return self._answer()

  def close(self) -> None:
    self.process.stdin.close()
    self.process.stdout.close()
    self.process.wait()

  def _answer(self):
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f'The engine {self.name} ended with code {self.process.wait()}; its last words are above.')
    return json.loads(line)


@contextlib.contextmanager
def running(commands: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Engine]]:
  """The engines of these commands (without the interpreter), started one after another and ended together."""
  with contextlib.ExitStack() as stack:
    engines = {}
    for name, command in commands.items():
      engines[name] = Engine(name, command)
      stack.callback(engines[name].close)
    yield engines


def alternate(engines: Mapping[str, Engine], rounds: int, turn: float) -> dict[str, Rounds]:
  """The seconds of all calls: in each round every engine has a turn of about `turn` seconds, one call at least.

  The first turn of each, a single call, is warm-up and not kept; who begins changes with the round.
  """
  counts = {name: max(1, round(turn / engine.go(1)[-1])) for name, engine in engines.items()}
  found: dict[str, Rounds] = {name: [] for name in engines}
  names = list(engines)
  for number in range(rounds):
    shift = number % len(names)
    for name in names[shift:] + names[:shift]:
      time.sleep(PAUSE)
      found[name].append(engines[name].go(counts[name]))
  return found


def summary(found: Rounds, work: Mapping[str, float]) -> dict:
  """Median and range of the rounds' medians, and `work` per second of the median."""
  medians = [statistics.median(calls) for calls in found]
  median = statistics.median(medians)
  return {'seconds': median, 'range': [min(medians), max(medians)], 'rounds': len(found),
          **{f'{unit}_per_second': amount / median for unit, amount in work.items()}}


def ratio(found: Rounds, baseline: Rounds) -> dict:
  """How many times as fast as the baseline: of the medians, and the range of the rounds' own ratios."""
  mine, other = ([statistics.median(calls) for calls in each] for each in (found, baseline))
  each_round = [b / a for a, b in zip(mine, other, strict=True)]
  return {'ratio': statistics.median(other) / statistics.median(mine),
          'ratio_range': [min(each_round), max(each_round)]}


def percentiles(found: Rounds, wanted: Sequence[int] = (50, 90, 99)) -> dict[str, float]:
  """Nearest-rank percentiles of all calls, in seconds."""
  calls = sorted(sum(found, []))
  return {f'p{p}': calls[max(0, -(-p * len(calls) // 100) - 1)] for p in wanted}


def machine() -> dict:
  """What the figures depend on; the load tells whether the machine was idle."""
  info = Path('/proc/cpuinfo')
  models = [line.split(':', 1)[1].strip() for line in info.read_text().splitlines() if line.startswith('model name')] \
      if info.is_file() else []
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return {'cpu': models[0] if models else platform.processor() or platform.machine(), 'cores': cores,
          'system': platform.system(), 'load_at_start': round(LOAD, 2)}


LOAD = os.getloadavg()[0] if hasattr(os, 'getloadavg') else float('nan')


def versions() -> dict[str, str]:
  found = {'python': platform.python_version()}
  for name in PACKAGES:
    with contextlib.suppress(PackageNotFoundError):
      found[name] = version(name)
  return found


def write(output: Path, **content) -> None:
  """The figures with the command, the day, the machine and the versions that they are of."""
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(json.dumps({
      'command': 'python ' + ' '.join(sys.argv), 'date': datetime.date.today().isoformat(), 'machine': machine(),
      'versions': versions(), **_rounded(content)}, indent=2) + '\n')


def _rounded(value):
  """Four digits: more is noise."""
  if isinstance(value, dict):
    return {key: _rounded(each) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return [_rounded(each) for each in value]
  return float(f'{value:.4g}') if isinstance(value, float) else value
