"""Laws that hold for the recurrent and the convolutional models as for the Transformer, over every variant of each."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tfm.config import Config, ConvolutionalConfig, DataConfig, RecurrentConfig, from_json, to_json
from tfm.decoding.beam import beam_search
from tfm.models.build import Model, build_model, initialize
from tfm.models.embedding import Embedding
from tfm.parallel.rules import logical_axes
from tfm.special_ids import BOS, EOS
from tfm.training.named_arrays import named_leaves

V, D, S, T = 11, 8, 7, 5
SOURCE_BxS = np.array([[5, 6, 7, 8, 9, 2, 0], [4, 9, 2, 0, 0, 0, 0], [0] * 7, [3, 8, 5, 5, 10, 4, 2]])
"""Sentence 2 is empty."""
LENGTHS_B = np.array([6, 3, 0, 7])
TARGET_BxT = np.array([[1, 7, 10, 4, 0], [1, 9, 6, 0, 0], [1, 5, 5, 3, 8], [1, 3, 0, 0, 0]])

recurrent = partial(RecurrentConfig, d_model=D, d_hidden=6, tying='none')
convolutional = partial(ConvolutionalConfig, d_model=D, d_hidden=6, tying='none', positions='none', max_positions=None)
ENCODER_DECODERS = {
    'fixed lstm': recurrent(cell='lstm', encoder_layers=2, decoder_layers=2, bidirectional=False, reverse_source=True,
                            bridge='copy', context='start', readout='linear'),
    'every step gru': recurrent(bidirectional=False, context='every_step', readout='tanh'),
    'fixed tanh': recurrent(cell='tanh', context='start', decoder_layers=2, readout='tanh'),
    'bahdanau': recurrent(encoder_layers=2),
    'luong': recurrent(cell='lstm', query='current', input_feeding=True, score='general', readout='tanh'),
    'luong without feeding': recurrent(query='current', score='biased_general', readout='tanh', decoder_layers=2),
    'sparse': recurrent(score='activated_general', alignment='sparsemax'),
    'entmax': recurrent(score='general', alignment='entmax15', query='current', readout='tanh'),
    'local predictive': recurrent(alignment='local_predictive', attention_window=2),
    'local monotonic': recurrent(cell='tanh', alignment='local_monotonic', attention_window=2),
    'convolutional': convolutional(encoder_layers=2, decoder_layers=2),
    'convolutional wide': convolutional(encoder_layers=3, decoder_layers=2, kernel_width=5, dilation='doubling',
                                        weight_norm=False, scale_residuals=False),
    'convolutional positions': convolutional(encoder_layers=1, decoder_layers=3, positions='learned',
                                             max_positions=12, scale_encoder_gradient=False, output_bias=False),
}
LANGUAGE_MODELS = {
    'lstm': recurrent(encoder_layers=0, decoder_layers=2, cell='lstm'),
    'gru': recurrent(encoder_layers=0, cell='gru'),
    'tanh': recurrent(encoder_layers=0, cell='tanh'),
    'window': recurrent(encoder_layers=0, cell='window', order=3),
    'convolutions': convolutional(encoder_layers=0, decoder_layers=2),
    'dilated': convolutional(encoder_layers=0, decoder_layers=2, kernel_width=2, dilation='doubling'),
}


@dataclass(frozen=True)
class Case:
  """A model with random parameters, and what several laws need of it, each compiled once."""

  model: Model
  variables: dict

  @property
  def both(self) -> bool:
    return self.model.config.shape == 'encoder_decoder'

  def inputs(self, source_BxS=SOURCE_BxS, target_BxT=TARGET_BxT) -> tuple:
    return (source_BxS, target_BxT) if self.both else (target_BxT,)

  @cached_property
  def forward(self):
    return jax.jit(lambda *inputs: self.model.apply(self.variables, *inputs))

  @cached_property
  def start(self):
    """source_BxS -> memory (None without an encoder) and a cache with two rows per sentence."""
    def run(source_BxS):
      if not self.both:
        return None, self.model.apply(self.variables, 2 * source_BxS.shape[0], S, method='init_cache')
      memory = self.model.apply(self.variables, source_BxS, method='encode')
      return memory, self.model.apply(self.variables, memory, S, 2, method='init_cache')
    return jax.jit(run)

  @cached_property
  def step(self):
    def run(tokens_RxT, memory, cache):
      arguments = (memory, cache) if self.both else (cache,)
      return self.model.apply(self.variables, tokens_RxT, *arguments, method='step')
    return jax.jit(run)


QUICK = {'fixed lstm', 'every step gru', 'bahdanau', 'luong', 'local predictive', 'convolutional', 'lstm', 'window',
         'convolutions'}
"""One for each part of the code; the others take three minutes."""


@pytest.fixture(scope='module', params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                        for name in (*ENCODER_DECODERS, *LANGUAGE_MODELS)])
def case(request) -> Case:
  config = {**ENCODER_DECODERS, **LANGUAGE_MODELS}[request.param]
  model, random = build_model(config, V, V), np.random.default_rng(0)
  shapes = jax.eval_shape(partial(initialize, model), jax.random.key(0))
  # Biases and scales too: what is left at 0 or 1 could be forgotten unnoticed.
  return Case(model, {'params': jax.tree.map(lambda leaf: np.asarray(
      0.3 * random.standard_normal(leaf.shape), np.float32), shapes)})


def close(actual, expected, tolerance=2e-6):
  np.testing.assert_allclose(actual, expected, atol=tolerance * max(1.0, np.abs(expected).max()))


def test_logits_are_finite_float32_and_differ_from_word_to_word(case):
  logits_BxTxV = case.forward(*case.inputs())
  assert logits_BxTxV.shape == (4, T, V) and logits_BxTxV.dtype == jnp.float32
  assert np.isfinite(logits_BxTxV).all() and np.std(logits_BxTxV, axis=-1).min() > 0.01


def test_a_sentence_alone_and_one_in_a_batch_with_padding_get_the_same_logits(case):
  batch_BxTxV = case.forward(*case.inputs())
  alone_1xTxV = case.forward(*case.inputs(SOURCE_BxS[1:2, :3], TARGET_BxT[1:2, :3]))
  close(batch_BxTxV[1, :3], alone_1xTxV[0])


def test_the_order_of_sentences_in_a_batch_does_not_matter(case):
  order = np.array([2, 0, 3, 1])
  close(case.forward(*case.inputs(SOURCE_BxS[order], TARGET_BxT[order])), case.forward(*case.inputs())[order])


def nudged(nudges: dict):
  """Adds a value to what the embeddings of these names give."""
  def intercept(call, args, kwargs, context):
    value, module = call(*args, **kwargs), context.module
    if not isinstance(module, Embedding) or context.method_name != '__call__' or module.name not in nudges:
      return value
    return value + nudges[module.name].astype(value.dtype)

  return intercept


def test_gradients_flow_only_from_where_a_word_may_look(case):
  """d logits[b, t] / d embedding[c, s] is exactly 0 across sentences, for s > t and for padding."""
  weights_V = jnp.asarray(np.random.default_rng(1).standard_normal(V), jnp.float32)
  nudges = {'target_embedding': jnp.zeros((4, T, D))}
  if case.both:
    nudges['source_embedding'] = jnp.zeros((4, S, D))

  @jax.jit
  @jax.jacrev
  def jacobian(nudges):
    with nn.intercept_methods(nudged(nudges)):
      return case.model.apply(case.variables, *case.inputs()) @ weights_V

  reaches = {name: np.any(np.asarray(x_BxTxBxSxD) != 0, axis=-1) for name, x_BxTxBxSxD in jacobian(nudges).items()}
  same_sentence = np.eye(4, dtype=bool)[:, None, :, None]
  allowed = same_sentence & np.tri(T, dtype=bool)[None, :, None, :]
  assert not (reaches['target_embedding'] & ~allowed).any()
  # A target's own word always has a say, whatever the width of a kernel.
  assert (reaches['target_embedding'] | ~(same_sentence & np.eye(T, dtype=bool)[None, :, None, :])).all()
  if case.both:
    real_BxS = np.arange(S) < LENGTHS_B[:, None]
    allowed = np.broadcast_to(same_sentence & real_BxS[None, None], (4, T, 4, S))
    assert not (reaches['source_embedding'] & ~allowed).any()
    assert reaches['source_embedding'][0, :, 0, :6].any(axis=0).all(), 'every word of a source is heard'


@pytest.mark.parametrize('widths', [(1,) * T, (3, 2), (1, 3, 1)], ids=str)
def test_cached_decoding_equals_teacher_forcing(case, widths):
  """Also for two rows per sentence, each with words of its own, that share one memory."""
  rows = np.array([0, 0, 1, 1])
  whole_RxTxV = case.forward(*case.inputs(SOURCE_BxS[rows], TARGET_BxT))
  memory, cache = case.start(SOURCE_BxS[:2])
  logits, at = [], 0
  for width in widths:
    logits_RxTxV, cache = case.step(TARGET_BxT[:, at:at + width], memory, cache)
    logits.append(logits_RxTxV)
    at += width
  assert cache.index == T
  close(np.concatenate(logits, axis=1), whole_RxTxV, 1e-5)


def test_a_reordered_cache_continues_the_rows_it_was_taken_from(case):
  rows_R = np.array([1, 0, 3, 3])
  memory, cache = case.start(SOURCE_BxS[:2])
  _, cache = case.step(TARGET_BxT[:, :3], memory, cache)
  continued_RxT = np.concatenate([TARGET_BxT[rows_R, :3], TARGET_BxT[::-1, 3:] + 2], axis=1)
  logits_RxTxV, _ = case.step(continued_RxT[:, 3:], memory, cache.reorder(jnp.asarray(rows_R)))
  whole_RxTxV = case.forward(*case.inputs(SOURCE_BxS[np.array([0, 0, 1, 1])], continued_RxT))
  close(logits_RxTxV, whole_RxTxV[:, 3:], 1e-5)


def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_sequences(case):
  if not case.both:
    pytest.skip('a language model is decoded by sampling and by greedy search')
  longest = 3
  memory, cache = case.start(SOURCE_BxS[:1])
  cache = case.model.apply(case.variables, memory, longest, 81, method='init_cache')
  found = beam_search(lambda tokens, cache: case.step(tokens, memory, cache), cache, jnp.array([longest]), longest,
                      81, 1, 0.0)
  # Of those cut at the limit none is returned while one has ended.
  sequences = [(*path, EOS) for n in range(longest) for path in itertools.product(range(3, V), repeat=n)]
  inputs_NxT = np.array([[BOS, *sequence, *[0] * longest][:longest] for sequence in sequences])
  log_probs = np.asarray(jax.nn.log_softmax(case.forward(np.repeat(SOURCE_BxS[:1], len(sequences), 0), inputs_NxT)))
  totals = [sum(log_probs[n, t, token] for t, token in enumerate(sequence)) for n, sequence in enumerate(sequences)]
  best = int(np.argmax(totals))
  assert tuple(np.asarray(found.tokens_BxMxL)[0, 0, :int(found.lengths_BxM[0, 0])]) == sequences[best]
  close(found.log_prob_BxM[0, 0], totals[best], 1e-5)


def test_every_parameter_has_a_sharding_rule_and_a_gradient(case):
  def loss(params):
    return jnp.sum(jnp.sin(case.model.apply({'params': params}, *case.inputs())))

  for name, leaf in named_leaves(jax.jit(jax.grad(loss))(case.variables['params'])).items():
    assert len(logical_axes(name, leaf.ndim)) == leaf.ndim
    assert np.isfinite(leaf).all() and np.any(leaf != 0), name


def test_dropout_needs_a_key_and_changes_the_logits(case):
  model = case.model.clone(config=dataclasses.replace(case.model.config, dropout=0.5))
  calm = model.apply(case.variables, *case.inputs())
  close(calm, case.forward(*case.inputs()))
  drawn = model.apply(case.variables, *case.inputs(), dropout_key=jax.random.key(0))
  assert np.abs(drawn - calm).max() > 1e-3 and np.isfinite(drawn).all()


def test_the_config_survives_json(case):
  text = dict(corpus='text', source=None, target=None, limit=None, held_out=None, root='r', train='t', validation='v')
  config = Config(model=case.model.config, data=DataConfig(max_length=12, **({} if case.both else text)))
  assert from_json(to_json(config)) == config
