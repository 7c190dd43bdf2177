"""E1: task model = feature + query + attention + output model (Brauwers & Frasincar 2021, section 2 and table 2).

Every score function, as the package computes it, against the survey's formula for one query and one
key at a time; and the properties that any weighted sum has.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tfm.analysis.result import Result, as_result
from tfm.attention.alignments import LOCAL
from tfm.attention.general import AttentionModule, AttentionParts
from tfm.attention.score_functions import SAME_WIDTH, SCORES

B, T, S, Q, F, W = 2, 3, 6, 4, 5, 7


def run_general_model(seeds: int = 5, seed: int = 0) -> Result:
  """Largest differences over seeds, in float64, and the invariants (i) to (v)."""
  several = range(seed, seed + seeds)
  with jax.enable_x64(True):
    differences = {score: max(_difference(score, each) for each in several) for score in SCORES}
    kept = [_invariants(each) for each in several]
  invariants = {name: max(found[name] for found in kept) for name in kept[0]}
  moved = min(found['(v) keys and values permuted apart'] for found in kept)
  local = min(found['(v) local alignment'] for found in kept)
  exact = {name: value for name, value in invariants.items() if name not in ('(v) keys and values permuted apart',
                                                                             '(v) local alignment')}
  conditions = {'every score is its formula (1e-12)': max(differences.values()) < 1e-12,
                **{f'{name} (1e-12)': value < 1e-12 for name, value in exact.items()},
                '(v) does not hold of local alignment, which goes by position': local > 1e-3}
  measured = {'conditions': conditions, 'difference from the formula': differences, 'violation': invariants}

  def plot(axes):
    axes.barh(list(differences), [max(value, 1e-18) for value in differences.values()])
    axes.set_xscale('log')
    axes.set_xlabel('largest difference from the formula, float64')

  control = f'keys and values permuted apart change the context by {moved:.2f} at least'
  return as_result('E1', 'score, alignment and weighted sum make up every attention of the survey',
                   '; '.join(conditions), control, measured,
                   'holds' if all(conditions.values()) and moved > 1e-3 else 'fails', plot)


def _made(score: str, seed: int, alignment: str = 'soft'):
  """A module with random parameters, its query and features, and where local alignment is to look."""
  rng = np.random.default_rng(seed)
  query, features = rng.standard_normal((B, T, Q)), rng.standard_normal((B, S, F))
  parts = AttentionParts(score, alignment, key_width=Q if score in SAME_WIDTH else None, dtype='float64',
                         hidden_width=W if score == 'additive' else None, window=1.5 if alignment in LOCAL else None)
  module = AttentionModule(parts, Q, F)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), query, features))
  return module, jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), shapes), query, features


def _difference(score: str, seed: int) -> float:
  """Between a module and equations 1 to 4 for every query by itself."""
  module, variables, query, features = _made(score, seed)
  found = module.apply(variables, query, features).context_BxTxV
  p = jax.tree.map(np.asarray, variables.get('params', {}))
  keys = features @ p['key']['kernel'] if 'key' in p else features
  s = p.get('score', {})
  formula = {
      'additive': lambda q, k: s['output'] @ np.tanh(s['query_kernel'].T @ q + s['key_kernel'].T @ k + s['bias']),
      'multiplicative': lambda q, k: q @ k, 'scaled': lambda q, k: q @ k / np.sqrt(len(k)),
      'general': lambda q, k: k @ s['weight'] @ q, 'biased_general': lambda q, k: k @ (s['weight'] @ q + s['bias']),
      'activated_general': lambda q, k: np.tanh(k @ s['weight'] @ q + s['bias']),
      'cosine': lambda q, k: q @ k / (np.linalg.norm(q) * np.linalg.norm(k)),
      'euclidean': lambda q, k: -np.linalg.norm(q - k)}[score]
  worst = 0.0
  for b, t in np.ndindex(B, T):
    e = np.array([formula(query[b, t], keys[b, l]) for l in range(S)])
    a = np.exp(e) / np.exp(e).sum()
    worst = max(worst, float(np.abs(sum(a[l] * features[b, l] for l in range(S)) - found[b, t]).max()))
  return worst


def _invariants(seed: int) -> dict[str, float]:
  """How far each is from holding."""
  module, variables, query, features = _made('additive', seed)
  found = module.apply(variables, query, features)
  order = np.roll(np.arange(S), 1 + seed % (S - 1))
  other = np.random.default_rng(seed + 100).standard_normal(features.shape)

  def context(keys, values, module=module, variables=variables):
    return module.apply(variables, query, keys, value_features_BxSxF=values).context_BxTxV

  local = _made('additive', seed, 'local_monotonic')[:2]
  return {
      '(i) weights are no distribution': float(max(jnp.abs(found.weights.sum(-1) - 1).max(), -found.weights.min())),
      # In every direction of space no further than the furthest value: then the context is in their convex hull.
      '(ii, iv) contexts leave the hull of the features': _outside(found.context_BxTxV, features, seed),
      '(v) keys and values permuted together': float(jnp.abs(
          context(features[:, order], other[:, order]) - context(features, other)).max()),
      '(v) keys and values permuted apart': float(jnp.abs(
          context(features[:, order], other) - context(features, other)).max()),
      '(v) local alignment': float(jnp.abs(context(features[:, order], other[:, order], *local)
                                           - context(features, other, *local)).max())}


def _outside(context_BxTxV, values_BxSxV, seed: int) -> float:
  directions = np.random.default_rng(seed).standard_normal((200, F))
  beyond = jnp.max(context_BxTxV @ directions.T, axis=1) - jnp.max(values_BxSxV @ directions.T, axis=1)
  return float(jnp.maximum(beyond, 0).max())
