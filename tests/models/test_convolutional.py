"""ConvS2S and the convolutional language model: what the papers say of them, and what every model promises."""

from __future__ import annotations

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis.cross_attention import cross_attention
from tfm.attention import masks
from tfm.attention.taxonomy import describe
from tfm.config import ConfigError
from tfm.convolutional_config import ConvolutionalConfig
from tfm.decoding.beam import beam_search
from tfm.models.convolutional import ConvolutionalDecoderOnly, ConvolutionalEncoderDecoder
from tfm.models.convolutional_blocks import Attended, DecoderLayer
from tfm.models.multihead import KeysValues
from tfm.models.tap import Tap
from tfm.special_ids import BOS, EOS

SMALL = dict(encoder_layers=2, decoder_layers=2, d_model=8, d_hidden=12, max_positions=12, dropout=0.0)
VARIANTS = [dict(dilation='doubling', positions='none', max_positions=None, weight_norm=False, tying='all'),
            dict(kernel_width=5, tying='target', scale_residuals=False, output_bias=False)]
LENGTHS_B = np.array([6, 3, 4])
"""Of the source sentences of `ids`."""


def config_of(**fields):
  return ConvolutionalConfig(**{**SMALL, **fields})


@pytest.fixture
def made(random_params, ids):
  """`made(**fields)` -> an encoder-decoder and random parameters."""
  def make(**fields):
    config = config_of(**fields)
    model = ConvolutionalEncoderDecoder(config, 17 if config.tying == 'all' else 19, 17)
    return model, random_params(model, *ids)
  return make


@pytest.fixture
def made_alone(random_params, ids):
  """`made_alone(**fields)` -> a language model and random parameters."""
  def make(**fields):
    model = ConvolutionalDecoderOnly(config_of(encoder_layers=0, **fields), 17)
    return model, random_params(model, ids[1])
  return make


# -- the parts --------------------------------------------------------------------------------------------------------


def test_a_decoder_layer_is_that_of_the_paper(random_params):
  """Section 3.2 to 3.4 in numpy: GLU, a way around, attention by z to z + e, and the scales that keep the variance."""
  random = np.random.default_rng(0)
  x_BxTxF, g_BxTxD, z_BxSxD, e_BxSxD = (random.standard_normal(shape).astype(np.float32) for shape in (
      (2, 5, 12), (2, 5, 8), (2, 4, 8), (2, 4, 8)))
  lengths_B, half = [4, 2], np.sqrt(0.5)
  attended = Attended(KeysValues(jnp.asarray(z_BxSxD)[:, :, None], jnp.asarray(half * (z_BxSxD + e_BxSxD))[:, :, None]),
                      masks.lengths(jnp.array(lengths_B)))
  layer = DecoderLayer(config_of(dilation='doubling'), 1)
  variables = random_params(layer, x_BxTxF, g_BxTxD, attended, None, None)

  def weights(*path):
    params = variables['params']
    for name in path:
      params = params[name]
    kernel = np.float64(params['kernel'])
    length = np.sqrt((kernel**2).sum(tuple(range(kernel.ndim - 1))))
    return kernel * params['scale'] / length, np.float64(params['bias'])

  def linear(x, *path):
    kernel, bias = weights(*path)
    return x @ kernel + bias

  kernel, bias = weights('convolution')
  found = jax.jit(layer.apply)(variables, x_BxTxF, g_BxTxD, attended, None, None)
  for b, t in itertools.product(range(2), range(5)):
    y = bias + sum(x_BxTxF[b, s] @ kernel[i] for i, s in enumerate((t - 4, t - 2, t)) if s >= 0)
    h = y[:12] / (1 + np.exp(-y[12:]))
    d = half * (linear(h, 'cross_attention', 'query_projection') + g_BxTxD[b, t])
    S = lengths_B[b]
    a = np.exp(z_BxSxD[b, :S] @ d)
    c = S * np.sqrt(1 / S) * (a / a.sum()) @ (half * (z_BxSxD + e_BxSxD))[b, :S]
    h = half * (h + linear(c, 'cross_attention', 'output_projection'))
    np.testing.assert_allclose(found[b, t], half * (h + x_BxTxF[b, t]), atol=2e-6)


def test_without_an_encoder_a_layer_is_a_gated_convolution_and_a_way_around_it(made_alone):
  params = made_alone()[1]['params']
  assert set(params) == {'target_embedding', 'target_positions', 'output', 'output_bias', 'decoder'}
  assert set(params['decoder']) == {'input_projection', 'layers_0', 'layers_1', 'output_projection'}
  assert set(params['decoder']['layers_0']) == {'convolution'}


def test_the_attention_is_multiplicative_and_takes_several_hops():
  (spec,) = describe(ConvolutionalEncoderDecoder(config_of(), 19, 17)).values()
  assert (spec.scoring, spec.alignment, spec.query_multiplicity) == ('multiplicative', 'soft', 'multi_hop')
  assert describe(ConvolutionalDecoderOnly(config_of(encoder_layers=0), 17)) == {}


def test_patterns_are_read_by_layer_and_leave_padding_out(made, ids):
  model, variables = made()
  patterns_BxNxHxTxS = cross_attention(model, variables['params'], *ids)
  assert patterns_BxNxHxTxS.shape[1:3] == model.config.cross_attention_shape == (2, 1)
  np.testing.assert_allclose(patterns_BxNxHxTxS.sum(-1), 1, rtol=1e-5)
  hidden = np.arange(6) >= LENGTHS_B[:, None]
  assert (np.where(hidden[:, None, None, None], patterns_BxNxHxTxS, 0) == 0).all()
  assert np.ptp(patterns_BxNxHxTxS, axis=1).max() > 0.01  # a pattern for each layer


# -- padding and batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('fields', VARIANTS, ids=str)
def test_padding_and_company_change_nothing(made, ids, fields):
  model, variables = made(**fields)
  forward, (source_BxS, target_BxT) = jax.jit(partial(model.apply, variables)), ids
  batch_BxTxV = forward(source_BxS, target_BxT)
  assert batch_BxTxV.shape == (3, 5, 17) and batch_BxTxV.dtype == jnp.float32 and np.std(batch_BxTxV) > 0.1
  for b, (S, T) in enumerate(((6, 5), (3, 2), (4, 4))):
    alone = forward(source_BxS[b:b + 1, :S], target_BxT[b:b + 1, :T])
    np.testing.assert_allclose(batch_BxTxV[b, :T], alone[0], atol=2e-6)


def test_an_empty_source_is_no_source(made, ids):
  """No NaN, in the gradients neither, and the same however wide the padding is."""
  model, variables = made()

  @jax.jit
  def run(params, source_BxS):
    return jax.value_and_grad(lambda params: jnp.sum(jnp.sin(model.apply(params, source_BxS, ids[1][:1]))))(params)

  (value, gradients), (wider, _) = run(variables, jnp.zeros((1, 2), int)), run(variables, jnp.zeros((1, 5), int))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients)) and np.isfinite(value)
  assert value == pytest.approx(float(wider), rel=1e-5)


def test_a_mask_that_is_given_is_the_one_that_is_used(made, ids):
  model, variables = made()
  encode = jax.jit(lambda source_BxS, mask=None: model.apply(variables, source_BxS, mask, method='encode'))
  shorter = masks.lengths(jnp.array([5, 3, 4]))
  memory, cut = encode(ids[0], shorter), encode(ids[0].at[0, 5].set(0))
  np.testing.assert_allclose(memory.states_BxSxD, cut.states_BxSxD, atol=1e-6)
  np.testing.assert_array_equal(memory.mask.lengths_B, cut.mask.lengths_B)
  assert np.abs(encode(ids[0]).states_BxSxD - memory.states_BxSxD)[0, :5].max() > 1e-3


# -- who sees whom ----------------------------------------------------------------------------------------------------


def nudge(name, value):
  """Adds a value to what the tap of this name passes on."""
  def intercept(call, args, kwargs, context):
    found = call(*args, **kwargs)
    return found + value if isinstance(context.module, Tap) and context.module.name == name else found
  return nn.intercept_methods(intercept)


def reaches(function, name, width):
  """bool: whether d output[t] / d embedding[s] is anything but exactly 0; `function` gives 1xTxD."""
  def summed(nudge_SxD):
    with nudge(name, nudge_SxD[None]):
      return function()[0].sum(-1)
  return np.any(np.asarray(jax.jit(jax.jacrev(summed))(jnp.zeros((width, 8)))) != 0, axis=-1)


FIELDS = [dict(), dict(kernel_width=5), dict(dilation='doubling'), dict(kernel_width=1)]


@pytest.mark.parametrize('fields', [*FIELDS, dict(kernel_width=2, dilation='doubling'), dict(kernel_width=4)], ids=str)
def test_a_decoder_sees_its_receptive_field_and_nothing_else(made_alone, fields):
  T = 20
  model, variables = made_alone(**{**fields, 'max_positions': T})
  seen = reaches(lambda: model.apply(variables, jnp.full((1, T), 5), method='hidden'), 'target_embed', T)
  behind = np.arange(T)[:, None] - np.arange(T)
  assert 1 <= model.config.receptive_field.decoder < T and model.config.receptive_field.encoder is None
  np.testing.assert_array_equal(seen, (behind >= 0) & (behind < model.config.receptive_field.decoder))


@pytest.mark.parametrize('fields', FIELDS, ids=str)
def test_an_encoder_sees_its_receptive_field_on_both_sides_and_no_padding(made, fields):
  S, length = 20, 16
  model, variables = made(**{**fields, 'max_positions': S})
  source_1xS = jnp.where(jnp.arange(S) < length, 5, 0)[None]
  seen = reaches(lambda: model.apply(variables, source_1xS, method='encode').states_BxSxD, 'source_embed', S)
  real, apart = np.arange(S) < length, np.abs(np.arange(S)[:, None] - np.arange(S))
  within = apart <= model.config.receptive_field.encoder // 2
  np.testing.assert_array_equal(seen, within & real & real[:, None])


def test_a_translation_sees_all_of_its_source_and_no_word_to_come(made, ids):
  model, variables = made()
  one = [x[1:2] for x in ids]
  source, target = (reaches(lambda: model.apply(variables, *one), f'{side}_embed', width)
                    for side, width in (('source', 6), ('target', 5)))
  np.testing.assert_array_equal(source, np.broadcast_to(np.arange(6) < LENGTHS_B[1], (5, 6)))
  np.testing.assert_array_equal(target, np.tri(5, dtype=bool))


def test_texts_packed_in_a_row_are_as_if_alone(made_alone, ids):
  for fields in (dict(), dict(dilation='doubling', kernel_width=2)):
    model, variables = made_alone(**fields)
    first, second = ids[1][:1, :4], ids[1][2:, 1:4]
    forward = jax.jit(partial(model.apply, variables))
    packed = forward(jnp.concatenate([first, second], axis=1), jnp.array([[5, 5, 5, 5, 2, 2, 2]]))
    np.testing.assert_allclose(packed, jnp.concatenate([forward(first), forward(second)], axis=1), atol=2e-6)


# -- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('fields', VARIANTS, ids=str)
def test_cached_decoding_equals_teacher_forcing(made, ids, fields):
  """In pieces of any width, with two rows per sentence, each with words of its own."""
  model, variables = made(**fields)
  source_BxS, rows = ids[0][:2], jnp.array([0, 0, 1, 1])
  target_RxT = jnp.array([[1, 7, 11, 4, 16, 9], [1, 9, 3, 3, 5, 6], [1, 5, 5, 12, 8, 8], [1, 3, 4, 5, 13, 7]])
  whole_RxTxV = jax.jit(model.apply)(variables, source_BxS[rows], target_RxT)

  @jax.jit
  def begin():
    memory = model.apply(variables, source_BxS, method='encode')
    return memory, model.apply(variables, memory, 12, 2, method='init_cache')

  memory, start = begin()
  step = jax.jit(partial(model.apply, variables, method='step'))
  for widths in ((1, 1, 1, 1, 1, 1), (4, 1, 1)):
    cache, logits = start, []
    for tokens in jnp.split(target_RxT, np.cumsum(widths)[:-1], axis=1):
      more, cache = step(tokens, memory, cache)
      logits.append(more)
    assert cache.index == 6
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), whole_RxTxV, atol=1e-5)


@pytest.mark.parametrize('fields', [dict(), dict(kernel_width=2, dilation='doubling'), dict(kernel_width=1)], ids=str)
def test_a_language_model_goes_on_from_any_prompt(made_alone, ids, fields):
  model, variables = made_alone(**fields)
  whole = jax.jit(model.apply)(variables, ids[1])
  cache = model.apply(variables, 3, 12, method='init_cache')
  step = jax.jit(partial(model.apply, variables, method='step'))
  first, cache = step(ids[1][:, :3], cache)
  logits = [first]
  for t in (3, 4):
    more, cache = step(ids[1][:, t:t + 1], cache)
    logits.append(more)
  np.testing.assert_allclose(jnp.concatenate(logits, axis=1), whole, atol=1e-5)


def test_a_cache_holds_rows_first_the_last_inputs_of_each_layer_and_one_memory_per_sentence(made, ids):
  model, variables = made(dilation='doubling')

  def start():
    return model.apply(variables, model.apply(variables, ids[0], method='encode'), 12, 4, method='init_cache')

  cache = jax.eval_shape(start)
  assert [leaf.shape for leaf in jax.tree.leaves(cache.steps)] == [(12, 2, 12), (12, 4, 12)]
  assert [leaf.shape for leaf in jax.tree.leaves(cache.source)] == [(3, 6, 1, 8)] * 2
  assert cache.index.dtype == jnp.int32


def test_a_beam_that_holds_everything_finds_what_enumeration_finds(random_params):
  """All outputs of at most 3 tokens of a vocabulary of 5, each scored by teacher forcing."""
  model = ConvolutionalEncoderDecoder(config_of(), 5, 5)
  source_BxS, L, M = jnp.array([[3, 4, 2], [4, 2, 0]]), 3, 32
  variables = random_params(model, source_BxS, source_BxS)
  outputs = [[*words, EOS] for n in range(L) for words in itertools.product((3, 4), repeat=n)]
  outputs += [list(words) for words in itertools.product((3, 4), repeat=L)]
  rows = np.array([[BOS, *words, *[0] * (L - len(words))] for words in outputs])

  @jax.jit
  def score(source_1xS):
    logits = model.apply(variables, jnp.repeat(source_1xS, len(rows), axis=0), rows[:, :-1])
    taken = jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(rows[:, 1:] != 0, taken, 0), axis=1)

  @jax.jit
  def search(source_BxS):
    memory = model.apply(variables, source_BxS, method='encode')
    cache = model.apply(variables, memory, L, M, method='init_cache')
    return beam_search(lambda tokens, cache: model.apply(variables, tokens, memory, cache, method='step'), cache,
                       jnp.array([L, L]), L, M, num_hypotheses=4, alpha=0.0)

  found = search(source_BxS)
  for b in range(2):
    scores = np.asarray(score(source_BxS[b:b + 1]))
    ended = sorted((-s, words) for s, words in zip(scores.tolist(), outputs) if words[-1] == EOS)[:4]
    for m, (negative, words) in enumerate(ended):
      assert found.tokens_BxMxL[b, m, :found.lengths_BxM[b, m]].tolist() == words
      assert found.scores_BxM[b, m] == pytest.approx(-negative, abs=1e-5)


# -- training ---------------------------------------------------------------------------------------------------------


def test_the_encoder_gets_its_gradient_divided_by_the_number_of_attentions(made, ids):
  """Its embeddings too, but for what reaches them as values of attention; the decoder as without."""
  gradients = []
  for scaled in (True, False):
    model, variables = made(scale_encoder_gradient=scaled)

    def loss(params, model=model):
      return jnp.sum(jnp.sin(model.apply({'params': params}, *ids)))

    gradients.append(jax.jit(jax.grad(loss))(variables['params']))
  (with_scale, without), N = gradients, model.config.decoder_layers
  for name in ('encoder', 'decoder', 'target_embedding', 'output'):
    factor = N if name == 'encoder' else 1
    jax.tree.map(lambda a, b, factor=factor: np.testing.assert_allclose(factor * a, b, rtol=1e-4, atol=1e-4),
                 with_scale[name], without[name])
  small, whole = with_scale['source_embedding']['table'], without['source_embedding']['table']
  assert np.abs(small - whole).max() > 0.01 and np.abs(N * small - whole).max() > 0.01


def test_dropout_falls_on_embeddings_inputs_of_convolutions_and_the_output(made_alone, ids):
  model, variables = made_alone(dropout=0.4)
  seen = {}

  def watch(call, args, kwargs, context):
    found, name = call(*args, **kwargs), context.module.name
    if context.method_name == '__call__' and name in ('convolution', 'target_embed', 'output_projection', 'decoder'):
      seen.setdefault(name, []).append(args[0] if name == 'convolution' else found)
    return found

  ids_BxT = jnp.tile(ids[1], (6, 1))
  for key in (jax.random.key(0), None):
    seen.clear()
    with nn.intercept_methods(watch):
      model.apply(variables, ids_BxT, None, key, method='hidden')
    values = [*seen['target_embed'], *seen['convolution'], *seen['decoder'][-1:]]
    assert len(values) == 1 + 2 + 1
    for value in values:
      zeros = np.mean(np.asarray(value) == 0)
      assert abs(zeros - 0.4) < 4 * (0.24 / value.size)**0.5 if key is not None else zeros == 0
  assert not np.any(np.asarray(seen['output_projection'][0]) == 0)


def test_bfloat16_ends_near_float32(made, ids):
  losses = []
  for dtype in ('float32', 'bfloat16'):
    model, variables = made(dtype=dtype)
    logits_BxTxV = jax.jit(model.apply)(variables, *ids)
    assert logits_BxTxV.dtype == jnp.float32
    losses.append(float(-jax.nn.log_softmax(logits_BxTxV)[..., 5].mean()))
  assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('fields, sentence', [
    (dict(kernel_width=4), 'kernel_width is 4, but an encoder.*odd'),
    (dict(kernel_width=0), 'kernel_width is 0'),
    (dict(decoder_layers=0), 'decoder_layers is 0'),
    (dict(encoder_layers=-1), 'encoder_layers is -1'),
    (dict(kernel_width=1, dilation='doubling'), "dilation='doubling' has no effect with kernel_width=1"),
    (dict(max_positions=None), "positions='learned' needs a table size"),
    (dict(positions='none'), "max_positions has no effect with positions='none'"),
    (dict(dropout=1.0), 'dropout is 1.0'),
    (dict(encoder_layers=0, tying='inputs'), "tying='inputs' shares two embeddings"),
    (dict(encoder_layers=0, scale_encoder_gradient=False), 'scale_encoder_gradient=False has no effect')], ids=str)
def test_what_cannot_be_is_refused(fields, sentence):
  with pytest.raises(ConfigError, match=sentence):
    config_of(**fields)


def test_more_positions_than_the_table_has_are_refused(made, made_alone, ids):
  model, variables = made(max_positions=6)
  with pytest.raises(ValueError, match='7 source positions exceed.*max_positions=6'):
    jax.eval_shape(model.apply, variables, jnp.ones((1, 7), int), ids[1])
  memory = jax.eval_shape(partial(model.apply, method='encode'), variables, ids[0])
  for one, params, first in ((model, variables, memory), (*made_alone(max_positions=6), 2)):
    with pytest.raises(ValueError, match='7 target positions exceed.*max_positions=6'):
      one.apply(params, first, 7, method='init_cache')
