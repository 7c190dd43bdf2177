"""Memory of blockwise attention, forward and backward, as the sequence grows: linear, where the scores are quadratic.

    python benchmarks/attention_memory.py [--lengths 4096 16384 65536] [--run 131072] [--output FILE.json]

Causal self-attention, one row, one head of width 64, float32. The bytes are what the compiler plans for temporaries,
so nothing is run; `--run` then really runs that many tokens, and prints the seconds and the most memory the process
ever had.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from tfm.attention import blockwise, masks

WIDTH = 64


@jax.jit
def forward_and_backward(q_BxTxHxC, k_BxTxHxC, v_BxTxHxC):
  def total(q, k, v):
    return jnp.sum(blockwise.attend(q, k, v, masks.causal())**2)

  return jax.value_and_grad(total, (0, 1, 2))(q_BxTxHxC, k_BxTxHxC, v_BxTxHxC)


def planned(T: int) -> dict:
  x = jax.ShapeDtypeStruct((1, T, 1, WIDTH), jnp.float32)
  bytes_ = forward_and_backward.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
  return {'tokens': T, 'temporary_bytes': bytes_, 'bytes_per_token': round(bytes_ / T, 1),
          'float32_scores_bytes': 4 * T * T}


def measured(T: int) -> dict:
  q, k, v = (jax.random.normal(key, (1, T, 1, WIDTH)) for key in jax.random.split(jax.random.key(0), 3))
  compiled = forward_and_backward.lower(q, k, v).compile()
  start = time.perf_counter()
  total, gradients = jax.block_until_ready(compiled(q, k, v))
  seconds = time.perf_counter() - start
  finite = all(bool(jnp.isfinite(x).all()) for x in (total, *gradients))
  kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == 'darwin' else 1)
  return {'tokens': T, 'seconds': round(seconds, 1), 'max_rss_mib': round(kilobytes / 1024), 'finite': finite}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--lengths', type=int, nargs='*', default=[4096, 16384, 65536])
  parser.add_argument('--run', type=int, default=None, metavar='TOKENS')
  parser.add_argument('--output', type=Path, default=Path(__file__).parent / 'results' / 'attention_memory.json')
  arguments = parser.parse_args()
  rows = [planned(T) for T in arguments.lengths]
  for row in rows:
    print(f'{row["tokens"]:7} tokens {row["temporary_bytes"] / 2**20:9.2f} MiB, {row["bytes_per_token"]:7.1f} bytes/'
          f'token; scores alone: {row["float32_scores_bytes"] / 2**20:9.0f} MiB')
  if arguments.run is not None:
    rows.append(measured(arguments.run))
    print('{tokens:7} tokens run in {seconds} s, {max_rss_mib} MiB at most, all finite: {finite}'.format(**rows[-1]))
  arguments.output.parent.mkdir(parents=True, exist_ok=True)
  arguments.output.write_text(json.dumps({
      'command': 'python ' + ' '.join(sys.argv), 'date': datetime.date.today().isoformat(),
      'device': str(jax.devices()[0].device_kind), 'machine': f'{platform.machine()}, {jax.devices()[0].platform}',
      'versions': {'jax': jax.__version__, 'python': platform.python_version()}, 'rows': rows}, indent=2) + '\n')


if __name__ == '__main__':
  main()
