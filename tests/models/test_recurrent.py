"""Laws of the recurrent models, over cases that hold every cell, context, score and alignment."""

from __future__ import annotations

import itertools
import typing
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tfm.attention import alignments, score_functions
from tfm.config import ConfigError
from tfm.decoding.beam import beam_search
from tfm.models.build import build_model, initialize
from tfm.models.tap import Tap
from tfm.recurrent_config import RecurrentConfig
from tfm.special_ids import BOS, EOS, PAD
from tfm.training.optimizer import role

D, V, S, T = 6, 11, 5, 5
ONE_WAY = dict(bidirectional=False)
CASES = {
    'bahdanau': dict(decoder_layers=2),
    'dot-sparsemax': dict(cell='lstm', score='multiplicative', alignment='sparsemax', bridge='copy', **ONE_WAY),
    'scaled-entmax': dict(cell='tanh', query='current', score='scaled', alignment='entmax15', **ONE_WAY),
    'local-p-feeding': dict(cell='lstm', decoder_layers=2, query='current', input_feeding=True, score='general',
                            alignment='local_predictive', attention_window=2, readout='tanh'),
    'local-m': dict(query='current', score='biased_general', alignment='local_monotonic', attention_window=1),
    'hard': dict(score='activated_general', alignment='hard'),
    'cosine-feeding': dict(query='current', input_feeding=True, score='cosine', reverse_source=True, **ONE_WAY),
    'euclidean': dict(cell='lstm', query='current', score='euclidean', readout='linear', **ONE_WAY),
    'sutskever': dict(cell='lstm', encoder_layers=2, decoder_layers=2, context='start', bridge='copy',
                      reverse_source=True, readout='linear', **ONE_WAY),
    'cho': dict(context='every_step', tying='all'),
}
MODELS = {'lstm': dict(cell='lstm', decoder_layers=2), 'gru': dict(), 'tanh': dict(cell='tanh'),
          'window': dict(cell='window', order=3, decoder_layers=2)}
LENGTHS_B = np.array([5, 3, 0])
SOURCE_BxS = np.array([[5, 6, 7, 8, 2], [4, 9, 2, 0, 0], [0] * 5])
TARGET_BxT = np.array([[1, 7, 3, 4, 6], [1, 9, 6, 0, 0], [1, 5, 5, 8, 6]])


def make(**changes) -> RecurrentConfig:
  return RecurrentConfig(**{**dict(d_model=D, d_hidden=7), **changes})


@cache
def made(name):
  """Model and random parameters of a case."""
  config = make(**CASES[name]) if name in CASES else make(encoder_layers=0, **MODELS[name])
  model, random = build_model(config, V, V), np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: initialize(model, jax.random.key(0)))
  return model, {'params': jax.tree.map(lambda leaf: 0.5 * random.standard_normal(leaf.shape, np.float32), shapes)}


def test_the_cases_hold_every_choice():
  hints = typing.get_type_hints(RecurrentConfig)
  for name in ('cell', 'context', 'query', 'score', 'alignment', 'bridge', 'readout'):
    values = {getattr(made(case)[0].config, name) for case in (*CASES, *MODELS)}
    assert values == set(typing.get_args(hints[name])), name
  assert set(typing.get_args(hints['score'])) == set(score_functions.SCORES)
  assert set(typing.get_args(hints['alignment'])) == (
      set(alignments.ALIGNMENTS) - {'hard_sampled', 'soft_per_feature', 'local_window'})


@pytest.fixture(params=CASES)
def translator(request):
  model, variables = made(request.param)
  return model, variables, jax.jit(lambda source, target: model.apply(variables, source, target))


def decode_in_pieces(model, variables, source_BxS, tokens_RxT, widths):
  """Logits of rows, several for each source, fed in pieces of these widths."""
  memory = () if source_BxS is None else (jax.jit(lambda: model.apply(variables, source_BxS, method='encode'))(),)
  start = (*memory, T, len(tokens_RxT) // len(source_BxS)) if memory else (len(tokens_RxT), T)
  cache = model.apply(variables, *start, method='init_cache')
  step = jax.jit(lambda tokens_RxT, cache: model.apply(variables, tokens_RxT, *memory, cache, method='step'))
  logits, at = [], 0
  for width in widths:
    logits_RxTxV, cache = step(tokens_RxT[:, at:at + width], cache)
    assert logits_RxTxV.dtype == jnp.float32
    logits.append(logits_RxTxV)
    at += width
  assert cache.index == at
  assert {leaf.shape[0] for leaf in jax.tree.leaves(cache.steps)} == {len(tokens_RxT)}
  assert source_BxS is None or {leaf.shape[0] for leaf in jax.tree.leaves(cache.source)} <= {len(source_BxS)}
  return np.concatenate(logits, axis=1)


def test_cached_decoding_equals_teacher_forcing(translator):
  """For two rows per sentence, each with words of its own."""
  model, variables, forward = translator
  tokens_RxT = np.concatenate([TARGET_BxT[:2], TARGET_BxT[1:] % 5 + 3])
  whole_RxTxV = forward(SOURCE_BxS[[0, 0, 1, 1]], tokens_RxT)
  logits_RxTxV = decode_in_pieces(model, variables, SOURCE_BxS[:2], tokens_RxT, (3, 1, 1))
  np.testing.assert_allclose(logits_RxTxV, whole_RxTxV, atol=5e-6)
  assert np.std(whole_RxTxV, axis=-1).min() > 0.02


@pytest.mark.parametrize('name', MODELS)
def test_cached_language_model_equals_teacher_forcing(name):
  model, variables = made(name)
  whole_RxTxV = jax.jit(lambda: model.apply(variables, TARGET_BxT))()
  np.testing.assert_allclose(decode_in_pieces(model, variables, None, TARGET_BxT, (2, 1, 1, 1)), whole_RxTxV,
                             atol=2e-6)


def test_a_sentence_alone_and_one_in_a_batch_with_padding_get_the_same_logits(translator):
  _, _, forward = translator
  batch_BxTxV = forward(SOURCE_BxS, TARGET_BxT)
  assert np.isfinite(batch_BxTxV).all()
  np.testing.assert_allclose(batch_BxTxV[1:2, :3], forward(SOURCE_BxS[1:2, :3], TARGET_BxT[1:2, :3]), atol=5e-6)


def reaches(model, variables, *ids):
  """Which embeddings each position's logits depend on: {side: bool BxTxBxS}, by gradients through the taps."""
  weights_V = jnp.asarray(np.random.default_rng(1).standard_normal(V), jnp.float32)

  def outputs_BxT(nudges):
    def intercept(call, args, kwargs, context):
      value, module = call(*args, **kwargs), context.module
      return value + nudges[module.name] if isinstance(module, Tap) and module.name in nudges else value
    with nn.intercept_methods(intercept):
      return model.apply(variables, *ids) @ weights_V

  names = ('source_embed', 'target_embed')[-len(ids):]
  nudges = {name: jnp.zeros((*each.shape, D)) for name, each in zip(names, ids)}
  return {name: np.any(np.asarray(x) != 0, axis=-1) for name, x in jax.jit(jax.jacrev(outputs_BxT))(nudges).items()}


def test_gradients_flow_exactly_from_where_a_word_may_look(translator):
  model, variables, _ = translator
  found = reaches(model, variables, SOURCE_BxS, TARGET_BxT)
  same = np.eye(3, dtype=bool)[:, None, :, None]
  np.testing.assert_array_equal(found['target_embed'], same & np.tri(T, dtype=bool)[None, :, None, :])
  real_BxS = np.arange(S) < LENGTHS_B[:, None]
  np.testing.assert_array_equal(found['source_embed'], np.broadcast_to(same & real_BxS[None, None], (3, T, 3, S)))


@pytest.mark.parametrize('name', MODELS)
def test_a_state_sums_up_all_words_and_a_window_only_the_last(name):
  """Latent autoregressive against autoregressive of a fixed order."""
  found = reaches(*made(name), TARGET_BxT)['target_embed']
  back_TxT = np.arange(T)[:, None] - np.arange(T)
  seen_TxT = (back_TxT >= 0) & (back_TxT < (3 if name == 'window' else T))
  np.testing.assert_array_equal(found, np.eye(3, dtype=bool)[:, None, :, None] & seen_TxT[None, :, None, :])


@pytest.mark.parametrize('name', ['bahdanau', 'local-m', 'sutskever', 'cho'])
def test_only_attention_sees_more_than_the_last_states(name):
  """Without it the source reaches the target through a vector of fixed width and in no other way."""
  model, variables = made(name)
  memory = jax.jit(lambda: model.apply(variables, SOURCE_BxS, method='encode'))()
  d_states, d_finals = jax.jit(jax.grad(
      lambda states, finals: jnp.sum(model.apply(variables, TARGET_BxT, memory.replace(
          states_BxSxV=states, finals=finals), method='decode')[..., 3]), (0, 1)))(memory.states_BxSxV, memory.finals)
  assert np.any(d_states) == (model.config.context == 'attention')
  assert all(np.any(part) for part in d_finals[-1])
  assert sum(part[0].size for part in d_finals[-1]) <= 2 * model.config.memory_width


@pytest.mark.parametrize('name', MODELS)
def test_texts_packed_in_a_row_are_as_if_alone(name):
  model, variables = made(name)
  first, second = TARGET_BxT[:1, :4], TARGET_BxT[1:2, :3]
  packed, *alone = jax.jit(lambda: (
      model.apply(variables, np.concatenate([first, second], axis=1), np.array([[5] * 4 + [2] * 3])),
      model.apply(variables, first), model.apply(variables, second)))()
  np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), atol=2e-6)


def test_the_source_is_read_from_its_end():
  """The same as a reversed sentence read from its beginning, but the states stay where their words are."""
  model, variables = made('sutskever')
  forward = build_model(make(**CASES['sutskever'] | dict(reverse_source=False)), V, V)
  params = dict(variables['params'])
  params['encoder'] = {name: {'forward': layer['backward']} for name, layer in params['encoder'].items()}
  backward, straight = jax.jit(lambda: (
      model.apply(variables, SOURCE_BxS[1:2], method='encode'),
      forward.apply({'params': params}, SOURCE_BxS[1:2, 2::-1], method='encode')))()
  jax.tree.map(np.testing.assert_array_equal, backward.finals, straight.finals)
  np.testing.assert_array_equal(backward.states_BxSxV[:, :3], straight.states_BxSxV[:, ::-1])


@pytest.mark.parametrize('name', ['bahdanau', 'local-p-feeding', 'sutskever'])
def test_a_beam_that_holds_everything_finds_what_enumeration_finds(name):
  vocabulary, limit, beam = 6, 3, 36
  config = make(**CASES[name], pad_id=PAD)
  model, random = build_model(config, vocabulary, vocabulary), np.random.default_rng(3)
  shapes = jax.eval_shape(lambda: initialize(model, jax.random.key(0)))
  variables = {'params': jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)}
  source_BxS = np.array([[4, 5, 3, 2], [5, 2, 0, 0]])

  @jax.jit
  def search():
    memory = model.apply(variables, source_BxS, method='encode')
    cache = model.apply(variables, memory, limit, beam, method='init_cache')
    return beam_search(lambda tokens, cache: model.apply(variables, tokens, memory, cache, method='step'), cache,
                       jnp.array([limit] * 2), limit, beam, num_hypotheses=10, alpha=0.0)

  words = [token for token in range(vocabulary) if token not in (PAD, BOS, EOS)]
  every = [[*body, EOS] for n in range(limit) for body in itertools.product(words, repeat=n)]
  inputs = np.array([[BOS, *tokens[:-1], *[PAD] * (limit - len(tokens))] for tokens in every])
  forward = jax.jit(lambda source: jax.nn.log_softmax(model.apply(variables, source, inputs)))
  found = search()
  for b in range(2):
    log_probs = forward(np.repeat(source_BxS[b:b + 1], len(every), axis=0))
    totals = [sum(float(rows[t, token]) for t, token in enumerate(tokens)) for rows, tokens in zip(log_probs, every)]
    best = sorted(zip(totals, every), reverse=True)[:10]
    assert [found.tokens_BxMxL[b, m, :found.lengths_BxM[b, m]].tolist() for m in range(10)] == [
        tokens for _, tokens in best]
    np.testing.assert_allclose(found.scores_BxM[b], [total for total, _ in best], rtol=1e-5)


@pytest.mark.parametrize('name', [*CASES, *MODELS])
def test_every_parameter_is_sharded_and_known_to_the_optimizer(name):
  """Every matrix for itself, those of the gates too."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(made(name)[1]):
    path = jax.tree_util.keystr(path, simple=True, separator='/')
    own = role(path, leaf.ndim)
    assert (own.group in ('hidden', 'embedding')) == (leaf.ndim - own.batch == 2), path


@pytest.mark.parametrize('name', ['bahdanau', 'local-p-feeding', 'hard', 'cho', 'lstm', 'window'])
def test_every_parameter_is_used(name):
  model, variables = made(name)
  ids = (SOURCE_BxS, TARGET_BxT)[-(2 if name in CASES else 1):]
  gradients = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(3 * model.apply({'params': params}, *ids)))))(
      variables['params'])
  unused = [path for path, leaf in jax.tree_util.tree_leaves_with_path(gradients) if not np.any(leaf)]
  assert not unused


@pytest.mark.parametrize('changes', [
    dict(decoder_layers=2), dict(query='current', input_feeding=True), dict(context='every_step'),
    dict(encoder_layers=0, cell='window', order=2)], ids=str)
def test_dropout_is_drawn_from_the_key_and_only_from_it(changes, random_params):
  config = make(dropout=0.4, **changes)
  model = build_model(config, V, V)
  ids = (SOURCE_BxS, TARGET_BxT)[-(2 if config.encoder_layers else 1):]
  variables = random_params(model, *ids)
  keys = jax.random.split(jax.random.key(0), 2)[jnp.array([0, 1, 0])]
  one, other, again = jax.jit(jax.vmap(lambda key: model.apply(variables, *ids, dropout_key=key)))(keys)
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).max() > 0.01
  plain = [str(jax.make_jaxpr(build_model(each, V, V).apply)(variables, *ids)) for each in (config, make(**changes))]
  assert plain[0] == plain[1]


def test_dropout_falls_on_what_enters_a_layer_and_on_the_readout(random_params):
  """Zeros in the embeddings, in what the second layer reads and in what `unembed` reads; none in the states."""
  model = build_model(make(encoder_layers=0, decoder_layers=2, dropout=0.5), V, V)
  variables = random_params(model, TARGET_BxT)
  hidden, found = jax.jit(lambda: model.apply(
      variables, TARGET_BxT, dropout_key=jax.random.key(0), method='hidden', mutable=['intermediates'],
      capture_intermediates=lambda module, _: isinstance(module, Tap)))()
  found = found['intermediates']
  assert 0.3 < np.mean(found['target_embed']['__call__'][0] == 0) < 0.7 and 0.3 < np.mean(hidden == 0) < 0.7
  assert all(np.all(found['decoder'][f'layers_{i}']['states']['__call__'][0] != 0) for i in range(2))


@pytest.mark.parametrize('name', ['bahdanau', 'window'])
def test_bfloat16_multiplies_in_bfloat16_and_ends_near_float32(name):
  model, variables = made(name)
  half = build_model(make(**{**(CASES | MODELS)[name], 'dtype': 'bfloat16'},
                          **({} if name in CASES else dict(encoder_layers=0))), V, V)
  ids = (SOURCE_BxS, TARGET_BxT)[-(2 if name in CASES else 1):]
  types = set()

  def visit(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == 'dot_general':
        types.update(str(x.aval.dtype) for x in equation.invars)
      for value in equation.params.values():
        if hasattr(value, 'jaxpr') or hasattr(value, 'eqns'):
          visit(getattr(value, 'jaxpr', value))

  visit(jax.make_jaxpr(half.apply)(variables, *ids).jaxpr)
  assert types == {'bfloat16'}
  np.testing.assert_allclose(jax.jit(half.apply)(variables, *ids), jax.jit(model.apply)(variables, *ids), atol=0.15)


def test_attention_in_the_terms_of_the_survey():
  (name, spec), = made('local-p-feeding')[0].attention_specs.items()
  assert (name, spec.scoring, spec.alignment) == ('decoder.cross_attention', 'general', 'local_predictive')
  assert made('cho')[0].attention_specs == made('gru')[0].attention_specs == {}


@pytest.mark.parametrize('changes, sentence', [
    (dict(encoder_layers=-1), 'encoder_layers is -1'),
    (dict(decoder_layers=0), 'decoder_layers is 0'),
    (dict(attention_width=0), 'attention_width is 0'),
    (dict(dropout=1.0), 'dropout is 1.0'),
    (dict(order=3), "order is 3 with cell='gru'"),
    (dict(cell='window', order=3), "cell='window' has no state that could carry a source"),
    (dict(cell='window', encoder_layers=0), "order is None with cell='window'"),
    (dict(forget_bias=2.0), 'forget_bias has no effect'),
    (dict(encoder_layers=0, bidirectional=False), 'bidirectional has no effect without an encoder'),
    (dict(encoder_layers=0, context='start'), 'context has no effect without an encoder'),
    (dict(encoder_layers=0, score='general'), 'score has no effect without an encoder'),
    (dict(encoder_layers=0, tying='inputs'), "tying='inputs' shares two embeddings"),
    (dict(context='start', score='general'), "score has no effect with context='start'"),
    (dict(context='every_step', query='current'), "query has no effect with context='every_step'"),
    (dict(reverse_source=True), 'reverse_source has no effect'),
    (dict(bridge='copy'), "bridge='copy' gives each decoder layer"),
    (dict(bridge='copy', bidirectional=False, decoder_layers=2), 'there are 2 and 1'),
    (dict(input_feeding=True), "input_feeding has no effect with query='previous'"),
    (dict(alignment='local_monotonic'), 'attention_window is None'),
    (dict(attention_window=3), "attention_window is 3 with alignment='soft'"),
    (dict(score='general', attention_width=8), 'attention_width has no effect'),
    (dict(score='scaled'), "score='scaled' compares a query with keys as wide"),
    (dict(alignment='hard_sampled'), "alignment is 'hard_sampled'; choose one of")])
def test_what_does_not_go_together_is_refused(changes, sentence):
  with pytest.raises(ConfigError) as error:
    RecurrentConfig(**changes)
  assert sentence in str(error.value)
