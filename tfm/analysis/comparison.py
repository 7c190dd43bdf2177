"""Several translators side by side: how sure each is of the references, and how that depends on length and place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from tfm.models.build import Model
from tfm.models.positions import positions_in_segments
from tfm.scores import bleu, exact_match
from tfm.training.objectives import inputs_and_labels

if TYPE_CHECKING:
  from matplotlib.figure import Figure


@dataclass(frozen=True)
class Tokens:
  """Every target token of a set of pairs, teacher forced; arrays of one length, in no particular order."""

  nll: np.ndarray
  """-log p of the token, nats."""
  correct: np.ndarray
  """bool: the token was the most probable."""
  position: np.ndarray
  """int: place in its target, from 0."""
  source_length: np.ndarray
  """int: tokens of its source."""


@partial(jax.jit, static_argnames='model')
def _forced(model, params, batch):
  inputs, labels_BxT, counts_BxT = inputs_and_labels(model, batch)
  logits_BxTxV = model.apply({'params': params}, *inputs)
  nll_BxT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BxTxV), labels_BxT[..., None], axis=-1)[..., 0]
  if len(inputs) == 2:  # a pair in each row
    places_BxT = jnp.broadcast_to(jnp.arange(labels_BxT.shape[1]), labels_BxT.shape)
    lengths_BxT = jnp.broadcast_to(jnp.sum(model.real(batch[0]), axis=1, keepdims=True), labels_BxT.shape)
  else:
    _, _, source_segments_BxS, segments_BxT = inputs
    places_BxT = positions_in_segments(segments_BxT)
    lengths_BxT = jnp.sum(segments_BxT[:, :, None] == source_segments_BxS[:, None], axis=-1)
  return nll_BxT, jnp.argmax(logits_BxTxV, axis=-1) == labels_BxT, places_BxT, lengths_BxT, counts_BxT


def forced_tokens(model: Model, params, batches: Sequence[tuple]) -> Tokens:
  """The tokens of `batches` (`tfm.text.objectives.build_evaluation_batches`) of a translation model."""
  found = []
  for batch in batches:
    *figures, counts_BxT = jax.device_get(_forced(model, params, tuple(batch)))
    found.append([figure_BxT[counts_BxT] for figure_BxT in figures])
  return Tokens(*(np.concatenate(parts) for parts in zip(*found)))


def accuracy_by_position(tokens: Tokens, edges: Sequence[int]) -> list[float]:
  """Share of correct tokens at places edges[i] ... edges[i + 1] - 1 of their targets."""
  return [float(np.mean(tokens.correct[(low <= tokens.position) & (tokens.position < high)]))
          for low, high in zip(edges, edges[1:])]


def length_groups(lengths: Sequence[int], groups: int = 5) -> list[tuple[int, int]]:
  """Ranges [low, high) of source length with about equally many sentences each; fewer where lengths are few."""
  edges = np.unique(np.quantile(lengths, np.linspace(0, 1, groups + 1), method='lower'))
  edges[-1] += 1
  if len(edges) == 1:
    edges = np.array([edges[0] - 1, edges[0]])
  return list(zip(edges[:-1].tolist(), edges[1:].tolist()))


def scores_by_length(hypotheses: Sequence[str], references: Sequence[str], lengths: Sequence[int],
                     groups: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
  """BLEU with its bootstrap interval, and exact match, of the sentences of every group."""
  found = []
  for low, high in groups:
    chosen = [i for i, length in enumerate(lengths) if low <= length < high]
    ours, theirs = [hypotheses[i] for i in chosen], [references[i] for i in chosen]
    score = bleu(ours, theirs, bootstrap=True)
    found.append({'low': low, 'high': high - 1, 'sentences': len(chosen), 'bleu': score.value,
                  'interval': score.interval, 'exact': exact_match(ours, theirs)})
  return found


def sequential_steps(model_config, S: int, T: int) -> int:
  """Longest chain of layers in a training pass over S and T tokens, each of which waits for the one before it.

  A recurrent layer is as many as it has tokens, and its successor starts one behind; any other layer is one (Vaswani
  et al. 2017, table 1).
  """
  c = model_config
  if c.kind != 'recurrent':
    return c.encoder_layers + c.decoder_layers
  return sum(layers + length - 1 for layers, length in ((c.encoder_layers, S), (c.decoder_layers, T)) if layers)


# -- figures ----------------------------------------------------------------------------------------------------------


def plot_lines(curves: dict[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> Figure:
  """A line for each model: name -> (x values, y values)."""
  from matplotlib.figure import Figure
  figure = Figure(figsize=(7, 4.2), layout='constrained')
  axes = figure.add_subplot()
  for (name, (xs, ys)), marker in zip(curves.items(), 'osv^Dpxh*+' * len(curves)):
    axes.plot(xs, ys, marker=marker, markersize=5, label=name)
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  axes.grid(alpha=0.3)
  axes.legend(frameon=False, fontsize=8)
  return figure


def plot_costs(costs: dict[str, tuple[float, float]]) -> Figure:
  """Tokens a second and sequential steps of every model: name -> (rate, steps)."""
  from matplotlib.figure import Figure
  figure = Figure(figsize=(8, 0.6 + 0.4 * len(costs)), layout='constrained')
  names = list(costs)[::-1]
  for place, title in enumerate(('training, target tokens a second', 'sequential steps of a training pass')):
    axes = figure.add_subplot(1, 2, place + 1)
    bars = axes.barh(names, [costs[name][place] for name in names], color='tab:gray')
    axes.bar_label(bars, fmt='{:,.0f}', padding=3, fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.2)
    if place:
      axes.set_yticklabels([])
  return figure
