"""E13: convolution and attention together do what each alone cannot (Gulati et al. 2020, section 2).

Two properties of a sequence: the order of three neighbouring tokens, which a convolution sees at once, and whether two
marked tokens far apart are the same, which attention sees at once. Five encoders of the same size learn either, and
both at once, from few examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tfm.analysis.ablation import short_circuit
from tfm.analysis.engine import edit
from tfm.analysis.result import Result, as_result, interval
from tfm.analysis.sites import sites
from tfm.config import TransformerConfig
from tfm.models.build import build_model, count_parameters, initialize

MOTIF, FILLERS, MARKED, KINDS, SYMBOLS = (1, 2, 3), 4, 10, 6, 22
"""The neighbours in their order; the first of six fillers; the first of the tokens that are marked on the left, and how
many, with as many for the right behind them; how many ids there are."""
TASKS = ('local', 'global', 'both')


@dataclass(frozen=True)
class Scale:
  """How large, how long."""

  width: int
  length: int
  examples: tuple[int, ...]
  steps: int
  seeds: int
  rows: int = 64
  learning_rate: float = 3e-3


SCALES = {'cpu': Scale(width=32, length=24, examples=(250, 1000), steps=400, seeds=5),
          'accel': Scale(width=128, length=128, examples=(250, 1000, 4000, 16_000), steps=3000, seeds=5, rows=256)}


def run_hybrids(scale: Literal['cpu', 'accel'] | Scale = 'cpu', seed: int = 0) -> Result:
  """Accuracy on fresh examples of encoders that have learned each task from n examples, by arm, task and n."""
  size = scale if isinstance(scale, Scale) else SCALES[scale]
  arms = _arms(size)
  sizes = {name: count_parameters(jax.eval_shape(partial(initialize, model), jax.random.key(0)))
           for name, (model, _) in arms.items()}
  found = {(name, n): _accuracies(model, size, n, seed, alone) for name, (model, alone) in arms.items()
           for n in size.examples}  # tasks x seeds
  small = max(n for n in size.examples if n <= 1000)
  singles, hybrids = ('convolution', 'attention'), ('attention, convolution', 'convolution, attention', 'parallel')
  by_task = {task: {name: found[name, small][i] for name in arms} for i, task in enumerate(TASKS)}
  best = max(hybrids, key=lambda name: by_task['both'][name].mean())
  marginal = {task: float(by_task[task][best].mean() - max(by_task[task][name].mean() for name in singles))
              for task in ('local', 'global')}
  gains = {name: interval(by_task['both'][best] - by_task['both'][name]) for name in singles}
  conditions = {f"with {small} examples '{best}' is within a point of the better one alone, on either property":
                    min(marginal.values()) >= -0.01,
                'and above both on the conjunction, paired over seeds, 95 %':
                    all(low > 0 for _, (low, _) in gains.values())}
  learned = min(max(by_task[task][name].mean() for name in arms) for task in TASKS) > 0.75
  control = float(np.mean(_accuracies(arms[best][0], size, small, seed, False, shuffled=True)))
  measured = {'conditions': conditions, 'parameters of': sizes, 'gain on the conjunction': gains, 'marginal': marginal,
              'accuracy from': {f'{name}, {n} examples': {task: interval(values[i]) for i, task in enumerate(TASKS)}
                                for (name, n), values in found.items()}}

  def plot(axes):
    for offset, name in enumerate(arms):
      means = np.array([by_task[task][name].mean() for task in TASKS])
      ends = np.array([interval(by_task[task][name])[1] for task in TASKS])
      axes.bar(np.arange(3) + 0.16 * (offset - 2), means, 0.15, yerr=np.abs(ends.T - means), label=name)
    axes.axhline(0.5, color='gray', linestyle=':', label='chance')
    axes.set(xticks=range(3), xticklabels=TASKS, ylim=(0.4, 1.25), ylabel=f'accuracy from {small} examples')
    axes.legend(fontsize=7, ncols=2)

  held = all(conditions.values()) and control < 0.6
  return as_result('E13', 'convolution and attention together do what each alone cannot', '; '.join(conditions),
                   f'with labels that belong to other examples: accuracy {control:.2f}', measured,
                   'holds' if held and learned else 'fails' if learned else 'not supported at this scale', plot)


def _arms(size: Scale):
  """Name -> (model, whether its attention is short-circuited: then the convolution alone mixes tokens)."""
  def made(d_ff, **convolution):
    return build_model(TransformerConfig(
        encoder_layers=2, decoder_layers=0, d_model=size.width, d_ff=d_ff, num_heads=4, norm='pre', dropout=0.0,
        positions='sinusoidal', num_labels=2, **convolution), SYMBOLS, SYMBOLS)

  def count(model):
    return count_parameters(jax.eval_shape(partial(initialize, model), jax.random.key(0)))

  hybrid = {'attention, convolution': 'after', 'convolution, attention': 'before', 'parallel': 'parallel'}
  arms = {name: (made(2 * size.width, convolution=kind, kernel_width=3), False) for name, kind in hybrid.items()}
  wanted = count(arms['parallel'][0])
  # What attention alone lacks of the others' size goes into its feed-forward network.
  few, more = (count(made(d_ff)) for d_ff in (size.width, 2 * size.width))
  d_ff = size.width + round((wanted - few) / (more - few) * size.width)
  return {'convolution': (arms['attention, convolution'][0], True), 'attention': (made(d_ff), False), **arms}


def draw(key, size: Scale, rows: int, share: float) -> tuple[jax.Array, jax.Array]:
  """Ids and labels, rows x length and rows x 3 (TASKS); so large a share of the rows has each property, independently.

  One marked token stands in the first third, the other in the last, the three neighbours between them.
  """
  fill, has, left_key, right_key, start_key, kind_key, other_key, order_key = jax.random.split(key, 8)
  T, third, row = size.length, size.length // 3, jnp.arange(rows)
  local, same = jax.random.bernoulli(has, share, (2, rows))
  left = jax.random.randint(left_key, (rows,), 0, third)
  right = jax.random.randint(right_key, (rows,), 2 * third, T)
  start = jax.random.randint(start_key, (rows,), third, 2 * third - len(MOTIF) + 1)
  kind = jax.random.randint(kind_key, (rows,), 0, KINDS)
  other = (kind + jnp.where(same, 0, jax.random.randint(other_key, (rows,), 1, KINDS))) % KINDS
  ids = jax.random.randint(fill, (rows, T), FILLERS, MARKED)
  ids = ids.at[row, left].set(MARKED + kind).at[row, right].set(MARKED + KINDS + other)
  # Without the property the same three tokens stand there in another order.
  a, b, c = MOTIF
  wrong = jnp.array([[a, c, b], [b, a, c], [b, c, a], [c, a, b], [c, b, a]])
  three = jnp.where(local[:, None], jnp.array(MOTIF), wrong[jax.random.randint(order_key, (rows,), 0, len(wrong))])
  ids = ids.at[row[:, None], start[:, None] + jnp.arange(len(MOTIF))].set(three)
  return ids, jnp.stack([local, same, local & same], axis=1).astype(jnp.int32)


def _accuracies(model, size: Scale, examples: int, seed: int, alone: bool, shuffled: bool = False) -> np.ndarray:
  """Tasks x seeds."""
  return np.array([[_accuracy(model, size, examples, each, alone, shuffled, task)
                    for each in range(seed, seed + size.seeds)] for task in range(len(TASKS))])


def _accuracy(model, size: Scale, examples: int, seed: int, alone: bool, shuffled: bool, task: int) -> float:
  start, data, test = jax.random.split(jax.random.key(seed), 3)
  share = 0.5**0.5 if TASKS[task] == 'both' else 0.5  # half of the labels are 1, whatever is asked
  ids, labels = (np.asarray(x) for x in draw(data, size, examples, share))
  labels = np.roll(labels[:, task], int(shuffled))
  rng = np.random.default_rng(seed)
  params = _first(model, start)
  moments = optax.adam(0.0).init(params)
  for i in range(size.steps):
    rows = rng.integers(examples, size=size.rows)
    rate = size.learning_rate * 0.5 * (1 + np.cos(np.pi * i / size.steps))
    params, moments = _step(params, moments, model, alone, ids[rows], labels[rows], rate)
  fresh, answers = draw(test, size, 512, share)
  return float(jnp.mean(jnp.argmax(_logits(params, model, alone, fresh), axis=-1) == answers[:, task]))


_first = partial(jax.jit, static_argnums=0)(initialize)


@partial(jax.jit, static_argnums=(1, 2))
def _logits(params, model, alone: bool, ids):
  if not alone:
    return model.apply({'params': params}, ids, method='classify')
  site = sites(model, params, ids, 'classify')['encoder.layers.self_attention.pattern']
  return edit(model, params, ids, short_circuit(site), method='classify')


@partial(jax.jit, static_argnums=(2, 3))
def _step(params, moments, model, alone: bool, ids, labels, rate):
  # One step a call: on a CPU XLA's convolutions are several times slower inside a loop.
  gradient = jax.grad(lambda params: optax.softmax_cross_entropy_with_integer_labels(
      _logits(params, model, alone, ids), labels).mean())(params)
  updates, moments = optax.adam(rate).update(gradient, moments)
  return optax.apply_updates(params, updates), moments
