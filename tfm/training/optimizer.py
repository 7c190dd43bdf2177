"""Adam as in the paper (Vaswani et al. 2017, section 5.3) and four others from optax, with optional clipping.

What a parameter is to an optimizer (embedding, hidden matrix, vector, ...) follows from its logical axes in
`tfm/parallel/rules.py`. Stacked layers and experts are separate matrices, so both layouts get the same updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from tfm.config import ConfigError, OptimizerConfig
from tfm.parallel.rules import logical_axes
from tfm.training.schedule import learning_rate

GROUPS: dict[tuple[str, ...], str] = {
    ('embed', 'heads', 'head_width'): 'hidden', ('heads', 'head_width', 'embed'): 'hidden',
    ('embed', 'mlp'): 'hidden', ('mlp', 'embed'): 'hidden',
    ('embed', 'channels'): 'hidden', ('channels', 'embed'): 'hidden',
    ('kernel_width', 'channels'): 'filter',  # one for each channel, and no matrix between two widths
    ('kernel_width', 'states', 'states'): 'hidden', ('embed', 'states'): 'hidden', ('states', 'embed'): 'hidden',
    ('states', 'states'): 'hidden',
    ('embed', 'bias'): 'head',  # router, pooler, classifier, output transform
    ('vocab', 'embed'): 'embedding',
    ('positions', 'embed'): 'table', ('positions', 'heads'): 'table',
    ('heads', 'head_width'): 'vector', ('heads',): 'vector', ('mlp',): 'vector', ('channels',): 'vector',
    ('vocab',): 'vector', ('bias',): 'vector', (): 'vector',
}
"""Logical axes of a parameter, without those that number layers, experts and gates -> its group."""

DECAYED = {'hidden', 'filter', 'head', 'embedding'}
"""Groups that `weight_decay` shrinks: matrices, filters and embeddings; no biases, norms, tables of positions."""

MUON_MOMENTUM = 0.95
"""Jordan 2024, with Nesterov's look-ahead and 5 Newton-Schulz iterations."""
MUON_RMS = 0.2
"""Size of a Muon update per entry, about that of AdamW's, so that both can share a rate (Liu et al. 2025, eq. 4)."""


@dataclass(frozen=True)
class Role:
  """What a parameter is to an optimizer."""

  group: str
  batch: int
  """Axes in front that number separate parameters: layers, experts, gates of a recurrent cell."""
  rows: int
  """How many of the axes after those are the rows of the matrix x W; the rest are its columns."""

  def matrix(self, leaf: jax.Array) -> jax.Array:
    """The leaf as matrices (rows x columns) behind its batch axes; as vectors where it is one."""
    batch, own = leaf.shape[:self.batch], leaf.shape[self.batch:]
    return leaf.reshape(*batch, -1) if self.group == 'vector' else leaf.reshape(*batch, math.prod(own[:self.rows]), -1)


def role(path: str, ndim: int) -> Role:
  """The role of the parameter at `path`.

  Raises:
    ConfigError: no rule covers the path, or no group its axes.
  """
  axes = logical_axes(path, ndim)
  own = tuple(axis for axis in axes if axis not in ('layers', 'experts', 'gates'))
  if own not in GROUPS:
    raise ConfigError(f'{path} has the logical axes {own}, which are in no group of parameters; add them to GROUPS in '
                      'tfm/training/optimizer.py.')
  return Role(GROUPS[own], len(axes) - len(own), 1 if own[-1:] == ('head_width',) else max(len(own) - 1, 1))


def build_optimizer(config: OptimizerConfig, d_model: int, total_steps: int) -> optax.GradientTransformation:
  """The optimizer of `config.name`, behind the clipping of the gradients' global norm."""
  rate = learning_rate(config, d_model, total_steps)
  decay, betas = config.weight_decay, (config.b1, config.b2)
  build = {
      'adam': lambda: optax.adam(rate, *betas, config.epsilon),
      'adamw': lambda: optax.adamw(rate, *betas, config.epsilon, weight_decay=decay, mask=_decayed),
      'adafactor': lambda: optax.chain(_factored(), optax.scale_by_learning_rate(rate)),
      'lion': lambda: optax.lion(rate, *betas, weight_decay=decay, mask=_decayed),
      'muon': lambda: _muon(config, rate),
  }
  optimizer = build[config.name]()
  if config.clip_norm is None:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def _decayed(params: Any) -> Any:
  return _by_role(lambda role, _: role.group in DECAYED, params)


def _muon(config: OptimizerConfig, rate: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
  """Muon for hidden matrices (Jordan 2024; Liu et al. 2025), AdamW for all else."""

  def dimensions(role: Role, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers:
    cut = role.batch + role.rows
    return optax.contrib.MuonDimensionNumbers(tuple(range(role.batch, cut)), tuple(range(cut, leaf.ndim)))

  def sized(role: Role, update: jax.Array) -> jax.Array:
    return MUON_RMS * max(role.matrix(update).shape[-2:])**0.5 * update

  hidden = optax.chain(
      optax.contrib.scale_by_muon(beta=MUON_MOMENTUM, eps=config.epsilon,
                                  weight_dimension_numbers=lambda updates: _by_role(dimensions, updates)),
      optax.stateless(lambda updates, _: _by_role(sized, updates)),
      optax.add_decayed_weights(config.weight_decay), optax.scale_by_learning_rate(rate))
  rest = optax.adamw(rate, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=_decayed)
  return optax.partition({'muon': hidden, 'adamw': rest}, lambda params: _by_role(
      lambda role, _: 'muon' if role.group == 'hidden' else 'adamw', params))


def _factored() -> optax.GradientTransformation:
  """Adafactor before the rate (Shazeer & Stern 2018, algorithm 4), for every matrix by itself.

  optax alone would factor the two widest axes, heads or layers among them, and measure all layers together.
  """
  moments = optax.scale_by_factored_rms()
  sizes = optax.chain(optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())

  def one(count, gradient, param, v_row, v_col, v):
    update, state = moments.update(gradient, optax.FactoredState(count, v_row, v_col, v), param)
    return sizes.update(update, sizes.init(param), param)[0], state.v_row, state.v_col, state.v

  def init(params):
    states = _by_role(lambda role, leaf: _each(moments.init, role)(role.matrix(leaf)), params)
    return jax.tree.transpose(jax.tree.structure(params), None, states)._replace(count=jnp.int32(0))

  def update(gradients, state, params):
    def of(role, gradient, param, *stored):
      found, *stored = _each(lambda *each: one(state.count, *each), role)(
          role.matrix(gradient), role.matrix(param), *stored)
      return found.reshape(gradient.shape), *stored

    found = _by_role(of, gradients, params, state.v_row, state.v_col, state.v)
    updates, *stored = jax.tree.transpose(jax.tree.structure(gradients), jax.tree.structure((0,) * 4), found)
    return updates, optax.FactoredState(state.count + 1, *stored)

  return optax.GradientTransformation(init, update)


def _each(function: Callable, role: Role) -> Callable:
  """`function` of one layer and one expert, over all of them."""
  for _ in range(role.batch):
    function = jax.vmap(function)
  return function


def _by_role(function: Callable, tree: Any, *others: Any) -> Any:
  """`function(role, leaf, ...)` at every leaf of a tree of parameters, or of arrays shaped like them."""

  def at(path, leaf, *rest):
    return function(role(jax.tree_util.keystr(path, simple=True, separator='/'), leaf.ndim), leaf, *rest)

  return jax.tree_util.tree_map_with_path(at, tree, *others)
