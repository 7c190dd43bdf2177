"""What models of each family learn to remember, by distance (E7 c and d)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import jax
import numpy as np

from tfm.analysis.distance_plot import plot_by_distance
from tfm.analysis.memory_tasks import Task, associative_recall, copy, first_token_recall, marked_recall
from tfm.analysis.result import Result, Verdict
from tfm.analysis.sequence_families import FAMILIES, Family, matched, parameters_of, recurrent, transformer
from tfm.analysis.task_training import Curve, Effort, accuracy_curve, half_distance, train
from tfm.models.build import Model, build_model, initialize


@dataclass(frozen=True)
class Scale:
  """Sizes of the experiments that train."""

  distances: tuple[int, ...]
  """Where accuracy is reported."""
  beyond: tuple[int, ...]
  """Distances that training never shows, where a task has them."""
  parameters: int
  """Of every family, within 5 %."""
  recall: Effort
  """On first-token recall, copying and marked recall."""
  associative: Effort
  width: Effort
  """On copying, for each width of state."""
  widths: tuple[int, ...]
  regular: Effort
  """On parity and Dyck."""
  regular_length: int
  seeds: int
  rows: int
  """Sequences an evaluation is made on."""

  @property
  def length(self) -> int:
    """T of the tasks: an eighth beyond the last distance, see `Curve.at`."""
    return max(self.distances) * 9 // 8 + 2


SCALES = {
    'cpu': Scale(distances=(1, 2, 4, 8, 16, 32, 64, 128), beyond=(192, 256), parameters=20_000, recall=Effort(1200, 16),
                 associative=Effort(1500, 32), width=Effort(600, 16), widths=(16, 32, 64), regular=Effort(800, 32),
                 regular_length=32, seeds=1, rows=512),
    'accel': Scale(distances=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), beyond=(1536, 2048), parameters=200_000,
                   recall=Effort(10_000, 64, 1e-3), associative=Effort(10_000, 128, 1e-3),
                   width=Effort(10_000, 64, 1e-3), widths=(32, 64, 128, 256), regular=Effort(10_000, 128, 1e-3),
                   regular_length=64, seeds=5, rows=1024),
}

RecallTask = Literal['first-token recall', 'copy', 'marked recall']
ASSOCIATIVE_PAIRS, ASSOCIATIVE_LENGTH = 8, 64


def scale_named(scale: str | Scale) -> Scale:
  """
  Raises:
    ValueError: there is none of this name.
  """
  if isinstance(scale, Scale):
    return scale
  if scale not in SCALES:
    raise ValueError(f'There is no scale {scale!r}; choose one of {", ".join(SCALES)}, or give a Scale.')
  return SCALES[scale]


@cache
def recall_tasks(scale: Scale, length: int) -> dict[str, Task]:
  return {'first-token recall': first_token_recall(length), 'copy': copy(length, scale.distances),
          'marked recall': marked_recall(length)}


@dataclass(frozen=True)
class Learned:
  """A family after its training on a task, and before."""

  model: Model
  params: dict
  untrained: dict
  last_loss: float


@cache
def learned(name: str, scale: Scale, task: str, seed: int) -> Learned:
  """The family `name` of FAMILIES after training on a recall task."""
  return learn(FAMILIES[name], scale.parameters, recall_tasks(scale, scale.length)[task], scale.recall, seed)


def learn(family: Family, parameters: int, task: Task, effort: Effort, seed: int) -> Learned:
  model = matched(family, parameters, task.vocab_size)
  params, losses = train(model, task, effort, jax.random.key(seed))
  return Learned(model, params, initialize(model, jax.random.key(seed + 1)), float(np.mean(losses[-20:])))


def mean_curve(learners: list[Learned], task: Task, rows: int, trained: bool = True) -> Curve:
  """Over seeds. A quarter of the rows at a time, so that long sequences fit."""
  curves = [accuracy_curve(each.model, each.params if trained else each.untrained, task, jax.random.key(10_000 + n),
                           max(1, rows // 4), 4) for n, each in enumerate(learners)]
  return Curve(sum(c.right for c in curves), sum(c.asked for c in curves))


def recall_by_distance(scale: str | Scale = 'cpu', seed: int = 0, task: RecallTask = 'copy') -> Result:
  """E7c: accuracy by distance of every family, equal in parameters, on one of three tasks.

  Raises:
    ValueError: no such scale or task.
  """
  scale = scale_named(scale)
  tasks = recall_tasks(scale, scale.length)
  if task not in tasks:
    raise ValueError(f'There is no recall task {task!r}; choose one of {", ".join(tasks)}.')
  # Copying asks by tokens for its delays, and has none for a delay that was not trained.
  beyond = () if task == 'copy' else scale.beyond
  far = recall_tasks(scale, max(beyond) * 9 // 8 + 2)[task] if beyond else None
  chance, distances = tasks[task].chance, scale.distances
  field = matched(FAMILIES['CNN'], scale.parameters, tasks[task].vocab_size).config.receptive_field.decoder
  accuracy, untrained, half, sizes, losses, error = {}, {}, {}, {}, {}, 0.0
  for name in FAMILIES:
    learners = [learned(name, scale, task, seed + n) for n in range(scale.seeds)]
    curve = mean_curve(learners, tasks[task], scale.rows)
    accuracy[name] = [curve.at(d) for d in distances]
    half[name] = half_distance(distances, accuracy[name], chance)
    if far is not None:
      further = mean_curve(learners, far, scale.rows)
      accuracy[name] += [further.at(d) for d in beyond]
    untrained[name] = mean_curve(learners, tasks[task], scale.rows, trained=False).overall
    if name == 'CNN':
      error = max([curve.error(d) for d in distances if d >= field], default=0.0)
    sizes[name] = parameters_of(learners[0].model.config, tasks[task].vocab_size)
    losses[name] = [each.last_loss for each in learners]
  conditions, trainable = _recall_conditions(accuracy, half, distances, field, chance, error)
  highest = max(untrained.values())
  controlled = highest < chance + 0.1
  return Result(
      name=f'E7c {task}',
      claim='Attention recalls over any distance it was trained on; a recurrent state of fixed width and a receptive '
      'field of fixed length do not.',
      criterion='; '.join(conditions),
      measured={'seeds': scale.seeds, 'parameters': sizes, 'chance': chance, 'distances': [*distances, *beyond],
                'trained_up_to': max(distances), 'accuracy': accuracy, 'd50': half, 'untrained': untrained,
                'cnn_receptive_field': field, 'last_loss': losses, 'conditions': conditions},
      verdict=verdict(conditions, trainable, controlled),
      control=f'Untrained models must be at chance ({chance:.3f}): the highest accuracy is {highest:.3f}. The CNN '
      'beyond its receptive field: see the conditions.',
      draw=lambda: plot_by_distance(f'{task}: accuracy by distance (trained up to {max(distances)})',
                                    {name: ([*distances, *beyond], values) for name, values in accuracy.items()},
                                    'accuracy', level=('chance', chance)))


def _recall_conditions(accuracy, half, distances, field, chance, error) -> tuple[dict[str, bool], bool]:
  """What must hold, and whether the models that can solve the task were trained well enough to judge."""
  by = {name: dict(zip(distances, values)) for name, values in accuracy.items()}
  last, slack = max(distances), 0.02 + 3 * error
  inside = [d for d in distances if d + max(1, d // 8) <= field]
  outside = [d for d in distances if d >= field]
  infinite = float('inf')
  d50 = {name: infinite if value is None else value for name, value in half.items()}
  cnn_learned = all(by['CNN'][d] >= 0.95 for d in inside)
  conditions = {
      f'accuracy of the Transformer at {last} >= 0.95': by['Transformer'][last] >= 0.95,
      'd50(tanh RNN) <= 64': d50['tanh RNN'] <= 64,
      'd50(LSTM) < d50(Transformer)': d50['LSTM'] < d50['Transformer'],
      f'CNN at chance from {field} tokens on': all(abs(by['CNN'][d] - chance) <= slack for d in outside),
      'and >= 0.95 inside its field': cnn_learned,
  }
  # A recurrent model that learned nothing at all has a short memory for another reason.
  return conditions, cnn_learned and all(by[n][distances[0]] >= 0.5 for n in ('Transformer', 'tanh RNN', 'LSTM'))


def verdict(conditions: dict[str, bool], trainable: bool, controlled: bool) -> Verdict:
  """'holds' asks for all; a model that has not learned what it surely can says nothing about the claim."""
  if not controlled:
    return 'fails'
  if not trainable:
    return 'not supported at this scale'
  return 'holds' if all(conditions.values()) else 'fails'


def associative_recall_by_distance(scale: str | Scale = 'cpu', seed: int = 0) -> Result:
  """E7c, MQAR: two layers of attention find a value by its key at any distance, one layer does not."""
  scale = scale_named(scale)
  task = associative_recall(ASSOCIATIVE_LENGTH, ASSOCIATIVE_PAIRS)
  distances = tuple(d for d in scale.distances if 4 <= d and d + d // 8 < ASSOCIATIVE_LENGTH - 1)
  rows = 16 * scale.rows  # few pairs lie at any one distance
  families = {**FAMILIES, 'Transformer, 1 layer': partial(transformer, layers=1)}
  accuracy, sizes, untrained = {}, {}, {}
  for name, family in families.items():
    learners = [learn(family, scale.parameters, task, scale.associative, seed + n) for n in range(scale.seeds)]
    curve = mean_curve(learners, task, rows)
    accuracy[name] = [curve.at(d) for d in distances]
    untrained[name] = mean_curve(learners, task, rows, trained=False).overall
    sizes[name] = parameters_of(learners[0].model.config, task.vocab_size)
  # Some value that was there, whichever key it belongs to.
  guess = 1 / ASSOCIATIVE_PAIRS + (1 - 1 / ASSOCIATIVE_PAIRS) * task.chance
  others = [name for name in FAMILIES if name != 'Transformer']
  conditions = {
      'Transformer >= 0.95 at every distance': min(accuracy['Transformer']) >= 0.95,
      'one layer of attention < 0.5 everywhere': max(accuracy['Transformer, 1 layer']) < 0.5,
      'Transformer best at the longest distance': all(accuracy['Transformer'][-1] > accuracy[n][-1] for n in others),
  }
  highest = max(untrained.values())
  return Result(
      name='E7c associative recall',
      claim='Attention finds a value by its key whatever the distance, from two layers on (one '
      'to tie a value to the key before it, one to look up).',
      criterion='; '.join(conditions),
      measured={'seeds': scale.seeds, 'parameters': sizes, 'chance': task.chance, 'guess_among_shown': guess,
                'pairs': ASSOCIATIVE_PAIRS, 'length': ASSOCIATIVE_LENGTH, 'distances': list(distances),
                'accuracy': accuracy, 'untrained': untrained, 'conditions': conditions},
      verdict=verdict(conditions, min(accuracy['Transformer']) >= 0.95, highest < task.chance + 0.1),
      control='One layer of attention must not solve it: at most '
      f'{max(accuracy["Transformer, 1 layer"]):.3f}, guessing among the values shown is {guess:.3f}. Untrained models: '
      f'at most {highest:.3f}, chance is {task.chance:.3f}.',
      draw=lambda: plot_by_distance(f'associative recall, {ASSOCIATIVE_PAIRS} pairs: accuracy by distance',
                                    {name: (distances, values) for name, values in accuracy.items()}, 'accuracy',
                                    level=('guess among the values shown', guess)))


def recency_bias(scale: str | Scale = 'cpu', seed: int = 0) -> Result:
  """E7d: the same sequences with the marked symbol at the start or just before the question; gap = end - start."""
  scale = scale_named(scale)
  length = max(scale.distances) + 1
  ends = {'start': marked_recall(length, position=0), 'end': marked_recall(length, position=length - 2)}
  accuracy = {}
  for name in FAMILIES:
    learners = [learned(name, scale, 'marked recall', seed + n) for n in range(scale.seeds)]
    curves = {end: mean_curve(learners, task, scale.rows) for end, task in ends.items()}
    accuracy[name] = {end: curve.overall for end, curve in curves.items()}
  gap = {name: values['end'] - values['start'] for name, values in accuracy.items()}
  error = {name: 1.96 * float(np.sqrt(sum(v * (1 - v) for v in values.values()) / (scale.rows * scale.seeds)))
           for name, values in accuracy.items()}
  conditions = {
      'gap(tanh RNN) >= 0.1': gap['tanh RNN'] >= 0.1,
      'gap(LSTM) >= 0.1': gap['LSTM'] >= 0.1,
      '95 % interval of gap(Transformer) includes 0, or it is below 0.01':
          abs(gap['Transformer']) <= max(error['Transformer'], 0.01),
  }
  controlled = gap['CNN'] >= 0.5
  return Result(
      name='E7d', claim='Recurrent models remember what is near better than what is far; attention does not.',
      criterion='; '.join(conditions),
      measured={'seeds': scale.seeds, 'distance_of_start': length - 1, 'accuracy': accuracy, 'gap': gap,
                'half_width_of_95_percent_interval': error, 'conditions': conditions},
      verdict=verdict(conditions, accuracy['Transformer']['end'] >= 0.95 and controlled, True),
      control='The plain CNN, which cannot see the start, must have a gap of 0.5 or more: '
      f'{gap["CNN"]:.3f}.',
      draw=lambda: plot_by_distance('marked recall by position of the mark', {
          name: ((1, length - 1), (values['end'], values['start'])) for name, values in accuracy.items()}, 'accuracy'))


def memory_width(scale: str | Scale = 'cpu', seed: int = 0) -> Result:
  """E7c: how far back copying works (d50), by the width of an RNN's state and by the width of a Transformer."""
  scale = scale_named(scale)
  delays = tuple(2**n for n in range(max(scale.distances).bit_length() - 1))
  task = copy(max(delays) * 9 // 8 + 2, delays)
  makers = {'tanh RNN': lambda width: recurrent(width),
            'Transformer': lambda width: transformer(2 * width, d_model=width)}
  half, accuracy = {}, {}
  for name, make in makers.items():
    for width in scale.widths:
      model = build_model(make(width), task.vocab_size, task.vocab_size)
      runs = [train(model, task, scale.width, jax.random.key(seed + n))[0] for n in range(scale.seeds)]
      curves = [accuracy_curve(model, params, task, jax.random.key(10_000 + n), scale.rows)
                for n, params in enumerate(runs)]
      right, asked = sum(c.right for c in curves), sum(c.asked for c in curves)
      values = [float(right[d] / asked[d]) for d in delays]
      accuracy[f'{name}, {width} wide'] = values
      half.setdefault(name, {})[width] = half_distance(delays, values, task.chance)
  rnn, attention = ([half[name][w] or float('inf') for w in scale.widths] for name in ('tanh RNN', 'Transformer'))
  conditions = {
      'd50(tanh RNN) grows with the width of its state': all(a < b for a, b in zip(rnn, rnn[1:])),
      f'd50(tanh RNN) < {max(delays)} at every width': max(rnn) < max(delays),
      f'd50(Transformer) > {max(delays)} at every width': min(attention) == float('inf'),
  }
  return Result(
      name='E7c memory width',
      claim='A recurrent state holds as many tokens as it is wide enough for; what attention holds does '
      'not depend on its width.',
      criterion='; '.join(conditions),
      measured={'seeds': scale.seeds, 'delays': list(delays), 'widths': list(scale.widths), 'd50': half,
                'accuracy': accuracy, 'conditions': conditions},
      verdict=verdict(conditions, attention[-1] == float('inf') and rnn[-1] > delays[0], True),
      control='The narrowest state must forget the longest delay (chance is '
      f'{task.chance:.3f}): {accuracy[f"tanh RNN, {scale.widths[0]} wide"][-1]:.3f}.',
      draw=lambda: plot_by_distance('copy: accuracy by delay and width',
                                    {name: (delays, values) for name, values in accuracy.items()}, 'accuracy',
                                    xlabel='delay in tokens', level=('chance', task.chance)))
