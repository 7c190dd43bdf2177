"""Patching: which values of a clean pass, put into a corrupt one, bring its answer back.

Activation patching and path patching run the model again for each value; a whole grid is one program, in which the
place of the patch is data. Attribution patching (Nanda 2023; Syed et al. 2023) reads the first-order answer for all
values from one backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tfm.analysis.engine import Edit, edit, read, run
from tfm.analysis.sites import Site, find, sites

Metric = Callable[[jax.Array], jax.Array]
"""Output of a pass -> a number. A pure function, kept from call to call: another one is another program."""


def activation_patching(model, params: Any, clean: tuple, corrupt: tuple, names: Sequence[str], metric: Metric, *,
                        batch_size: int | None = None) -> dict[str, jax.Array]:
  """For each site a grid: the metric of the corrupt pass with the value of the clean one at that layer and position.

  Args:
    clean, corrupt: inputs of two passes, of the same shapes.
    names: rows of layers, without a number: decoder.layers.resid_pre, ...self_attention.output, ...mlp.
    metric: of the output, for example a difference of two logits at the last position.
    batch_size: so many passes are one batch; None is 16 on a CPU, whose caches hold no more (64 take a sixth longer),
      and 64 elsewhere.

  Returns:
    For each name the metrics NxT float32: layers by positions.

  Raises:
    ValueError: a site that is no row of layers, or inputs of different shapes.
  """
  if [jnp.shape(x) for x in clean] != [jnp.shape(x) for x in corrupt]:
    raise ValueError(f'The clean inputs have shapes {[jnp.shape(x) for x in clean]} and the corrupt ones '
                     f'{[jnp.shape(x) for x in corrupt]}; pad them to the same.')
  known = sites(model, params, clean)
  rows = tuple(_row(name, known) for name in names)
  if batch_size is None:
    batch_size = 16 if jax.default_backend() == 'cpu' else 64
  return dict(zip(names, _grids(model, rows, metric, batch_size)(params, clean, corrupt)))


@functools.lru_cache(maxsize=32)
def _grids(model, rows: tuple[Site, ...], metric: Metric, batch_size: int):

  def grids(params, clean, corrupt):
    values = read(model, params, clean, [site.name for site in rows])

    def patched(place):
      # All sites are in every pass, and at most one of them is replaced: one program serves the whole grid.
      number, layer, position = place
      edits = [Edit(site.name, value=values[site.name], at=_at(site, layer, position) & (number == i))
               for i, site in enumerate(rows)]
      return metric(edit(model, params, corrupt, edits))

    places = [(i, n, t) for i, site in enumerate(rows) for n in range(site.layers)
              for t in range(site.shape[site.query_axis])]
    found = jax.lax.map(patched, tuple(jnp.array(places).T), batch_size=batch_size)
    ends = [sum(_size(site) for site in rows[:i]) for i in range(1, len(rows))]
    return [each.reshape(site.layers, -1) for site, each in zip(rows, jnp.split(found, ends))]

  return jax.jit(grids)


def attribution_patching(model, params: Any, clean: tuple, corrupt: tuple, names: Sequence[str],
                         metric: Metric) -> dict[str, jax.Array]:
  """What `activation_patching` adds to the metric of the corrupt pass, to first order: (clean - corrupt) . gradient.

  Returns:
    For each name NxT, summed over the batch.
  """
  known = sites(model, params, corrupt)
  rows = tuple(_row(name, known) for name in names)
  return dict(zip(names, _attributions(model, rows, metric)(params, clean, corrupt)))


@functools.lru_cache(maxsize=32)
def _attributions(model, rows: tuple[Site, ...], metric: Metric):

  def attributions(params, clean, corrupt):
    names = [site.name for site in rows]
    there, here = (read(model, params, inputs, names) for inputs in (clean, corrupt))

    def with_added(added):
      return metric(edit(model, params, corrupt, [Edit(name, add=added[name]) for name in names]))

    slopes = jax.grad(with_added)({name: jnp.zeros_like(here[name]) for name in names})
    return [_by_position(site, (there[site.name] - here[site.name]) * slopes[site.name]) for site in rows]

  return jax.jit(attributions)


def path_patching(model, params: Any, clean: tuple, corrupt: tuple, sender: tuple[str, int],
                  receiver: tuple[str, int], metric: Metric) -> jax.Array:
  """The effect of a head on the metric along one path: through the input of another head alone (Wang et al. 2023, 3.1).

  The clean pass is run with the sender's output from the corrupt one and everything between held at its clean value, to
  see what the receiver would be given; then that alone is put into the clean pass.

  Args:
    sender: name of a site of head outputs with its layer, and the head: ('decoder.layers[0].self_attention.z', 3).
    receiver: name of what a later head is given, with its layer, and the head:
      ('decoder.layers[2].self_attention.query', 1); query, key or value.
    metric: of the output.

  Returns:
    metric(patched) - metric(clean); exactly 0 where the sender comes after the receiver.
  """
  known = sites(model, params, clean)
  (source, layer), (target, to_layer) = find(sender[0], known), find(receiver[0], known)
  for name, number, head, site in ((sender[0], layer, sender[1], source), (receiver[0], to_layer, receiver[1], target)):
    if number is None or len(site.shape) != 4:
      raise ValueError(f"'{name}' is no output of one layer's heads; write it like "
                       'decoder.layers[0].self_attention.z (sender) or ....query, .key, .value (receiver).')
    if not 0 <= head < site.shape[-2]:
      raise ValueError(f"'{name}' has {site.shape[-2]} heads, from 0; {head} is none of them.")
  # Everything that adds to the stream between the two is held: heads by their z, MLPs by their output.
  held = tuple(site for name, site in known.items()
               if site.layers and name.endswith(('_attention.z', '.mlp')) and len(name.split('.')) in (3, 4))
  place = jnp.array([layer, sender[1], to_layer, receiver[1]])
  return _path(model, source, target, held, metric)(params, clean, corrupt, place)


@functools.lru_cache(maxsize=32)
def _path(model, source: Site, target: Site, held: tuple[Site, ...], metric: Metric):

  def effect(params, clean, corrupt, place):
    layer, head, to_layer, to_head = place
    values = read(model, params, clean, [site.name for site in held])
    sent = read(model, params, corrupt, source.name)[source.name]
    hold = [Edit(site.name, value=values[site.name]) for site in held]
    send = Edit(source.name, value=sent, at=_head(source, layer, head))

    def answer(edits):
      given = run(model, params, clean, edits=edits, where=target.name).readings[target.name]
      put = Edit(target.name, value=given, at=_head(target, to_layer, to_head))
      return metric(edit(model, params, clean, put))

    return answer([*hold, send]) - answer([*hold, send.replace(at=False)])

  return jax.jit(effect)


def _row(name: str, known) -> Site:
  site, layer = find(name, known)
  if site.layers is None or layer is not None or site.shape is None:
    raise ValueError(f"'{name}' is no row of layers; name one without a number, like decoder.layers.resid_pre.")
  return site


def _size(site: Site) -> int:
  return site.layers * site.shape[site.query_axis]


def _at(site: Site, layer, position) -> jax.Array:
  """bool: True in one layer at one position."""
  axes = len(site.shape) + 1
  at_layer = (jnp.arange(site.layers) == layer).reshape(-1, *[1] * (axes - 1))
  return at_layer & (jnp.arange(site.shape[site.query_axis]) == position).reshape(-1, *[1] * (-site.query_axis - 1))


def _head(site: Site, layer, head) -> jax.Array:
  at_layer = (jnp.arange(site.layers) == layer).reshape(-1, 1, 1, 1, 1)
  return at_layer & (jnp.arange(site.shape[-2]) == head).reshape(-1, 1)


def _by_position(site: Site, value: jax.Array) -> jax.Array:
  """Summed over all axes but layers and positions: NxT."""
  value = jnp.moveaxis(value, site.query_axis, 1)
  return value.reshape(*value.shape[:2], -1).sum(-1)
