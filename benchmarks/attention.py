"""TFLOP/s of every attention backend by length, beside PyTorch's attention and, on a GPU, cuDNN called directly.

    python benchmarks/attention.py [--lengths 512 1024 ...] [--tokens 16384] [--heads 16] [--width 128]
        [--rounds 5] [--output FILE.json]

Self-attention, bfloat16 on a GPU and float32 on a CPU (where sizes are smaller). A batch has `--tokens` tokens (at
least one row), so that every length is about as much memory. Counted are 4 B H T S C operations forward, half of it
under a causal mask, and 2.5 times that backward: the convention of FlashAttention-2 (Dao 2023), which counts neither
the softmax nor what is computed twice. The backends of one length take turns, after compiling and one call. PyTorch is
measured if it is there, on a GPU with CUDA. `--small` only tries the script out.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# JAX would take three quarters of a GPU's memory, and PyTorch needs some.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp
from side_by_side import RESULTS, alternate, ratio, summary, write

from tfm.attention import masks
from tfm.attention.attend import BACKENDS, Request, attend
from tfm.training.host_memory import reuse_freed_memory

SIZES = {
    'gpu': dict(lengths=[512, 1024, 2048, 4096, 8192, 16384, 32768], tokens=16384, heads=16, width=128),
    'cpu': dict(lengths=[32, 128, 512, 1024, 2048, 4096, 8192], tokens=2048, heads=8, width=64),
    'small': dict(lengths=[16, 32], tokens=32, heads=2, width=8),
}
DIRECT, TORCH = 'cudnn, called directly', 'torch'
BACKENDS_MEASURED = {'gpu': ('cudnn', 'pallas', 'blockwise', 'reference', DIRECT, TORCH),
                     'cpu': ('blockwise', 'reference', TORCH)}
PASSES = 'forward', 'forward and backward'
SCORES_SHARE = 16
"""Bytes per score that the reference is reckoned to need, forward and backward."""
CPU_MEMORY = 8 * 2**30


def on_gpu() -> bool:
  return jax.default_backend() == 'gpu'


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
    size, dtype = (self.batch, self.length, self.heads, self.width), jnp.bfloat16 if on_gpu() else jnp.float32
    return [jax.random.normal(key, size, dtype) for key in jax.random.split(jax.random.key(0), 4)]


def why_not(name: str, shape: Shape, memory: float) -> str | None:
  """Why it is not measured; `memory` in bytes is what the device has."""
  if name == TORCH:
    return None if torch_is_there() else f'there is no PyTorch{" with CUDA" * on_gpu()}'
  if name == DIRECT:
    return None if on_gpu() else 'there is no GPU'
  if name == 'reference' and SCORES_SHARE * shape.batch * shape.heads * shape.length**2 > memory:
    return 'its scores do not fit in memory'
  size = jax.ShapeDtypeStruct((shape.batch, shape.length, shape.heads, shape.width), jnp.bfloat16)
  return BACKENDS[name].supports(Request.of(size, size, size, masks.causal() if shape.causal else None))


def torch_is_there() -> bool:
  if importlib.util.find_spec('torch') is None:
    return False
  import torch
  return torch.cuda.is_available() or not on_gpu()


def jax_call(name: str, shape: Shape, backward: bool) -> Callable[[int], None]:
  """A function that runs so many calls and waits for the last."""
  if name == DIRECT:
    function = functools.partial(jax.nn.dot_product_attention, is_causal=shape.causal, implementation='cudnn')
  else:
    function = functools.partial(attend, mask=masks.causal() if shape.causal else None, backend=name)
  arrays = shape.arrays() if backward else shape.arrays()[:3]
  step = jax.jit(functools.partial(forward_and_backward, function) if backward else function).lower(*arrays).compile()

  def run(count: int) -> None:
    for _ in range(count):
      result = step(*arrays)
    jax.block_until_ready(result)

  return run


def forward_and_backward(function, q, k, v, d_z):
  z, pull = jax.vjp(function, q, k, v)
  return z, *pull(d_z)


def torch_call(shape: Shape, backward: bool) -> Callable[[int], None]:
  import torch

  size = shape.batch, shape.heads, shape.length, shape.width
  where = dict(device='cuda', dtype=torch.bfloat16) if on_gpu() else {}
  q, k, v, d_z = (torch.randn(size, requires_grad=backward, **where) for _ in range(4))

  def run(count: int) -> None:
    for _ in range(count):
      z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)
      if backward:
        torch.autograd.grad(z, (q, k, v), d_z.detach())
    if on_gpu():
      torch.cuda.synchronize()

  return run


class Backend:
  """One backend on one shape, compiled and called once; as `alternate` wants an engine."""

  def __init__(self, name: str, shape: Shape, backward: bool):
    self.run = torch_call(shape, backward) if name == TORCH else jax_call(name, shape, backward)
    self.run(1)

  def go(self, count: int) -> list[float]:
    began = time.perf_counter()
    self.run(count)
    return [(time.perf_counter() - began) / count]


def measure(names: list[str], shape: Shape, backward: bool, rounds: int, turn: float, memory: float) -> Iterator[dict]:
  """A row for each backend, with its seconds and TFLOP/s, or why there are none."""
  ready, reasons = {}, {name: reason for name in names if (reason := why_not(name, shape, memory))}
  for name in set(names) - set(reasons):
    try:
      ready[name] = Backend(name, shape, backward)
    except Exception as error:  # out of memory, or a kernel that does not compile here: the others are still measured
      reasons[name] = one_line(error)
  found = alternate(ready, rounds, turn) if ready else {}
  for name in names:
    row = {'backend': name, 'tokens': shape.length, 'batch': shape.batch, 'causal': shape.causal,
           'pass': PASSES[backward]}
    if name in reasons:
      yield row | {'reason': reasons[name]}
      continue
    row |= summary(found[name], {'flops': shape.operations(backward)})
    yield row | (ratio(found[name], found[TORCH]) if TORCH in found else {})


def differences(names: list[str], shape: Shape) -> dict[str, float | str]:
  """The largest of output and gradients from the reference's: a fast kernel that is wrong is no use."""
  def results(name):
    function = functools.partial(attend, mask=masks.causal() if shape.causal else None, backend=name)
    return [x.astype(jnp.float32) for x in jax.jit(functools.partial(forward_and_backward, function))(*shape.arrays())]

  expected, found = results('reference'), {}
  for name in names:
    if name in BACKENDS and name != 'reference':
      try:
        found[name] = max(float(jnp.max(jnp.abs(one - other))) for one, other in zip(results(name), expected))
      except Exception as error:  # said here, and the others are still measured
        found[name] = one_line(error)
  return found


def one_line(error: Exception) -> str:
  return f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'[:200]


def table(rows: list[dict], names: list[str]) -> str:
  """TFLOP/s, a column for each backend; a dash where there is none."""
  found: dict[tuple, dict] = {}
  for row in rows:
    found.setdefault((row['pass'], row['causal'], row['tokens']), {})[row['backend']] = row.get('flops_per_second')
  lines = [f'{"pass":21}{"causal":8}{"T":>6}' + ''.join(f'{name:>24}' for name in names)]
  for (which, causal, tokens), speeds in found.items():
    cells = ('–' if speeds[name] is None else f'{speeds[name] / 1e12:.3g}' for name in names)
    lines.append(f'{which:21}{"yes" if causal else "no":8}{tokens:6}' + ''.join(f'{cell:>24}' for cell in cells))
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  device = jax.devices()[0]
  sizes = SIZES.get(device.platform, SIZES['gpu'])
  parser.add_argument('--lengths', type=int, nargs='+', default=sizes['lengths'])
  for name in ('tokens', 'heads', 'width'):
    parser.add_argument(f'--{name}', type=int, default=sizes[name])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--turn', type=float, default=0.3, help='seconds of a turn')
  parser.add_argument('--small', action='store_true', help='two short lengths, to see that it runs')
  parser.add_argument('--output', type=Path, default=RESULTS / f'attention_{device.platform}.json')
  arguments = parser.parse_args()
  if arguments.small:
    vars(arguments).update(SIZES['small'], rounds=2, turn=0.01)
  names = list(BACKENDS_MEASURED.get(device.platform, BACKENDS_MEASURED['cpu']))
  if device.platform == 'cpu':
    reuse_freed_memory()  # as training does
  memory = (device.memory_stats() or {}).get('bytes_limit', CPU_MEMORY)
  heads, width = arguments.heads, arguments.width
  agreement = differences(names, Shape(2, min(arguments.lengths), heads, width, True))
  print('largest difference from the reference, causal:', agreement)
  rows: list[dict] = []
  for backward, causal, length in itertools.product((False, True), (False, True), arguments.lengths):
    shape = Shape(max(1, arguments.tokens // length), length, heads, width, causal)
    rows += (found := list(measure(names, shape, backward, arguments.rounds, arguments.turn, memory)))
    print(table(found, names).splitlines()[-1], flush=True)
    # Each time, so that a run that is cut off leaves what it has.
    write(arguments.output, device=str(device.device_kind), dtype='bfloat16' if on_gpu() else 'float32', heads=heads,
          width=width, convention='4 B H T S C operations forward, half if causal; backward 2.5 times forward',
          largest_difference_from_reference=agreement, rows=rows)
  print(table(rows, names))


if __name__ == '__main__':
  main()
