from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from tfm.models.build import build_model, initialize
from tfm.models.layout import layout_of, to_layout

LAYERS = 12
"""Two digits: `layers_10` comes after `layers_9`, not after `layers_1`."""


def unrolled() -> dict:
  """Every layer holds its own number."""
  def layers(first):
    return {f'layers_{i}': {'norm': {'scale': np.full(3, first + i)}, 'mlp': {'kernel': np.full((2, 3), first + i)}}
            for i in sorted(range(LAYERS), key=str)}
  return {'target_embedding': {'table': np.arange(6.).reshape(2, 3)}, 'encoder': layers(0),
          'decoder': {**layers(100), 'other': np.arange(3.)}}


def assert_same(tree, other):
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_stacked_layers_are_in_the_order_of_their_numbers():
  scanned = to_layout(unrolled(), 'scanned')
  for first, stack in ((0, 'encoder'), (100, 'decoder')):
    for leaf in jax.tree.leaves(scanned[stack]['layers']):
      assert leaf.shape[0] == LAYERS
      for i in range(LAYERS):
        np.testing.assert_array_equal(leaf[i], first + i)


def test_there_and_back_is_lossless_and_what_is_no_layer_stays():
  scanned = to_layout(unrolled(), 'scanned')
  assert_same(to_layout(scanned, 'unrolled'), unrolled())
  assert_same(to_layout(to_layout(scanned, 'unrolled'), 'scanned'), scanned)
  assert_same(scanned['target_embedding'], unrolled()['target_embedding'])
  assert_same(scanned['decoder']['other'], unrolled()['decoder']['other'])


def test_the_layout_of_a_tree_can_be_told_and_conversion_to_it_changes_nothing():
  scanned = to_layout(unrolled(), 'scanned')
  assert (layout_of(unrolled()), layout_of(scanned)) == ('unrolled', 'scanned')
  assert_same(to_layout(scanned, 'scanned'), scanned)
  assert_same(to_layout(unrolled(), 'unrolled'), unrolled())


@pytest.mark.parametrize('scan_layers, layout', [(True, 'scanned'), (False, 'unrolled')])
def test_a_model_reads_the_layout_of_its_config(tiny, scan_layers, layout):
  model, variables = tiny(scan_layers=scan_layers, norm='pre', encoder_layers=3)
  assert layout_of(variables['params']) == layout
  from_scratch = jax.eval_shape(partial(model.init, jax.random.key(0)), *[np.ones((1, 2), np.int32)] * 2)['params']
  assert jax.tree.map(np.shape, from_scratch) == jax.tree.map(np.shape, variables['params'])
  other = build_model(tiny(scan_layers=not scan_layers, norm='pre', encoder_layers=3)[0].config, 17, 17)
  shapes = jax.eval_shape(partial(initialize, other), jax.random.key(0))
  converted = jax.eval_shape(lambda: to_layout(variables['params'], layout_of(shapes)))
  assert jax.tree.map(np.shape, converted) == jax.tree.map(np.shape, shapes)
