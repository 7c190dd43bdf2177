"""Patching restores what it puts back, and no path runs backwards."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis import patching
from tfm.analysis.attribution import output_projection
from tfm.analysis.engine import Edit, edit, read, run
from tfm.analysis.patching import activation_patching, attribution_patching, path_patching

N, T = 4, 6
NAMES = ('decoder.layers.resid_post', 'decoder.layers.self_attention.output', 'decoder.layers.mlp')


def metric(logits):
  return logits[0, -1, 4] - logits[0, -1, 7]


def pair(case, family='decoder_only', layout='scanned'):
  model, params, inputs = case(family, layout)
  clean = tuple(each[2:] for each in inputs)  # without padding
  return model, params, clean, (*clean[:-1], clean[-1].at[:, 1].set(9))


@pytest.mark.parametrize('family, layout', [('decoder_only', 'scanned'), ('encoder_decoder', 'unrolled')])
def test_the_grid_is_each_patch_by_itself(case, family, layout):
  model, params, clean, corrupt = pair(case, family, layout)
  grid = activation_patching(model, params, clean, corrupt, NAMES, metric, batch_size=7)
  before, after = (metric(edit(model, params, inputs, Edit(NAMES[0], at=False, value=0.0)))
                   for inputs in (corrupt, clean))
  assert all(each.shape == (N, T) for each in grid.values())
  stream = grid[NAMES[0]]
  np.testing.assert_allclose(stream[-1, -1], after, atol=1e-5)  # the last stream at the last position is the answer
  np.testing.assert_allclose(stream[:, 0], before, atol=1e-5)  # before the first difference there is nothing to restore
  np.testing.assert_allclose(stream[-1, :-1], before, atol=1e-5)  # nor at the last layer of another position
  assert np.abs(stream[0, 1] - before) > 1e-3
  value = read(model, params, clean, NAMES[2])[NAMES[2]]
  one = edit(model, params, corrupt, Edit(f'{NAMES[2].replace("layers", "layers[1]")}', value=value[1],
                                          at=(jnp.arange(T) == 1)[None, :, None]))
  np.testing.assert_allclose(grid[NAMES[2]][1, 1], metric(one), atol=1e-5)


def test_a_grid_is_one_program(case):
  model, params, clean, corrupt = pair(case)
  patching._grids.cache_clear()
  for inputs in ((clean, corrupt), (corrupt, clean)):
    activation_patching(model, params, *inputs, NAMES, metric)
  assert patching._grids.cache_info().currsize == 1 and patching._grids.cache_info().hits == 1


def test_attribution_is_the_first_order_of_activation(case):
  model, params, clean, corrupt = pair(case)
  # Inputs that differ by little in the first stream: then first order is nearly all there is.
  table = params['target_embedding']['table']
  apart = 0.003 * jnp.array([1.0, -1.0] * 8)
  near = dict(params, target_embedding={'table': table.at[9].set(table[clean[-1][0, 1]] + apart)})
  exact = activation_patching(model, near, clean, corrupt, NAMES[:1], metric)[NAMES[0]]
  before = metric(model.apply({'params': near}, *corrupt))
  first = attribution_patching(model, near, clean, corrupt, NAMES[:1], metric)[NAMES[0]]
  np.testing.assert_allclose(first, exact - before, atol=2e-4)
  assert np.abs(first).max() > 1e-3


def test_paths(case):
  model, params, clean, corrupt = pair(case)

  def effect(sender, receiver, kind='query'):
    return float(path_patching(model, params, clean, corrupt, (f'decoder.layers[{sender[0]}].self_attention.z',
                                                               sender[1]),
                               (f'decoder.layers[{receiver[0]}].self_attention.{kind}', receiver[1]), metric))

  assert effect((0, 1), (2, 0)) != 0 and effect((0, 1), (2, 1), 'value') != 0
  assert effect((2, 0), (0, 0)) == 0 and effect((1, 2), (1, 3)) == 0


def test_a_path_carries_what_the_sender_wrote_and_nothing_of_what_lies_between(case):
  """By hand: what the sender's head would write less what it wrote is added to the receiver's stream, and no MLP or
  head between them has seen it."""
  model, params, clean, corrupt = pair(case)
  sender = 'decoder.layers[0].self_attention.z'
  z = [read(model, params, inputs, sender)[sender][:, :, 1] for inputs in (clean, corrupt)]
  weights = output_projection(model, params, 'decoder', 'self_attention')['kernel'][0, 1]
  query = 'decoder.layers[2].self_attention.query'
  given = run(model, params, clean, where=query,
              edits=Edit('decoder.layers[2].resid_pre', add=(z[1] - z[0]) @ weights)).readings[query]
  put = Edit(query, value=given, at=(jnp.arange(4) == 3)[None, None, :, None])
  expected = metric(edit(model, params, clean, put)) - metric(model.apply({'params': params}, *clean))
  found = path_patching(model, params, clean, corrupt, (sender, 1), (query, 3), metric)
  np.testing.assert_allclose(found, expected, atol=2e-6)
  assert abs(expected) > 2e-5


def test_paths_and_rows_that_are_none_are_refused(case):
  model, params, clean, corrupt = pair(case)
  with pytest.raises(ValueError, match='is no output of one layer'):
    path_patching(model, params, clean, corrupt, (NAMES[2], 0), (NAMES[2], 0), metric)
  with pytest.raises(ValueError, match='is no row of layers'):
    activation_patching(model, params, clean, corrupt, ['decoder.layers[1].mlp'], metric)
  with pytest.raises(ValueError, match='pad them to the same'):
    activation_patching(model, params, clean, tuple(each[:, :-1] for each in corrupt), NAMES, metric)
