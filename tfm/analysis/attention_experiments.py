"""What is said of attention, made runnable: roles of query, key and value, the soft dictionary, the scale.

Brauwers & Frasincar 2021 (arXiv 2203.14263) say it in words; each `run_...` measures it with the package's own score
functions and alignments, states the criterion, and comes with a control that must fail. All but the training of
`run_roles` takes seconds. No figure here is of a trained language model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tfm.analysis.result import Result, as_result, interval
from tfm.attention.alignments import soft
from tfm.attention.score_functions import general, multiplicative, scaled

# -- query, key and value have roles ----------------------------------------------------------------------------------

TIED = {'untied': (0, 1, 2), 'key = value': (0, 1, 1), 'query = key = value': (1, 1, 1)}
"""Which of three matrices serve as W_Q, W_K and W_V."""


def run_roles(pairs: int = 32, code: int = 16, steps: int = 2000, seeds: int = 5, batch: int = 64, rate: float = 1e-2,
              wider: tuple[float, ...] = (1.5, 2.0), seed: int = 0) -> Result:
  """Keys and values of their own against one matrix for both, on bindings: which value came with this key?

  A token is [key; value], two random codes, fresh in every batch; the query is [key; 0]. One layer of one head; what it
  returns is compared with the values of the sequence. Tied matrices of the width of a code have to carry key and value
  in one, wider ones have room. Queries and keys begin with the same matrix, so that no arm has to find it by luck.
  """
  keys = jax.random.split(jax.random.key(seed), seeds)
  train = partial(_train_bindings, pairs=pairs, code=code, steps=steps, keys=keys, batch=batch, rate=rate)
  rights, exchanged, asymmetries = train(jnp.array([*TIED.values()]), code)
  accuracy = dict(zip(TIED, rights)) | {
      f'key = value, {times} times as wide': train(jnp.array([TIED['key = value']]), round(times * code))[0][0]
      for times in wider}
  swapped, asymmetry = exchanged[0], asymmetries[0]
  gap = interval(accuracy['untied'] - accuracy['key = value'])
  measured = {f'accuracy, {name}': interval(right) for name, right in accuracy.items()} | {
      'gap': gap, 'accuracy, keys and values exchanged': interval(swapped), 'chance': 1 / pairs,
      'asymmetry of scores': interval(asymmetry)}
  # Below it still, by more than the seeds differ, with half as much width again: so it needs about twice.
  needs_twice = 1.5 in wider and interval(accuracy['untied'] - accuracy['key = value, 1.5 times as wide'])[1][0] > 0
  passed = (np.mean(accuracy['untied']) >= 0.99 and np.mean(swapped) <= 1.5 / pairs
            and (gap[0] >= 0.2 or (gap[1][0] > 0 and needs_twice)))
  verdict = 'holds' if passed else 'fails' if gap[1][0] <= 0 else 'not supported at this scale'

  def plot(axes):
    axes.bar(range(len(accuracy) + 1), [np.mean(right) for right in (*accuracy.values(), swapped)])
    axes.set_xticks(range(len(accuracy) + 1), [*accuracy, 'untied, K and V exchanged'], rotation=20, ha='right')
    axes.axhline(1 / pairs, color='black', linestyle=':')
    axes.set_ylabel('accuracy')

  return as_result('E2', 'keys and values are different things',
                 'untied >= 99 %; keys and values in one matrix >= 20 points lower at the same width, or lower even at '
                 '1.5 times the width; exchanged at inference <= 1.5 times chance; refuted if the gap may be 0',
                 'keys and values exchanged after training: at chance, as it must be', measured, verdict, plot)


def _bindings(key, pairs, code, batch):
  """Tokens BxSx2C, queries Bx1x2C, values BxSxC, which B."""
  codes_BxSx2C = jax.random.rademacher(key, (batch, pairs, 2 * code), jnp.float32)
  which_B = jax.random.randint(jax.random.fold_in(key, 1), (batch,), 0, pairs)
  query_Bx1x2C = jnp.take_along_axis(codes_BxSx2C, which_B[:, None, None], axis=1)
  return codes_BxSx2C, query_Bx1x2C.at[..., code:].set(0.0), codes_BxSx2C[..., code:], which_B


def _train_bindings(tied_Ax3, width, pairs, code, steps, keys, batch, rate):
  """Arms x seeds: accuracy, accuracy with K and V exchanged, asymmetry of the scores of a sequence with itself."""
  optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

  def logits(params, tied_3, tokens, query, values, exchange=False):
    W_Q, W_K, W_V = params['in'][tied_3]
    keys, carried = (tokens @ (W_V if exchange else W_K)), (tokens @ (W_K if exchange else W_V))
    weights = soft(multiplicative(query @ W_Q, keys))
    return (weights @ carried @ params['out'] @ jnp.swapaxes(values, 1, 2))[:, 0]

  def one(tied_3, key):
    first, other, last = (jax.random.normal(jax.random.fold_in(key, i), shape) * shape[0]**-0.5
                          for i, shape in enumerate(((2 * code, width), (2 * code, width), (width, code))))
    init = {'in': jnp.stack([first, first, other]), 'out': last}

    def step(state, i):
      params, moments = state
      *inputs, which_B = _bindings(jax.random.fold_in(key, 100 + i), pairs, code, batch)
      gradient = jax.grad(lambda params: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(
          logits(params, tied_3, *inputs), which_B)))(params)
      update, moments = optimizer.update(gradient, moments)
      return (optax.apply_updates(params, update), moments), None

    (params, _), _ = jax.lax.scan(step, (init, optimizer.init(init)), jnp.arange(steps))
    *inputs, which_B = _bindings(jax.random.fold_in(key, 99), pairs, code, 1024)
    right, exchanged = (jnp.mean(jnp.argmax(logits(params, tied_3, *inputs, exchange), axis=-1) == which_B)
                        for exchange in (False, True))
    W_Q, W_K, _ = params['in'][tied_3]
    scores = general(inputs[0][:1], inputs[0][:1], W_K @ W_Q.T)[0]
    return right, exchanged, jnp.linalg.norm(scores - scores.T) / jnp.linalg.norm(scores)

  over_seeds = jax.vmap(one, in_axes=(None, 0))
  return tuple(np.asarray(x) for x in jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))(tied_Ax3, keys))


# -- which sequence asks, and which answers ---------------------------------------------------------------------------


def run_swapped(ways: int = 5, shots: int = 5, width: int = 16, episodes: int = 400, seeds: int = 5,
                seed: int = 0) -> Result:
  """Few-shot classification without training: the query item asks the support, or the support asks the query item.

  Tokens are [x; label], the query's label is 0. Scores are the same in both directions, transposed. With one key, every
  weight is exactly 1, so the support learns nothing of who is like whom; with a skip each support item keeps its own
  label and the answer can be read off the length of what comes out.
  """
  arms = 'query asks', 'query asks, skip', 'support asks', 'support asks, skip', 'support asks, normed over support'
  once = jax.jit(partial(_few_shot, ways, shots, width, episodes))
  several = range(seed, seed + seeds)
  found = [once(jax.random.key(each)) for each in several]
  accuracy = {name: np.array([float(one[0][i]) for one in found]) for i, name in enumerate(arms)}
  content = np.array([_content(each, width) for each in several])
  asymmetry = np.array([_asymmetry(each, width) for each in several])
  gap, chance = interval(accuracy['query asks'] - accuracy['support asks']), 1 / ways
  by_chance = interval(accuracy['support asks'])
  measured = {f'accuracy, {name}': interval(right) for name, right in accuracy.items()} | {
      'gap': gap, 'chance': chance, 'weights of one key': np.unique([np.asarray(one[1]) for one in found]),
      'R2 of the answering side': interval(content[:, 1]), 'R2 of the asking side': interval(content[:, 0]),
      'asymmetry': interval(asymmetry[:, 0]), 'asymmetry, symmetric matrix': float(asymmetry[:, 1].max()),
      'weights differ, symmetric matrix': interval(asymmetry[:, 2])}
  same = np.array_equal(accuracy['support asks, normed over support'], accuracy['query asks'])
  passed = (gap[0] >= 0.3 and abs(by_chance[0] - chance) <= 2 * np.sqrt(chance / episodes / seeds) and same
            and np.mean(content[:, 1] - content[:, 0]) >= 0.5)
  verdict = 'holds' if passed else 'fails' if gap[1][0] <= 0 else 'not supported at this scale'

  def plot(axes):
    axes.bar(range(len(arms)), [right.mean() for right in accuracy.values()])
    axes.set_xticks(range(len(arms)), arms, rotation=20, ha='right')
    axes.axhline(chance, color='black', linestyle=':')
    axes.set_ylabel(f'accuracy, {ways}-way {shots}-shot')

  return as_result('E3', 'who asks and who answers is not symmetric',
                 'without a skip >= 30 points between the directions, the second at chance; content of the answering '
                 'side >= 0.5 R2 above that of the asking side; normed over the same axis the difference is gone',
                 'the same scores normed over the other axis: no difference any more', measured, verdict, plot)


def _few_shot(ways, shots, width, episodes, key):
  centres_key, support_key, query_key, class_key = jax.random.split(key, 4)
  centres = 1.2 * jax.random.normal(centres_key, (episodes, ways, width))
  label_S = jnp.repeat(jnp.arange(ways), shots)
  support = centres[:, label_S] + jax.random.normal(support_key, (episodes, ways * shots, width))
  answer = jax.random.randint(class_key, (episodes,), 0, ways)
  query = centres[jnp.arange(episodes), answer][:, None] + jax.random.normal(query_key, (episodes, 1, width))
  labels = jnp.broadcast_to(jax.nn.one_hot(label_S, ways), (episodes, ways * shots, ways))
  asked, answered = scaled(query, support), scaled(support, query)
  forward, backward = soft(asked), soft(answered)
  # Queries ask: the label part of what comes out. A skip adds [x; 0] and leaves that part alone.
  one = (forward @ labels)[:, 0]
  # Support asks: [x; label] of each item, read as labels weighted by the length of x.
  brought = backward @ query

  def read(x, label):
    return jnp.einsum('bs,bsc->bc', jnp.sum(x**2, axis=-1), label)

  over_support = jnp.swapaxes(soft(jnp.swapaxes(answered, 1, 2)), 1, 2)
  logits = (one, one, read(brought, jnp.zeros_like(labels)), read(support + brought, labels),
            jnp.einsum('bs,bsc->bc', over_support[..., 0], labels))
  return jnp.stack([jnp.mean(jnp.argmax(logit, axis=-1) == answer) for logit in logits]), backward


def _content(seed, width, rows=600, queries=6, keys=8):
  """Held-out R2 of linear maps from the mean output to the mean of the asking and of the answering sequence."""
  random = np.random.default_rng(seed)
  asking, answering = (random.standard_normal((rows, 1, width)) + random.standard_normal((rows, n, width))
                       for n in (queries, keys))
  matrix, carried = (random.standard_normal((width, width)) / width for _ in range(2))
  out = np.asarray(soft(general(jnp.asarray(asking), jnp.asarray(answering), jnp.asarray(matrix))) @ jnp.asarray(
      answering @ carried)).mean(axis=1)
  half, result = rows // 2, []
  for side in (asking, answering):
    target = side.mean(axis=1)
    fit = np.linalg.lstsq(np.c_[out[:half], np.ones(half)], target[:half], rcond=None)[0]
    rest = target[half:] - np.c_[out[half:], np.ones(half)] @ fit
    result.append(1 - np.sum(rest**2) / np.sum((target[half:] - target[:half].mean(axis=0))**2))
  return result


def _asymmetry(seed, width):
  """max|S_BA - S_AB^T| / max|S_AB| with any M and with a symmetric one; how much the weights differ with that."""
  random = np.random.default_rng(seed)
  a, b, matrix = (random.standard_normal(shape) for shape in ((1, 6, width), (1, 9, width), (width, width)))
  with jax.enable_x64(True):
    result = []
    for weight in (matrix, (matrix + matrix.T) / 2):
      there, back = general(jnp.asarray(a), jnp.asarray(b), weight), general(jnp.asarray(b), jnp.asarray(a), weight)
      transposed = jnp.swapaxes(there, 1, 2)
      result.append(float(jnp.abs(back - transposed).max() / jnp.abs(there).max()))
    return [*result, float(jnp.abs(soft(back) - jnp.swapaxes(soft(there), 1, 2)).max())]


# -- a dictionary that can be differentiated --------------------------------------------------------------------------


def run_dictionary(entries: int = 64, width: int = 64, betas=(5.0, 10.0, 15.0, 20.0, 30.0, 40.0),
                   seeds: int = 5, seed: int = 0) -> Result:
  """Attention with unit keys and inverse temperature beta looks a value up, but for 2 max|v| (n - 1) e^(-beta m).

  m is the margin, the least 1 - k_i . k_j. Noise on the query makes the answer worse by and by, where a dict raises
  KeyError; half-way between two keys it is half-way between their values.
  """
  found = [_look_up(each, entries, width, betas) for each in range(seed, seed + seeds)]
  errors, bounds, slopes, halves, means, negative, noisy = (np.array(x) for x in zip(*found))
  measured = {'error': errors.mean(0), 'bound': bounds.mean(0), 'slope / margin': interval(slopes),
              'half-way error at the last beta': float(halves.max()),
              'distance from the mean at beta 0': float(means.max()), 'error with beta -5': interval(negative),
              'error with noise 0, 0.1, 0.2, 0.4, 0.8': noisy.mean(0)}
  passed = ((errors <= bounds).all() and (slopes <= -0.9).all() and halves.max() < 1e-3 and means.max() < 1e-12
            and negative.min() > 0.5 and (np.diff(noisy.mean(0)) > 0).all())

  def plot(axes):
    axes.semilogy(betas, errors.mean(0), 'o-', label='greatest error')
    axes.semilogy(betas, bounds.mean(0), '--', label='bound')
    axes.set_xlabel('inverse temperature')
    axes.legend()

  return as_result('E4', 'attention is a soft dictionary',
                 'error never above the bound; log error falls with slope <= -0.9 m; half-way error < 1e-3; beta 0 '
                 'gives the mean; beta < 0 must miss',
                 'an inverse temperature below 0: misses', measured, 'holds' if passed else 'fails', plot)


def _look_up(seed, entries, width, betas):
  random = np.random.default_rng(seed)
  keys, values = (random.standard_normal((entries, width)) for _ in range(2))
  keys /= np.linalg.norm(keys, axis=1, keepdims=True)
  margin = 1 - np.max(keys @ keys.T - 2 * np.eye(entries))
  with jax.enable_x64(True):
    def answers(query, beta):
      return np.asarray(soft(beta * multiplicative(jnp.asarray(query)[None], jnp.asarray(keys)[None]))[0] @ values)

    def error(query, beta):
      return np.linalg.norm(answers(query, beta) - values, axis=1).max()

    errors = np.array([error(keys, beta) for beta in betas])
    # Half-way on the sphere, between the two keys whose half-way point is the loneliest.
    pairs = np.array([(i, j) for i in range(entries) for j in range(i)])
    middle = keys[pairs].sum(axis=1)
    middle /= np.linalg.norm(middle, axis=1, keepdims=True)
    closeness = np.sort(middle @ keys.T, axis=1)
    best = np.argmax(closeness[:, -2] - closeness[:, -3])
    half = np.abs(answers(middle[best:best + 1], betas[-1])[0] - values[pairs[best]].mean(axis=0)).max()
    noise = random.standard_normal(keys.shape) / np.sqrt(width)
    noisy = [error(keys + size * noise, 20.0) for size in (0.0, 0.1, 0.2, 0.4, 0.8)]
    bounds = 2 * np.linalg.norm(values, axis=1).max() * (entries - 1) * np.exp(-np.array(betas) * margin)
    return (errors, bounds, np.polyfit(betas, np.log(errors), 1)[0] / margin, half,
            np.abs(answers(keys, 0.0) - values.mean(axis=0)).max(), error(keys, -5.0), noisy)


# -- 1 / sqrt(d_k) ----------------------------------------------------------------------------------------------------


def run_scale(widths=(4, 16, 64, 256, 1024), keys: int = 64, queries: int = 128, seeds: int = 5,
              seed: int = 0) -> Result:
  """Entropy of the weights, and size of the softmax's Jacobian diag(p) - p p^T, with and without 1 / sqrt(d_k).

  q . k of unit-variance entries has variance d_k (survey, section 3.2.1; Vaswani et al. 2017, section 3.2.1).
  """
  found = np.array([[_sharpness(each, width, keys, queries) for width in widths] for each in range(seed, seed + seeds)])
  entropy, jacobian = ({name: found[:, :, i, j] for i, name in enumerate(('unscaled', 'scaled'))} for j in range(2))
  middle = {name: values.mean(axis=0) for name, values in entropy.items()}
  variation = {name: float(np.ptp(values) / values.mean()) for name, values in middle.items()}
  measured = {'widths': widths} | {f'entropy, {name}': values for name, values in middle.items()} | {
      f'Jacobian, {name}': values.mean(axis=0) for name, values in jacobian.items()} | {
      f'variation of entropy, {name}': value for name, value in variation.items()}
  passed = ((np.diff(entropy['unscaled'], axis=1) < 0).all() and middle['unscaled'][-1] < 0.2
            and variation['scaled'] < 0.02 and variation['unscaled'] > 0.02)

  def plot(axes):
    for name, values in middle.items():
      axes.semilogx(widths, values, 'o-', label=name)
    axes.set_xlabel('d_k')
    axes.set_ylabel(f'entropy of the weights over {keys} keys, nats')
    axes.legend()

  return as_result('E5', 'without 1 / sqrt(d_k) wide heads are almost hard',
                 'unscaled entropy falls with d_k in every seed, to < 0.2 nats at the widest; scaled it varies by < 2 '
                 '%, and unscaled it must not',
                 'without the scale: entropy falls with the width', measured, 'holds' if passed else 'fails', plot)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _sharpness(seed, width, keys, queries):
  """(unscaled, scaled) x (entropy, norm of the Jacobian), means over queries."""
  one, other = jax.random.split(jax.random.key(seed))
  # A set of keys for every query, so that they are independent draws.
  query, key = jax.random.normal(one, (queries, 1, width)), jax.random.normal(other, (queries, keys, width))
  p = jnp.stack([soft(score(query, key))[:, 0] for score in (multiplicative, scaled)])
  entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
  square = jnp.sum(p**2, axis=-1)
  jacobian = jnp.sqrt(jnp.maximum(square - 2 * jnp.sum(p**3, axis=-1) + square**2, 0.0))
  return jnp.stack([jnp.mean(entropy, axis=1), jnp.mean(jacobian, axis=1)], axis=1)


EXPERIMENTS: dict[str, Callable[..., Result]] = {
    'roles': run_roles, 'swapped': run_swapped, 'dictionary': run_dictionary, 'scale': run_scale}
