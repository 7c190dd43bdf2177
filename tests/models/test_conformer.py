"""Convolution beside attention, against direct sums and equations written out by hand, and the laws of padding."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tfm.attention import masks
from tfm.config import TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.models.conformer import ConformerLayer, Convolution, ConvolutionLayer, Depthwise
from tfm.models.experts import Experts
from tfm.models.feed_forward import FeedForward
from tfm.models.layers import Tokens
from tfm.models.layout import to_layout
from tfm.models.multihead import MultiHeadAttention
from tfm.models.tap import Tap
from tfm.training.named_arrays import named_leaves

B, S, D = 2, 9, 16
X_BxSxD = jnp.asarray(np.random.default_rng(0).standard_normal((B, S, D)), jnp.float32)
LENGTHS_B = np.array([9, 6])
REAL_BxS = np.arange(S) < LENGTHS_B[:, None]
TOKENS = Tokens(masks.lengths(jnp.asarray(LENGTHS_B)), real_BxT=jnp.asarray(REAL_BxS))
VARIANTS = [(kind, norm) for kind in ('before', 'after', 'parallel') for norm in ('post', 'pre', 'sandwich')]
VARIANTS.append(('conformer', 'pre'))

each_variant = pytest.mark.parametrize('kind, norm', VARIANTS)


def config_of(**changes) -> TransformerConfig:
  return TransformerConfig(**{**dict(d_model=D, d_ff=24, num_heads=2, dropout=0.0, convolution='after',
                                     kernel_width=3), **changes})


# -- by hand ----------------------------------------------------------------------------------------------------------


def direct_sum(params, x_BxSxD):
  """The convolution, term by term."""
  kernel_WxD = np.asarray(params['kernel'], np.float64)
  W, y = len(kernel_WxD), np.zeros(x_BxSxD.shape)
  for b, s, j in np.ndindex(len(x_BxSxD), x_BxSxD.shape[1], W):
    if 0 <= s + j - (W - 1) // 2 < x_BxSxD.shape[1]:
      y[b, s] += kernel_WxD[j] * np.asarray(x_BxSxD[b, s + j - (W - 1) // 2], np.float64)
  return y + np.asarray(params.get('bias', 0.0))


def normalized(params, x):
  x = np.asarray(x, np.float64)
  if 'bias' in params:
    x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  return x * np.asarray(params['scale']) + np.asarray(params.get('bias', 0.0))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def convolved(params, x_BxSxD, real_BxS=REAL_BxS):
  """The convolution module (section 2.2 of the paper) but for its first norm and its dropout."""

  def linear(x, name):
    return np.asarray(x, np.float64) @ np.asarray(params[name]['kernel']) + np.asarray(params[name].get('bias', 0.0))

  gated = linear(x_BxSxD, 'inner') * sigmoid(linear(x_BxSxD, 'gate')) * real_BxS[..., None]
  x = normalized(params['norm'], direct_sum(params['depthwise'], gated))
  return linear(x * sigmoid(x), 'outer')


@pytest.mark.parametrize('biases', ['mlp', 'none'])
@pytest.mark.parametrize('width', [1, 3, 7, 21])
def test_the_depthwise_convolution_is_the_direct_sum(random_params, width, biases):
  """Also of a kernel that is wider than the sentence."""
  module = Depthwise(config_of(kernel_width=width, biases=biases))
  variables = random_params(module, X_BxSxD)
  expected = direct_sum(variables['params'], X_BxSxD)
  np.testing.assert_allclose(jax.jit(module.apply)(variables, X_BxSxD), expected, atol=1e-6)
  assert {name: leaf.shape for name, leaf in variables['params'].items()} == {
      'kernel': (width, D), **({'bias': (D,)} if biases == 'mlp' else {})}


@pytest.mark.parametrize('biases, norm_type', [('mlp', 'layer'), ('all', 'layer'), ('qkv', 'rms'), ('none', 'rms')])
def test_the_module_is_that_of_the_paper(random_params, biases, norm_type):
  module = Convolution(config_of(biases=biases, norm_type=norm_type))
  variables = random_params(module, X_BxSxD, REAL_BxS)
  found = jax.jit(module.apply)(variables, X_BxSxD, REAL_BxS)
  np.testing.assert_allclose(found, convolved(variables['params'], X_BxSxD), atol=1e-5)
  has_bias = {name for name in variables['params'] if 'bias' in variables['params'][name]}
  linear = {'inner', 'gate', 'outer', 'depthwise'}
  assert has_bias - {'norm'} == (linear if biases in ('mlp', 'all') else set())


def test_it_begins_by_glorots_rule():
  module = Convolution(config_of(d_model=256, kernel_width=31))
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 256)), jnp.ones((1, 1), bool))['params']
  for name, bound in (('inner', (6 / 512)**0.5), ('gate', (6 / 512)**0.5), ('outer', (6 / 512)**0.5),
                      ('depthwise', (6 / 62)**0.5)):
    assert 0.99 * bound < jnp.abs(params[name]['kernel']).max() <= bound
    np.testing.assert_allclose(jnp.std(params[name]['kernel']), bound / 3**0.5, rtol=0.03)


@pytest.mark.parametrize('width', [1, 3, 5])
def test_a_position_sees_its_kernel_and_nothing_beyond_and_no_padding(random_params, width):
  """d y[s] / d x[r] is exactly 0 where |s - r| exceeds half the kernel, and where r is padding."""
  module = Convolution(config_of(kernel_width=width))
  variables = random_params(module, X_BxSxD, REAL_BxS)
  weights_D = jnp.asarray(np.random.default_rng(1).standard_normal(D), jnp.float32)
  slope_BxSxBxSxD = jax.jit(jax.jacrev(lambda x: module.apply(variables, x, REAL_BxS) @ weights_D))(X_BxSxD)
  near_SxS = np.abs(np.subtract.outer(np.arange(S), np.arange(S))) <= width // 2
  expected = np.eye(B, dtype=bool)[:, None, :, None] & near_SxS[None, :, None, :] & REAL_BxS[None, None]
  np.testing.assert_array_equal(np.any(np.asarray(slope_BxSxBxSxD) != 0, axis=-1), expected)


# -- layers -----------------------------------------------------------------------------------------------------------


@each_variant
def test_the_sublayers_follow_each_other_as_the_variant_says(random_params, kind, norm):
  """The equation of the block, from its parameters; attention and feed-forward network have tests of their own."""
  layer = (ConformerLayer if kind == 'conformer' else ConvolutionLayer)(config_of(convolution=kind, norm=norm))
  variables = random_params(layer, X_BxSxD, None, TOKENS)
  params, config = variables['params'], layer.config

  def attend(y):
    return np.asarray(jax.jit(lambda y: MultiHeadAttention(config).apply(
        {'params': params['self_attention']}, y, y, TOKENS.mask))(jnp.asarray(y, jnp.float32)))

  def feed(name, y):
    return np.asarray(jax.jit(lambda y: FeedForward(config).apply({'params': params[name]}, y))(
        jnp.asarray(y, jnp.float32)))

  def sublayer(name, x, function, weight=1.0):
    norm_of = partial(normalized, params[f'{name}_norm'])
    if norm == 'post':
      return norm_of(x + weight * function(x))
    y = function(norm_of(x))
    return x + weight * (normalized(params[f'{name}_post_norm'], y) if norm == 'sandwich' else y)

  steps = {'attention': lambda x: sublayer('self_attention', x, attend),
           'convolution': lambda x: sublayer('convolution', x, partial(convolved, params['convolution'])),
           'both': lambda x: sublayer('self_attention', x, lambda y: attend(y) + convolved(params['convolution'], y)),
           'mlp': lambda x: sublayer('mlp', x, partial(feed, 'mlp')),
           'half before': lambda x: sublayer('macaron_mlp', x, partial(feed, 'macaron_mlp'), 0.5),
           'half behind': lambda x: sublayer('mlp', x, partial(feed, 'mlp'), 0.5),
           'norm': lambda x: normalized(params['block_norm'], x)}
  order = {'before': ['convolution', 'attention', 'mlp'], 'after': ['attention', 'convolution', 'mlp'],
           'parallel': ['both', 'mlp'],
           'conformer': ['half before', 'attention', 'convolution', 'half behind', 'norm']}[kind]
  x = np.asarray(X_BxSxD, np.float64)
  for step in order:
    x = steps[step](x)
  np.testing.assert_allclose(jax.jit(lambda: layer.apply(variables, X_BxSxD, None, TOKENS)[0])(), x, atol=2e-5)
  named = {'self_attention', 'mlp', *['convolution'] * (kind != 'parallel'), *['macaron_mlp'] * (kind == 'conformer')}
  assert set(params) == {'convolution', *named, *(f'{name}_norm' for name in named),
                         *(f'{name}_post_norm' for name in named if norm == 'sandwich'),
                         *['block_norm'] * (kind == 'conformer')}


def test_experts_stand_in_for_both_feed_forward_networks():
  layer = ConformerLayer(config_of(convolution='conformer', norm='pre', experts=3, biases='none'))
  found = jax.eval_shape(lambda: layer.init_with_output(
      jax.random.key(0), X_BxSxD, None, TOKENS, capture_intermediates=lambda module, _: isinstance(module, Experts))[1])
  assert set(found['losses']) == {'mlp', 'macaron_mlp'} == set(found['intermediates'])


# -- whole models -----------------------------------------------------------------------------------------------------


def drawn(tiny, kind, norm, **more):
  """An encoder-only model of two layers, or what `more` says."""
  return tiny(**{**dict(decoder_layers=0, convolution=kind, norm=norm, kernel_width=5), **more})


@each_variant
def test_padding_and_company_change_nothing(tiny, ids, kind, norm):
  """A sentence alone, in a batch, behind more padding, in another row: the same to the last bits of float32."""
  model, variables = drawn(tiny, kind, norm, scan_layers=True)
  ids_BxS = ids[0]
  wider_BxS, changed_BxS = jnp.pad(ids_BxS, ((0, 0), (0, 7))), ids_BxS.at[1, 1].set(11)
  batches = ids_BxS[1:2, :3], jnp.concatenate([ids_BxS, ids_BxS[::-1], changed_BxS]), wider_BxS
  alone, several, wider = jax.jit(lambda: [model.apply(variables, each) for each in batches])()
  whole, turned, changed = np.split(several, 3)
  assert np.isfinite(wider).all()
  for other in (whole, wider, turned):
    np.testing.assert_allclose(other[1, :3], alone[0], atol=1e-5)
  np.testing.assert_allclose(wider[0, :6], whole[0], atol=1e-5)
  assert np.abs(changed[1, :3] - alone[0]).max(-1).min() > 1e-3  # it is within the kernel of all three


@pytest.mark.parametrize('kind, norm', [('conformer', 'pre'), ('parallel', 'post')])
def test_the_mask_given_to_encode_is_what_counts(tiny, ids, kind, norm):
  model, variables = drawn(tiny, kind, norm, decoder_layers=1, encoder_layers=1)
  encode = partial(model.apply, variables, method='encode')

  @jax.jit
  def states():
    return [memory.states_BxSxD for memory in (
        encode(ids[0][:1], masks.lengths(jnp.array([4]))), encode(ids[0][:1, :4]), encode(ids[0][1:2]),
        encode(ids[0][1:2], masks.everything()))]

  cut, short, usual, whole = states()
  np.testing.assert_allclose(cut[:, :4], short, atol=1e-5)
  assert np.abs(usual - whole)[:, :3].max() > 1e-3
  for mask in (masks.causal(), masks.window(2), masks.segments(ids[0]), masks.dense(jnp.ones((1, 1, 6, 6), bool))):
    with pytest.raises(ValueError, match='A convolution mixes neighbours whatever a causal, window, segment or dense'):
      jax.eval_shape(lambda mask=mask: encode(ids[0], mask))


def test_a_vocabulary_without_padding_has_none(tiny, ids):
  model, variables = drawn(tiny, 'before', 'sandwich', pad_id=None, encoder_layers=1)
  short, whole = jax.jit(lambda: [model.apply(variables, ids[0][1:2, :width]) for width in (3, 6)])()
  assert np.abs(short - whole[:, :3]).max() > 1e-3


RATES = dict(dropout=0.2, attention_dropout=0.3, activation_dropout=0.4)


def loss_and_gradients(model, ids, params):
  """A loss with dropout and its gradients, for parameters in the unrolled layout."""
  layout = 'scanned' if model.config.scan_layers else 'unrolled'

  def loss(params, key):
    logits_BxTxV = model.apply({'params': to_layout(params, layout)}, ids[0], dropout_key=key)
    return jnp.sum(jax.nn.log_softmax(logits_BxTxV)[..., 5])

  return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, jax.random.key(3)))


@pytest.mark.parametrize('kind, norm, remat', [('before', 'post', 'none'), ('after', 'sandwich', 'full'),
                                               ('parallel', 'pre', 'dots'), ('conformer', 'pre', 'full')])
def test_scanning_and_recomputing_change_nothing_and_every_parameter_counts(tiny, ids, kind, norm, remat):
  params = drawn(tiny, kind, norm)[1]['params']
  value, gradients = loss_and_gradients(drawn(tiny, kind, norm, **RATES)[0], ids, params)
  for path, leaf in named_leaves(gradients).items():
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-4, path
  model, _ = drawn(tiny, kind, norm, **RATES, scan_layers=True, remat=remat)
  other_value, other = loss_and_gradients(model, ids, params)
  np.testing.assert_allclose(other_value, value, rtol=1e-6)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=5e-6), other, gradients)


@pytest.mark.parametrize('kind, dropouts', [('before', 3), ('after', 3), ('parallel', 2), ('conformer', 4)])
def test_no_two_places_share_a_dropout_key(tiny, ids, in_place, monkeypatch, kind, dropouts):
  """And each sub-layer has one, the convolution too."""
  model, variables = drawn(tiny, kind, 'pre', **RATES)
  sites = []

  def record(key, shape, rate):
    sites.append((rate, jax.random.key_data(key)))
    return jnp.ones(shape, bool)

  monkeypatch.setattr('tfm.models.dropout.keep_mask', record)

  @jax.jit
  def keys(key):
    sites.clear()
    with in_place():
      model.apply(variables, ids[0], dropout_key=key)
    return jnp.stack([key for _, key in sites])

  drawn_keys = np.asarray(keys(jax.random.key(0)))
  assert len(np.unique(drawn_keys, axis=0)) == len(drawn_keys)
  rates = [rate for rate, _ in sites]
  assert {name: rates.count(rate) for name, rate in RATES.items()} == {
      'dropout': 1 + 2 * dropouts, 'attention_dropout': 2, 'activation_dropout': 2 * (2 if kind == 'conformer' else 1)}


@pytest.mark.parametrize('kind, stream', [
    ('before', ['resid_pre', 'resid_mid_conv', 'resid_mid', 'resid_post']),
    ('after', ['resid_pre', 'resid_mid', 'resid_mid_conv', 'resid_post']),
    ('parallel', ['resid_pre', 'resid_mid', 'resid_post']),
    ('conformer', ['resid_pre', 'resid_mid_macaron', 'resid_mid', 'resid_mid_conv', 'resid_post'])])
def test_every_named_value_can_be_read_and_is_what_its_name_promises(tiny, ids, kind, stream):
  def read(model, variables):
    _, found = model.apply(variables, ids[0], mutable=['intermediates'],
                           capture_intermediates=lambda module, method: method == '__call__' and isinstance(
                               module, Tap | Convolution))
    return {path.removesuffix('/__call__'): value
            for path, (value,) in traverse_util.flatten_dict(found['intermediates'], sep='/').items()}

  names = *stream, 'convolution', 'convolution/gated', 'convolution/mixed', 'convolution/act'
  sizes = {name: (D,) for name in names} | {name: (24,) for name in ('mlp/act', 'macaron_mlp/act')}
  if kind != 'conformer':
    del sizes['macaron_mlp/act']
  for scan_layers, layers, count in ((True, ('layers',), (2,)), (False, ('layers_0', 'layers_1'), ())):
    model, variables = drawn(tiny, kind, 'pre', scan_layers=scan_layers)
    shapes = {path: value.shape for path, value in jax.eval_shape(partial(read, model), variables).items()}
    attention = {path for path in shapes if '/self_attention/' in path}
    assert len(attention) == 3 * len(layers)
    assert {path: shape for path, shape in shapes.items() if path not in attention} == {
        'source_embed': (3, 6, D), **{f'encoder/{layer}/{name}': (*count, 3, 6, *size)
                                      for layer in layers for name, size in sizes.items()}}
  found = jax.jit(partial(read, model))(variables)
  of = lambda name: np.asarray(found[f'encoder/layers_0/{name}'])  # noqa: E731
  assert (of('convolution/gated')[1, 3:] == 0).all() and (of('convolution/gated')[1, :3] != 0).any()
  np.testing.assert_allclose(of('resid_pre'), found['source_embed'], atol=1e-6)
  np.testing.assert_allclose(found['encoder/layers_1/resid_pre'], of('resid_post'), atol=1e-6)
  if kind != 'parallel':  # what the convolution adds to the stream
    before = of(stream[stream.index('resid_mid_conv') - 1])
    np.testing.assert_allclose(of('resid_mid_conv') - before, of('convolution'), atol=1e-5)


def test_cached_decoding_equals_teacher_forcing(tiny, ids):
  model, variables = drawn(tiny, 'conformer', 'pre', encoder_layers=1, decoder_layers=1)

  @jax.jit
  def both(source_BxS, target_BxT):
    memory = model.apply(variables, source_BxS, method='encode')
    cache, logits = model.apply(variables, memory, 5, method='init_cache'), []
    for piece in jnp.split(target_BxT, [3], axis=1):
      out, cache = model.apply(variables, piece, memory, cache, method='step')
      logits.append(out)
    return jnp.concatenate(logits, axis=1), model.apply(variables, source_BxS, target_BxT)

  np.testing.assert_allclose(*both(*ids), atol=1e-5)


def test_the_decoder_has_no_convolution_and_bfloat16_stays_bfloat16():
  config = config_of(encoder_layers=1, decoder_layers=1, convolution='conformer', norm='pre', dtype='bfloat16')
  model = build_model(config, 17, 17)
  params = jax.eval_shape(partial(initialize, model), jax.random.key(0))
  assert not [path for path in named_leaves(params) if path.startswith('decoder/') and 'convolution' in path]
  ids_BxS = jnp.ones((1, 4), jnp.int32)
  plain = build_model(dataclasses.replace(config, convolution='none', kernel_width=7), 17, 17)
  of_plain = jax.eval_shape(partial(initialize, plain), jax.random.key(0))
  assert jax.tree.map(jnp.shape, params['decoder']) == jax.tree.map(jnp.shape, of_plain['decoder'])
  _, found = jax.eval_shape(lambda params: model.apply(
      {'params': params}, ids_BxS, ids_BxS, mutable=['intermediates'],
      capture_intermediates=lambda module, method: method == '__call__'), params)
  assert {value.dtype for path, value in named_leaves(found['intermediates']['encoder']).items()
          if 'scores' not in path and 'pattern' not in path} == {jnp.dtype('bfloat16')}
