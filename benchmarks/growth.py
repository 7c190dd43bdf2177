"""How a training step grows: its time and memory against length, width and vocabulary, with fitted exponents.

    python benchmarks/growth.py [--of length width vocabulary wide_vocabulary] [--lengths 128 ... 16384]
        [--widths 64 ... 1024] [--vocabularies 1000 ... 64000] [--rounds 5] [--output FILE.json]

The step of train.py on a decoder-only model of 2 layers, float32, its attention chosen as always:

- length: width 64, one head, 256 words, one row. All attention scores are T x T, so FLOPs go to exponent 2; memory
  too, up to the length from which attention is blockwise, and to 1 beyond.
- width: length 64, 4 rows, heads of 32, 256 words. Matrices are D x D, so FLOPs and the bytes of the state go to
  exponent 2.
- vocabulary: width 128, length 64, 4 rows: only logits, embedding and their update grow, to exponent 1. The slowest
  doubling is printed beside what the FLOPs predict. wide_vocabulary: the same at width 512 and 8 rows.

An exponent is the slope of a straight line through the logarithms; `last_exponent` is that of the last doubling.
Memory is what the compiler plans (`memory_analysis`): temporaries of a call, and the state it is given.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from shapes import Shape
from side_by_side import RESULTS, summary, write

from tfm.config import TransformerConfig

FIGURES = ('seconds', 'temporary_bytes', 'state_bytes', 'flops')


def _model(width: int, heads: int) -> TransformerConfig:
  return TransformerConfig(0, 2, width, 4 * width, heads, norm='pre', dropout=0.0)


GROWS = {
    'length': lambda n: Shape(_model(64, 1), 256, 1, n),
    'width': lambda n: Shape(_model(n, n // 32), 256, 4, 64),
    'vocabulary': lambda n: Shape(_model(128, 4), n, 4, 64),
    'wide_vocabulary': lambda n: Shape(_model(512, 8), n, 8, 64),
}
SIZES = {'lengths': [128, 256, 512, 1024, 2048, 4096, 8192, 16384], 'widths': [64, 128, 256, 512, 1024],
         'vocabularies': [1000, 2000, 4000, 8000, 16000, 32000, 64000]}
SMALL = {'lengths': [16, 32, 64], 'widths': [32, 64], 'vocabularies': [64, 128]}
ALONG = {'length': 'lengths', 'width': 'widths', 'vocabulary': 'vocabularies', 'wide_vocabulary': 'vocabularies'}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
  """b of the least-squares line log value = a + b log size."""
  x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
  return statistics.linear_regression(x, y).slope


def fitted(sizes: Sequence[float], values: Sequence[float]) -> dict[str, float]:
  """Over all sizes, and over the last two."""
  return {'exponent': exponent(sizes, values), 'last_exponent': exponent(sizes[-2:], values[-2:])}


def doublings(sizes: Sequence[float], seconds: Sequence[float], flops: Sequence[float]) -> list[dict]:
  """From each size to the next: how many times the seconds and the FLOPs are."""
  return [{'from': sizes[i], 'to': sizes[i + 1], 'seconds': seconds[i + 1] / seconds[i],
           'flops': flops[i + 1] / flops[i]} for i in range(len(sizes) - 1)]


def measure(of: str, sizes: Sequence[int], rounds: int) -> list[dict]:
  """A row for each size; they are compiled first and then run in turn."""
  from tfm_step import Training

  from tfm.parallel.flops import model_flops
  rows, steps = [], []
  for size in sizes:
    shape = GROWS[of](size)
    training = Training(shape.config(0.0), shape.vocabulary, (shape.batch(padded=False)[0], None))
    memory = training.memory
    flops = model_flops(shape.model, shape.vocabulary, shape.rows, shape.length, shape.length, halve_causal=False)
    rows.append({'of': of, 'size': size, 'tokens': shape.rows * shape.length, 'flops': flops.step,
                 'logits_share_of_flops': flops.logits / flops.forward,
                 'temporary_bytes': memory.temp_size_in_bytes, 'state_bytes': memory.argument_size_in_bytes})
    began = time.perf_counter()
    training.run(1)
    steps.append((training, max(1, round(0.2 / (time.perf_counter() - began)))))
  found: list[list[list[float]]] = [[] for _ in sizes]
  for _ in range(rounds):
    for seconds, (training, count) in zip(found, steps):
      seconds.append([training.seconds(count)])
  for row, seconds in zip(rows, found):
    row |= summary(seconds, {'tokens': row['tokens'], 'flops': row['flops']})
    print(f'{of:10} {row["size"]:6} {1e3 * row["seconds"]:9.2f} ms [{1e3 * row["range"][0]:.2f}, '
          f'{1e3 * row["range"][1]:.2f}] {row["flops_per_second"] / 1e9:6.1f} GFLOP/s, temporaries '
          f'{row["temporary_bytes"] / 2**20:8.2f} MiB, state {row["state_bytes"] / 2**20:7.2f} MiB', flush=True)
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--of', nargs='+', choices=GROWS, default=list(GROWS))
  for name, sizes in SIZES.items():
    parser.add_argument(f'--{name}', type=int, nargs='+', default=sizes)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--small', action='store_true', help='few sizes, to see that it runs')
  parser.add_argument('--output', type=Path, default=RESULTS / 'growth.json')
  arguments = parser.parse_args()
  rows, fits, steps = [], {}, {}
  for of in arguments.of:
    sizes = SMALL[ALONG[of]] if arguments.small else sorted(getattr(arguments, ALONG[of]))
    rows += (found := measure(of, sizes, 2 if arguments.small else arguments.rounds))
    columns = {name: [row[name] for row in found] for name in FIGURES}
    if len(sizes) < 2:
      continue
    fits[of] = {name: fitted(sizes, values) for name, values in columns.items()}
    steps[of] = doublings(sizes, columns['seconds'], columns['flops'])
    print(f'{of:10} exponents ' + ', '.join(
        f'{name} {each["exponent"]:.2f} (last {each["last_exponent"]:.2f})' for name, each in fits[of].items()))
    slowest = max(steps[of], key=lambda step: step['seconds'] / step['flops'])
    print(f'{of:10} slowest step, {slowest["from"]} to {slowest["to"]}: x{slowest["seconds"]:.2f} in time, '
          f'x{slowest["flops"]:.2f} in FLOPs', flush=True)
  write(arguments.output, rows=rows, fits=fits, steps=steps)


if __name__ == '__main__':
  main()
