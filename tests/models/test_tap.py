from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from tfm.models.layout import to_layout
from tfm.models.tap import Tap

B, S, T, D, H, C, F = 3, 6, 5, 16, 2, 8, 24
ENCODER_LAYERS, DECODER_LAYERS = 2, 3
ATTENTION = {'scores': (B, H, 'queries', 'keys'), 'pattern': (B, H, 'queries', 'keys'), 'z': (B, 'queries', H, C)}


def attention_sites(name, queries, keys):
  sizes = {'queries': queries, 'keys': keys}
  return {f'{name}/{tap}': tuple(sizes.get(size, size) for size in shape) for tap, shape in ATTENTION.items()}


ENCODER_LAYER = {'resid_pre': (B, S, D), **attention_sites('self_attention', S, S), 'resid_mid': (B, S, D),
                 'mlp/act': (B, S, F), 'resid_post': (B, S, D)}
DECODER_LAYER = {'resid_pre': (B, T, D), **attention_sites('self_attention', T, T), 'resid_mid': (B, T, D),
                 **attention_sites('cross_attention', T, S), 'resid_mid_cross': (B, T, D), 'mlp/act': (B, T, F),
                 'resid_post': (B, T, D)}


def expected_sites(scan_layers: bool) -> dict[str, tuple]:
  sites = {'source_embed': (B, S, D), 'target_embed': (B, T, D)}
  for stack, layer, count in (('encoder', ENCODER_LAYER, ENCODER_LAYERS), ('decoder', DECODER_LAYER, DECODER_LAYERS)):
    for tap, shape in layer.items():
      if scan_layers:
        sites[f'{stack}/layers/{tap}'] = (count, *shape)
      else:
        sites |= {f'{stack}/layers_{i}/{tap}': shape for i in range(count)}
  return sites


def make(tiny, scan_layers, norm='post'):
  # Two source and target tables, so that every module is called once and has one value.
  return tiny(scan_layers=scan_layers, norm=norm, tying='target', encoder_layers=ENCODER_LAYERS,
              decoder_layers=DECODER_LAYERS)


def capture(model, variables, *arguments, where=lambda module: isinstance(module, Tap), **more):
  """The output, and by path what every module that `where` chooses returned."""
  out, found = model.apply(variables, *arguments, mutable=['intermediates'],
                           capture_intermediates=lambda module, method: method == '__call__' and where(module), **more)
  flat = traverse_util.flatten_dict(found['intermediates'], sep='/')
  return out, {path.removesuffix('/__call__'): value for path, (value,) in flat.items()}


@pytest.fixture(scope='module')
def captured():
  return {}


def captures(tiny, ids, captured, scan_layers):
  """(logits, taps) compiled once for all tests that look at them."""
  if scan_layers not in captured:
    model, variables = make(tiny, scan_layers)
    captured[scan_layers] = jax.jit(partial(capture, model))(variables, *ids)
  return captured[scan_layers]


@pytest.mark.parametrize('scan_layers', [False, True])
def test_every_named_value_can_be_read(tiny, ids, captured, scan_layers):
  _, found = captures(tiny, ids, captured, scan_layers)
  assert {path: value.shape for path, value in found.items()} == expected_sites(scan_layers)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_the_values_are_those_that_their_names_promise(tiny, ids, captured, scan_layers):
  logits_BxTxV, found = captures(tiny, ids, captured, scan_layers)
  model, variables = make(tiny, scan_layers)
  layer = (lambda stack, i, tap: found[f'{stack}/layers/{tap}'][i]) if scan_layers else (
      lambda stack, i, tap: found[f'{stack}/layers_{i}/{tap}'])
  for stack, count, embed in (('encoder', ENCODER_LAYERS, 'source_embed'), ('decoder', DECODER_LAYERS, 'target_embed')):
    np.testing.assert_allclose(layer(stack, 0, 'resid_pre'), found[embed], atol=1e-6)
    for i in range(1, count):
      np.testing.assert_allclose(layer(stack, i, 'resid_pre'), layer(stack, i - 1, 'resid_post'), atol=1e-6)
  for stack, name in (('encoder', 'self_attention'), ('decoder', 'self_attention'), ('decoder', 'cross_attention')):
    pattern_BxHxTxS = layer(stack, 1, f'{name}/pattern')
    np.testing.assert_allclose(pattern_BxHxTxS.sum(-1), 1, atol=1e-6)
    if (stack, name) == ('decoder', 'self_attention'):
      assert (np.triu(pattern_BxHxTxS, 1) == 0).all()
    else:
      assert (pattern_BxHxTxS[1, :, :, 3:] == 0).all()  # the padding of sentence 1
    np.testing.assert_allclose(jax.nn.softmax(layer(stack, 1, f'{name}/scores'), axis=-1), pattern_BxHxTxS, atol=1e-6)
  assert min(layer('encoder', 1, 'mlp/act').min(), layer('decoder', 1, 'mlp/act').min()) == 0
  # The logit lens: the last residual stream, unembedded, is the output.
  lens = model.apply(variables, layer('decoder', DECODER_LAYERS - 1, 'resid_post'), method='unembed')
  np.testing.assert_allclose(lens, logits_BxTxV, atol=1e-6)


def test_scanned_taps_are_the_unrolled_ones_stacked(tiny, ids, captured):
  model, variables = make(tiny, True)
  unrolled, _ = make(tiny, False)
  _, scanned_taps = captures(tiny, ids, captured, True)
  _, taps = jax.jit(partial(capture, unrolled))({'params': to_layout(variables['params'], 'unrolled')}, *ids)
  for path, value in taps.items():
    layer = re.search(r'layers_(\d+)', path)
    stacked = scanned_taps[path if layer is None else path.replace(layer[0], 'layers')]
    np.testing.assert_allclose(stacked if layer is None else stacked[int(layer[1])], value, atol=2e-6)


@pytest.mark.parametrize('norm', ['post', 'pre'])
def test_the_logit_lens_of_the_last_layer_is_the_output_and_capturing_leaves_it_alone(tiny, ids, norm):
  """To the bit, operation by operation; compiled programs may round differently when they have more outputs."""
  model, variables = make(tiny, False, norm)
  logits_BxTxV, found = capture(model, variables, *ids)
  np.testing.assert_array_equal(model.apply(variables, *ids), logits_BxTxV)
  lens = model.apply(variables, found[f'decoder/layers_{DECODER_LAYERS - 1}/resid_post'], method='unembed')
  np.testing.assert_array_equal(lens, logits_BxTxV)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_modules_whose_output_has_a_name_can_be_read_too(tiny, ids, scan_layers):
  """q, k, v, attention and feed-forward outputs need no taps (shapes only: nothing is computed)."""
  model, variables = make(tiny, scan_layers)
  _, found = jax.eval_shape(lambda: capture(model, variables, *ids, where=lambda module: True))
  stem, stacked = ('decoder/layers', (DECODER_LAYERS,)) if scan_layers else ('decoder/layers_2', ())
  for path, shape in {'self_attention/query': (B, T, H, C), 'cross_attention/key': (B, S, H, C),
                      'cross_attention/value': (B, S, H, C), 'self_attention': (B, T, D), 'cross_attention': (B, T, D),
                      'mlp': (B, T, D), 'mlp_norm': (B, T, D)}.items():
    assert found[f'{stem}/{path}'].shape == (*stacked, *shape)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_cached_steps_have_the_same_taps(tiny, ids, scan_layers):
  model, variables = make(tiny, scan_layers)
  M, length, new = 2, 7, 2

  def run():
    memory = model.apply(variables, ids[0], method='encode')
    cache = model.apply(variables, memory, length, M, method='init_cache')
    return capture(model, variables, jnp.ones((B * M, new), jnp.int32), memory, cache, method='step')

  _, found = jax.eval_shape(run)
  sites = {path for path in expected_sites(scan_layers) if path.startswith(('decoder', 'target'))}
  assert set(found) == sites
  last, stacked = ('decoder/layers', (DECODER_LAYERS,)) if scan_layers else ('decoder/layers_2', ())
  assert found[f'{last}/self_attention/pattern'].shape == (*stacked, B * M, H, new, length)
  assert found[f'{last}/cross_attention/pattern'].shape == (*stacked, B, H, M * new, S)


def replace_by_data(call, args, kwargs, context):
  """A tap whose scope holds a `gate` in the collection `taps` is multiplied by it."""
  value, scope = call(*args, **kwargs), context.module.scope
  tapped = isinstance(context.module, Tap) and context.method_name == '__call__'
  return value * scope.get_variable('taps', 'gate') if tapped and scope.has_variable('taps', 'gate') else value


def test_data_in_the_collection_taps_reaches_each_layer_of_a_scan(tiny, ids):
  """Switching off the feed-forward network of layer 1 alone, in both layouts."""
  model, variables = make(tiny, True)
  unrolled, _ = make(tiny, False)

  @partial(jax.jit, static_argnums=0)
  def run(model, variables, taps):
    with nn.intercept_methods(replace_by_data):
      return model.apply({**variables, 'taps': taps}, *ids)

  def gates(values):
    return {'decoder': {'layers': {'mlp': {'act': {'gate': jnp.asarray(values)}}}}}

  def gates_unrolled(values):
    return {'decoder': {f'layers_{i}': {'mlp': {'act': {'gate': gate}}} for i, gate in enumerate(values)}}

  flat = {'params': to_layout(variables['params'], 'unrolled')}
  results = []
  for values in ([1., 1., 1.], [1., 0., 1.], [1., 1., 0.]):
    results.append(run(model, variables, gates(values)))
    np.testing.assert_allclose(results[-1], run(unrolled, flat, gates_unrolled(values)), atol=2e-6)
  for one, other in zip(results, results[1:]):
    assert np.abs(one - other).max() > 0.1
  assert run._cache_size() == 2  # one program for each layout, whatever the gates


def program(model, variables, ids) -> str:
  """Optimised HLO without what only describes it: source locations and names of instructions."""
  text = jax.jit(model.apply).lower(variables, *ids).compile().as_text()
  text = text[text.index('%'):]  # the tables of files and functions in front
  text = re.sub(r', metadata=\{[^}]*\}', '', text)
  names: dict[str, str] = {}
  return re.sub(r'%[\w.-]+', lambda match: names.setdefault(match[0], f'%{len(names)}'), text)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_taps_vanish_from_compiled_programs(tiny, ids, monkeypatch, traces, scan_layers):
  model, variables = make(tiny, scan_layers)
  with_taps = program(model, variables, ids)
  for module in ('ends', 'feed_forward', 'layers', 'multihead'):
    monkeypatch.setattr(f'tfm.models.{module}.Tap', lambda: lambda value: value)
  traces()
  _, found = jax.eval_shape(lambda: capture(model, variables, *ids, where=lambda module: True))
  assert not any(path.endswith(('pattern', 'resid_mid', '_embed', 'act')) for path in found)  # they are gone indeed
  assert program(model, variables, ids) == with_taps
