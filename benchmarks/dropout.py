"""What dropout's random bits cost a training step: JAX's generators beside the hash of tfm/models/dropout.py.

    python benchmarks/dropout.py [--shape tiny|base] [--rounds 6] [--output FILE.json]

One process, the variants in turn, medians over the rounds after one warm-up step each; the ratio is to no dropout.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import tfm.models.dropout
from tfm.config import Config, TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.training.host_memory import reuse_freed_memory
from tfm.training.step import build_step, new_state

SHAPES = {
    'tiny': (TransformerConfig(4, 4, 128, 256, 4), 8000, (128, 32)),
    'base': (TransformerConfig(), 8000, (25, 32)),
}
HASH = tfm.models.dropout.keep_mask


def bernoulli(key, shape, rate):
  return jax.random.bernoulli(key, 1.0 - rate, shape)


# name -> (rate, generator of the mask, implementation of the key)
VARIANTS = {
    'none': (0.0, HASH, 'threefry2x32'),
    'hash': (0.1, HASH, 'threefry2x32'),
    'threefry': (0.1, bernoulli, 'threefry2x32'),
    'rbg': (0.1, bernoulli, 'rbg'),
}


def prepare(shape: str, rate: float, mask, implementation: str):
  """A compiled step of this variant, as a function without arguments."""
  model_config, vocabulary, (rows, length) = SHAPES[shape]
  config = Config(model=dataclasses.replace(model_config, dropout=rate))
  model = build_model(config.model, vocabulary, vocabulary)
  state = new_state(config, model, initialize(model, jax.random.key(0)))
  state = state.replace(key=jax.random.key(1, impl=implementation))
  rng = np.random.default_rng(0)
  batch = tuple(jnp.asarray(rng.integers(4, vocabulary, (rows, length + extra)), jnp.int32) for extra in (0, 1))
  tfm.models.dropout.keep_mask = mask
  step = jax.jit(build_step(config, model), donate_argnums=0)
  holder = [step(state, batch)[0]]
  jax.block_until_ready(holder)
  tfm.models.dropout.keep_mask = HASH

  def run() -> float:
    start = time.perf_counter()
    holder[0], _ = step(holder[0], batch)
    jax.block_until_ready(holder)
    return time.perf_counter() - start

  return run


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shape', choices=SHAPES, default='tiny')
  parser.add_argument('--rounds', type=int, default=6)
  parser.add_argument('--output', type=Path, default=None)
  arguments = parser.parse_args()
  print(reuse_freed_memory())
  steps = {name: prepare(arguments.shape, *variant) for name, variant in VARIANTS.items()}
  seconds = {name: [] for name in steps}
  for _ in range(arguments.rounds):
    for name, run in steps.items():
      seconds[name].append(run())
  medians = {name: statistics.median(values) for name, values in seconds.items()}
  rows = [{'generator': name, 'milliseconds': round(1000 * medians[name], 1),
           'range': [round(1000 * min(values), 1), round(1000 * max(values), 1)],
           'ratio': round(medians[name] / medians['none'], 3)} for name, values in seconds.items()]
  for row in rows:
    print(f'{row["generator"]:9} {row["milliseconds"]:8.1f} ms {row["range"]}  x{row["ratio"]:.2f}')
  if arguments.output is not None:
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({
        'command': 'python ' + ' '.join(sys.argv), 'date': datetime.date.today().isoformat(),
        'device': str(jax.devices()[0].device_kind), 'machine': f'{platform.machine()}, {jax.devices()[0].platform}',
        'versions': {'jax': jax.__version__, 'python': platform.python_version()}, 'shape': arguments.shape,
        'rounds': arguments.rounds, 'rows': rows}, indent=2) + '\n')


if __name__ == '__main__':
  main()
