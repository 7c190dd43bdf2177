"""The measures of E12 are what they say, and its facts are told as often and as wrongly as they should be."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis.ablation import knock_out
from tfm.analysis.attribution import attribution
from tfm.analysis.engine import Edit, edit
from tfm.analysis.overconfidence import (
    SCALES,
    START,
    _edited,
    average_token,
    calibration_error,
    components,
    make_world,
    measure,
    run_overconfidence,
    token_vectors,
    writes,
)
from tfm.analysis.report import as_json
from tfm.analysis.sites import sites

SIZE = replace(SCALES['cpu'], layers=2, width=16, length=12, subjects=20, objects=5, words=10, steps=80, rows=32,
               seeds=1)
ZIPF = 1 / np.arange(1, 12) / (1 / np.arange(1, 12)).sum()


@pytest.mark.parametrize('layout, changes', [
    ('scanned', {}), ('scanned', dict(biases='all', output_bias=True)),
    ('unrolled', dict(norm_type='rms', scale_output=True))])
def test_the_parts_sum_to_the_logits_whatever_is_taken_from_all(case, layout, changes):
  model, params, (ids,) = case('decoder_only', layout, **changes)
  logits = edit(model, params, (ids,), Edit('decoder.layers.mlp', scale=1.0))[:, -1]
  parts, final = writes(model, params, ids)
  np.testing.assert_allclose(sum(parts.values()), final, atol=1e-5)
  vectors, constant = token_vectors(model, params, final[1])
  np.testing.assert_allclose(vectors @ final[1] + constant, logits[1], atol=2e-5)

  answers = np.array([3, 7, 10])
  found = components(model, params, jnp.stack(list(parts.values())), final, answers, ZIPF)
  np.testing.assert_allclose(found['suppression'].sum(1), logits @ ZIPF - logits[np.arange(3), answers], atol=2e-5)
  # A constant for each part, the mean over the vocabulary, is all by which this differs from direct logit attribution.
  tokens = jnp.broadcast_to(jnp.arange(11)[:, None, None], (11, *ids.shape))
  by_token = [attribution(model, params, (ids,), each).heads['self_attention'][2, 3, :, -1] for each in tokens]
  expected = ZIPF @ jnp.stack(by_token) - jnp.stack([by_token[v][b] for b, v in enumerate(answers)])
  np.testing.assert_allclose(found['suppression'][:, list(parts).index('head 2.3')], expected, atol=2e-5)


def test_a_part_that_follows_the_frequencies_is_seen_to_and_one_that_does_nothing_does_nothing(case):
  model, params, (ids,) = case('decoder_only', 'scanned')
  parts, final = writes(model, params, ids)
  vectors = np.stack([token_vectors(model, params, each)[0] for each in final])
  along = jnp.asarray(np.linalg.pinv(vectors) @ np.log(ZIPF))  # its logits are log p, as nearly as 16 numbers allow
  found = components(model, params, jnp.stack([along, 0 * along, final - along]), final, np.zeros(3, int), ZIPF)
  assert (found['correlation with log p'][:, 0] > 0.95).all()
  np.testing.assert_allclose(found['entropy effect'][:, 1], 0.0, atol=1e-6)
  np.testing.assert_allclose(found['suppression'][:, 1], 0.0, atol=1e-6)


def test_only_what_is_like_the_average_token_stands_out():
  rng = np.random.default_rng(0)
  vectors, p = rng.normal(size=(300, 64)), 1 / np.arange(1, 301)
  p = p / p.sum()
  average = np.broadcast_to((p - p.mean()) @ vectors, (5, 64))
  cos, z = average_token(jnp.stack([average, 3 * average, -average, rng.normal(size=(5, 64))]), vectors, p, 0)
  np.testing.assert_allclose(cos[:3], [1, 1, -1], atol=1e-5)
  assert (z[:2] > 5).all() and z[2] < -5 and abs(z[3]) < 3
  # A write that favours the first ten tokens, which are frequent, but none of them more than another.
  some = np.broadcast_to(vectors[:10].sum(0), (5, 64))[None]
  assert average_token(some, vectors, p, 0)[1][0] > 3 > abs(average_token(some, vectors, p, 0, among=range(10))[1][0])


def test_edits_are_those_of_the_engine_and_of_the_last_layer_alone(case):
  model, params, (ids,) = case('decoder_only', 'scanned')
  logits = model.apply({'params': params}, ids)
  average = jax.random.normal(jax.random.key(0), (16,))
  found = {name: on_texts for name, _, on_texts in _edited(model, params, ids, ids, average, 0)}
  unit = average / jnp.linalg.norm(average)
  np.testing.assert_allclose(found['untouched'], logits, atol=1e-5)
  without = Edit('decoder.layers[3].mlp', function=lambda y, layer: y - (y @ unit)[..., None] * unit)
  np.testing.assert_allclose(found['average token taken out, 1'], edit(model, params, (ids,), without), atol=1e-5)
  for kind, rest in (('scores', ''), ('pattern', ', not renormalised')):
    site = sites(model, params, (ids,))[f'decoder.layers.self_attention.{kind}']
    change = knock_out(site, queries=range(1, 6), keys=0, layers=3)
    np.testing.assert_allclose(found[f'start knocked out{rest}'], edit(model, params, (ids,), change), atol=1e-5)
    other = found[f'another position knocked out{rest}']
    np.testing.assert_allclose(other[:, :2], logits[:, :2], atol=1e-5)  # they see the start and themselves
    # Position 2 has one other to lose.
    change = knock_out(site, queries=2, keys=1, layers=3)
    np.testing.assert_allclose(other[:, 2], edit(model, params, (ids,), change)[:, 2], atol=1e-5)
    assert np.isfinite(other).all() and (abs(other - logits)[:, 2:].max(-1) > 1e-4).all()


def test_calibration_error_by_hand():
  confidence, right = np.array([0.95, 0.91, 0.55, 0.52, 1.0]), np.array([True, False, True, True, True])
  # Bins 0.9 to 1: 2.86 expected, 2 right; 0.5 to 0.6: 1.07 and 2.
  assert abs(calibration_error(confidence, right) - (0.86 + 0.93) / 5) < 1e-12
  assert calibration_error(np.ones(4), np.ones(4, bool)) == 0.0


def test_facts_are_told_again_and_a_fifth_of_the_tellings_has_a_drawn_object():
  rng = np.random.default_rng(0)
  world = make_world(rng, SIZE)
  facts = world.facts_Fx3
  pairs = {tuple(fact[:2]): fact[2] for fact in facts}
  assert len(pairs) == len(facts) == 40 and (np.unique(facts[:, 1], return_counts=True)[1] == 2).all()
  texts = world.texts(rng, SIZE, 20_000)
  assert texts.shape == (20_000, 12) and (texts[:, 0] == START).all() and (texts[:, 1:] > START).all()
  counted = np.bincount(texts[:, 1:].ravel(), minlength=len(world.unigram_V)) / texts[:, 1:].size
  np.testing.assert_allclose(counted, world.unigram_V, atol=0.002)
  assert abs(world.unigram_V.sum() - 1) < 1e-12
  told = world.told(rng, SIZE, rng.integers(40, size=50_000))
  same = np.mean([pairs[relation, subject] == what for relation, subject, what in told])
  by_chance = world.objects_V[facts[:, 2]].mean()
  assert abs(same - (0.8 + 0.2 * by_chance)) < 0.01
  in_texts = [(*pair, what) for row in texts[:2000] for *pair, what in zip(row[1:], row[2:], row[3:])
              if tuple(pair) in pairs]
  assert abs(np.mean([pairs[relation, subject] == what for relation, subject, what in in_texts]) - same) < 0.02
  np.testing.assert_array_equal(world.facts_Fx3, facts)  # no telling has changed them


def test_what_knows_nothing_and_what_is_no_sum_are_refused(case):
  model, params, (ids,) = case('decoder_only', 'scanned')
  wrong = np.asarray((edit(model, params, (ids,), Edit('decoder.layers.mlp', scale=1.0))[:, -1].argmax(-1) + 1) % 11)
  with pytest.raises(ValueError, match='answers 0 of 3 prompts'):
    measure(model, params, ids, wrong, wrong, ids, ZIPF)
  model, params, (ids,) = case('decoder_only', 'scanned', norm='post')
  with pytest.raises(ValueError, match='sum'):
    measure(model, params, ids, wrong, wrong, ids, ZIPF)


@pytest.mark.slow  # a minute
def test_what_has_learned_little_supports_nothing():
  result = run_overconfidence(SIZE)
  assert result.verdict == 'not supported at this scale' and len(result.measured['conditions']) == 4
  found = as_json(result)['measured']['by seed'][0]
  assert np.shape(found['attention to the start']) == (2, 4) and len(found['log p(y*)']['tuned lens']) == 2
  assert len(found['edits']) == 8 and list(found['suppression'])[-2:] == ['mlp 1', 'constant']
  pytest.importorskip('matplotlib')
  assert len(result.draw().axes) == 2
