"""What one device needs for ring attention when the sequence is shared out: temporary memory, collectives, work.

    python benchmarks/ring_memory.py [--length 32768] [--heads 2] [--output benchmarks/results/ring_memory.json]

Causal attention forward and backward, float32, compiled for 1, 2, 4, 8 simulated CPU devices and not run. Temporary
bytes are XLA's own figure for one device; `ratio` is these to the bytes on one device divided by the number of devices.
It stays above 1: the scores of one pair of blocks are there on any number of devices, and a device alone, with nobody
to exchange with, needs fewer copies. `pairs` is the least and the most that any device computes, in pairs of blocks;
`collectives` counts them in the compiled text, where a loop's body stands once.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import platform
import re
import sys
from pathlib import Path

os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8 ' + os.environ.get('XLA_FLAGS', '')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402

from tfm.attention import masks, ring  # noqa: E402
from tfm.config import MeshConfig  # noqa: E402
from tfm.parallel.mesh import build_mesh  # noqa: E402

COLLECTIVES = r'\b(collective-permute|all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\('


def row(devices: int, length: int, heads: int, width: int) -> dict:
  mesh = build_mesh(MeshConfig(data=1, context=devices), jax.devices()[:devices])

  def loss(q, k, v):
    return ring.attend(q, k, v, masks.causal()).sum()

  with jax.set_mesh(mesh):
    x = jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32, sharding=NamedSharding(mesh, ring.HEADED))
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(x, x, x).compile()
  natural = ring.blocks_computed(masks.causal(), length, devices, zigzag=False).sum(axis=1)
  memory, pairs = compiled.memory_analysis(), ring.blocks_computed(masks.causal(), length, devices).sum(axis=1)
  return {'devices': devices, 'temporary_bytes': memory.temp_size_in_bytes,
          'argument_bytes': memory.argument_size_in_bytes, 'output_bytes': memory.output_size_in_bytes,
          'collectives': dict(sorted(collections.Counter(re.findall(COLLECTIVES, compiled.as_text())).items())),
          'pairs': [int(pairs.min()), int(pairs.max())],
          'pairs_in_natural_order': [int(natural.min()), int(natural.max())]}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--length', type=int, default=32768)
  parser.add_argument('--heads', type=int, default=2)
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--output', type=Path, default=None)
  arguments = parser.parse_args()
  rows = [row(devices, arguments.length, arguments.heads, arguments.width) for devices in (1, 2, 4, 8)]
  for each in rows:
    each['ratio'] = round(each['temporary_bytes'] * each['devices'] / rows[0]['temporary_bytes'], 3)
    print(f'{each["devices"]} devices  {each["temporary_bytes"] / 2**20:7.1f} MiB  x{each["ratio"]:.2f}  '
          f'pairs {each["pairs"]}  {each["collectives"]}')
  if arguments.output is not None:
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({
        'command': 'python ' + ' '.join(sys.argv), 'date': datetime.date.today().isoformat(),
        'device': str(jax.devices()[0].device_kind),
        'machine': f'{platform.machine()}, {jax.devices()[0].platform}, 8 simulated devices',
        'versions': {'jax': jax.__version__, 'python': platform.python_version()},
        'shape': {'batch': 1, 'length': arguments.length, 'heads': arguments.heads, 'width': arguments.width},
        'rows': rows}, indent=2) + '\n')


if __name__ == '__main__':
  main()
