"""What a mesh costs, from shapes alone: memory, exchanges and time, without compiling anything."""

from __future__ import annotations

import dataclasses
import functools
import itertools
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
from tfm.parallel.mesh import AXES, BATCH_AXES
from tfm.parallel.rules import shardings
from tfm.text.buckets import Shape
from tfm.training.objectives import abstract_batch, batch_sums
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
  own, moments = _shard_bytes(mesh, state.params), _shard_bytes(mesh, (state.opt_state, state.ema))
  gathered = {**sizes, 'data': 1, 'fsdp': 1, 'context': 1}
  whole = _shard_bytes(AbstractMesh(tuple(gathered.values()), tuple(gathered)), state.params)
  replicas = math.prod(sizes[name] for name in BATCH_AXES)
  micro, remat = config.training.accumulate, config.model.remat == 'full'
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
      # The update reads and writes parameters and moments, and reads the gradients, which were written before.
      hbm=(passes * whole + 4 * own + 2 * moments + 4 * micro * kept) / chip.bandwidth,
      interconnect=sum(each.seconds(chip) for each in exchanges)))


def _temporaries(config: Config, sizes: dict[str, int], own: float, table: float, kept: float) -> float:
  """The larger of two peaks: the end of the forward pass, and the gradients meeting at the end of the backward pass."""
  accumulator = own if config.training.accumulate > 1 else 0.0
  gathered = table if sizes['fsdp'] > 1 else 0.0
  # Gradients of the logits and of the look-ups, of target and source.
  tables = table * (3 if config.model.shape == 'encoder_decoder' else 2)
  shared = math.prod(sizes.values()) > sizes['tensor']
  forward = kept + own + gathered
  backward = own + gathered + (2 * tables if shared else tables)
  return accumulator + max(forward, backward)


def _exchanges(config: Config, sizes: dict[str, int], own: float, whole: float,
               local: tuple[int, int, int]) -> list[Collective]:
  """What the mesh makes necessary: weights gathered and their gradients added up (fsdp, data, context), tokens gathered
  for the experts and added up (expert), the partial sums of every sub-layer (tensor), keys and values on their way
  round (context)."""
  c, (data, fsdp, expert, tensor, context) = config.model, (sizes[name] for name in AXES)
  cross = c.decoder_layers if c.encoder_layers else 0
  micro, (rows, S, T) = config.training.accumulate, local
  item = 2 if c.dtype == 'bfloat16' else 4
  source, target = (item * rows * length * c.d_model for length in (S, T))
  found = []
  if fsdp > 1:
    passes = 3 if c.remat == 'full' else 2
    found += [Collective('all-gather', whole, fsdp, expert * tensor * context, passes * micro),
              Collective('reduce-scatter', whole, fsdp, expert * tensor * context, micro)]
  if (copies := data * expert * context) > 1:
    found.append(Collective('all-reduce', own, copies, 1 if copies == context else fsdp * tensor * context, micro))
  if tensor > 1:
    twice = 2 * micro  # forward and backward
    sublayers = 2 + (c.convolution != 'none') + (c.convolution == 'conformer')
    found += [Collective('all-reduce', source, tensor, context, twice * sublayers * c.encoder_layers),
              Collective('all-reduce', target, tensor, context, twice * (2 * c.decoder_layers + cross))]
  if expert > 1:  # tokens to the experts of the others, and what these made of them back, forward and backward
    networks = (2 if c.convolution == 'conformer' else 1) * c.encoder_layers
    sent = expert * (source * networks + target * c.decoder_layers)
    found += [Collective(kind, sent, expert, tensor * context, 2 * micro) for kind in ('all-gather', 'reduce-scatter')]
  if context > 1:
    width = item * rows * c.key_heads * (c.key_width + c.value_width) / tensor
    hops = (context - 1) * 3 * micro  # the backward pass sends keys, values and the gradients of both
    found += [Collective('collective-permute', width * S, context, 1, hops * (c.encoder_layers + cross)),
              Collective('collective-permute', width * T, context, 1, hops * c.decoder_layers)]
  return found


@functools.lru_cache(maxsize=256)
def residual_bytes(c: TransformerConfig, vocab_size: int, tensor: int, rows: int, S: int, T: int) -> float:
  """Bytes that the forward pass keeps for the backward pass, of rows x (S + T) tokens on one of `tensor` devices.

  A convolution has d_model channels, all of which are counted, although each device keeps its share only.
  """
  share = dataclasses.replace(c, num_heads=c.num_heads // tensor, num_kv_heads=c.key_heads // tensor,
                              d_k=c.key_width, d_v=c.value_width, d_ff=c.d_ff // tensor, vocab_multiple=1)
  model = build_model(share, *[-(-vocab_size // tensor)] * 2)
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.eval_shape(functools.partial(initialize, model), key)
  drops = c.dropout or c.attention_dropout or c.activation_dropout

  def backward(params, batch, key):
    return jax.vjp(lambda params: batch_sums(model, params, batch, 0.1, key if drops else None).loss, params)[1]

  batch = abstract_batch(c.shape, rows, S, T)
  kept = jax.tree.leaves(jax.eval_shape(backward, params, batch, key))
  left_out = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)}
  # Without a loop between them XLA makes the masks of dropout and ReLU twice rather than keep them.
  types = {jax.dtypes.float0} if c.scan_layers else {jax.dtypes.float0, jnp.dtype(bool)}
  return float(sum(leaf.size * leaf.dtype.itemsize for leaf in kept
                   if (leaf.shape, leaf.dtype) not in left_out and leaf.dtype not in types))


def _recomputed_bytes(c: TransformerConfig, vocab_size: int, tensor: int, rows: int, S: int, T: int) -> float:
  """What remat brings back while it goes through a layer backwards, with two gradients as wide as the MLP."""
  if c.remat == 'none':
    return 0.0

  def layer(remat: str) -> float:
    last, first = ('decoder_layers', 'encoder_layers') if c.decoder_layers else ('encoder_layers', 'decoder_layers')
    few = dataclasses.replace(c, remat=remat, **{first: min(getattr(c, first), 1)})
    one, two = (residual_bytes(dataclasses.replace(few, **{last: layers}), vocab_size, tensor, rows, S, T)
                for layers in (1, 2))
    return two - one

  return layer('none') - layer(c.remat) + 2 * rows * (T or S) * c.d_ff / tensor * (2 if c.dtype == 'bfloat16' else 4)


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
  params, length = abstract_state(config, vocab_size).params, max(shape.source, shape.target - 1)
  divisors = [number for number in range(1, devices + 1) if devices % number == 0]
  tensors = [number for number in divisors if number <= min(16, domain)]
  contexts = [number for number in divisors if number == 1 or number * 256 <= length]
  experts = [number for number in divisors if number == 1 or config.model.experts and not config.model.experts % number]
  for tensor, context, expert, fsdp in itertools.product(tensors, contexts, experts, divisors):
    data = devices // (tensor * context * expert * fsdp)
    uneven = shape.rows % max(data * fsdp * expert * config.training.accumulate, 1) or length % (2 * context)
    if data * tensor * context * expert * fsdp != devices or uneven:
      continue
    sizes = dict(zip(AXES, (data, fsdp, expert, tensor, context)))
    try:
      shardings(AbstractMesh(tuple(sizes.values()), AXES), params)
    except ConfigError:  # it names what this split cannot share out
      continue
    yield sizes
