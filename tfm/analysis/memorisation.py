"""E11: deep attention memorises, and can be short-circuited (Menta, Agrawal & Agarwal 2025).

A language model learns two things at once: random strings by heart, which no rule makes shorter, and to copy a string
that it has just read, which it can do with strings that it has never seen. Then the attention of some layers is
short-circuited (every position attends to itself alone), and what is left of both is measured. The claim: without
attention in the last quarter of the layers the rule stays and the memory goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tfm.analysis.ablation import short_circuit, zero
from tfm.analysis.engine import Edit, edit
from tfm.analysis.result import Result, as_result, interval
from tfm.analysis.sites import sites
from tfm.analysis.task_training import adam
from tfm.config import TransformerConfig
from tfm.models.build import build_model, initialize

MEMORY, RULE, AGAIN, SYMBOLS = 1, 2, 3, 60
"""First token of a string to learn by heart; of one to copy; what stands between it and its copy; how many others."""
PATTERN, HEADS = 'decoder.layers.self_attention.pattern', 'decoder.layers.self_attention.z'


@dataclass(frozen=True)
class Scale:
  """How large, how long."""

  layers: int
  width: int
  length: int
  strings: int
  prefix: int
  """Tokens after which a string must be known."""
  steps: int
  rows: int
  """Of each kind, in a step."""
  seeds: int
  learning_rate: float = 2e-3


SCALES = {'cpu': Scale(layers=8, width=64, length=32, strings=256, prefix=8, steps=3000, rows=32, seeds=3),
          'accel': Scale(layers=16, width=256, length=64, strings=4096, prefix=16, steps=20_000, rows=256, seeds=5,
                         learning_rate=5e-4)}


def run_memorisation(scale: Literal['cpu', 'accel'] | Scale = 'cpu', seed: int = 0) -> Result:
  """What is left of memory (strings that come out whole) and of the rule (accuracy on fresh strings), over what there
  was, with every run of layers short-circuited."""
  size = scale if isinstance(scale, Scale) else SCALES[scale]
  found = [_measure(size, each) for each in range(seed, seed + size.seeds)]
  quarter = -(-size.layers // 4)
  first, last = (0, quarter), (size.layers - quarter, size.layers)
  left = {kind: {span: np.array([f[kind][span] for f in found]) for span in found[0][kind]}
          for kind in ('memory', 'rule', 'memory, heads zeroed', 'rule, heads zeroed')}
  selectivity = {name: left['rule'][span] - left['memory'][span] for name, span in (('first', first), ('last', last))}
  untouched = {name: [f['untouched'][name] for f in found] for name in found[0]['untouched']}
  trained = min(untouched['memory']) > 0.9 and min(untouched['rule']) > 0.9
  conditions = {
      'without the last quarter the rule stays (>= 0.9 of it) and memory goes (<= 0.5)':
          bool((left['rule'][last] >= 0.9).all() and (left['memory'][last] <= 0.5).all()),
      'so the last quarter is selective: rule less memory above 0, 95 %': interval(selectivity['last'])[1][0] > 0,
      'without the first quarter the rule goes too (<= 0.5)': bool((left['rule'][first] <= 0.5).all()),
      'the last quarter is more selective than the first in 4 of 5 seeds':
          bool(np.mean(selectivity['last'] > selectivity['first']) >= 0.8)}
  never = max(untouched['strings never seen'])
  table = {kind: {f'{a}-{b - 1}': values for (a, b), values in spans.items()} for kind, spans in left.items()}
  measured = {'conditions': conditions, 'untouched': untouched, 'left of it': table,
              'selectivity': {name: interval(values) for name, values in selectivity.items()}}

  def plot(axes):
    singles = [(n, n + 1) for n in range(size.layers)]
    for kind, style in (('memory', '-'), ('rule', '-'), ('memory, heads zeroed', ':'), ('rule, heads zeroed', ':')):
      axes.plot([left[kind][span].mean() for span in singles], f'o{style}', label=kind)
    axes.set(xlabel='layer whose attention is short-circuited', ylabel='left of it', ylim=(-0.05, 1.1))
    axes.legend(fontsize=7)

  held = all(conditions.values()) and never < 0.05
  return as_result('E11', 'deep attention memorises: it can be short-circuited without losing the rule',
                   '; '.join(conditions), f'strings that were never seen come out whole: {never:.2f}', measured,
                   'holds' if held and trained else 'fails' if trained else 'not supported at this scale', plot)


def _measure(size: Scale, seed: int) -> dict[str, Any]:
  rng = np.random.default_rng(seed)
  strings, never = (jnp.asarray(_strings(rng, size)) for _ in range(2))
  model, params = _train(size, seed, strings)
  fresh = _copies(jax.random.key(seed + 10_000), size, 256)
  known = sites(model, params, strings)

  def answers(change: Edit) -> dict[str, float]:
    exact = _whole(edit(model, params, strings, change), strings, size.prefix)
    return {'memory': float(exact), 'rule': float(_accuracy(edit(model, params, fresh, change), fresh, size))}

  def without(kind, span: tuple[int, int]) -> dict[str, float]:
    # bool for each layer: the same program for every choice
    chosen = (np.arange(size.layers) >= span[0]) & (np.arange(size.layers) < span[1])
    return answers(kind(known[PATTERN if kind is short_circuit else HEADS], layers=chosen))

  spans = [(a, b) for a in range(size.layers) for b in range(a + 1, size.layers + 1)]
  before = without(short_circuit, (0, 0))
  unseen = _whole(model.apply({'params': params}, never), never, size.prefix)
  found: dict[str, Any] = {'untouched': before | {'strings never seen': float(unseen)}}
  for name, kind in (('', short_circuit), (', heads zeroed', zero)):
    after = {span: without(kind, span) for span in spans}
    for what in ('memory', 'rule'):
      found[what + name] = {span: after[span][what] / max(before[what], 1e-9) for span in spans}
  return found


# -- two kinds of text ------------------------------------------------------------------------------------------------


def _strings(rng: np.random.Generator, size: Scale) -> np.ndarray:
  ids = rng.integers(4, 4 + SYMBOLS, (size.strings, size.length))
  ids[:, 0] = MEMORY
  return ids


def _copies(key, size: Scale, rows: int) -> jax.Array:
  half = size.length // 2 - 1
  string = jax.random.randint(key, (rows, half), 4, 4 + SYMBOLS)
  mark = jnp.full((rows, 1), RULE)
  return jnp.concatenate([mark, string, mark + AGAIN - RULE, string, string[:, :1]], axis=1)[:, :size.length]


def _asked(ids_BxT, size: Scale) -> jax.Array:
  """bool Bx(T-1): whether the token after each position follows from what stands before it."""
  at_T = jnp.arange(size.length - 1)
  half = size.length // 2
  return jnp.where(ids_BxT[:, :1] == MEMORY, at_T >= size.prefix, (at_T >= half) & (at_T < 2 * half - 1))


def _right(logits_BxTxV, ids_BxT) -> jax.Array:
  return jnp.argmax(logits_BxTxV[:, :-1], axis=-1) == ids_BxT[:, 1:]


@partial(jax.jit, static_argnames='prefix')
def _whole(logits_BxTxV, ids_BxT, prefix: int):
  """Part of the strings of which every token after the prefix is the most probable one: what greedy decoding writes."""
  return jnp.mean(_right(logits_BxTxV, ids_BxT)[:, prefix:].all(axis=1))


@partial(jax.jit, static_argnames='size')
def _accuracy(logits_BxTxV, ids_BxT, size: Scale):
  asked = _asked(ids_BxT, size)
  return jnp.sum(_right(logits_BxTxV, ids_BxT) & asked) / jnp.sum(asked)


def _train(size: Scale, seed: int, strings):
  model = build_model(TransformerConfig(
      encoder_layers=0, decoder_layers=size.layers, d_model=size.width, d_ff=2 * size.width, num_heads=4, norm='pre',
      dropout=0.0, positions='learned', max_positions=size.length, scan_layers=True), 4 + SYMBOLS, 4 + SYMBOLS)
  optimizer = adam(size.learning_rate, size.steps)
  params = initialize(model, jax.random.key(seed))
  moments = optimizer.init(params)

  def loss(params, ids_BxT):
    logits = model.apply({'params': params}, ids_BxT)[:, :-1]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, ids_BxT[:, 1:])
    asked = _asked(ids_BxT, size)
    return jnp.sum(nll * asked) / jnp.sum(asked)

  @jax.jit
  def step(params, moments, key):
    which, copies = jax.random.split(key)
    learned = strings[jax.random.randint(which, (size.rows,), 0, size.strings)]
    gradient = jax.grad(loss)(params, jnp.concatenate([learned, _copies(copies, size, size.rows)]))
    updates, moments = optimizer.update(gradient, moments)
    return optax.apply_updates(params, updates), moments

  for key in jax.random.split(jax.random.key(seed + 1), size.steps):
    params, moments = step(params, moments, key)
  return model, params
