"""E6: does attention find which word translates which? On a language whose alignment is known exactly.

  python -m tfm.analysis.alignment_experiment --output FOLDER

trains a Transformer, a bidirectional GRU with attention (Bahdanau et al. 2015) and an LSTM that hands over a vector of
fixed width (Sutskever et al. 2014), of about as many parameters, and measures
  a. the alignment error rate (AER) of every head, by output and by input (Chen et al. 2020), beside controls;
  b. attention correctness, the weight on the right words;
  c. accuracy by the length of the source;
  d. what is lost when an unweighted mean takes the place of the weights;
  e. the AER of gradients, which a model without attention has too.
The head is chosen on the validation set and judged on the test set. Every accuracy is that of tokens, teacher forced.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tfm.analysis.alignment_error import (
  INDEXINGS,
  alignment_error_rate,
  attention_correctness,
  diagonal_links,
  error_table,
  links_of,
  saliency,
  shuffled_rows,
  uniform_links,
  word_pattern,
)
from tfm.analysis.alignment_report import draw, write_report
from tfm.analysis.cross_attention import cross_attention
from tfm.analysis.result import Result
from tfm.analysis.unweighted_mean import unweighted_mean
from tfm.config import (
  Config,
  DataConfig,
  OptimizerConfig,
  RecurrentConfig,
  TokenizerConfig,
  TrainingConfig,
  TransformerConfig,
)
from tfm.model_section import ModelSection
from tfm.models.build import Model, build_model, count_parameters, initialize
from tfm.text.batches import Batches, encode_pairs, prefetch
from tfm.text.buckets import Shape
from tfm.text.corpora import Corpus, build_corpus
from tfm.text.synthetic_language import AlignedPair, aligned_splits, write_corpus
from tfm.text.tokenizer import Tokenizers, train_tokenizers
from tfm.training.compilation_cache import use_compilation_cache
from tfm.training.step import build_step, fresh_state

log = logging.getLogger('tfm')

CHUNK = 100
"""Sentences that are read at a time."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Scale:
  train: int
  validation: int
  test: int
  """Sentence pairs; all are different."""
  steps: int
  tokens_per_batch: int
  layers: int
  d_model: int
  num_heads: int


SCALES = {'cpu': Scale(12_000, 100, 300, 2000, 1024, 2, 64, 4),
          'accel': Scale(100_000, 1000, 2000, 20_000, 8192, 4, 256, 8)}


@dataclass(frozen=True)
class Trained:
  model: Model
  params: Any
  tokenizers: Tokenizers


@dataclass(frozen=True)
class Readings:
  """What a model says of each of some sentences; patterns are of words and NxHxTxS."""

  correct: np.ndarray
  tokens: np.ndarray
  """int, a number each: target tokens that were right, and all."""
  patterns: dict[str, list[np.ndarray]]
  """'output' and 'input' (with attention), 'saliency' (1x1xTxS)."""
  unweighted: np.ndarray | None
  """As `correct`, without the weights; None without attention."""

  @property
  def accuracy(self) -> float:
    return _ratio(self.correct, self.tokens)

  def of(self, start: int | None, stop: int | None) -> Readings:
    """Those of some of the sentences."""
    part = slice(start, stop)
    return Readings(self.correct[part], self.tokens[part], {name: all_[part] for name, all_ in self.patterns.items()},
                    None if self.unweighted is None else self.unweighted[part])


def run(scale: Literal['cpu', 'accel'] = 'cpu', seed: int = 0) -> Result:
  """Train the three models and measure; deterministic on one kind of device.

  Raises:
    ValueError: no such scale.
  """
  if scale not in SCALES:
    raise ValueError(f'scale is {scale!r}; choose one of {", ".join(map(repr, SCALES))}.')
  size, begun = SCALES[scale], time.process_time()
  splits = aligned_splits(seed, test=size.test, validation=size.validation, train=size.train)
  readings, facts = {}, {}
  log.info('A synthetic language: %d pairs to learn from, %d to choose heads by, %d for the test.', size.train,
           size.validation, size.test)
  with tempfile.TemporaryDirectory() as folder:
    write_corpus(folder, splits)
    config = _base(size, seed, folder)
    corpus = build_corpus(config.data)
    tokenizers = train_tokenizers(config.tokenizer, corpus.tokenizer_texts())
    for name, model in _models(size, tokenizers).items():
      start = time.process_time()
      trained = fit(config, model, corpus, tokenizers)
      readings[name] = read(trained, [*splits['validation'], *splits['test']])
      facts[name] = {'parameters': count_parameters(trained.params),
                     'accuracy': readings[name].of(size.validation, None).accuracy}
      log.info('%s: token accuracy %.4f, %.0f s.', name, facts[name]['accuracy'], time.process_time() - start)
  measured = {'scale': scale, 'seed': seed, **asdict(size), 'models': facts,
              **measure(readings, splits['validation'], splits['test'], seed)}
  log.info('%.0f s of processor time in all.', time.process_time() - begun)
  return judge(measured)


# -- the models -------------------------------------------------------------------------------------------------------


def _base(size: Scale, seed: int, folder: str) -> Config:
  return Config(
      tokenizer=TokenizerConfig(kind='word', vocab_size=400, joint=False),
      data=DataConfig(corpus='files', source='source', target='target', limit=None, held_out=None, root=folder,
                      train='train', validation='validation', tokens_per_batch=size.tokens_per_batch, buckets=2,
                      max_length=32),
      model=_transformer(size),
      optimizer=OptimizerConfig(schedule='cosine', learning_rate=2e-3, warmup_steps=size.steps // 20, clip_norm=1.0,
                                label_smoothing=0.0),
      training=TrainingConfig(steps=size.steps, seed=seed))


def _transformer(size: Scale) -> TransformerConfig:
  return TransformerConfig(encoder_layers=size.layers, decoder_layers=size.layers, d_model=size.d_model,
                           d_ff=4 * size.d_model, num_heads=size.num_heads, norm='pre', tying='target')


def _models(size: Scale, tokenizers: Tokenizers) -> dict[str, ModelSection]:
  """The Transformer, and the others as wide as makes them as large."""
  sizes = tokenizers.source.vocab_size, tokenizers.target.vocab_size

  def parameters(config: ModelSection) -> int:
    return count_parameters(jax.eval_shape(partial(initialize, build_model(config, *sizes)), jax.random.key(0)))

  transformer = _transformer(size)
  goal = parameters(transformer)
  shared = dict(d_model=size.d_model, tying='target', dropout=transformer.dropout)
  gru = partial(RecurrentConfig, cell='gru', bidirectional=True, context='attention', **shared)
  lstm = partial(RecurrentConfig, cell='lstm', bidirectional=False, bridge='copy', context='start', readout='linear',
                 **shared)
  matched = [min((make(d_hidden=width) for width in range(16, 4 * size.d_model, 4)),
                 key=lambda config: abs(parameters(config) - goal)) for make in (gru, lstm)]
  return {'transformer': transformer, 'gru with attention': matched[0], 'fixed-vector lstm': matched[1]}


def fit(config: Config, section: ModelSection, corpus: Corpus, tokenizers: Tokenizers) -> Trained:
  """A model trained for `config.training.steps` steps by the package's own step and batches."""
  config = replace(config, model=section)
  model = build_model(section, tokenizers.source.vocab_size, tokenizers.target.vocab_size)
  state = fresh_state(config, model)
  step = jax.jit(build_step(config, model), donate_argnums=0)
  batches = Batches(corpus, tokenizers, config.data, config.training.seed)
  for _, batch in prefetch(batches, 0, config.training.steps):
    state, _ = step(state, batch)
  return Trained(model, state.params, tokenizers)


# -- what they say ----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=('model', 'weighted'))
def _correct(model, params, source_BxS, target_BxT, weighted: bool):
  """Target tokens of every sentence that are right, and all of them, each B."""
  if weighted:
    logits_BxTxV = model.apply({'params': params}, source_BxS, target_BxT[:, :-1])
  else:
    logits_BxTxV = unweighted_mean(model, params, source_BxS, target_BxT[:, :-1])
  labels_BxT = target_BxT[:, 1:]
  real_BxT = model.apply({'params': params}, labels_BxT, method='real')
  return (jnp.sum((jnp.argmax(logits_BxTxV, axis=-1) == labels_BxT) & real_BxT, axis=1), jnp.sum(real_BxT, axis=1))


def read(trained: Trained, pairs: Sequence[AlignedPair]) -> Readings:
  """Accuracy and patterns of every pair."""
  model, params, attends = trained.model, trained.params, trained.model.config.cross_attention_shape is not None
  encoded = encode_pairs(trained.tokenizers, [pair.texts for pair in pairs])
  shape = Shape(min(CHUNK, len(pairs)), int(encoded.source_lengths.max()), int(encoded.target_lengths.max()))
  counts, patterns = [], {name: [] for name in (*(INDEXINGS if attends else ()), 'saliency')}
  for start in range(0, len(pairs), shape.rows):
    rows = np.arange(start, min(start + shape.rows, len(pairs)))
    source_BxS, target_BxT = encoded.batch(shape, rows)
    found = [_correct(model, params, source_BxS, target_BxT, weighted) for weighted in ((True, False) if attends else (
        True,))]
    counts.append(np.stack([found[0][1], *(correct for correct, _ in found)])[:, :len(rows)])
    saliency_BxTxS = np.asarray(saliency(model, params, source_BxS, target_BxT))
    attention = np.asarray(cross_attention(model, params, source_BxS, target_BxT[:, :-1])) if attends else None
    for b in range(len(rows)):
      texts = (trained.tokenizers.source.tokens(source_BxS[b, :encoded.source_lengths[rows[b]] - 1].tolist()),
               trained.tokenizers.target.tokens(target_BxT[b, 1:encoded.target_lengths[rows[b]] - 1].tolist()))
      patterns['saliency'].append(word_pattern(saliency_BxTxS[b, None, None], *texts, 'output'))
      for indexing in INDEXINGS if attends else ():
        patterns[indexing].append(word_pattern(attention[b], *texts, indexing))
  tokens, correct, *unweighted = np.concatenate(counts, axis=1)
  return Readings(correct, tokens, patterns, unweighted[0] if unweighted else None)


# -- figures and verdict ----------------------------------------------------------------------------------------------


def measure(readings: dict[str, Readings], validation: Sequence[AlignedPair], test: Sequence[AlignedPair],
            seed: int) -> dict[str, Any]:
  """All figures, as JSON values; the readings are those of the validation set and then those of the test set."""
  chosen_by, gold = [pair.links for pair in validation], [pair.links for pair in test]
  rng = np.random.Generator(np.random.Philox(seed % 2 ** 64))
  lengths = np.array([len(pair.source) for pair in test])
  heads, gradients, correctness, ablation, by_length, slopes = {}, {}, {}, {}, {}, {}
  for name, both in readings.items():
    first, last = both.of(None, len(validation)), both.of(len(validation), None)
    gradients[name] = float(error_table(last.patterns['saliency'], gold)[0, 0])
    by_length[name] = [[int(n), _ratio(last.correct[lengths == n], last.tokens[lengths == n])]
                       for n in np.unique(lengths)]
    slopes[name] = _slope(lengths, last.correct / last.tokens, rng)
    if last.unweighted is None:
      continue
    ablation[name] = {'weighted': last.accuracy, 'unweighted': _ratio(last.unweighted, last.tokens)}
    heads[name], correctness[name] = {}, {}
    for indexing in INDEXINGS:
      single = error_table(first.patterns[indexing], chosen_by)[:, :-1]
      n, h = map(int, np.unravel_index(single.argmin(), single.shape))
      table, patterns = error_table(last.patterns[indexing], gold), [p[n, h] for p in last.patterns[indexing]]
      heads[name][indexing] = {'table': table.tolist(), 'layer': n + 1, 'head': h + 1, 'error': float(table[n, h]),
                               'interval': _interval([*map(links_of, patterns)], gold, rng)}
      correctness[name][indexing] = attention_correctness(patterns, gold)
  best = heads['transformer']['input']
  shuffled = [links_of(shuffled_rows(p[best['layer'] - 1, best['head'] - 1], rng))
              for p in readings['transformer'].patterns['input'][len(validation):]]
  sizes = [(len(pair.source), len(pair.target)) for pair in test]
  controls = {'diagonal': [diagonal_links(*size) for size in sizes],
              'uniform': [uniform_links(*size, rng) for size in sizes], 'shuffled rows': shuffled}
  return {'attention': heads, 'saliency': gradients, 'attention_correctness': correctness,
          'controls': {name: alignment_error_rate(links, gold) for name, links in controls.items()},
          'unweighted_mean': ablation, 'accuracy_by_length': by_length, 'accuracy_slope': slopes}


def judge(measured: dict[str, Any]) -> Result:
  """The figures held against the criterion."""
  error, controls = measured['attention']['transformer']['input']['error'], measured['controls']
  fixed, slopes = measured['saliency']['fixed-vector lstm'], measured['accuracy_slope']
  ablation = measured['unweighted_mean']['transformer']
  checks = {
      'best head by input at most 0.10': error <= 0.10,
      'at most half of the diagonal': error <= 0.5 * controls['diagonal'],
      'below the saliency of the fixed vector': error < fixed,
      'an unweighted mean loses 10 points or more': ablation['weighted'] - ablation['unweighted'] >= 0.10,
      'accuracy with attention has no slope': all(
          low <= 0 <= high for name in measured['attention'] for low, high in [slopes[name]['interval']]),
      'accuracy of the fixed vector falls with length': slopes['fixed-vector lstm']['interval'][1] < 0}
  learned = measured['models']['transformer']['accuracy'] >= 0.90
  failed = min(controls.values()) > 0.5
  verdict = 'not supported at this scale' if not (learned and failed) else 'holds' if all(checks.values()) else 'fails'
  return Result(
      name='E6',
      claim='Attention finds which source word a target word translates; a vector of fixed width does not, and loses '
            'accuracy on long sentences.',
      criterion='AER of the best head of the Transformer, by input, <= 0.10, <= 0.5 x that of the diagonal and < that '
                'of the saliency of the fixed-vector model; an unweighted mean loses >= 10 points of token accuracy; '
                'the 95 % interval of the slope of accuracy over length includes 0 with attention and lies below 0 '
                'without.',
      measured={**measured, 'checks': checks},
      verdict=verdict,
      control=f'AER of the diagonal {controls["diagonal"]:.3f}, of uniform weights {controls["uniform"]:.3f}, of the '
              f'best head with its rows shuffled {controls["shuffled rows"]:.3f}: '
              + ('all above 0.5, as they must.' if failed else 'not all above 0.5, so the language is too easy.'),
      draw=partial(draw, measured))


def _ratio(part: np.ndarray, whole: np.ndarray) -> float:
  return float(part.sum() / whole.sum())


def _resampled(count: int, rng: np.random.Generator) -> np.ndarray:
  """Numbers of sentences drawn with replacement, RESAMPLES x count."""
  return rng.integers(count, size=(RESAMPLES, count))


def _interval(found, gold, rng: np.random.Generator) -> list[float]:
  """95 % bootstrap interval of the AER over sentences."""
  hits = np.array([2 * len(a & s) for a, s in zip(found, gold)])
  total = np.array([len(a) + len(s) for a, s in zip(found, gold)])
  rows = _resampled(len(hits), rng)
  return np.quantile(1 - hits[rows].sum(axis=1) / total[rows].sum(axis=1), [0.025, 0.975]).tolist()


def _slope(lengths: np.ndarray, accuracy: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
  """Least squares of the accuracy of sentences over their source length, a word, with its 95 % bootstrap interval."""

  def slope(x, y):
    x = x - x.mean(axis=-1, keepdims=True)
    return (x * y).sum(axis=-1) / (x * x).sum(axis=-1)

  rows = _resampled(len(lengths), rng)
  return {'slope': float(slope(lengths, accuracy)),
          'interval': np.quantile(slope(lengths[rows], accuracy[rows]), [0.025, 0.975]).tolist()}


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m tfm.analysis.alignment_experiment', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--output', type=Path, default=Path('alignment'), help='folder for results and figures')
  parser.add_argument('--scale', choices=SCALES, default='cpu')
  parser.add_argument('--seed', type=int, default=0)
  arguments = parser.parse_args()
  use_compilation_cache()
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  result = run(arguments.scale, arguments.seed)
  write_report(result, arguments.output)
  print(f'{result.name}: {result.verdict}. {arguments.output} has results.json, results.md and figures.')


if __name__ == '__main__':
  main()
