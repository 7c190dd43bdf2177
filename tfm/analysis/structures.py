"""E8: what self-attention, cross-attention and masked attention can and cannot do.

Self-attention without positions treats a sentence as a set; cross-attention gives as many answers as there are
questions; a mask makes one pass over T positions worth T passes, and a model that is trained without it learns to copy
what it should predict.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tfm.analysis.engine import Edit, edit
from tfm.analysis.result import Result, as_result, interval
from tfm.config import TransformerConfig
from tfm.models.build import build_model, initialize

V, LENGTH = 16, 12
SMALL = dict(d_model=16, d_ff=32, num_heads=2, dropout=0.0, norm='pre')


def run_structures(seeds: int = 5, steps: int = 300, seed: int = 0) -> Result:
  """The exact properties of the three attentions at random weights, and what training without a mask leads to."""
  exact = [_exact(each) for each in range(seed, seed + seeds)]
  worst = {name: float(max(found[name] for found in exact)) for name in exact[0]}
  least = {name: float(min(found[name] for found in exact)) for name in exact[0]}
  leaks = [_leak(each, steps) for each in range(seed, seed + seeds)]
  loss = {name: [leak[name] for leak in leaks] for name in leaks[0]}
  uniform = float(np.log(V))
  conditions = {
      'self-attention without positions commutes with permutations (1e-5); with positions it must not':
          worst['permuted, no positions'] < 1e-5 < 1e-2 < least['permuted, sinusoidal'],
      'cross-attention does not see the order of its source (1e-5), nor its padding (gradient exactly 0)':
          worst['source permuted'] < 1e-5 and worst['gradient of source padding'] == 0.0,
      'masked: no gradient from a later position (exactly 0), all at once is step by step (1e-5)':
          worst['gradient of later positions'] == 0.0 and worst['parallel against cached'] < 1e-5,
      'one masked pass gives the losses of T passes over prefixes (1e-5)': worst['one pass against T'] < 1e-5,
      'trained without a mask the loss is < 0.1 of that with a mask':
          all(a < 0.1 * b for a, b in zip(loss['unmasked'], loss['masked'])),
      'what it then writes is no better than chance, and less likely than uniform to the model with a mask':
          all(a < 2.5 / V for a in loss['accuracy, unmasked']) and min(loss['nll of what it writes']) >= uniform}
  control = min(loss['accuracy, masked'])
  measured = {'conditions': conditions, 'largest difference': worst,
              **{name: interval(values) for name, values in loss.items()}, 'uniform nll': uniform,
              'tokens evaluated for T losses, with a mask and without': [LENGTH, LENGTH * (LENGTH + 1) // 2]}

  def plot(axes):
    names = ['masked', 'unmasked', 'nll of what it writes']
    axes.bar(['with mask,\ntraining', 'without mask,\ntraining', 'without mask,\nwhat it writes'],
             [np.mean(loss[name]) for name in names])
    axes.axhline(uniform, color='gray', linestyle=':', label='uniform')
    axes.set_ylabel('nats per token')
    axes.legend()

  return as_result('E8', 'self, cross and masked attention differ in what they may see', '; '.join(conditions),
                   f'a model with a mask writes by the rule: accuracy {control:.2f}', measured,
                   'holds' if all(conditions.values()) and control > 0.4 else 'fails', plot)


def _exact(seed: int) -> dict[str, float]:
  rng = np.random.default_rng(seed)
  source, target = (rng.integers(3, V, (2, LENGTH)) for _ in range(2))
  order = rng.permutation(LENGTH)

  def made(**config):
    model = build_model(TransformerConfig(**SMALL, **config), V, V)
    return model, initialize(model, jax.random.key(seed))

  found: dict[str, Any] = {}
  for name in ('none', 'sinusoidal'):
    model, params = made(encoder_layers=2, decoder_layers=0, positions=name, pad_id=None)
    states, permuted = (_apply(model, params, ids, method='hidden') for ids in (source, source[:, order]))
    found[f'permuted, {"no positions" if name == "none" else name}'] = jnp.abs(permuted - states[:, order]).max()

  model, params = made(encoder_layers=2, decoder_layers=2, positions='none')
  logits, permuted = (_apply(model, params, ids, target) for ids in (source, source[:, order]))
  found['source permuted'] = jnp.abs(permuted - logits).max()
  padded = np.where(np.arange(LENGTH) < LENGTH - 4, source, 0)
  slope_TxBxSxD = _slope(model, params, (padded, target), 'source_embed')
  found['gradient of source padding'] = jnp.abs(slope_TxBxSxD[:, :, -4:]).max()

  model, params = made(encoder_layers=0, decoder_layers=2)
  later = np.triu(np.ones((LENGTH, LENGTH), bool), 1)[:, None, :, None]
  found['gradient of later positions'] = jnp.abs(_slope(model, params, (target,), 'target_embed') * later).max()
  logits = _apply(model, params, target)
  cache = model.apply({'params': params}, 2, LENGTH, method='init_cache')
  steps = []
  for t in range(LENGTH):
    step, cache = _apply(model, params, target[:, t:t + 1], cache, method='step')
    steps.append(step)
  found['parallel against cached'] = jnp.abs(jnp.concatenate(steps, axis=1) - logits).max()
  prefixes = jnp.stack([_apply(model, params, target[:, :t + 1])[:, -1] for t in range(LENGTH)], axis=1)
  one, many = (_nll(each[:, :-1], target[:, 1:]) for each in (logits, prefixes))
  found['one pass against T'] = jnp.abs(one - many).max()
  return {name: float(value) for name, value in found.items()}


@partial(jax.jit, static_argnames=('model', 'method'))
def _apply(model, params, *inputs, method=None):
  return model.apply({'params': params}, *inputs, method=method)


@partial(jax.jit, static_argnames=('model', 'name'))
def _slope(model, params, inputs, name):
  """d (random sum of the logits at t) / d embedding at s, TxBxSxD."""
  weights_V = jax.random.normal(jax.random.key(1), (V,))
  embedded = jnp.zeros((*inputs[0].shape, SMALL['d_model']))
  return jax.jacrev(lambda add: (edit(model, params, inputs, Edit(name, add=add)) @ weights_V).sum(0))(embedded)


# -- without a mask ---------------------------------------------------------------------------------------------------


def _leak(seed: int, steps: int) -> dict[str, float]:
  """Text of which half the symbols follow from the last one, the others are drawn; two models, one of which may look at
  what it is to predict."""
  rule = jnp.asarray(np.random.default_rng(seed).permutation(V))
  common = SMALL | dict(d_model=32, d_ff=64, positions='learned', max_positions=LENGTH, pad_id=None)
  trained = {}
  for name, shape in (('masked', dict(encoder_layers=0, decoder_layers=2)),
                      ('unmasked', dict(encoder_layers=2, decoder_layers=0))):
    model = build_model(TransformerConfig(**common, **shape), V, V)
    trained[name] = (model, *_train(model, rule, seed, steps))
  written = {name: _write(model, params, seed) for name, (model, params, _) in trained.items()}
  right = {name: float(jnp.mean(rule[ids[:, :-1]] == ids[:, 1:])) for name, ids in written.items()}
  model, params, _ = trained['masked']
  nll = _nll(_apply(model, params, written['unmasked'])[:, :-1], written['unmasked'][:, 1:]).mean()
  return {'masked': trained['masked'][2], 'unmasked': trained['unmasked'][2], 'accuracy, masked': right['masked'],
          'accuracy, unmasked': right['unmasked'], 'nll of what it writes': float(nll)}


def _text(key, rule, rows: int) -> jax.Array:
  first, drawn, follows = jax.random.split(key, 3)

  def following(last, inputs):
    other, follow = inputs
    now = jnp.where(follow, rule[last], other)
    return now, now

  begin = jax.random.randint(first, (rows,), 0, V)
  _, ids = jax.lax.scan(following, begin, (jax.random.randint(drawn, (LENGTH, rows), 0, V),
                                           jax.random.bernoulli(follows, 0.5, (LENGTH, rows))))
  return ids.T


def _loss(params, model, ids_BxT):
  # Behind the last position nothing stands that could be looked at.
  return _nll(model.apply({'params': params}, ids_BxT)[:, :-1], ids_BxT[:, 1:]).mean()


@partial(jax.jit, static_argnames='model')
def _step(params, moments, model, rule, key):
  loss, gradient = jax.value_and_grad(_loss)(params, model, _text(key, rule, 32))
  updates, moments = OPTIMIZER.update(gradient, moments)
  return optax.apply_updates(params, updates), moments, loss


OPTIMIZER = optax.adam(5e-3)


def _train(model, rule, seed: int, steps: int) -> tuple[Any, float]:
  """Parameters, and the mean loss of the last tenth."""
  params = initialize(model, jax.random.key(seed))
  moments, losses = OPTIMIZER.init(params), []
  for key in jax.random.split(jax.random.key(seed + 1000), steps):
    params, moments, loss = _step(params, moments, model, rule, key)
    losses.append(loss)
  return params, float(jnp.stack(losses[-steps // 10:]).mean())


def _write(model, params, seed: int, rows: int = 64) -> jax.Array:
  """Texts that begin with a drawn symbol; each next one is drawn from what the model says of the last position."""
  first, *keys = jax.random.split(jax.random.key(seed + 2000), LENGTH)
  ids = jax.random.randint(first, (rows, 1), 0, V)
  for key in keys:
    # Without a mask, what stands behind the last position would have a say: it is not there.
    logits = _apply(model, params, ids)[:, -1]
    ids = jnp.concatenate([ids, jax.random.categorical(key, logits)[:, None]], axis=1)
  return ids


def _nll(logits, ids):
  return optax.softmax_cross_entropy_with_integer_labels(logits, ids)
