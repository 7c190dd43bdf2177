from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.decoding.cache import Cache
from tfm.decoding.loop import IMPOSSIBLE
from tfm.decoding.sampling import sample, sentence_keys, truncate
from tfm.special_ids import BOS, EOS, PAD

LOGITS = np.log(np.array([.1, .1, .05, .3, .2, .15, .1]))


def constant_step(tokens_RxT, cache):
  return jnp.asarray(LOGITS, jnp.float32)[None, None].repeat(tokens_RxT.shape[0], 0), cache


@partial(jax.jit, static_argnames=('length', 'top_k', 'top_p'))
def draw_jitted(model, sources, limits_B, length, keys_B, temperature=1.0, top_k=0, top_p=1.0,
                prefix_BxP=None, prefix_lengths_B=None):
  cache = model.init_cache(sources)
  return sample(model.step, cache, limits_B, length, keys_B, temperature, top_k, top_p, prefix_BxP, prefix_lengths_B)


def draw(*arguments, **settings):
  return jax.tree.map(np.asarray, draw_jitted(*arguments, **settings))


def exact(temperature=1.0, top_k=0, top_p=1.0):
  """The distribution that the definition of the three settings gives, in plain Python."""
  weights = np.exp(LOGITS / temperature)
  weights[[PAD, BOS]] = 0
  ranked = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
  ranked = ranked[:top_k] if top_k else ranked
  total, reached, kept = sum(weights[ranked]), 0.0, []
  for token in ranked:
    if reached >= top_p - 1e-6:
      break
    kept.append(token)
    reached += weights[token] / total
  probs = np.zeros(len(weights))
  probs[kept] = weights[kept]
  return probs / probs.sum()


@pytest.mark.parametrize('settings', [
    {'temperature': 0.5}, {'top_k': 3}, {'top_k': 100}, {'top_p': 0.7},
    {'temperature': 1.5, 'top_k': 4, 'top_p': 0.6},
], ids=str)
def test_frequencies_follow_the_exact_truncated_distribution(settings):
  draws = 20_000
  cache = Cache(index=jnp.int32(0), source=(), steps=jnp.zeros(draws))
  keys_B = jax.random.split(jax.random.key(5), draws)
  out = sample(constant_step, cache, jnp.ones(draws, jnp.int32), 1, keys_B, **settings)
  out = jax.tree.map(np.asarray, out)
  counts, probs = np.bincount(out.tokens_BxL[:, 0], minlength=len(LOGITS)), exact(**settings)
  assert (counts[probs == 0] == 0).all()
  possible = probs > 0
  chi_square = ((counts - draws * probs)[possible] ** 2 / (draws * probs[possible])).sum()
  degrees = possible.sum() - 1
  assert chi_square <= degrees + 5 * np.sqrt(2 * degrees)  # five standard deviations; the seed is fixed
  np.testing.assert_allclose(out.log_prob_B, LOGITS[out.tokens_BxL[:, 0]], rtol=1e-5)  # untempered, untruncated


def test_tokens_of_one_row_are_drawn_independently():
  draws = 5000
  cache = Cache(index=jnp.int32(0), source=(), steps=jnp.zeros(draws))
  keys_B = jax.random.split(jax.random.key(6), draws)
  tokens_BxL = np.asarray(sample(constant_step, cache, jnp.full(draws, 2), 2, keys_B).tokens_BxL)
  repeated, probs = (tokens_BxL[:, 0] == tokens_BxL[:, 1]).sum(), exact()
  going_on = tokens_BxL[:, 0] != EOS
  expected = going_on.sum() * (probs[3:] ** 2).sum() / probs[3:].sum()
  assert abs(repeated - expected) < 5 * np.sqrt(expected)


def test_top_k_keeps_exactly_k_and_among_equals_the_lowest_ids():
  logits_BxV = jnp.array([[1., 3., 2., 2., 2., 0.], [0., 0., 0., 0., 0., 0.]])
  kept_BxV = truncate(logits_BxV, top_k=3) > IMPOSSIBLE
  assert kept_BxV.tolist() == [[False, True, True, True, False, False], [True, True, True, False, False, False]]
  np.testing.assert_array_equal(truncate(logits_BxV, top_k=6), logits_BxV)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
  logits_BxV = jnp.log(jnp.array([[.1, .5, .25, .125, .025]]))
  for p, kept in [(1e-9, 1), (.49, 1), (.51, 2), (.74, 2), (.76, 3), (.87, 3), (.88, 4), (.99, 5), (1.0, 5)]:
    assert (truncate(logits_BxV, top_p=p) > IMPOSSIBLE).sum() == kept, p
  assert jnp.array_equal(truncate(logits_BxV, top_p=jnp.float32(.76)), truncate(logits_BxV, top_p=.76))


@pytest.mark.parametrize('settings', [{'top_k': 1}, {'top_p': 1e-6}], ids=str)
def test_the_sharpest_settings_are_greedy_search(toy, greedy, settings):
  model = toy(vocabulary=9, eos=-1.0)
  sources, limits_B = model.sources(4), np.array([0, 3, 8, 10])
  expected = greedy(model, sources, limits_B, 10)
  drawn = draw(model, sources, limits_B, 10, jax.random.split(jax.random.key(0), 4), **settings)
  for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(drawn)):
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_sentence_draws_the_same_in_any_batch_and_a_different_key_draws_differently(toy):
  model = toy(vocabulary=9, eos=-1.0)
  sources, limits_B = model.sources(4), np.array([10, 5, 8, 10])

  def tokens(rows, seed=0):
    keys_B = sentence_keys(jax.random.key(seed), jnp.array(rows))
    return np.asarray(draw(model, sources[rows], limits_B[rows], 10, keys_B).tokens_BxL)

  together = tokens([0, 1, 2, 3])
  np.testing.assert_array_equal(tokens([2, 0, 3]), together[[2, 0, 3]])
  assert not np.array_equal(tokens([0, 1, 2, 3], seed=1), together)


def test_sentence_keys_are_distinct_and_do_not_depend_on_how_many():
  three = jax.random.key_data(sentence_keys(jax.random.key(0), jnp.array([4, 7]), 3)).tolist()
  assert len({tuple(key) for key in three}) == 6
  two = jax.random.key_data(sentence_keys(jax.random.key(0), jnp.array([7, 4]), 2)).tolist()
  assert two == three[3:5] + three[0:2]


@pytest.mark.parametrize('kept', [1, 3, 10])
def test_forcing_a_samples_own_tokens_gives_the_same_sample(toy, kept):
  model = toy(vocabulary=9, eos=-1.0)
  sources, limits_B = model.sources(4), np.array([4, 6, 8, 10])
  keys_B = sentence_keys(jax.random.key(2), jnp.arange(4))
  free = draw(model, sources, limits_B, 10, keys_B, 1.3, 5, 0.95)
  forced = draw(model, sources, limits_B, 10, keys_B, 1.3, 5, 0.95, free.tokens_BxL, np.minimum(free.lengths_B, kept))
  for one, other in zip(jax.tree.leaves(free), jax.tree.leaves(forced)):
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize('settings, name', [
    ({'temperature': 0.0}, 'temperature'), ({'top_k': -1}, 'top_k'), ({'top_p': 0.0}, 'top_p'),
    ({'top_p': 1.5}, 'top_p'), ({'keys_B': jax.random.key(0)}, 'keys_B'), ({'keys_B': jnp.zeros(2)}, 'keys_B'),
], ids=str)
def test_settings_out_of_range_are_refused(settings, name):
  cache = Cache(index=jnp.int32(0), source=(), steps=jnp.zeros(2))
  settings = {'keys_B': jax.random.split(jax.random.key(0), 2)} | settings
  with pytest.raises(ValueError, match=name):
    sample(constant_step, cache, jnp.ones(2, jnp.int32), 1, **settings)
