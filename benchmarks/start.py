"""How long until something happens: from the start of a process to its first training step, or its first sentence.

    pip install -e '.[bench]'
    python benchmarks/start.py [--rounds 3] [--output FILE.json]

Whole processes, from before Python starts to the line that says it is done; Transformer-base (25 x 32 tokens, 8,000
words). Cold: JAX's compilation cache is an empty folder. Warm: the same command again.

- import: `import tfm`; import_all: and all its names, with JAX and Flax.
- step: model, optimizer and one step (`training_step.py`), with layers unrolled and scanned; torch: the same with
  nn.Transformer.
- train.py: the command itself on its embedded corpus, tokenizer and batches included, to the first step it reports
  (the numbers have no more than 3,335 BPE tokens).
- sentence: a model opened and one sentence translated, beam 4 (`decoding.py`), by tfm, CTranslate2 and transformers;
  tfm_translate: the command itself.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import decoding
from side_by_side import RESULTS, ratio, summary, write

HERE = Path(__file__).resolve().parent
SENTENCE = 'w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15'


@dataclass(frozen=True)
class Command:
  """What is started, and the line of its output that ends the wait."""

  arguments: list[str]
  until: str
  """A regular expression, at the beginning of a line."""
  baseline: str | None = None
  cached: bool = True
  """Whether there is a compilation cache to be cold or warm."""
  stdin: str = ''


def commands(folder: Path, small: bool) -> dict[str, Command]:
  shape = 'small' if small else 'base'
  every = 'import tfm; [getattr(tfm, name) for name in tfm.__all__]; '

  def step(engine: str, shape: str, **more) -> Command:
    return Command([str(HERE / 'training_step.py'), '--engine', engine, '--shapes', shape, '--dropout', '0', '--warm',
                    '1'], '{', 'torch', **more)

  def sentence(engine: str, **more) -> Command:
    return Command([str(HERE / 'decoding.py'), '--engine', engine, '--folder', str(folder), '--batches', '1', '--beams',
                    '4'], '{', 'sentence_transformers', **more)

  model = ['--model.encoder-layers', '1', '--model.decoder-layers', '1', '--model.d-model', '32', '--model.d-ff', '64',
           '--model.num-heads', '2', '--tokenizer.vocab-size', '300'] if small else [
               '--model.encoder-layers', '6', '--model.decoder-layers', '6', '--model.d-model', '512', '--model.d-ff',
               '2048', '--model.num-heads', '8', '--tokenizer.vocab-size', '8000']
  return {
      'import': Command(['-c', 'import tfm; print("ready", flush=True)'], 'ready', cached=False),
      'import_all': Command(['-c', every + 'print("ready", flush=True)'], 'ready', cached=False),
      'torch': step('torch', shape, cached=False),
      'step': step('tfm', shape),
      **({} if small else {'step_scanned': step('tfm', 'base_scanned')}),
      'train.py': Command([str(HERE.parent / 'train.py'), str(HERE.parent / 'configs' / 'numbers_en_de.py'), '--run',
                           str(folder / 'run'), '--training.log-every', '1', '--data.tokens-per-batch', '800', *model],
                          'step 1/', 'torch'),
      'sentence_transformers': sentence('transformers', cached=False),
      'sentence_ct2': sentence('ct2_1x2', cached=False),
      'sentence': sentence('tfm'),
      'tfm_translate': Command(['-c', 'from tfm.cli import main; main()', 'translate', str(folder / 'tfm'),
                                '--beam-size', '4'], r'w\d+ ', 'sentence_transformers', stdin=SENTENCE + '\n'),
  }


def seconds(command: Command, cache: Path) -> float:
  """From the start of the process to its line; `RuntimeError` with what it said if the line never came."""
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(cache)}
  began = time.perf_counter()
  process = subprocess.Popen([sys.executable, *command.arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, env=environment)
  process.stdin.write(command.stdin)
  process.stdin.close()
  said = []
  for line in process.stdout:
    said.append(line)
    if re.match(command.until, line):
      took = time.perf_counter() - began
      process.stdout.close()
      process.wait() if command.until != 'step 1/' else _kill(process)
      return took
  raise RuntimeError(f'{command.arguments} ended without a line {command.until!r}:\n{"".join(said)}')


def _kill(process: subprocess.Popen) -> None:
  process.kill()
  process.wait()


def measure(chosen: dict[str, Command], folder: Path, rounds: int) -> dict[str, list[list[float]]]:
  """Seconds of each round; those with a cache cold and then warm, in a cache of their own."""
  found: dict[str, list[list[float]]] = {}
  for number in range(rounds):
    for name, command in chosen.items():
      for state in ('cold', 'warm') if command.cached else ('',):
        cache = folder / f'cache-{name}-{number}'
        took = seconds(command, cache)
        shutil.rmtree(folder / 'run', ignore_errors=True)  # the next run starts anew
        found.setdefault(f'{name} {state}'.strip(), []).append([took])
        print(f'  round {number + 1} {name} {state}: {took:.2f} s', flush=True)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--only', nargs='+', metavar='NAME', help='of the list above')
  parser.add_argument('--small', action='store_true', help='one layer, one round, to see that it runs')
  parser.add_argument('--output', type=Path, default=RESULTS / 'start.json')
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    decoding.write_models(folder, arguments.small)
    chosen = commands(folder, arguments.small)
    if unknown := set(arguments.only or ()) - set(chosen):
      parser.error(f'--only {" ".join(sorted(unknown))} is unknown; choose from {", ".join(chosen)}.')
    chosen = {name: each for name, each in chosen.items() if not arguments.only or name in arguments.only}
    found = measure(chosen, folder, 1 if arguments.small else arguments.rounds)
  rows = []
  for name, rounds in found.items():
    row = {'name': name, **summary(rounds, {})}
    baseline = chosen[name.split()[0]].baseline
    if baseline in found:
      row |= {'baseline': baseline, **ratio(rounds, found[baseline])}
    rows.append(row)
    of = f', x{row["ratio"]:.2f} of {baseline}' if 'ratio' in row else ''
    print(f'{name:22} {row["seconds"]:6.2f} s [{row["range"][0]:.2f}, {row["range"][1]:.2f}]{of}')
  write(arguments.output, rows=rows)


if __name__ == '__main__':
  main()
