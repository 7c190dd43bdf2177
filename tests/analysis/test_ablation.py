"""What ablations leave in the place of what they take."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis.ablation import knock_out, mask, mean, mean_value, short_circuit, uniform, zero
from tfm.analysis.engine import edit, read, run
from tfm.analysis.sites import sites

N, H, B, T = 4, 4, 3, 6
Z, PATTERN = 'decoder.layers.self_attention.z', 'decoder.layers.self_attention.pattern'
SCORES = PATTERN.replace('pattern', 'scores')


@pytest.mark.parametrize('layout', ['scanned', 'unrolled'])
def test_zeros_stand_where_the_mask_says_and_nothing_else_changes(case, layout):
  model, params, inputs = case('decoder_only', layout)
  site = sites(model, params, inputs)[Z]
  found = run(model, params, inputs, where=Z, edits=zero(site, layers=[1, -1], heads=2, positions=[0, 3])).readings[Z]
  before = read(model, params, inputs, Z)[Z]
  for t in range(T):
    assert (found[1, :, t, 2] == 0).all() == (t in (0, 3))
    assert (found[3, :, t, 2] == 0).all() == (t in (0, 3))
  np.testing.assert_array_equal(found[0], before[0])
  np.testing.assert_array_equal(found[1][:, :, [0, 1, 3]], before[1][:, :, [0, 1, 3]])


def test_a_short_circuited_layer_writes_its_own_values(case):
  model, params, inputs = case('encoder_decoder')
  known = sites(model, params, inputs)
  where = [Z, 'decoder.layers.self_attention.value']
  found = run(model, params, inputs, where=where, edits=short_circuit(known[PATTERN], layers=2)).readings
  np.testing.assert_allclose(found[Z][2], found[where[1]][2], atol=1e-6)
  assert not np.allclose(found[Z][1], found[where[1]][1], atol=1e-2)
  with pytest.raises(ValueError, match='queries are no keys'):
    short_circuit(known['decoder.layers.cross_attention.pattern'])


def test_means_are_over_what_is_real(case):
  model, params, (source, target) = case('encoder_decoder')
  inputs, real = (source, target), jnp.asarray(target != 0)
  name = 'decoder.layers.mlp'
  found = mean_value(model, params, [inputs, inputs], name, [real, real])
  value = np.asarray(read(model, params, inputs, name)[name])
  np.testing.assert_allclose(found[:, 0, 0], value[:, np.asarray(real)].mean(1), rtol=1e-4, atol=1e-5)
  after = run(model, params, inputs, where=name, edits=mean(sites(model, params, inputs)[name], found, layers=1))
  np.testing.assert_allclose(after.readings[name][1], np.broadcast_to(found[1], value[1].shape), rtol=1e-6)
  with pytest.raises(ValueError, match='is no pattern'):
    mean_value(model, params, [inputs], PATTERN)


def test_a_knocked_out_key_is_not_seen_and_scores_share_its_weight(case):
  model, params, inputs = case('decoder_only', 'scanned')
  known = sites(model, params, inputs)
  before = read(model, params, inputs, PATTERN)[PATTERN]
  cut = run(model, params, inputs, where=PATTERN, edits=knock_out(known[PATTERN], 4, 0, layers=0)).readings[PATTERN]
  shared = run(model, params, inputs, where=PATTERN, edits=knock_out(known[SCORES], 4, 0, layers=0)).readings[PATTERN]
  assert (cut[0, :, :, 4, 0] == 0).all() and (shared[0, :, :, 4, 0] == 0).all()
  np.testing.assert_allclose(cut[0, :, :, 4].sum(-1), 1 - before[0, :, :, 4, 0], atol=1e-6)
  np.testing.assert_allclose(shared[0, :, :, 4], cut[0, :, :, 4] / cut[0, :, :, 4].sum(-1, keepdims=True), atol=1e-5)
  np.testing.assert_array_equal(cut[0, :, :, :4], before[0, :, :, :4])


def test_a_knocked_out_path_carries_no_gradient(case):
  """Position 0 out of reach of all later queries in every layer: what it holds changes nothing after it."""
  model, params, inputs = case('decoder_only')
  known = sites(model, params, inputs)
  other = (inputs[0].at[:, 0].set(3),)
  gone = knock_out(known[SCORES], np.arange(1, T), 0)
  one, two = (edit(model, params, each, gone) for each in (inputs, other))
  np.testing.assert_allclose(one[:, 1:], two[:, 1:], atol=1e-5)
  assert not np.allclose(edit(model, params, other, zero(known[Z], heads=np.zeros(H, bool))), one, atol=1e-2)


def test_uniform_patterns_are_rows_of_one_weight(case):
  model, params, inputs = case('decoder_only')
  allowed = jnp.tril(jnp.ones((T, T), bool))[None, None]
  edits = uniform(sites(model, params, inputs)[PATTERN], allowed, layers=[0])
  found = run(model, params, inputs, where=PATTERN, edits=edits).readings[PATTERN]
  np.testing.assert_allclose(found[0, 0, 0], np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None], atol=1e-6)


def test_masks_refuse_what_a_site_does_not_have(case):
  known = sites(*case('decoder_only'))
  assert mask(known[PATTERN], positions=2).shape == (1, 1, 1, T, 1)
  for site, which, message in ((PATTERN, dict(heads=9), 'there are 4'), ('target_embed', dict(layers=1), 'has none'),
                               ('decoder.layers.mlp', dict(heads=1), 'has none'),
                               (Z, dict(heads=np.ones(3, bool)), 'give 4 of bool')):
    with pytest.raises(ValueError, match=message):
      mask(known[site], **which)
  with pytest.raises(ValueError, match='is no pattern'):
    short_circuit(known[Z])


def test_masks_may_be_traced(case):
  site = sites(*case('decoder_only'))[Z]
  found = jax.vmap(lambda layer, head: mask(site, layers=layer, heads=head))(jnp.arange(N), jnp.arange(H))
  assert found.shape == (N, N, 1, 1, H, 1) and found.sum() == N
