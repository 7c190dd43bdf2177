"""What a mesh costs, from shapes alone: memory, exchanges and time, without compiling anything."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from tfm.config import Config, ConfigError, TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.parallel.chips import Chip
from tfm.parallel.collectives import Collective
from tfm.parallel.flops import model_flops
from tfm.parallel.mesh import AXES
from tfm.parallel.rules import shardings
from tfm.text.buckets import Shape
from tfm.training.objectives import batch_sums
from tfm.training.step import TrainState, new_state


@dataclass(frozen=True)
class Memory:
  """Bytes on each device."""

  parameters: float
  optimizer: float
  temporaries: float
  """Gradients, activations, gathered weights, buffers."""

  @property
  def total(self) -> float:
    return self.parameters + self.optimizer + self.temporaries


@dataclass(frozen=True)
class Roofline:
  """Seconds of a step if one thing alone took time."""

  compute: float
  """Every product that is computed (causal scores in full, recomputation too), at peak."""
  hbm: float
  """Weights and moments as often as they pass, four passes over what is kept for the backward pass."""
  interconnect: float
  """All exchanges, one after the other, at full bandwidth."""

  @property
  def overlapped(self) -> float:
    return max(self.compute, self.hbm, self.interconnect)

  @property
  def serial(self) -> float:
    return max(self.compute, self.hbm) + self.interconnect

  @property
  def limit(self) -> str:
    return max(('interconnect', 'hbm', 'compute'), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Estimate:
  """A mesh, judged from shapes alone."""

  mesh: dict[str, int]
  memory: Memory
  exchanges: list[Collective]
  roofline: Roofline


def estimate(config: Config, sizes: dict[str, int], vocab_size: int, shape: Shape, chip: Chip) -> Estimate:
  """Memory, exchanges and time of a mesh without compiling anything.

  Parameters and moments are exact. Activations are the residuals of a trace of one device's share of the model.

  Raises:
    ConfigError: a parameter cannot be shared out like this.
  """
  state = abstract_state(config, vocab_size)
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  own, moments = _shard_bytes(mesh, state.params), _shard_bytes(mesh, state.opt_state)
  whole = _shard_bytes(AbstractMesh((sizes['tensor'],) + (1,) * 3, ('tensor', 'data', 'fsdp', 'context')), state.params)
  replicas, micro, remat = sizes['data'] * sizes['fsdp'], config.training.accumulate, config.model.remat == 'full'
  local = (shape.rows // replicas // micro, shape.source // sizes['context'], (shape.target - 1) // sizes['context'])
  kept = residual_bytes(config.model, vocab_size, sizes['tensor'], *local)
  again = _recomputed_bytes(config.model, vocab_size, sizes['tensor'], *local)
  rows_of = config.model.vocab_multiple
  table = 4 * config.model.d_model * -(-vocab_size // rows_of) * rows_of / sizes['tensor']
  memory = Memory(own, moments, _temporaries(config, sizes, own, table, kept + again))
  exchanges = _exchanges(config, sizes, own, whole, local)
  B, S, T = shape.rows, shape.source, shape.target - 1
  done = model_flops(config.model, vocab_size, B, S, T, halve_causal=False)
  recomputed = done.forward - done.logits if remat else 0.0
  passes = (3 if remat else 2) * micro  # over the weights
  return Estimate(sizes, memory, exchanges, Roofline(
      compute=(done.step + recomputed) / math.prod(sizes.values()) / chip.flops(config.model.dtype),
      # Adam reads parameter, gradient and two moments and writes all but the gradient, which was written before.
      hbm=(passes * whole + 8 * own + 4 * micro * kept) / chip.bandwidth,
      interconnect=sum(each.seconds(chip) for each in exchanges)))


def _temporaries(config: Config, sizes: dict[str, int], own: float, table: float, kept: float) -> float:
  """The larger of two peaks: the end of the forward pass, and the gradients meeting at the end of the backward pass."""
  accumulator = own if config.training.accumulate > 1 else 0.0
  gathered = table if sizes['fsdp'] > 1 else 0.0
  tables = 3 * table  # gradients of the logits, of the target's look-up and of the source's
  shared = sizes['data'] * sizes['fsdp'] * sizes['context'] > 1
  forward = kept + own + gathered
  backward = own + gathered + (2 * tables if shared else tables)
  return accumulator + max(forward, backward)


def _exchanges(config: Config, sizes: dict[str, int], own: float, whole: float,
               local: tuple[int, int, int]) -> list[Collective]:
  """What the mesh makes necessary: weights gathered and their gradients added up (fsdp, data, context), the partial
  sums of every sub-layer (tensor), keys and values on their way round (context)."""
  c, (data, fsdp, tensor, context) = config.model, (sizes[name] for name in AXES)
  micro, (rows, S, T) = config.training.accumulate, local
  item = 2 if c.dtype == 'bfloat16' else 4
  source, target = (item * rows * length * c.d_model for length in (S, T))
  found = []
  if fsdp > 1:
    passes = 3 if c.remat == 'full' else 2
    found += [Collective('all-gather', whole, fsdp, tensor * context, passes * micro),
              Collective('reduce-scatter', whole, fsdp, tensor * context, micro)]
  if data * context > 1:
    found.append(Collective('all-reduce', own, data * context, fsdp * tensor * context if data > 1 else 1, micro))
  if tensor > 1:
    twice = 2 * micro  # forward and backward
    found += [Collective('all-reduce', source, tensor, context, twice * 2 * c.encoder_layers),
              Collective('all-reduce', target, tensor, context, twice * 3 * c.decoder_layers)]
  if context > 1:
    width = item * rows * c.num_heads * (c.key_width + c.value_width) / tensor
    hops = (context - 1) * 3 * micro  # the backward pass sends keys, values and the gradients of both
    found += [Collective('collective-permute', width * S, context, 1, hops * (c.encoder_layers + c.decoder_layers)),
              Collective('collective-permute', width * T, context, 1, hops * c.decoder_layers)]
  return found


@functools.lru_cache(maxsize=256)
def residual_bytes(c: TransformerConfig, vocab_size: int, tensor: int, rows: int, S: int, T: int) -> float:
  """Bytes that the forward pass keeps for the backward pass, of rows x (S + T) tokens on one of `tensor` devices."""
  share = dataclasses.replace(c, num_heads=c.num_heads // tensor, d_k=c.key_width, d_v=c.value_width,
                              d_ff=c.d_ff // tensor, vocab_multiple=1)
  model = build_model(share, *[-(-vocab_size // tensor)] * 2)
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.eval_shape(functools.partial(initialize, model), key)
  drops = c.dropout or c.attention_dropout or c.activation_dropout

  def backward(params, batch, key):
    return jax.vjp(lambda params: batch_sums(model, params, batch, 0.1, key if drops else None).loss, params)[1]

  batch = tuple(jax.ShapeDtypeStruct((rows, width), jnp.int32) for width in (S, T + 1))
  kept = jax.tree.leaves(jax.eval_shape(backward, params, batch, key))
  left_out = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)}
  # Without a loop between them XLA makes the masks of dropout and ReLU twice rather than keep them.
  types = {jax.dtypes.float0} if c.scan_layers else {jax.dtypes.float0, jnp.dtype(bool)}
  return float(sum(leaf.size * leaf.dtype.itemsize for leaf in kept
                   if (leaf.shape, leaf.dtype) not in left_out and leaf.dtype not in types))


def _recomputed_bytes(c: TransformerConfig, vocab_size: int, tensor: int, rows: int, S: int, T: int) -> float:
  """What remat brings back while it goes through a decoder layer backwards, with two gradients as wide as the MLP."""
  if c.remat == 'none':
    return 0.0

  def layer(remat: str) -> float:
    one, two = (residual_bytes(dataclasses.replace(c, remat=remat, encoder_layers=1, decoder_layers=layers),
                               vocab_size, tensor, rows, S, T) for layers in (1, 2))
    return two - one

  return layer('none') - layer(c.remat) + 2 * rows * T * c.d_ff / tensor * (2 if c.dtype == 'bfloat16' else 4)


@functools.lru_cache(maxsize=16)
def abstract_state(config: Config, vocab_size: int) -> TrainState:
  """Shapes of the training state."""
  model = build_model(config.model, vocab_size, vocab_size)
  return jax.eval_shape(lambda key: new_state(config, model, initialize(model, key)),
                        jax.eval_shape(lambda: jax.random.key(0)))


def _shard_bytes(mesh: AbstractMesh, tree: Any) -> float:
  shapes = jax.tree.map(lambda leaf, placed: math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
                        tree, shardings(mesh, tree))
  return float(sum(jax.tree.leaves(shapes)))


def other_meshes(config: Config, devices: int, vocab_size: int, shape: Shape, domain: int) -> Iterator[dict[str, int]]:
  """Splits worth trying: `tensor` inside a domain and at most 16, `context` only where every part keeps 256 tokens."""
  params = abstract_state(config, vocab_size).params
  divisors = [number for number in range(1, devices + 1) if devices % number == 0]
  for tensor in (number for number in divisors if number <= min(16, domain)):
    for context in (number for number in divisors if number == 1 or number * 256 <= shape.source):
      for fsdp in divisors:
        data = devices // (tensor * context * fsdp)
        uneven = data * tensor * context * fsdp != devices or shape.rows % (data * fsdp * config.training.accumulate)
        if uneven or shape.source % (2 * context):
          continue
        sizes = dict(zip(AXES, (data, fsdp, tensor, context)))
        try:
          shardings(AbstractMesh(tuple(sizes.values()), AXES), params)
        except ConfigError:  # it names what this split cannot share out
          continue
        yield sizes
