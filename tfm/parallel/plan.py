"""Will it fit, how fast, on which mesh: answered on a laptop, before anything is rented.

Two sources. The real training step is compiled ahead of time for as many simulated CPU devices as there will be chips:
its memory and its exchanges are read off the result. And an estimate from shapes alone, which is quick, compares
meshes. `docs/plan.md` says how far each can be trusted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from tfm.config import Config, TransformerConfig, from_json, require, to_json
from tfm.errors import UserError
from tfm.models.build import build_model
from tfm.parallel.chips import Chip, chip_named
from tfm.parallel.collectives import KINDS, Collective, collectives
from tfm.parallel.compile import jit_step
from tfm.parallel.estimate import Estimate, Memory, Roofline, abstract_state, estimate, other_meshes
from tfm.parallel.flops import model_flops
from tfm.parallel.mesh import AXES, BATCH_AXES, build_mesh, mesh_sizes
from tfm.text.buckets import Shape
from tfm.training.objectives import abstract_batch

USABLE = 0.9
"""Share of a chip's memory that a step may fill; the rest is for the runtime, its buffers and fragments."""

LIGHT = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
"""No machine code worth running is made; fusion, partitioning and buffer assignment come before that, so memory and
exchanges are those of the full compilation."""


@dataclass(frozen=True)
class Plan:
  """What `tfm plan` prints."""

  config: Config
  chip: Chip
  devices: int
  shape: Shape
  """Rows, source width, and target width (one more than labels) of the batch that was planned for."""
  memory: Memory
  """Temporaries are those of the compiled step."""
  exchanges: list[Collective]
  """Of the compiled step."""
  roofline: Roofline
  """With the exchanges of the compiled step."""
  flops: float
  """Model FLOPs of a step; see `tfm.parallel.flops.ModelFlops`."""
  estimate: Estimate
  """Of the same mesh."""
  best: Estimate | None
  """The fastest mesh that fits, by the estimate; None if none does."""

  @property
  def fits(self) -> bool:
    return self.memory.total <= USABLE * self.chip.memory

  def mfu(self, seconds: float) -> float:
    """Of the chips' bf16 peak, whatever the model computes in."""
    return self.flops / self.devices / self.chip.bf16_flops / seconds

  def __str__(self) -> str:
    memory, roofline = self.memory, self.roofline
    need, have = memory.total / 2**30, self.chip.memory / 2**30
    sent = {kind: sum(each.sent for each in self.exchanges if each.kind == kind) for kind in KINDS}
    moved = ', '.join(f'{kind} {size / 1e6:,.1f}' for kind, size in sent.items() if size) or 'none'
    wide = '; the CPU that it is compiled for widens bfloat16' if self.config.model.dtype == 'bfloat16' else ''
    lines = [
        f'{self.devices} x {self.chip.name}, {_axes(self.estimate.mesh)}',
        f'batch         {self.shape.rows} rows of {self._widths()} tokens '
        f'({self.config.model.dtype}, accumulate {self.config.training.accumulate})',
        f'memory        {need:.2f} of {have:.1f} GiB a device: '
        + ('fits' if self.fits else f'does NOT fit ({USABLE:.0%} of it may be filled)'),
        f'  GiB         parameters {memory.parameters / 2**30:.2f}, optimizer {memory.optimizer / 2**30:.2f}, '
        f'temporaries {memory.temporaries / 2**30:.2f} (from shapes alone: '
        f'{self.estimate.memory.temporaries / 2**30:.2f}{wide})',
        f'model FLOPs   {self.flops:.3e} a step (matrix products, 3 x forward, causal halved, no recomputation)',
        f'sent, MB      {moved} (a device, a step)',
        f'time, ms      compute {roofline.compute * 1e3:.2f}, HBM {roofline.hbm * 1e3:.2f}, '
        f'interconnect {roofline.interconnect * 1e3:.2f}: limited by {roofline.limit.replace("hbm", "HBM")}',
        f'step, ms      {roofline.overlapped * 1e3:.2f} if exchanges hide behind the rest, {roofline.serial * 1e3:.2f} '
        f'if not: MFU at most {self.mfu(roofline.overlapped):.1%}, {self.mfu(roofline.serial):.1%}',
        f'better mesh   {self._advice()}',
        f'train with    {" ".join(self._flags())}',
    ]
    return '\n'.join(lines)

  def _widths(self) -> str:
    source, target = self.shape.source, self.shape.target - 1
    return f'{source} source and {target} target' if source and target else str(source or target)

  def _flags(self) -> list[str]:
    """What was planned for and is not the default, as `train.py` takes it."""
    asked = [('mesh', name) for name in AXES] + [('model', 'vocab_multiple')] + [
        ('data', name) for name in ('rows_multiple', 'width_multiple', 'tokens_per_batch')]
    values = [(section, name, getattr(getattr(self.config, section), name),
               getattr(getattr(Config(), section), name)) for section, name in asked]
    return [f'--{section}.{name.replace("_", "-")} {value}' for section, name, value, default in values
            if value != default]

  def _advice(self) -> str:
    if self.best is None:
      return 'no split of these devices fits; raise training.accumulate, set model.remat, or take more of them'
    own, best = self.estimate, self.best
    if own.mesh == best.mesh:
      return 'no other split is estimated to be faster'
    return (f'for the same rows {_axes(best.mesh)} is estimated at {best.roofline.serial * 1e3:.2f} ms and '
            f'{best.memory.total / 2**30:.2f} GiB (this one: {own.roofline.serial * 1e3:.2f} ms, '
            f'{own.memory.total / 2**30:.2f} GiB)')


def plan(config: Config, devices: int, chip: str, vocab_size: int | None = None) -> Plan:
  """Compile the step of `config` for so many chips and say what it needs.

  The batch is the longest bucket: data.max_length on every side that the model has, rows as the token budget allows, at
  least one for every device that shares out rows.

  Args:
    vocab_size: of both languages; by default that of the config (for words and characters the most there can be).

  Raises:
    UserError: the chip is not known, or the config does not go with so many devices.
  """
  known = chip_named(chip)
  require(isinstance(config.model, TransformerConfig),
          f'A plan is made for Transformers, but the model is {config.model.kind}, which shares out rows alone; try it '
          'on one device.')
  require(devices > 0, f'{devices} devices cannot train; give 1 or more.')
  vocab_size = vocab_size or config.tokenizer.vocab_size or 260
  config, shape = batch_for(config, devices)
  sizes = dict(zip(AXES, mesh_sizes(config.mesh, devices)))
  own = estimate(config, sizes, vocab_size, shape, known)
  compiled = _compile_elsewhere(config, devices, vocab_size, shape)
  exchanges = [Collective(**each) for each in compiled['exchanges']]
  found = [own, *(estimate(config, other, vocab_size, shape, known)
                  for other in other_meshes(config, devices, vocab_size, shape, known.domain) if other != sizes)]
  fitting = [each for each in found if each.memory.total <= USABLE * known.memory]
  return Plan(
      config, known, devices, shape,
      memory=dataclasses.replace(own.memory, temporaries=compiled['temporaries']),
      exchanges=exchanges,
      roofline=dataclasses.replace(own.roofline, interconnect=sum(each.seconds(known) for each in exchanges)),
      flops=model_flops(config.model, vocab_size, shape.rows, shape.source, shape.target - 1).step,
      estimate=own,
      best=min(fitting, key=lambda each: each.roofline.serial, default=None))


def with_mesh(config: Config, tokens_per_batch: int | None = None, **axes: int | None) -> Config:
  """`config` on another mesh, data taking the rest, with the multiples raised that the mesh asks for."""
  data = config.data
  if tokens_per_batch is not None:
    data = dataclasses.replace(data, tokens_per_batch=tokens_per_batch)
  if not (chosen := {name: size for name, size in axes.items() if size is not None}):
    return dataclasses.replace(config, data=data)
  mesh = dataclasses.replace(config.mesh, data=-1, **chosen)
  if mesh.context > 1:
    data = dataclasses.replace(data, width_multiple=math.lcm(data.width_multiple, 2 * mesh.context))
  model = dataclasses.replace(config.model, vocab_multiple=math.lcm(config.model.vocab_multiple, max(mesh.tensor, 1)))
  return dataclasses.replace(config, mesh=mesh, data=data, model=model)


def batch_for(config: Config, devices: int) -> tuple[Config, Shape]:
  """The longest bucket, and the config with the rows and the token budget that these devices need."""
  data, sizes = config.data, dict(zip(AXES, mesh_sizes(config.mesh, devices)))
  multiple = math.lcm(data.rows_multiple, math.prod(sizes[name] for name in BATCH_AXES) * config.training.accumulate)
  rows = max(data.tokens_per_batch // data.max_length // multiple, 1) * multiple
  width = data.max_length // data.width_multiple * data.width_multiple
  data = dataclasses.replace(data, rows_multiple=multiple,
                             tokens_per_batch=max(data.tokens_per_batch, rows * data.max_length))
  shape = Shape(rows, width if config.model.encoder_layers else 0, (width if config.model.decoder_layers else 0) + 1)
  return dataclasses.replace(config, data=data), shape


def _axes(mesh: dict[str, int]) -> str:
  return ' x '.join(f'{name} {size}' for name, size in mesh.items() if size > 1) or 'one device'


# -- compiled ---------------------------------------------------------------------------------------------------------


def _compile_elsewhere(config: Config, devices: int, vocab_size: int, shape: Shape) -> dict[str, Any]:
  """`compile_here` in a process of its own: the number of devices is fixed once JAX has started."""
  request = {'config': to_json(config), 'vocab_size': vocab_size, 'shape': shape}
  root = str(Path(__file__).parents[2])
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false',
                 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
                 'PYTHONPATH': os.pathsep.join([root, *filter(None, [os.environ.get('PYTHONPATH')])])}
  done = subprocess.run([sys.executable, '-c', f'from {__name__} import answer; answer()'], env=environment,
                        input=json.dumps(request), capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f'The step could not be compiled for {devices} devices:\n{done.stderr[-3000:]}')
  result = json.loads(done.stdout.splitlines()[-1])
  if 'refused' in result:
    raise UserError(result['refused'])
  return result


def answer() -> None:
  """Read a request on standard input, compile, and write the result as JSON on standard output."""
  request = json.loads(sys.stdin.read())
  try:
    result = compile_here(from_json(request['config']), request['vocab_size'], Shape(*request['shape']))
  except UserError as error:
    result = {'refused': str(error)}
  print(json.dumps(result))


def compile_here(config: Config, vocab_size: int, shape: Shape) -> dict[str, Any]:
  """The real step, compiled for all devices of this process: bytes on a device, and exchanges."""
  mesh = build_mesh(config.mesh)
  model, state = build_model(config.model, vocab_size, vocab_size), abstract_state(config, vocab_size)
  batch = abstract_batch(config.model.shape, shape.rows, shape.source, shape.target - 1,
                         packed=config.data.packing == 'packed')
  with jax.set_mesh(mesh):
    compiled = jit_step(config, model, mesh, state).lower(state, batch).compile(LIGHT)
  memory = compiled.memory_analysis()
  return {'arguments': memory.argument_size_in_bytes,
          # The state is donated, so new and old share their memory; what does not is counted here.
          'temporaries': memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
          'exchanges': [dataclasses.asdict(each) for each in collectives(compiled.as_text())]}


