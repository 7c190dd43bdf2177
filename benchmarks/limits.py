"""What this machine can do: JAX's float32 matrix product, and memory bandwidth for copying and for reading.

    python benchmarks/limits.py [--rounds 8] [--output FILE.json]

The other benchmarks measure the limit they run against in the same run, by `commands`.

- matmul: 2,048 x 2,048 by 2,048 x 2,048, in JAX as installed; flops per second.
- copy: 512 MiB from one array to another, on all cores; bytes read and written per second.
- read: two arrays of 256 MiB multiplied and added up (a dot product) on all cores; bytes per second.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
from pathlib import Path

import numpy as np
from side_by_side import RESULTS, alternate, each, running, serve, summary, write

LIMITS = ('matmul', 'copy', 'read')


def commands(*names: str) -> dict[str, list[str]]:
  return {name: [str(Path(__file__).resolve()), '--engine', name] for name in names}


def matmul():
  import jax
  import jax.numpy as jnp
  size = 2048
  a, b = (jax.random.normal(key, (size, size), jnp.float32) for key in jax.random.split(jax.random.key(0)))
  product = jax.jit(jnp.matmul)
  return {'work': {'flops': 2 * size**3}}, each(lambda: product(a, b).block_until_ready())


def _in_parts(function, *arrays):
  """`function` on every core's part of the arrays; numpy lets other threads run meanwhile."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  parts = list(zip(*(np.array_split(array, cores) for array in arrays)))
  pool = concurrent.futures.ThreadPoolExecutor(cores)
  return each(lambda: list(pool.map(lambda part: function(*part), parts)))


def copy():
  source, target = np.ones(2**27, np.float32), np.zeros(2**27, np.float32)
  return {'work': {'bytes': source.nbytes + target.nbytes}}, _in_parts(np.copyto, target, source)


def read():
  a, b = np.ones(2**26, np.float32), np.ones(2**26, np.float32)
  return {'work': {'bytes': a.nbytes + b.nbytes}}, _in_parts(np.dot, a, b)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=8)
  parser.add_argument('--small', action='store_true', help='two short rounds, to see that it runs')
  parser.add_argument('--output', type=Path, default=RESULTS / 'limits.json')
  parser.add_argument('--engine', choices=LIMITS, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.engine:
    return serve({'matmul': matmul, 'copy': copy, 'read': read}[arguments.engine])
  with running(commands(*LIMITS)) as engines:
    found = alternate(engines, 2 if arguments.small else arguments.rounds, 0.1 if arguments.small else 1.0)
    rows = [{'limit': name, **summary(found[name], engine.facts['work'])} for name, engine in engines.items()]
  for row in rows:
    unit = 'flops' if row['limit'] == 'matmul' else 'bytes'
    print(f'{row["limit"]:7} {row[f"{unit}_per_second"] / 1e9:7.1f} G{unit}/s')
  write(arguments.output, rows=rows)


if __name__ == '__main__':
  main()
