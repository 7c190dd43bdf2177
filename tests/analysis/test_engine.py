"""Reading and replacing: the laws of the engine, over families and layouts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis.engine import Edit, edit, program, read, run
from tfm.analysis.sites import find, matching, named, parse, sites

V, D, N, H, B, T, S = 11, 16, 4, 4, 3, 6, 8
FAMILIES = ('encoder_decoder', 'decoder_only', 'encoder_only', 'conformer', 'bahdanau', 'luong', 'rnn_lm', 'conv_s2s')
THREE = ('encoder_decoder', 'decoder_only', 'encoder_only')
LAYOUTS = ('scanned', 'unrolled')


def last_stack(family: str) -> str:
  return 'encoder' if family == 'encoder_only' else 'decoder'


def plain(model, params, inputs, **kwargs):
  return jax.jit(lambda params, *inputs: model.apply({'params': params}, *inputs, **kwargs))(params, *inputs)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', [*THREE, 'conformer'])
def test_sites_are_the_same_scanned_or_unrolled(case, family):
  one, other = (sites(*case(family, layout)) for layout in LAYOUTS)
  assert one.keys() == other.keys()
  assert {name: (site.layers, site.shape) for name, site in one.items()} == {
      name: (site.layers, site.shape) for name, site in other.items()}


def test_the_attentions_of_an_encoder_decoder_have_the_shapes_of_their_sides(case):
  known = sites(*case('encoder_decoder', 'scanned'))
  shapes = {name: (site.layers, *site.shape) for name, site in known.items() if name.endswith('.pattern')}
  assert shapes == {
      'encoder.layers.self_attention.pattern': (N, B, H, S, S),
      'decoder.layers.self_attention.pattern': (N, B, H, T, T),
      'decoder.layers.cross_attention.pattern': (N, B, H, T, S)}


@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_has_its_attentions_and_states_among_its_sites(case, family):
  model, params, inputs = case(family)
  known = sites(model, params, inputs)
  wanted = {'resid_post'} if family in (*THREE, 'conformer', 'conv_s2s') else {'states'}
  if family != 'rnn_lm':
    wanted.add('pattern')
  assert wanted <= {name.rsplit('.')[-1] for name in known}
  found = read(model, params, inputs, where=['*.' + name for name in wanted])
  for name, value in found.items():
    site = known[name]
    assert value.shape == (*(() if site.layers is None else (site.layers,)), *site.shape)
    if name.endswith('pattern'):
      np.testing.assert_allclose(np.sum(value, axis=-1), 1.0, atol=1e-5)


def test_names(case):
  assert parse('decoder.layers[3].z') == ('decoder.layers.z', 3)
  assert parse('target_embed') == ('target_embed', None)
  assert named(('decoder', 'layers_3', 'z'), scanned=False) == ('decoder.layers.z', 3)
  assert named(('decoder', 'layers', 'z'), scanned=True) == ('decoder.layers.z', -1)
  known = sites(*case('encoder_decoder'))
  assert find('decoder.layers[-1].resid_post', known)[1] == N - 1
  assert matching('*coder.layers[1].resid_post', known) == ['decoder.layers[1].resid_post',
                                                            'encoder.layers[1].resid_post']


@pytest.mark.parametrize('name, message', {
    'decoder.layers[0].crossattention.pattern': 'never reaches',
    'decoder.layers[9].resid_post': 'there are 4 layers',
    'target_embed[0]': 'is one place',
    'decoder.layers[0].layers[1]': 'no name of a site',
    'decoder layers': 'no name of a site',
    '*.nothing': 'is like',
}.items())
def test_bad_names_are_refused(case, name, message):
  model, params, inputs = case('encoder_decoder')
  with pytest.raises(ValueError, match=message):
    read(model, params, inputs, where=name)


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', THREE)
def test_layers_read_the_same_scanned_or_unrolled(case, family):
  where = [f'{last_stack(family)}.layers.{name}'
           for name in ('resid_post', 'mlp', 'self_attention.pattern', 'self_attention.z', 'self_attention.query')]
  one, other = (read(*case(family, layout), where=where) for layout in LAYOUTS)
  for name in where:
    np.testing.assert_allclose(one[name], other[name], atol=2e-5, err_msg=name)
  for layout in LAYOUTS:
    for i in (0, N - 1):
      name = where[0].replace('layers', f'layers[{i}]')
      np.testing.assert_allclose(read(*case(family, layout), where=name)[name], one[where[0]][i], atol=2e-5)


def test_a_pattern_is_read_whatever_kernel_the_model_has(case):
  model, params, inputs = case('encoder_decoder', attention_backend='blockwise')
  where = 'decoder.layers.cross_attention.pattern'
  expected = read(*case('encoder_decoder'), where=where)[where]
  np.testing.assert_array_equal(read(model, params, inputs, where=where)[where], expected)


def test_only_a_request_for_patterns_leaves_the_kernel_of_the_model(case):
  def loops_over_blocks(where):
    model, params, inputs = case('decoder_only', attention_backend='blockwise')
    return 'scan[' in str(jax.make_jaxpr(lambda: run(model, params, inputs, where=where).readings)())

  assert not loops_over_blocks('decoder.layers.self_attention.pattern')
  assert loops_over_blocks('decoder.layers.resid_post')


def mean_entropy(pattern_BxHxTxS):
  return -jnp.sum(jax.scipy.special.xlogy(pattern_BxHxTxS, pattern_BxHxTxS), axis=-1).mean((0, 2))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_values_are_reduced_where_they_arise(case, layout):
  name = 'decoder.layers.self_attention.pattern'
  model, params, inputs = case('encoder_decoder', layout)
  reduced = read(model, params, inputs, where={name: mean_entropy})[name]
  whole = read(model, params, inputs, where=name)[name]
  assert reduced.shape == (N, H)
  np.testing.assert_allclose(reduced, jax.vmap(mean_entropy)(whole), atol=1e-6)
  text = program.__wrapped__(model, None, ((name, *find(name, sites(model, params, inputs)), mean_entropy),),
                             ()).lower(params, inputs, {}).compile().as_text()
  assert f'f32[{N},{B},{H},{T},{T}]' not in text  # patterns of all layers never stand side by side


def test_one_site_has_one_reduction(case):
  model, params, inputs = case('decoder_only')
  with pytest.raises(ValueError, match='two functions'):
    read(model, params, inputs, where={'decoder.layers.resid_post': None, 'decoder.layers[0].resid_post': jnp.sum})


# -- edits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family, layout', [*((family, 'unrolled') for family in FAMILIES),
                                            *((family, 'scanned') for family in (*THREE, 'conformer'))])
def test_an_edit_of_nothing_changes_nothing(case, family, layout):
  model, params, inputs = case(family, layout)
  known = sites(model, params, inputs)
  name = next(name for name in known if name.endswith(('resid_post', 'states')))
  expected = plain(model, params, inputs)
  found = edit(model, params, inputs, Edit(name, at=False, value=3.0, scale=1.0, add=0.0))
  # sqrt(0.5) of one layer and of the next are one product to XLA, unless something stands between them.
  np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7 if family == 'conv_s2s' else 0)


def identity(pattern, layers):
  return Edit(pattern, at=jnp.isin(jnp.arange(N), jnp.asarray(layers, int)).reshape(N, 1, 1, 1, 1),
              value=jnp.eye(T)[None, None, None])


@pytest.mark.parametrize('layout', LAYOUTS)
def test_all_subsets_of_layers_run_in_one_program(case, layout):
  model, params, inputs = case('decoder_only', layout)
  name = 'decoder.layers.self_attention.pattern'
  program.cache_clear()
  outputs = {}
  for layers in [(), (0,), (2,), (0, 1, 2, 3)]:
    outputs[layers] = edit(model, params, inputs, identity(name, layers))
  assert program.cache_info().currsize == 1
  compiled = program(model, None, (), tuple((path, (None,)) for path in sites(model, params, inputs)[name].paths))
  assert program.cache_info().currsize == 1 and compiled._cache_size() == 1
  np.testing.assert_array_equal(outputs[()], plain(model, params, inputs))
  assert not np.allclose(outputs[0,], outputs[2,], atol=1e-3)


@pytest.mark.parametrize('family', THREE)
def test_short_circuits_are_the_same_scanned_or_unrolled_and_as_computed_by_hand(case, family):
  name = f'{last_stack(family)}.layers.self_attention.pattern'
  length = S if family == 'encoder_only' else T
  for layers in [(2,), (0, 3)]:
    change = dataclasses.replace(identity(name, layers), value=jnp.eye(length)[None, None, None])
    one, other = (edit(*case(family, layout), change) for layout in LAYOUTS)
    np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_numbered_edit_touches_that_layer_alone(case, layout):
  model, params, inputs = case('encoder_decoder', layout)
  value = jax.random.normal(jax.random.key(2), (B, T, D))
  name = 'decoder.layers.resid_post'
  found = run(model, params, inputs, where=name,
              edits=Edit('decoder.layers[1].resid_post', value=value, at=jnp.arange(T)[None, :, None] == 2))
  before = read(model, params, inputs, where=name)[name]
  after = found.readings[name]
  np.testing.assert_array_equal(after[0], before[0])
  np.testing.assert_array_equal(after[1, :, 2], value[:, 2])
  np.testing.assert_array_equal(after[1, :, [0, 1, 3, 4, 5]], before[1, :, [0, 1, 3, 4, 5]])
  np.testing.assert_array_equal(after[2:, :, :2], before[2:, :, :2])  # causal
  assert not np.allclose(after[2, :, 3], before[2, :, 3], atol=1e-4)


def test_scale_add_and_several_edits_of_one_site_happen_in_order(case):
  model, params, inputs = case('decoder_only', 'scanned')
  name = 'decoder.layers.mlp'
  before = read(model, params, inputs, where=name)[name][0]
  found = run(model, params, inputs, where='decoder.layers[0].mlp', edits=[
      Edit('decoder.layers[0].mlp', scale=2.0, add=1.0),
      Edit('decoder.layers.mlp', at=jnp.arange(N) == 0, function=lambda y, layer: y * 3 + layer)])
  np.testing.assert_allclose(found.readings['decoder.layers[0].mlp'], (before * 2 + 1) * 3, rtol=1e-6)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_function_is_told_its_layer(case, layout):
  model, params, inputs = case('decoder_only', layout)
  name = 'decoder.layers.self_attention.z'
  found = run(model, params, inputs, where=name, edits=Edit(
      name, at=jnp.arange(N) >= 2, function=lambda y, layer: jnp.full_like(y, layer)))
  np.testing.assert_array_equal(found.readings[name][2:], np.broadcast_to(
      np.array([2, 3]).reshape(2, 1, 1, 1, 1), found.readings[name][2:].shape))


def test_masked_scores_can_be_replaced(case):
  model, params, inputs = case('decoder_only')
  name = 'decoder.layers.self_attention.scores'
  found = run(model, params, inputs, where='decoder.layers.self_attention.pattern',
              edits=Edit(name, at=True, value=0.0))
  assert np.isfinite(found.output).all()


def test_future_positions_never_change_under_a_causal_patch(case):
  model, params, inputs = case('decoder_only', 'scanned')

  def changed(layer, position):
    replace = (jnp.arange(N) == layer).reshape(N, 1, 1, 1) & (jnp.arange(T) == position).reshape(1, 1, T, 1)
    return edit(model, params, inputs, Edit('decoder.layers.resid_post', at=replace, value=9.0))

  grid = jax.jit(jax.vmap(jax.vmap(changed, (None, 0)), (0, None)))(jnp.arange(N), jnp.arange(T))
  before = plain(model, params, inputs)
  for position in range(T):
    np.testing.assert_allclose(grid[:, position, :, :position], np.broadcast_to(
        before[:, :position], (N, B, position, V)), atol=1e-5)
    assert (np.abs(grid[:, position, :, position] - before[:, position]).max(-1) > 1e-3).all()


def test_gradients_flow_to_what_is_added(case):
  model, params, inputs = case('decoder_only', 'scanned')
  name = 'decoder.layers.resid_post'

  def logit(add):
    return edit(model, params, inputs, Edit(name, add=add))[0, -1, 3]

  zero = jnp.zeros((N, B, T, D))
  grad = jax.jit(jax.grad(logit))(zero)
  direction = jax.random.normal(jax.random.key(4), zero.shape).at[:, 1:].set(0)
  h = 1e-2
  difference = (logit(h * direction) - logit(-h * direction)) / (2 * h)
  np.testing.assert_allclose(jnp.vdot(grad, direction), difference, rtol=2e-2)
  assert (grad[:, 1:] == 0).all()


@pytest.mark.parametrize('policy', ['full', 'dots'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_rematerialised_layers_read_and_edit_the_same(case, layout, policy):
  name = 'decoder.layers.self_attention.pattern'
  one, other = (run(*case('decoder_only', layout, remat=remat), where=name, edits=identity(name, [1]))
                for remat in ('none', policy))
  np.testing.assert_allclose(one.output, other.output, atol=1e-6)
  np.testing.assert_allclose(one.readings[name], other.readings[name], atol=1e-6)


def test_a_compiled_function_around_an_edit_is_no_other_functions_program(case):
  model, params, inputs = case('decoder_only')
  apply = jax.jit(lambda params: model.apply({'params': params}, *inputs))
  before = apply(params)
  edited = edit(model, params, inputs, Edit('decoder.layers[0].mlp', scale=0.0))
  np.testing.assert_array_equal(apply(params), before)
  assert not np.allclose(edited, before, atol=1e-3)


@pytest.mark.parametrize('change, message', {
    'misspelt': (Edit('decoder.layer.mlp', scale=0.0), 'never reaches'),
    'nothing': (Edit('decoder.layers.mlp'), 'changes nothing'),
    'rank': (Edit('decoder.layers.mlp', add=jnp.zeros((T, D))), 'behind one for 4 layers'),
    'shape': (Edit('decoder.layers.mlp', add=jnp.zeros((1, 1, T + 1, 1))), 'has shape'),
    'growing': (Edit('decoder.layers.mlp', function=lambda y, layer: y[..., None]), 'gives shape'),
    'both': (Edit('decoder.layers.mlp', value=0.0, function=lambda y, layer: y), 'a value and a function'),
}.values(), ids=lambda each: '')
def test_bad_edits_are_refused(case, change, message):
  model, params, inputs = case('decoder_only')
  with pytest.raises(ValueError, match=message):
    edit(model, params, inputs, change)


# -- cached decoding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family, layout', [('encoder_decoder', 'unrolled'), ('encoder_decoder', 'scanned'),
                                            ('decoder_only', 'unrolled'), ('decoder_only', 'scanned'),
                                            ('bahdanau', 'unrolled'), ('luong', 'unrolled'), ('conv_s2s', 'unrolled')])
def test_an_edit_in_cached_decoding_is_that_in_the_parallel_pass(case, family, layout):
  model, params, inputs = case(family, layout)
  memory = () if len(inputs) == 1 else (plain(model, params, inputs[:1], method='encode'),)
  known = sites(model, params, inputs)
  edits = []
  for i, pattern in enumerate(name for name in known if name.startswith('decoder') and name.endswith('pattern')):
    shape = (*(() if known[pattern].layers is None else (known[pattern].layers,)), *known[pattern].shape)
    # What has not been written yet cannot be attended to.
    past = jnp.tril(jnp.ones((T, T), bool)) if 'self' in pattern else True
    edits.append(Edit(pattern, at=jax.random.bernoulli(jax.random.key(5 + i), 0.3, shape) & past,
                      value=jax.random.uniform(jax.random.key(8 + i), shape)))
  stream = next((name for name in known if name.startswith('decoder') and name.endswith('resid_mid')), None)
  if stream:
    edits.append(Edit(stream, add=jax.random.normal(jax.random.key(7), (N, B, T, D))))
  expected = edit(model, params, inputs, edits)
  assert not np.allclose(expected, plain(model, params, inputs), atol=1e-2)

  start = memory or (B,)
  cache = plain(model, params, (), method=lambda module: module.init_cache(*start, T))
  for t in range(T):
    inputs_t = (inputs[-1][:, t:t + 1], *memory, cache)
    logits, cache = run(model, params, inputs_t, edits=edits, method='step', start=cache.index).output
    np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=3e-5, err_msg=f'step {t}')
