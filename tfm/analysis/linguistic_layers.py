"""E10: the first layers hold the surface of a sentence, those in the middle its syntax, the last its meaning (Jawahar,
Sagot & Seddah 2019).

A masked language model learns a small grammar; then linear probes read from each layer what SentEval asks of a
sentence (`tfm.analysis.treebank_layers`: what a treebank says of a word). Where a kind of property arises is the centre
of gravity of what each further layer adds to the probes' score (Tenney et al. 2019). The control is the same model
before training.

Jawahar et al. read the first token of BERT, which was trained to tell whether two sentences follow each other. Nothing
asks this of the first token here, so a sentence's vector is the mean over its words (`GrammarScale.vector`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tfm.analysis import grammar
from tfm.analysis.engine import read
from tfm.analysis.probes import centre_of_gravity, cumulative_scores, probe_layers
from tfm.analysis.result import Result, as_result, interval
from tfm.analysis.task_training import adam
from tfm.config import TransformerConfig
from tfm.models.build import Model, build_model, initialize
from tfm.special_ids import EOS, PAD, UNK
from tfm.text.buckets import Shape
from tfm.text.masking import Masked
from tfm.text.ragged import Ragged
from tfm.training.objectives import batch_sums

KINDS = {'surface': 'tab:blue', 'syntactic': 'tab:orange', 'semantic': 'tab:green'}
"""From the bottom to the top, if the claim holds; and their colours."""
CLAIM = 'surface, syntactic and semantic properties arise in layers one above the other'


@dataclass(frozen=True)
class Scale:
  """How large, how long."""

  layers: int
  width: int
  steps: int
  rows: int
  """Sentences in a step."""
  probed: int
  """Of each task, at most: sentences, of which a third are kept for measuring; or words of each of two sets."""
  seeds: int
  learning_rate: float = 3e-3
  mask_rate: float = 0.2
  """More than BERT's 0.15, to learn in fewer steps."""
  dropout: float = 0.0


@dataclass(frozen=True)
class GrammarScale(Scale):
  """Of the experiment on the grammar."""

  sentences: int = 20_000
  """To learn from."""
  trees: int = 20_000
  """To make the tasks from."""
  vector: Literal['mean', 'first'] = 'mean'
  """Of a sentence: the mean over its words, or the state of <s> (the paper's, of a model with another objective)."""

  def __post_init__(self):
    if self.vector not in ('mean', 'first'):
      raise ValueError(f"vector is '{self.vector}'; choose the 'mean' over the words or the 'first' token.")


SCALES = {'cpu': GrammarScale(layers=6, width=64, steps=2500, rows=32, probed=3000, seeds=3),
          'accel': GrammarScale(layers=12, width=256, steps=30_000, rows=256, probed=20_000, seeds=5,
                                learning_rate=5e-4, sentences=500_000, trees=100_000)}


class Scores(NamedTuple):
  """Of one task; the first layer is the embedding."""

  accuracy_N: np.ndarray
  control_N: np.ndarray
  """On labels drawn for each word type (Hewitt & Liang 2019)."""
  cumulative_N: np.ndarray
  """With all layers up to this one."""
  chance: float
  """The most frequent answer, always."""

  def gain(self, scores_N: np.ndarray) -> np.ndarray:
    """From 0 for chance to 1."""
    return (scores_N - self.chance) / (1 - self.chance)

  @property
  def selectivity(self) -> float:
    """In the layer that answers best."""
    best = int(np.argmax(self.accuracy_N))
    return float(self.accuracy_N[best] - self.control_N[best])


class Seed(NamedTuple):
  """What one seed gave."""

  masked: float
  """Part of masked tokens that are guessed right, in sentences not learned from."""
  frequent: float
  """The same for one who always says the most frequent token."""
  trained: dict[str, Scores]
  untrained: dict[str, Scores]


def run_linguistic_layers(scale: Literal['cpu', 'accel'] | GrammarScale = 'cpu', seed: int = 0) -> Result:
  """The ten tasks of SentEval on sentences of `tfm.analysis.grammar`, read from a model that has learned it."""
  size = scale if isinstance(scale, GrammarScale) else SCALES[scale]
  return result_of('E10', grammar.TASKS, [_on_grammar(size, each) for each in range(seed, seed + size.seeds)])


def _on_grammar(size: GrammarScale, seed: int) -> Seed:
  rng = np.random.default_rng(seed)
  learned, held_out = (grammar.encode([grammar.words(grammar.draw(rng)) for _ in range(count)])
                       for count in (size.sentences, 500))
  trees = [grammar.draw(rng) for _ in range(size.trees)]
  model, first, params = train(size, seed, learned, grammar.MASK_ID, grammar.LONGEST + 2)
  tasks = dict(grammar.examples(trees, size.probed, rng))

  def scores(params) -> dict[str, Scores]:
    found = {}
    for name, (sentences, labels_M, types_M) in tasks.items():
      vectors_NxMxD = np.concatenate([
          (states[:, :, 0] if size.vector == 'first' else
           (states * is_word[..., None]).sum(2) / np.maximum(is_word.sum(1), 1)[:, None])[:, :rows]
          for states, is_word, rows in states_of(model, params, grammar.encode(sentences))], axis=1)
      found[name] = scores_of(vectors_NxMxD, labels_M, types_M, np.arange(len(labels_M)) % 3 == 0, seed)
    return found

  return Seed(*masked_accuracy(model, params, size, learned, held_out, grammar.MASK_ID), scores(params), scores(first))


# -- the model --------------------------------------------------------------------------------------------------------


def train(size: Scale, seed: int, texts: Ragged, mask_id: int, length: int) -> tuple[Model, Any, Any]:
  """A masked language model, its first parameters and its last."""
  model = build_model(TransformerConfig(
      encoder_layers=size.layers, decoder_layers=0, d_model=size.width, d_ff=2 * size.width, num_heads=4, norm='pre',
      dropout=size.dropout, positions='learned', max_positions=length, scan_layers=True), mask_id + 1, mask_id + 1)
  optimizer = adam(size.learning_rate, size.steps)
  first = params = initialize(model, jax.random.key(seed))
  moments = optimizer.init(params)

  def loss(params, batch, key):
    sums = batch_sums(model, params, batch, 0.0, key if size.dropout else None)
    return sums.loss / sums.tokens

  @jax.jit
  def step(params, moments, batch, key):
    updates, moments = optimizer.update(jax.grad(loss)(params, batch, key), moments)
    return optax.apply_updates(params, updates), moments

  masked, rng = Masked(texts, size.mask_rate, mask_id, seed), np.random.default_rng(seed + 1)
  for number, key in enumerate(jax.random.split(jax.random.key(seed + 1), size.steps)):
    rows = rng.integers(len(masked), size=size.rows)
    params, moments = step(params, moments, _batch(masked.at(seed, number), Shape(size.rows, length, 1), rows), key)
  return model, first, params


def _batch(masked: Masked, shape: Shape, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """What is read, and what is asked: no word that is not in the vocabulary."""
  inputs_BxT, labels_BxT = masked.batch(shape, rows)
  return inputs_BxT, np.where(labels_BxT == UNK, PAD, labels_BxT)


def masked_accuracy(model: Model, params, size: Scale, learned: Ragged, held_out: Ragged,
                    mask_id: int) -> tuple[float, float]:
  """Accuracy on the masked tokens of texts that are held out, and that of the most frequent token learned from."""
  rows = np.arange(len(held_out.lengths))
  shape = Shape(len(rows), int(held_out.lengths.max()), 1)
  inputs_BxT, labels_BxT = _batch(Masked(held_out, size.mask_rate, mask_id), shape, rows)
  sums = jax.jit(batch_sums, static_argnums=(0, 3))(model, params, (inputs_BxT, labels_BxT), 0.0)
  frequent = np.bincount(learned.ids[learned.ids > UNK]).argmax()
  return float(sums.correct / sums.tokens), float((labels_BxT == frequent).sum() / sums.tokens)


def states_of(model: Model, params, texts: Ragged) -> Iterable[tuple[np.ndarray, np.ndarray, int]]:
  """In blocks of rows: the embedding and the output of every layer, (1 + N)xBxTxD; which tokens are words, BxT; and how
  many rows are texts."""
  width, block = int(texts.lengths.max()), 256
  for begin in range(0, len(texts.lengths), block):
    rows = np.arange(begin, min(begin + block, len(texts.lengths)))
    ids_BxT = texts.pad(rows, block, width)
    found = read(model, params, jnp.asarray(ids_BxT), ('source_embed', 'encoder.layers.resid_post'))
    yield (np.concatenate([found['source_embed'][None], found['encoder.layers.resid_post']]), ids_BxT > EOS, len(rows))


def scores_of(states_NxMxD: np.ndarray, labels_M: np.ndarray, types_M, test_M: np.ndarray, seed: int) -> Scores:
  each = probe_layers(states_NxMxD, labels_M, types_M, test_M, np.random.default_rng(seed))
  chance = np.bincount(labels_M[test_M]).max() / test_M.sum()
  return Scores(each.accuracy_N, each.control_N, cumulative_scores(states_NxMxD, labels_M, test_M), float(chance))


# -- the verdict ------------------------------------------------------------------------------------------------------


def gravity(scores: Mapping[str, Scores], tasks: Iterable[str], embedding: bool = True) -> float:
  """Centre of gravity of what layers add to the mean gain of some tasks.

  Args:
    embedding: what is there before the first layer counts as added by layer 0. Without, as published: but nothing is
      left then of a property that the embedding tells.
  """
  curve = np.mean([scores[task].gain(scores[task].cumulative_N) for task in tasks], axis=0)
  return centre_of_gravity(np.concatenate([[0.0], curve])) - 1 if embedding else centre_of_gravity(curve)


def result_of(name: str, kinds: Mapping[str, str], seeds: Sequence[Seed]) -> Result:
  """The verdict on what some seeds gave; `kinds` has the kind of each task."""
  tasks = {kind: [task for task in kinds if kinds[task] == kind] for kind in KINDS}
  places, published, gaps = {}, {}, {}
  found = {who: [getattr(seed, who) for seed in seeds] for who in ('trained', 'untrained')}
  for who, several in found.items():
    places[who] = {kind: [gravity(each, tasks[kind]) for each in several] for kind in KINDS}
    published[who] = {kind: [gravity(each, tasks[kind], embedding=False) for each in several] for kind in KINDS}
    gaps[who] = {f'{low} to {high}': interval(np.subtract(places[who][high], places[who][low]))
                 for low, high in pairwise(KINDS)}
  rises = {who: [low > 0 for _, (low, _) in gaps[who].values()] for who in found}
  selectivity = {task: interval([each[task].selectivity for each in found['trained']]) for task in kinds}
  gains = {who: {task: np.mean([each[task].gain(each[task].accuracy_N) for each in several], 0) for task in kinds}
           for who, several in found.items()}
  masked, frequent = ([getattr(seed, of) for seed in seeds] for of in ('masked', 'frequent'))
  learned = interval(np.subtract(masked, frequent))[1][0] > 0.1
  above_chance = {kind: float(np.mean([gains['trained'][task].max() for task in tasks[kind]])) for kind in KINDS}
  beyond_words = {kind: float(np.mean([selectivity[task][0] for task in tasks[kind]])) for kind in KINDS}
  conditions = {
      **{f'properties that are {high} arise above those that are {low}: gap of E above 0, 95 %': bool(met)
         for (low, high), met in zip(pairwise(KINDS), rises['trained'])},
      'in an untrained model they do not, both': not all(rises['untrained']),
      'selectivity in the best layer is above 10 points, in the mean of each kind':
          min(beyond_words.values()) > 0.1}
  # Below the control labels a probe reads nothing that it could not learn by heart: no layer can be told from it.
  supported = learned and min(above_chance.values()) > 0.1 and min(beyond_words.values()) > 0
  measured = {
      'conditions': conditions,
      'masked tokens guessed': {'by the model': interval(masked), 'the most frequent one': interval(frequent)},
      'E': places, 'E without the embedding, as published': published, 'gaps of E': gaps,
      'accuracy by layer': {who: {task: np.mean([each[task].accuracy_N for each in several], 0) for task in kinds}
                            for who, several in found.items()},
      'chance': {task: float(np.mean([each[task].chance for each in found['trained']])) for task in kinds},
      'best layer': {task: [int(np.argmax(each[task].accuracy_N)) for each in found['trained']] for task in kinds},
      'selectivity in the best layer': selectivity,
      'selectivity of a kind': beyond_words, 'gain of a kind in the best layer': above_chance}

  def plot(axes):
    for kind, colour in KINDS.items():
      for number, task in enumerate(tasks[kind]):
        axes.plot(gains['trained'][task], color=colour, marker='os^vD'[number], markersize=4, linewidth=1, label=task)
      axes.plot(np.mean([gains['untrained'][task] for task in tasks[kind]], 0), ':', color=colour,
                label=f'{kind}, untrained')
    axes.set(xlabel='layer (0: embedding)', ylabel='gain of a linear probe over chance', ylim=(-0.1, 1.45))
    axes.legend(fontsize=6, ncols=3, loc='upper center')

  untrained = ', '.join(f'{gap} {mean:+.2f} ({low:+.2f} to {high:+.2f})'
                        for gap, (mean, (low, high)) in gaps['untrained'].items())
  return as_result(name, CLAIM, '; '.join(conditions), f'gaps of E in an untrained model: {untrained}', measured,
                   'not supported at this scale' if not supported else 'holds' if all(conditions.values()) else 'fails',
                   plot)
