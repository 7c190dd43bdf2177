"""Where attention should lose: regular languages, for which a state of fixed size is enough (E7c, control)."""

from __future__ import annotations

from typing import Literal

from tfm.analysis.distance_plot import plot_by_distance
from tfm.analysis.long_range_recall import Scale, learn, mean_curve, scale_named, verdict
from tfm.analysis.memory_tasks import bounded_dyck
from tfm.analysis.memory_tasks import parity as parity_task
from tfm.analysis.result import Result
from tfm.analysis.sequence_families import FAMILIES, parameters_of

LANGUAGES = {'parity': parity_task, 'bounded Dyck': bounded_dyck}


def parity(scale: str | Scale = 'cpu', seed: int = 0) -> Result:
  """`regular_language` with 'parity'."""
  return regular_language(scale, seed, 'parity')


def dyck(scale: str | Scale = 'cpu', seed: int = 0) -> Result:
  """`regular_language` with 'bounded Dyck'."""
  return regular_language(scale, seed, 'bounded Dyck')


def regular_language(scale: str | Scale = 'cpu', seed: int = 0,
                     language: Literal['parity', 'bounded Dyck'] = 'parity') -> Result:
  """Accuracy after prefixes up to four times as long as those trained on, of every family, equal in parameters.

  Raises:
    ValueError: no such scale or language.
  """
  scale = scale_named(scale)
  if language not in LANGUAGES:
    raise ValueError(f'There is no language {language!r}; choose one of {", ".join(LANGUAGES)}.')
  short, longest = scale.regular_length, 4 * scale.regular_length
  task, long = LANGUAGES[language](short), LANGUAGES[language](longest * 9 // 8)
  prefixes = [n for n in (4, 8, 16, 32, 64, 128, 256, 512, 1024) if n <= longest]
  accuracy, untrained, sizes = {}, {}, {}
  for name, family in FAMILIES.items():
    learners = [learn(family, scale.parameters, task, scale.regular, seed + n) for n in range(scale.seeds)]
    curve, before = (mean_curve(learners, long, scale.rows, trained) for trained in (True, False))
    accuracy[name] = [curve.at(n) for n in prefixes]
    untrained[name] = [before.at(n) for n in prefixes]
    sizes[name] = parameters_of(learners[0].model.config, task.vocab_size)
  state = {name: accuracy[name][-1] for name in ('tanh RNN', 'LSTM')}
  best = max(state, key=state.get)
  trained_at = prefixes.index(short) - 1
  conditions = {
      f'an RNN or LSTM >= 0.95 at {longest} tokens, trained up to {short}': state[best] >= 0.95,
      'the Transformer there is lower by 0.2 or more': accuracy['Transformer'][-1] <= state[best] - 0.2,
  }
  highest = max(values[-1] for values in untrained.values())
  return Result(
      name=f'E7c {language}', claim='Where a state of fixed size is enough, a recurrent model learns what holds at any '
      'length, and attention does not.',
      criterion='; '.join(conditions),
      measured={'seeds': scale.seeds, 'parameters': sizes, 'chance': task.chance, 'trained_up_to': short,
                'distances': prefixes, 'accuracy': accuracy, 'untrained': untrained, 'best_recurrent': best,
                'conditions': conditions},
      verdict=verdict(conditions, state[best] >= 0.95 or accuracy[best][trained_at] >= 0.95,
                      highest < task.chance + 0.1),
      control=f'Untrained models must not be above the best constant answer ({task.chance:.3f}) at {longest} tokens: '
      f'at most {highest:.3f}.',
      draw=lambda: plot_by_distance(f'{language}: accuracy by length of the prefix (trained up to {short})',
                                    {name: (prefixes, values) for name, values in accuracy.items()}, 'accuracy',
                                    xlabel='tokens read', level=('best constant answer', task.chance)))
