"""E3, trained: does it matter which side asks? Few-shot classification, with cross-attention in both directions.

An episode has N classes, K examples of each with their labels (the support), and one item to classify. The item asks
and the support answers, or the other way round, with the same parameters, data and steps. Two things change with the
direction: over which axis the softmax norms, and whose values are carried. With one key the softmax is 1 whatever the
score, so every row of a support that asks is told the same: the item's value, in which there is no label. Unless a skip
connection carries the asking side past the attention; then the direction hides.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tfm.analysis.result import Result, as_result, interval
from tfm.attention.alignments import soft
from tfm.attention.score_functions import scaled

WAYS, SHOTS, FEATURES, WIDTH, HIDDEN, ROWS = 5, 5, 16, 32, 256, 64


class Arm(NamedTuple):
  """One way to put the two sides together."""

  item_asks: bool
  skip: bool = False
  over_support: bool = False
  """The support asks, but the weights norm over its rows, and its values are carried: what is left is the score."""

  @property
  def name(self) -> str:
    side = 'item asks' if self.item_asks else 'support asks'
    return side + ', skip' * self.skip + ', normed over the support' * self.over_support


ITEM, SUPPORT, ITEM_SKIP, SUPPORT_SKIP = Arm(True), Arm(False), Arm(True, skip=True), Arm(False, skip=True)
CONTROL = Arm(False, over_support=True)


def run_few_shot(seeds: int = 5, steps: int = 3000, seed: int = 0) -> Result:
  """Accuracy on 2,000 fresh episodes by direction, with and without the asking side's skip connection."""
  found = {arm: np.array([_learn(arm, steps, each) for each in range(seed, seed + seeds)])
           for arm in (ITEM, SUPPORT, ITEM_SKIP, SUPPORT_SKIP, CONTROL)}
  accuracy = {arm: interval(values) for arm, values in found.items()}
  chance = 1 / WAYS
  gap, hidden = interval(found[ITEM] - found[SUPPORT]), interval(found[ITEM_SKIP] - found[SUPPORT_SKIP])
  conditions = {
      'without a skip the directions are >= 30 points apart (95 %)': gap[1][0] >= 0.3,
      'and the support asks in vain: within 2 points of chance': abs(accuracy[SUPPORT][0] - chance) < 0.02,
      'with a skip less than half of the gap is left': hidden[0] < gap[0] / 2}
  measured = {'conditions': conditions, 'accuracy of': {arm.name: each for arm, each in accuracy.items()}, 'gap': gap,
              'gap with skip': hidden, 'chance': chance,
              'parameters': sum(leaf.size for leaf in jax.tree.leaves(_first(jax.random.key(0))))}

  def plot(axes):
    for offset, label, *arms in ((-0.18, 'without skip', ITEM, SUPPORT), (0.18, 'with skip', ITEM_SKIP, SUPPORT_SKIP)):
      means = np.array([accuracy[arm][0] for arm in arms])
      ends = np.array([accuracy[arm][1] for arm in arms])
      bars = axes.bar(np.arange(2) + offset, means, 0.34, yerr=np.abs(ends.T - means), capsize=3, label=label)
      axes.bar_label(bars, fmt='%.2f')
    axes.axhline(chance, color='gray', linestyle=':', label='chance')
    axes.set(xticks=range(2), ylim=(0, 1.2), ylabel=f'accuracy, {WAYS}-way {SHOTS}-shot',
             xticklabels=['the item asks,\nthe support answers', 'the support asks,\nthe item answers'])
    axes.legend(fontsize=8, ncols=3, loc='upper center')

  control = accuracy[CONTROL][0]
  return as_result('E3 trained', 'which side asks decides what is learned, unless a skip connection hides it',
                   '; '.join(conditions), 'the support asks too, but its rows are what the weights sum to 1 over and '
                   f'what is carried: accuracy {control:.2f}, so it is not the scores', measured,
                   'holds' if all(conditions.values()) and control > chance + 0.3 else 'fails', plot)


def episodes(key, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Support BxSxF with one-hot labels behind the features, item Bx1xF with zeros there, and the item's class B."""
  centres_key, noise_key, item_key, which_key = jax.random.split(key, 4)
  centres = 0.8 * jax.random.normal(centres_key, (rows, WAYS, 1, FEATURES))
  examples = centres + 0.6 * jax.random.normal(noise_key, (rows, WAYS, SHOTS, FEATURES))
  labels = jnp.broadcast_to(jnp.eye(WAYS)[:, None], (rows, WAYS, SHOTS, WAYS))
  support = jnp.concatenate([examples, labels], axis=-1).reshape(rows, WAYS * SHOTS, -1)
  answer_B = jax.random.randint(which_key, (rows,), 0, WAYS)
  item = centres[jnp.arange(rows), answer_B] + 0.6 * jax.random.normal(item_key, (rows, 1, FEATURES))
  return support, jnp.pad(item, ((0, 0), (0, 0), (0, WAYS))), answer_B


@jax.jit
def _first(key):
  shapes = {name: (FEATURES + WAYS, WIDTH) for name in ('query', 'key', 'value', 'skip')}
  shapes |= {'hidden': (WIDTH, HIDDEN), 'output': (HIDDEN, WAYS)}
  return {name: jax.random.normal(each, shape) / np.sqrt(shape[0])
          for (name, shape), each in zip(shapes.items(), jax.random.split(key, len(shapes)))}


@partial(jax.jit, static_argnums=1)
def _logits(params, arm: Arm, support, item):
  asks, answers = (item, support) if arm.item_asks else (support, item)
  scores_BxTxS = scaled(asks @ params['query'], answers @ params['key'])
  if arm.over_support:
    z = soft(jnp.swapaxes(scores_BxTxS, 1, 2)) @ (asks @ params['value'])
  else:
    z = soft(scores_BxTxS) @ (answers @ params['value'])
  if arm.skip:
    z = z + asks @ params['skip']
  return jnp.mean(jax.nn.relu(z @ params['hidden']), axis=1) @ params['output']


@partial(jax.jit, static_argnums=1)
def _step(state, arm: Arm, key, rate):
  params, moments = state

  def loss(params):
    support, item, answer_B = episodes(key, ROWS)
    return optax.softmax_cross_entropy_with_integer_labels(_logits(params, arm, support, item), answer_B).mean()

  updates, moments = optax.adam(rate).update(jax.grad(loss)(params), moments)
  return optax.apply_updates(params, updates), moments


def _learn(arm: Arm, steps: int, seed: int) -> float:
  start, data, test = jax.random.split(jax.random.key(seed), 3)
  params = _first(start)
  state = params, optax.adam(0.0).init(params)
  for i, key in enumerate(jax.random.split(data, steps)):
    state = _step(state, arm, key, 5e-3 * 0.5 * (1 + np.cos(np.pi * i / steps)))
  support, item, answer_B = episodes(test, 2000)
  return float(jnp.mean(jnp.argmax(_logits(state[0], arm, support, item), axis=-1) == answer_B))
