from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm
from tfm.config import DataConfig, TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.special_ids import BOS, EOS, PAD
from tfm.text.batches import Encoded, Ragged, encode_pairs, evaluation_batches
from tfm.text.buckets import Shape
from tfm.text.corpora import build_corpus
from tfm.training.run_folder import RunFolder
from tfm.training.samples import write_samples
from tfm.training.validation import out_of_patience, validate, validation_nll

V = 19
DATA = DataConfig(tokens_per_batch=64, max_length=8)


@pytest.fixture(scope='module')
def model_and_params():
  # Dropout and smoothing are for training; a validation that used them would be noisy and too high.
  model = build_model(TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=8, d_ff=8, num_heads=2,
                                        dropout=0.5), V, V)
  return model, jax.tree.map(lambda leaf: 3 * leaf, initialize(model, jax.random.key(0)))


@pytest.fixture(scope='module')
def sentences():
  """Sources and targets of other lengths."""
  random = np.random.default_rng(0)
  lengths = [(1, 4), (6, 2), (6, 2), (1, 4), (6, 2)]

  def words(count):
    return random.integers(4, V, count).tolist()

  return [([*words(s), EOS], [BOS, *words(t), EOS]) for s, t in lengths]


def test_nll_is_that_of_the_sentences_one_by_one(model_and_params, sentences):
  model, params = model_and_params
  logits_of = jax.jit(lambda source, target: model.apply({'params': params}, source[None], target[None])[0])
  total = tokens = 0.0
  for source, target in sentences:
    logits_TxV = np.asarray(logits_of(jnp.array(source), jnp.array(target[:-1])), np.float64)
    log_p_TxV = logits_TxV - np.log(np.exp(logits_TxV).sum(-1, keepdims=True))
    total -= log_p_TxV[range(len(target) - 1), target[1:]].sum()
    tokens += len(target) - 1
  encoded = Encoded(*(Ragged.of(side) for side in zip(*sentences)))
  batches = evaluation_batches(encoded, DATA, rows_multiple=4)
  assert any((batch.source_BxS == PAD).all(1).any() for batch in batches)  # rows of nothing but padding
  assert validation_nll(model, params, batches) == pytest.approx(total / tokens, rel=1e-5)
  # Whatever the batches, it is a mean over tokens.
  shape = Shape(*batches[0].source_BxS.shape, batches[0].target_BxT.shape[1])
  alone = [evaluation_batches(Encoded(Ragged.of([s]), Ragged.of([t])), DATA, [shape])[0] for s, t in sentences]
  assert validation_nll(model, params, alone) == pytest.approx(total / tokens, rel=1e-5)


def test_figures_are_of_the_given_weights(numbers_run):
  translator = tfm.load(numbers_run)
  model, data = translator.model, RunFolder(numbers_run).read_config().data
  pairs = build_corpus(data).validation()[:3]
  batches = evaluation_batches(encode_pairs(translator.tokenizers, pairs), data)
  blank = translator.with_params(jax.tree.map(jnp.zeros_like, translator.params))
  figures, hypotheses = validate(model, translator.params, batches, blank, pairs)
  assert hypotheses == [found.text for found in translator.translate([source for source, _ in pairs])]
  assert figures['nll'] == pytest.approx(validation_nll(model, translator.params, batches))
  assert figures['exact'] == pytest.approx(100 * np.mean([h == t for h, (_, t) in zip(hypotheses, pairs)]))
  assert set(figures) == {'nll', 'bleu', 'chrf', 'exact'} and 0 < figures['chrf'] <= 100
  zeros, _ = validate(model, blank.params, batches, translator, pairs)
  assert zeros['nll'] == pytest.approx(math.log(model.target_vocab_size), rel=1e-5)  # all logits equal


def test_samples_are_for_people(tmp_path):
  path = tmp_path / 'samples' / '000010.txt'
  write_samples(path, [('two', 'zwei'), ('three', 'drei')], ['zwei', 'zwölf', 'not among the samples'])
  assert path.read_text(encoding='utf-8') == (
      'source       two\nreference    zwei\ntranslation  zwei\n\n'
      'source       three\nreference    drei\ntranslation  zwölf\n')


def waited(figures: list[float], lower_is_better: bool) -> int:
  """How many validations have passed since the best so far was beaten."""
  best, since = None, 0
  for figure in figures:
    better = best is None or (figure < best if lower_is_better else figure > best)
    best, since = (figure, 0) if better else (best, since + 1)
  return since


@pytest.mark.parametrize('by', ['nll', 'bleu', 'chrf'])
@pytest.mark.parametrize('patience', [1, 2, 3])
def test_patience_ends_after_so_many_validations_without_a_better_one(by, patience):
  for length in range(7):
    for figures in itertools.product([1.0, 2.0, 3.0], repeat=length):
      history = [{'step': 10 * i, 'nll': 0.0, 'bleu': 0.0, 'chrf': 0.0, by: figure} for i, figure in enumerate(figures)]
      assert out_of_patience(history, by, patience) == (waited(figures, by == 'nll') >= patience), figures


def test_without_patience_it_never_ends():
  assert not out_of_patience([{'nll': 1.0}] * 1000, 'nll', None)
  assert not out_of_patience([], 'nll', 1)
