"""TFLOP/s of every attention backend on a GPU, beside cuDNN called directly and PyTorch's attention.

    python benchmarks/attention_gpu.py [--lengths 512 1024 ...] [--tokens 16384] [--heads 16] [--width 128]
        [--output benchmarks/results/attention_gpu.json]

bfloat16 self-attention. A batch has `--tokens` tokens (at least one row), so that every length is about as much
memory. Counted are 4 B H T S C operations forward, half of it under a causal mask, and 2.5 times that backward: the
convention of FlashAttention-2 (Dao 2023), which counts neither the softmax nor what is computed twice. Medians over
rounds of `--repeats` calls in a row, after compiling and one call. PyTorch is measured if it is there, with CUDA.
`--tiny` tries the script out on a CPU; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# JAX would take three quarters of the memory, and PyTorch needs some.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp

from tfm.attention import masks
from tfm.attention.attend import BACKENDS, Request, attend

LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768]
OURS = 'cudnn', 'pallas', 'blockwise', 'reference'
PASSES = 'forward', 'forward and backward'
DIRECT, TORCH = 'cudnn, called directly', 'torch'
SCORES_SHARE = 16
"""Bytes per score that the reference is reckoned to need, forward and backward."""


@dataclass(frozen=True)
class Shape:
  batch: int
  length: int
  heads: int
  width: int
  causal: bool

  def operations(self, backward: bool) -> float:
    """Of the products of matrices: 4 B H T S C forward, half if causal, and 2.5 times more with the backward pass."""
    forward = 4 * self.batch * self.heads * self.length**2 * self.width * (0.5 if self.causal else 1)
    return forward * (3.5 if backward else 1)

  def arrays(self) -> list[jax.Array]:
    """Queries, keys, values and a gradient of the output."""
    size = self.batch, self.length, self.heads, self.width
    return [jax.random.normal(key, size, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4)]


def why_not(name: str, shape: Shape, memory: float) -> str | None:
  """Why it is not measured; `memory` in bytes is what the device has."""
  if name == TORCH:
    return None if torch_has_cuda() else 'there is no PyTorch with CUDA'
  if name == DIRECT:
    return None if jax.default_backend() == 'gpu' else 'there is no GPU'
  if name == 'reference' and SCORES_SHARE * shape.batch * shape.heads * shape.length**2 > memory:
    return 'its scores do not fit in memory'
  size = jax.ShapeDtypeStruct((shape.batch, shape.length, shape.heads, shape.width), jnp.bfloat16)
  return BACKENDS[name].supports(Request.of(size, size, size, masks.causal() if shape.causal else None))


def torch_has_cuda() -> bool:
  if importlib.util.find_spec('torch') is None:
    return False
  import torch
  return torch.cuda.is_available()


def jax_call(name: str, shape: Shape, backward: bool, repeats: int) -> Callable[[], None]:
  """A function that runs `repeats` calls and waits for the last."""
  if name == DIRECT:
    function = functools.partial(jax.nn.dot_product_attention, is_causal=shape.causal, implementation='cudnn')
  else:
    function = functools.partial(attend, mask=masks.causal() if shape.causal else None, backend=name)
  arrays = shape.arrays() if backward else shape.arrays()[:3]
  step = jax.jit(functools.partial(forward_and_backward, function) if backward else function).lower(*arrays).compile()

  def run() -> None:
    for _ in range(repeats):
      result = step(*arrays)
    jax.block_until_ready(result)

  return run


def forward_and_backward(function, q, k, v, d_z):
  z, pull = jax.vjp(function, q, k, v)
  return z, *pull(d_z)


def torch_call(shape: Shape, backward: bool, repeats: int) -> Callable[[], None]:
  import torch

  size = shape.batch, shape.heads, shape.length, shape.width
  q, k, v, d_z = (torch.randn(size, device='cuda', dtype=torch.bfloat16, requires_grad=backward) for _ in range(4))

  def run() -> None:
    for _ in range(repeats):
      z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)
      if backward:
        torch.autograd.grad(z, (q, k, v), d_z.detach())
    torch.cuda.synchronize()

  return run


def measure(name: str, shape: Shape, backward: bool, rounds: int, repeats: int) -> dict:
  """Milliseconds a call and TFLOP/s, or why there are none."""
  try:
    run = torch_call(shape, backward, repeats) if name == TORCH else jax_call(name, shape, backward, repeats)
    run()
    seconds = []
    for _ in range(rounds):
      start = time.perf_counter()
      run()
      seconds.append((time.perf_counter() - start) / repeats)
  except Exception as error:  # out of memory, or a kernel that does not compile here: the others are still measured
    return {'reason': one_line(error)}
  median = statistics.median(seconds)
  return {'milliseconds': round(1000 * median, 4),
          'range': [round(1000 * min(seconds), 4), round(1000 * max(seconds), 4)],
          'tflops': round(shape.operations(backward) / median / 1e12, 3)}


def differences(names: list[str], shape: Shape) -> dict[str, float | str]:
  """The largest of output and gradients from the reference's: a fast kernel that is wrong is no use."""
  def results(name):
    function = functools.partial(attend, mask=masks.causal() if shape.causal else None, backend=name)
    return [x.astype(jnp.float32) for x in jax.jit(functools.partial(forward_and_backward, function))(*shape.arrays())]

  expected, found = results('reference'), {}
  for name in names:
    if name in OURS and name != 'reference':
      try:
        found[name] = max(float(jnp.max(jnp.abs(one - other))) for one, other in zip(results(name), expected))
      except Exception as error:  # said here, and the others are still measured
        found[name] = one_line(error)
  return found


def one_line(error: Exception) -> str:
  return f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'[:200]


def table(rows: list[dict], names: list[str]) -> str:
  """TFLOP/s, a column for each backend; a dash where there is none."""
  found = {}
  for row in rows:
    found.setdefault((row['pass'], row['causal'], row['tokens']), {})[row['backend']] = row.get('tflops')
  lines = [f'{"pass":21}{"causal":8}{"T":>6}' + ''.join(f'{name:>24}' for name in names)]
  for (which, causal, tokens), speeds in found.items():
    cells = ('–' if speeds.get(name) is None else f'{speeds[name]:.1f}' for name in names)
    lines.append(f'{which:21}{"yes" if causal else "no":8}{tokens:6}' + ''.join(f'{cell:>24}' for cell in cells))
  return '\n'.join(lines)


def measure_all(lengths: list[int], tokens: int, heads: int, width: int, names: list[str], rounds: int, repeats: int,
                memory: float) -> Iterator[dict]:
  for backward, causal, length, name in itertools.product((False, True), (False, True), lengths, names):
    shape = Shape(max(1, tokens // length), length, heads, width, causal)
    reason = why_not(name, shape, memory)
    yield {'backend': name, 'tokens': length, 'batch': shape.batch, 'causal': causal, 'pass': PASSES[backward]} | (
        {'reason': reason} if reason else measure(name, shape, backward, rounds, repeats))


def versions() -> dict[str, str]:
  found = {'jax': jax.__version__, 'python': platform.python_version()}
  if torch_has_cuda():
    import torch
    found['torch'] = torch.__version__
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--lengths', type=int, nargs='+', default=LENGTHS)
  parser.add_argument('--tokens', type=int, default=16384)
  parser.add_argument('--heads', type=int, default=16)
  parser.add_argument('--width', type=int, default=128)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--repeats', type=int, default=10)
  parser.add_argument('--tiny', action='store_true')
  parser.add_argument('--output', type=Path, default=Path(__file__).parent / 'results' / 'attention_gpu.json')
  arguments = parser.parse_args()
  device = jax.devices()[0]
  if device.platform != 'gpu' and not arguments.tiny:
    print(f'There is no GPU here (JAX sees {device.platform}), so nothing was measured.')
    return
  names = [*OURS, DIRECT, TORCH]
  sizes = arguments.lengths, arguments.tokens, arguments.heads, arguments.width
  if arguments.tiny:
    names, sizes = ['blockwise', 'reference'], ([16, 32], 32, 2, 8)
  memory = (device.memory_stats() or {}).get('bytes_limit', 8 * 2**30)
  rows, report = [], {
      'command': 'python ' + ' '.join(sys.argv), 'date': datetime.date.today().isoformat(),
      'device': str(device.device_kind), 'machine': f'{platform.machine()}, {device.platform}', 'versions': versions(),
      'heads': sizes[2], 'width': sizes[3], 'dtype': 'bfloat16', 'rounds': arguments.rounds,
      'repeats': arguments.repeats,
      'convention': '4 B H T S C operations forward, half if causal; backward 2.5 times forward',
      'largest_difference_from_reference': differences(names, Shape(2, min(sizes[0]), *sizes[2:], True))}
  print('largest difference from the reference, causal:', report['largest_difference_from_reference'])
  arguments.output.parent.mkdir(parents=True, exist_ok=True)
  for row in measure_all(*sizes, names, arguments.rounds, arguments.repeats, memory):
    rows.append(row)
    print(row, file=sys.stderr, flush=True)
    # Each time, so that a run that is cut off leaves what it has.
    arguments.output.write_text(json.dumps({**report, 'rows': rows}, indent=2) + '\n')
  print(table(rows, names))


if __name__ == '__main__':
  main()
