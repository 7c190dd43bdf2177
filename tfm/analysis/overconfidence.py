"""E12: the last layer guards against overconfidence (Lv et al. 2024, "Interpreting key mechanisms of factual recall").

A language model learns made-up facts, "RELATION SUBJECT -> OBJECT"; one telling of five is contradicted by an object
drawn by its frequency. Then it is read where it completes a fact. The claim: the middle layers find the answer and the
last one takes some of it back, in two ways: heads copy what the start of the text carries, and the MLP writes the
average token, the mean of all token vectors by frequency. Without them the answer is more probable, and the model is
worse: less calibrated, or a worse model of text. What is measured is defined here, not by the paper's formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import rankdata, ttest_rel

from tfm.analysis.ablation import mask
from tfm.analysis.attribution import directions, output_projection, require_sum
from tfm.analysis.engine import Edit, edit, read
from tfm.analysis.lens import fit_tuned_lens, logit_lens
from tfm.analysis.result import Result, interval
from tfm.analysis.sites import sites
from tfm.analysis.task_training import adam
from tfm.config import TransformerConfig
from tfm.models.build import build_model, initialize

START = 1
"""The first token of every text; 0 is padding, and relations, subjects, objects and other words follow."""
ATTENTION, MLP = 'decoder.layers.self_attention', 'decoder.layers.mlp'


@dataclass(frozen=True)
class Scale:
  """How large, how long."""

  layers: int
  width: int
  length: int
  relations: int
  subjects: int
  """Each with two facts."""
  objects: int
  words: int
  steps: int
  rows: int
  seeds: int
  learning_rate: float = 3e-3
  noise: float = 0.2
  """Share of tellings with a drawn object."""
  density: float = 0.35
  """Share of facts among facts and single words."""


SCALES = {'cpu': Scale(layers=4, width=64, length=24, relations=10, subjects=150, objects=50, words=100, steps=600,
                       rows=64, seeds=3),
          'accel': Scale(layers=12, width=256, length=64, relations=20, subjects=500, objects=200, words=2000,
                         steps=20_000, rows=256, seeds=5, learning_rate=5e-4)}


def run_overconfidence(scale: Literal['cpu', 'accel'] | Scale = 'cpu', seed: int = 0) -> Result:
  """Where confidence in the answer rises and falls, who takes it back, and what happens without them."""
  size = scale if isinstance(scale, Scale) else SCALES[scale]
  found = [_measure(size, each) for each in range(seed, seed + size.seeds)]
  lenses = {name: np.array([f['log p(y*)'][name] for f in found]) for name in ('logit lens', 'tuned lens')}
  rises = np.diff(lenses['logit lens'], axis=1)
  z_RxN = np.array([f['average token']['z'] for f in found])
  edits = {name: {what: float(np.mean([f['edits'][name][what] for f in found])) for what in each}
           for name, each in found[0]['edits'].items()}
  before = edits['untouched']
  helped = [each for name, each in edits.items()
            if not name.startswith('another') and each['p(y*)'] > before['p(y*)'] + 0.001]
  start = [f['start against another'] for f in found]
  conditions = {
      'the last layer lowers the log probability of the answer (95 %), an earlier one raises it':
          bool(interval(rises[:, -1])[1][1] < 0 and (rises[:, :-1].max(axis=1) > 0).all()),
      'the last MLP writes the average token: z > 3, and more than any other MLP':
          bool((z_RxN[:, -1] > 3).all() and (z_RxN[:, -1] > z_RxN[:, :-1].max(axis=1)).all()),
      'without the start in the last layer the answer gains, and more than without another position (p < 0.01)':
          all(each['gain'] > 0 and each['p'] < 0.01 for each in start),
      'every edit that makes the answer more probable (by 0.001) makes calibration or the loss of text worse':
          bool(helped) and all(each['ECE'] > before['ECE'] or each['loss'] > before['loss'] for each in helped)}
  untrained = max(abs(f['z of the last MLP, untrained']) for f in found)
  trained = min(f['edits']['untouched']['accuracy'] for f in found) > 0.9
  parts = {what: {name: float(np.mean([f[what][name] for f in found])) for name in found[0][what]}
           for what in ('suppression', 'entropy effect', 'correlation with log p')}
  measured = {'conditions': conditions, 'log p(y*) by layer': {name: each.mean(0) for name, each in lenses.items()},
              'what the last layer adds to it': {name: interval(each[:, -1] - each[:, -2])
                                                 for name, each in lenses.items()},
              'z of the average token, MLP by MLP': z_RxN.mean(0), 'edits': edits, **parts, 'by seed': found}
  held = all(conditions.values()) and untrained < 3
  verdict = 'holds' if held and trained else 'fails' if trained else 'not supported at this scale'
  claim = 'the last layer guards against overconfidence'
  return Result('E12', claim, '; '.join(conditions), measured, verdict,
                f'before training the last MLP writes no average token: |z| = {untrained:.1f}, below 3',
                partial(_figure, f'{claim}: {verdict}', lenses, parts['suppression']))


def _figure(title: str, lenses: dict[str, np.ndarray], suppression: dict[str, float]):
  from matplotlib.figure import Figure
  figure = Figure(figsize=(9, 4.5), layout='constrained')
  layers, parts = figure.subplots(1, 2)
  for (name, each_RxN), style in zip(lenses.items(), ('-', ':')):
    for i, each_N in enumerate(each_RxN):
      layers.plot(each_N, f'o{style}', color=f'C{i}', label=name if i == 0 else None)
  layers.set(xlabel='after layer (a colour for each seed)', ylabel='log probability of the answer',
             xticks=range(each_RxN.shape[1]))
  layers.legend(fontsize=7)
  parts.barh(list(suppression), list(suppression.values()))
  parts.invert_yaxis()
  parts.set_xlabel('suppression of the answer, by component')
  parts.tick_params(axis='y', labelsize=7)
  figure.suptitle(title, fontsize=10)
  return figure


def _measure(size: Scale, seed: int) -> dict[str, Any]:
  rng = np.random.default_rng(seed)
  world = make_world(rng, size)
  model, first, params = _train(size, seed, world)
  F = len(world.facts_Fx3)
  # One shorter than in training, where nothing is asked of the last position.
  texts = world.texts(rng, size, 4 * F)[:, :-1]
  # A prompt follows a whole fact or a word, not half a fact.
  whole = texts[texts[:, -3] >= np.flatnonzero(world.objects_V)[0], :-2]
  prompts = np.concatenate([whole[:F], world.facts_Fx3[:, :2]], axis=1)
  told = world.told(rng, size, np.arange(F))[:, 2]
  parts, final_PxD = writes(model, first, prompts)
  _, z_N = average_token(_mlps(parts), token_vectors(model, first, final_PxD[0])[0], world.unigram_V, seed)
  return {**measure(model, params, prompts, world.facts_Fx3[:, 2], told, texts[:F], world.unigram_V, seed),
          'z of the last MLP, untrained': float(z_N[-1])}


# -- what is measured, of any decoder-only model ----------------------------------------------------------------------


def measure(model, params: Any, prompts_PxT, answers_P, told_P, texts_PxT, unigram_V, seed: int = 0) -> dict[str, Any]:
  """All that E12 asks of one model. Means are over the prompts that it answers rightly; accuracy, entropy and expected
  calibration error (ECE) are over all.

  Args:
    model: pre-norm and decoder-only.
    prompts_PxT: texts that begin with the start token and end where the answer comes next.
    answers_P: the true answer y*.
    told_P: what a text says there, noise included, for the ECE; the answers where nothing else is known.
    texts_PxT: held-out text, for its loss and to fit the tuned lens.
    unigram_V: how frequent each token is in training.

  Raises:
    ValueError: the logits of this model are no sum, or it answers fewer than two prompts.
  """
  require_sum(model.config)
  lenses = {'logit lens': logit_lens, 'tuned lens': fit_tuned_lens(model, params, [(texts_PxT,)])}
  log_p = {name: jax.nn.log_softmax(lens(model, params, (prompts_PxT,))[:, :, -1]) for name, lens in lenses.items()}
  right_P = np.asarray(log_p['logit lens'][-1].argmax(-1) == answers_P)
  if right_P.sum() < 2:
    raise ValueError(f'The model answers {right_P.sum()} of {len(right_P)} prompts; train it longer, or ask what it '
                     'knows.')
  found: dict[str, Any] = {'log p(y*)': {
      name: np.asarray(each_NxPxV)[:, right_P, answers_P[right_P]].mean(1) for name, each_NxPxV in log_p.items()}}

  parts, final_PxD = writes(model, params, prompts_PxT)
  by_part = components(model, params, jnp.stack(list(parts.values())), final_PxD, answers_P, unigram_V)
  for what, each_PxO in by_part.items():
    found[what] = dict(zip([*parts, 'constant'], np.asarray(each_PxO)[right_P].mean(0).tolist()))
  pattern_NxPxHxTxS = read(model, params, (prompts_PxT,), f'{ATTENTION}.pattern')[f'{ATTENTION}.pattern']
  found['attention to the start'] = np.asarray(pattern_NxPxHxTxS[..., -1, 0])[:, right_P].mean(1)

  vectors_VxD, _ = token_vectors(model, params, final_PxD[0])
  mlps_NxPxD = _mlps(parts)[:, right_P]
  cos_N, z_N = average_token(mlps_NxPxD, vectors_VxD, unigram_V, seed)
  _, among_N = average_token(mlps_NxPxD, vectors_VxD, unigram_V, seed, among=np.unique(answers_P))
  found['average token'] = {'cos': cos_N, 'z': z_N, 'z, answers permuted among themselves': among_N}

  edits, p_P = {}, {}
  average_D = (unigram_V - unigram_V.mean()) @ vectors_VxD
  for name, on_prompts, on_texts in _edited(model, params, prompts_PxT, texts_PxT, average_D, seed):
    probabilities_PxV = np.asarray(jax.nn.softmax(on_prompts[:, -1]))
    said_P = probabilities_PxV.argmax(-1)
    p_P[name] = probabilities_PxV[right_P, answers_P[right_P]]
    nll = optax.softmax_cross_entropy_with_integer_labels(on_texts[:, :-1], texts_PxT[:, 1:])
    edits[name] = {'p(y*)': float(p_P[name].mean()), 'accuracy': float((said_P == answers_P).mean()),
                   'entropy': float(_entropy(on_prompts[:, -1]).mean()),
                   'ECE': calibration_error(probabilities_PxV.max(-1), said_P == told_P), 'loss': float(nll.mean())}
  start_P, other_P = p_P['start knocked out'], p_P['another position knocked out']
  return {**found, 'edits': edits, 'start against another': {
      'gain': float((start_P - p_P['untouched']).mean()), 'gain over another': float((start_P - other_P).mean()),
      'p': float(ttest_rel(start_P, other_P, alternative='greater').pvalue)}}


def writes(model, params: Any, ids_BxT) -> tuple[dict[str, jax.Array], jax.Array]:
  """What every component writes into the residual stream of the last position, each BxD, and the sum of it, BxD."""
  names = 'target_embed', MLP, f'{ATTENTION}.z', 'decoder.layers.resid_post'
  embedding, mlps, z, stream = read(model, params, (ids_BxT,), dict.fromkeys(names, _last)).values()
  output = output_projection(model, params, 'decoder', 'self_attention')
  parts = {'embedding': embedding}
  for n, heads in enumerate(jnp.einsum('nbhc,nhcd->nhbd', z, output['kernel'])):
    parts |= {f'head {n}.{h}': each for h, each in enumerate(heads)}
    if 'bias' in output:
      parts[f'attention bias {n}'] = jnp.broadcast_to(output['bias'][n], embedding.shape)
    parts[f'mlp {n}'] = mlps[n]
  return parts, stream[-1]


def _last(y):
  return y[:, -1]


def _mlps(parts: dict[str, jax.Array]) -> jax.Array:
  return jnp.stack([each for name, each in parts.items() if name.startswith('mlp')])


def token_vectors(model, params: Any, final_D) -> tuple[jax.Array, jax.Array]:
  """VxD and V: the logit of v is <vector v, final stream> + constant v, with the final norm held as at `final_D`."""
  V = model.output_vocab_size
  d_1xVxD, constant_1xV = directions(model, params, jnp.broadcast_to(final_D, (1, V, len(final_D))),
                                     jnp.arange(V)[None])
  return d_1xVxD[0], constant_1xV[0]


def components(model, params: Any, writes_OxBxD, final_BxD, answers_B, unigram_V) -> dict[str, jax.Array]:
  """Of every component, Bx(O+1); the last is what is there whatever is read (beta of the norm, output bias).

  With dla(v) its part of the logit of v: `suppression` is sum_v p(v) dla(v) - dla(y*), which sums to that of the
  logits; `entropy effect` the entropy of the output less that of softmax(logits - dla); `correlation with log p` that
  of dla, by ranks, over the tokens that occur.
  """
  seen = np.flatnonzero(unigram_V)
  return _components(model, params, writes_OxBxD, final_BxD, jnp.asarray(answers_B), jnp.asarray(unigram_V), seen,
                     rankdata(unigram_V[seen]))


@partial(jax.jit, static_argnames='model')
def _components(model, params, writes_OxBxD, final_BxD, answers_B, unigram_V, seen, ranks):

  def one(row):
    writes_OxD, final_D, answer = row
    vectors_VxD, constant_V = token_vectors(model, params, final_D)
    dla_OxV = jnp.concatenate([writes_OxD @ vectors_VxD.T, constant_V[None]])
    logits_V = dla_OxV.sum(0)
    ranks_OxV = dla_OxV[:, seen].argsort(-1).argsort(-1).astype(jnp.float32)
    return {'suppression': dla_OxV @ unigram_V - dla_OxV[:, answer],
            'entropy effect': _entropy(logits_V) - _entropy(logits_V - dla_OxV),
            'correlation with log p': jnp.corrcoef(jnp.concatenate([ranks_OxV, ranks[None]]))[-1, :-1]}

  return jax.lax.map(one, (writes_OxBxD.swapaxes(0, 1), final_BxD, answers_B))


def average_token(writes_NxBxD, vectors_VxD, unigram_V, seed: int, among=None,
                  draws: int = 1000) -> tuple[np.ndarray, np.ndarray]:
  """N and N: cos of each write with the average token, mean over B, and its z, in standard deviations above chance.

  The average token is sum_v p(v) vector_v less the mean vector; chance is the same with p permuted over the vocabulary,
  or over the tokens `among`.
  """
  p_RxV = np.tile(np.asarray(unigram_V), (1 + draws, 1))
  among = np.arange(p_RxV.shape[1]) if among is None else among
  p_RxV[1:, among] = np.random.default_rng(seed).permuted(p_RxV[1:, among], axis=1)
  tokens_RxD = (p_RxV - p_RxV.mean(1, keepdims=True)) @ np.asarray(vectors_VxD)
  units_NxD = np.asarray(writes_NxBxD / jnp.linalg.norm(writes_NxBxD, axis=-1, keepdims=True)).mean(1)
  cos_NxR = units_NxD @ (tokens_RxD / np.linalg.norm(tokens_RxD, axis=1, keepdims=True)).T
  return cos_NxR[:, 0], (cos_NxR[:, 0] - cos_NxR[:, 1:].mean(1)) / cos_NxR[:, 1:].std(1)


def _edited(model, params, prompts_PxT, texts_PxT, average_D, seed: int) -> Iterator[tuple[str, jax.Array, jax.Array]]:
  """Name, logits of the prompts, logits of the texts, for every edit; all are of the last layer alone."""
  both = prompts_PxT, texts_PxT
  unit_D = average_D / jnp.linalg.norm(average_D)
  last = f'{MLP}[{model.config.decoder_layers - 1}]'
  # An edit of what the last MLP writes does not change what it reads: what is taken away is known beforehand.
  along = [read(model, params, (ids,), last)[last] @ unit_D for ids in both]
  for alpha in (0.0, 0.5, 1.0, 2.0):
    yield (f'average token taken out, {alpha:g}' if alpha else 'untouched',
           *(edit(model, params, (ids,), Edit(last, add=-alpha * m_PxT[..., None] * unit_D))
             for ids, m_PxT in zip(both, along)))

  P, T = prompts_PxT.shape
  known = sites(model, params, (prompts_PxT,))
  query_T = np.arange(T)
  other_PxT = 1 + np.floor(np.random.default_rng(seed).random((P, T)) * (query_T - 1)).astype(int)
  # No query loses itself; one that sees nothing else keeps all (-1).
  keys = {'start': np.where(query_T > 0, 0, -1), 'another position': np.where(query_T > 1, other_PxT, -1)}
  # Scores of -inf leave what is freed to the other positions; a pattern of 0 does not.
  for kind, gone, rest in (('scores', -jnp.inf, ''), ('pattern', 0.0, ', not renormalised')):
    site = known[f'{ATTENTION}.{kind}']
    for which, key_PxT in keys.items():
      change = Edit(site.name, at=mask(site, layers=-1) & (key_PxT.reshape(-1, 1, T, 1) == query_T), value=gone)
      yield f'{which} knocked out{rest}', *(edit(model, params, (ids,), change) for ids in both)


def _entropy(logits) -> jax.Array:
  log_p = jax.nn.log_softmax(logits)
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def calibration_error(confidence_P, right_P, bins: int = 10) -> float:
  """Expected calibration error: mean of |confidence - accuracy| over bins of equal width, weighted by what falls into
  each (Naeini et al. 2015)."""
  bin_P = np.minimum((confidence_P * bins).astype(int), bins - 1)
  return float(np.abs(np.bincount(bin_P, confidence_P - right_P)).sum() / len(bin_P))


# -- facts in text, and a model of it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
  """Facts, and how frequent tokens are in the texts that tell them."""

  facts_Fx3: np.ndarray
  """Relation, subject, object."""
  objects_V: np.ndarray
  """Probability of a drawn object."""
  words_V: np.ndarray
  """Of a word that is no part of a fact."""
  unigram_V: np.ndarray
  """Of a token anywhere behind the start."""

  def told(self, rng: np.random.Generator, size: Scale, which) -> np.ndarray:
    """nx3: facts by number, some with a drawn object."""
    facts_nx3 = self.facts_Fx3[which]
    drawn = rng.choice(len(self.objects_V), size=len(which), p=self.objects_V)
    facts_nx3[:, 2] = np.where(rng.random(len(which)) < size.noise, drawn, facts_nx3[:, 2])
    return facts_nx3

  def texts(self, rng: np.random.Generator, size: Scale, rows: int) -> np.ndarray:
    """rows x length: the start, then a cut of one long text of facts and words in any order."""
    n = rows * (size.length - 1)
    told_nx3 = self.told(rng, size, rng.integers(len(self.facts_Fx3), size=n))
    fact_n = rng.random(n) < size.density
    told_nx3[~fact_n, 0] = rng.choice(len(self.words_V), size=int((~fact_n).sum()), p=self.words_V)
    there_nx3 = np.stack([np.ones(n, bool), fact_n, fact_n], axis=1)
    return np.insert(told_nx3[there_nx3][:n].reshape(rows, -1), 0, START, axis=1)


def make_world(rng: np.random.Generator, size: Scale) -> World:
  """Two facts of every subject; objects and words are Zipfian."""
  first = np.cumsum([START + 1, size.relations, size.subjects, size.objects, size.words])
  V = first[-1]
  objects_V, words_V = np.zeros((2, V))
  for each_V, begin, count in ((objects_V, first[2], size.objects), (words_V, first[3], size.words)):
    each_V[begin:begin + count] = 1 / np.arange(1, count + 1)
    each_V /= each_V.sum()
  pairs = [(first[0] + r, s) for s in range(first[1], first[2]) for r in rng.permutation(size.relations)[:2]]
  facts_Fx3 = np.column_stack([pairs, rng.choice(V, size=len(pairs), p=objects_V)])
  told_V, true_V = (np.bincount(each.ravel(), minlength=V) / len(pairs) for each in (facts_Fx3, facts_Fx3[:, 2]))
  counts_V = size.density * (told_V + size.noise * (objects_V - true_V)) + (1 - size.density) * words_V
  return World(facts_Fx3, objects_V, words_V, counts_V / counts_V.sum())


def _train(size: Scale, seed: int, world: World) -> tuple[Any, Any, Any]:
  """The model, its parameters before training, and after."""
  V = len(world.unigram_V)
  model = build_model(TransformerConfig(
      encoder_layers=0, decoder_layers=size.layers, d_model=size.width, d_ff=4 * size.width, num_heads=4, norm='pre',
      dropout=0.0, positions='learned', max_positions=size.length, scan_layers=True), V, V)
  optimizer, step = _step(model, size)
  first = initialize(model, jax.random.key(seed))
  params, moments, rng = first, optimizer.init(first), np.random.default_rng(seed + 1000)
  for _ in range(size.steps):
    params, moments = step(params, moments, world.texts(rng, size, size.rows))
  return model, first, params


@cache
def _step(model, size: Scale):
  """The optimizer and a training step, compiled once for all seeds."""
  optimizer = adam(size.learning_rate, size.steps)

  def loss(params, ids_BxT):
    logits = model.apply({'params': params}, ids_BxT)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids_BxT[:, 1:]).mean()

  @jax.jit
  def step(params, moments, ids_BxT):
    updates, moments = optimizer.update(jax.grad(loss)(params, ids_BxT), moments)
    return optax.apply_updates(params, updates), moments

  return optimizer, step
