import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.decoding.beam import beam_search
from tfm.decoding.cache import Cache
from tfm.decoding.loop import IMPOSSIBLE
from tfm.special_ids import BOS, EOS, PAD

PENALTY = {'gnmt': lambda n, alpha: ((5 + max(n, 1)) / 6) ** alpha, 'power': lambda n, alpha: max(n, 1) ** alpha}


@partial(jax.jit, static_argnames=('length', 'beam_size', 'num_hypotheses', 'form', 'stop'))
def _search(model, sources, limits_B, length, beam_size, **settings):
  return beam_search(model.step, model.init_cache(sources, beam_size), limits_B, length, beam_size, **settings)


def search(model, sources, limits, *sizes, **settings):
  return jax.tree.map(np.asarray, _search(model, sources, np.array(limits), *sizes, **settings))


def as_lists(found, row):
  """[(tokens, score, finished)] of one sentence, without the empty places."""
  return [(found.tokens_BxMxL[row, m, :found.lengths_BxM[row, m]].tolist(), float(found.scores_BxM[row, m]),
           bool(found.finished_BxM[row, m]))
          for m in range(found.scores_BxM.shape[1]) if found.scores_BxM[row, m] > IMPOSSIBLE]


def assert_same(ours, reference):
  assert [hypothesis[0] for hypothesis in ours] == [hypothesis[0] for hypothesis in reference]
  assert [hypothesis[2] for hypothesis in ours] == [hypothesis[2] for hypothesis in reference]
  np.testing.assert_allclose([hypothesis[1] for hypothesis in ours], [hypothesis[1] for hypothesis in reference],
                             rtol=1e-5, atol=1e-6)


def naive_beam(model, source_W, limit, beam_size, n, alpha, form, stop, prefix=()):
  """Beam search in lists, for one sentence, without cache; stop=None goes on to the limit."""
  live, ended = [([], 0.0)], []
  for t in range(limit):
    candidates = []
    for tokens, total in live:
      for token, log_prob in enumerate(model.log_probs(source_W, tokens)[-1]):
        if (token == prefix[t]) if t < len(prefix) else (token not in (PAD, BOS)):
          candidates.append((tokens + [token], total + log_prob))
    candidates = sorted(candidates, key=lambda candidate: -candidate[1])[:2 * beam_size]
    for tokens, total in candidates[:beam_size]:
      if tokens[-1] == EOS:
        ended.append((tokens, total / PENALTY[form](t + 1, alpha), True))
    ended = sorted(ended, key=lambda hypothesis: -hypothesis[1])[:beam_size]
    live = [candidate for candidate in candidates if candidate[0][-1] != EOS][:beam_size]
    if not live or (stop == 'full' and len(ended) == beam_size):
      break
    if stop == 'bound' and len(ended) >= n and ended[n - 1][1] >= live[0][1] / PENALTY[form](limit, alpha):
      break
  return (ended + [(tokens, total / PENALTY[form](limit, alpha), False) for tokens, total in live])[:n]


def all_sequences(model, source_W, limit, alpha, form):
  """Every output there is up to the limit: those that end by score, then those cut by score."""
  tokens = [token for token in range(model.vocabulary) if token not in (PAD, BOS, EOS)]
  ended = [[*body, EOS] for n in range(limit) for body in itertools.product(tokens, repeat=n)]
  cut = [list(body) for body in itertools.product(tokens, repeat=limit)]

  def ranked(sequences, finished):
    scored = [(sequence, model.log_prob(source_W, sequence) / PENALTY[form](len(sequence), alpha), finished)
              for sequence in sequences]
    return sorted(scored, key=lambda hypothesis: -hypothesis[1])

  return ranked(ended, True) + ranked(cut, False)


@pytest.mark.parametrize('alpha', [0.0, 0.6, 1.0])
@pytest.mark.parametrize('form', ['gnmt', 'power'])
def test_a_beam_that_holds_everything_finds_what_enumeration_finds(toy, alpha, form):
  model = toy(seed=7)
  sources, limits = model.sources(3), [4, 2, 3]
  found = search(model, sources, limits, 4, 108, num_hypotheses=60, alpha=alpha, form=form)
  for row, limit in enumerate(limits):
    assert_same(as_lists(found, row), all_sequences(model, sources[row], limit, alpha, form)[:60])


@pytest.mark.parametrize('alpha', [0.0, 1.0])
def test_a_bound_that_stops_early_still_finds_the_best_of_all(toy, alpha):
  model = toy(seed=4, eos=2.0)
  sources = model.sources(4)
  found = search(model, sources, [4] * 4, 4, 108, num_hypotheses=3, alpha=alpha)
  for row in range(4):
    assert_same(as_lists(found, row), all_sequences(model, sources[row], 4, alpha, 'gnmt')[:3])


@pytest.mark.parametrize('stop', ['bound', 'full'])
@pytest.mark.parametrize('beam_size, alpha, form, eos', [
    (2, 0.6, 'gnmt', 0.0), (3, 1.0, 'power', 1.0), (5, 1.0, 'gnmt', -1.0)])
def test_equals_a_search_written_without_batch_or_cache(toy, beam_size, alpha, form, eos, stop):
  limits = [0, 1, 4, 7, 7, 9, 9, 9]
  n = beam_size // 2
  for seed in range(3):
    model = toy(vocabulary=8, seed=seed, eos=eos)
    sources = model.sources(len(limits), seed)
    found = search(model, sources, limits, 9, beam_size, num_hypotheses=n, alpha=alpha, form=form, stop=stop)
    for row, limit in enumerate(limits):
      expected = naive_beam(model, sources[row], limit, beam_size, n, alpha, form, stop)
      assert_same(as_lists(found, row), expected)


@pytest.mark.parametrize('n, alpha, form', [(1, 0.0, 'gnmt'), (4, 0.6, 'gnmt'), (2, 1.0, 'power'), (3, 3.0, 'power')])
def test_the_bound_changes_nothing_but_the_number_of_turns(toy, n, alpha, form):
  model, turns, limit = toy(vocabulary=8, seed=1, eos=3.0), [], 9
  sources = model.sources(8)

  def step(tokens_RxT, cache):
    jax.debug.callback(lambda: turns.append(1))
    return model.step(tokens_RxT, cache)

  cache = model.init_cache(sources, 4)
  found = jax.jit(lambda: beam_search(step, cache, jnp.full(8, limit), limit, 4, n, alpha, form))()
  found = jax.tree.map(np.asarray, found)
  jax.effects_barrier()
  for row in range(8):
    assert_same(as_lists(found, row), naive_beam(model, sources[row], limit, 4, n, alpha, form, None))
  if n == 1:
    assert len(turns) < limit


def test_full_stops_when_as_many_hypotheses_as_the_beam_holds_have_ended(toy):
  model = toy(vocabulary=8, seed=1, eos=-0.5)
  differs = 0
  for seed in range(4):
    sources = model.sources(8, seed)
    settings = dict(num_hypotheses=2, alpha=2.0, form='power')
    full, bound = (search(model, sources, [9] * 8, 9, 2, stop=stop, **settings) for stop in ('full', 'bound'))
    assert (full.scores_BxM[:, 0] <= bound.scores_BxM[:, 0] + 1e-6).all()
    differs += int((full.tokens_BxMxL != bound.tokens_BxMxL).any())
  assert differs


@pytest.mark.parametrize('stop', ['bound', 'full'])
@pytest.mark.parametrize('alpha', [0.0, 0.6, 4.0])
def test_beam_1_is_greedy_search(toy, greedy, alpha, stop):
  model = toy(vocabulary=9, seed=3, eos=1.0)
  sources, limits = model.sources(12), jnp.array([0, 1, 4] + [10] * 9)
  found = search(model, sources, limits, 10, 1, alpha=alpha, form='power', stop=stop)
  expected = greedy(model, sources, limits, 10)
  np.testing.assert_array_equal(found.tokens_BxMxL[:, 0], expected.tokens_BxL)
  np.testing.assert_array_equal(found.lengths_BxM[:, 0], expected.lengths_B)
  np.testing.assert_allclose(found.log_prob_BxM[:, 0], expected.log_prob_B, rtol=1e-6)
  np.testing.assert_array_equal(found.finished_BxM[:, 0], expected.finished_B)


@pytest.mark.parametrize('stop', ['bound', 'full'])
def test_a_sentence_alone_equals_the_sentence_in_a_batch(toy, stop):
  model = toy(vocabulary=8, seed=5, eos=0.5)
  sources, limits = model.sources(6), [0, 2, 5, 9, 9, 12]
  together = search(model, sources, limits, 12, 4, num_hypotheses=4, stop=stop)
  for row, width in [(0, 12), (2, 12), (4, 9)]:
    alone = search(model, sources[row:row + 1], limits[row:row + 1], width, 4, num_hypotheses=4, stop=stop)
    np.testing.assert_array_equal(alone.tokens_BxMxL[0], together.tokens_BxMxL[row, :, :width])
    for one, other in zip(jax.tree.leaves(alone)[1:], jax.tree.leaves(together)[1:]):
      np.testing.assert_allclose(one[0], other[row], rtol=1e-6)


def test_scores_are_those_of_the_tokens_and_the_list_is_distinct_and_sorted(toy):
  model, alpha = toy(vocabulary=8, seed=6), 0.6
  sources = model.sources(6)
  found = search(model, sources, [8] * 6, 8, 5, num_hypotheses=5, alpha=alpha)
  for row in range(6):
    hypotheses = as_lists(found, row)
    assert len({tuple(tokens) for tokens, _, _ in hypotheses}) == len(hypotheses) == 5
    order = [(not finished, -score) for _, score, finished in hypotheses]
    assert order == sorted(order)
    for m, (tokens, score, finished) in enumerate(hypotheses):
      log_prob = model.log_prob(sources[row], tokens)
      np.testing.assert_allclose(found.log_prob_BxM[row, m], log_prob, rtol=1e-5)
      np.testing.assert_allclose(score, log_prob / PENALTY['gnmt'](len(tokens), alpha), rtol=1e-5)
      assert finished == (tokens[-1] == EOS) and not set(tokens) & {PAD, BOS}
      assert not found.tokens_BxMxL[row, m, len(tokens):].any()


@pytest.mark.parametrize('stop', ['bound', 'full'])
def test_forced_prefixes_of_unequal_lengths(toy, stop):
  model = toy(vocabulary=8, seed=8, eos=-0.5)
  sources, limits = model.sources(4), [7, 7, 9, 9]
  prefixes = [[], [5], [7, 3, 4], [6, 6, EOS]]
  prefix_BxP = np.array([prefix + [9] * (3 - len(prefix)) for prefix in prefixes]) % 8
  found = search(model, sources, limits, 9, 3, num_hypotheses=3, stop=stop, prefix_BxP=prefix_BxP,
                 prefix_lengths_B=np.array([0, 1, 3, 3]))
  for row, prefix in enumerate(prefixes):
    hypotheses = as_lists(found, row)
    assert all(tokens[:len(prefix)] == prefix for tokens, _, _ in hypotheses)
    assert_same(hypotheses, naive_beam(model, sources[row], limits[row], 3, 3, 0.6, 'gnmt', stop, prefix))
  assert len(as_lists(found, 3)) == 1 and found.lengths_BxM[3].tolist() == [3, 0, 0]
  assert found.scores_BxM[3, 1:].tolist() == [np.float32(IMPOSSIBLE)] * 2
  assert not found.tokens_BxMxL[3, 1:].any() and not found.finished_BxM[3, 1:].any()


def test_forcing_its_own_output_gives_the_same_output(toy):
  model = toy(vocabulary=8, seed=8)
  sources, limits = model.sources(6), [3, 5, 7, 9, 9, 9]
  free = search(model, sources, limits, 9, 4)
  forced = search(model, sources, limits, 9, 4, prefix_BxP=free.tokens_BxMxL[:, 0],
                  prefix_lengths_B=free.lengths_BxM[:, 0])
  for one, other in zip(jax.tree.leaves(free), jax.tree.leaves(forced)):
    np.testing.assert_allclose(one, other, rtol=1e-6)
  model = toy(seed=7)  # and, where the beam holds everything, forcing any part of it
  free = search(model, model.sources(3), [4] * 3, 4, 108)
  part = search(model, model.sources(3), [4] * 3, 4, 108, prefix_BxP=free.tokens_BxMxL[:, 0],
                prefix_lengths_B=np.minimum(free.lengths_BxM[:, 0], 2))
  np.testing.assert_array_equal(free.tokens_BxMxL, part.tokens_BxMxL)
  np.testing.assert_allclose(free.scores_BxM, part.scores_BxM, rtol=1e-6)


def test_no_nan_when_one_token_has_all_the_probability():
  def step(tokens_RxT, cache):
    return jnp.full((*tokens_RxT.shape, 6), -jnp.inf).at[..., cache.source].set(0.0), cache

  @jax.jit
  def decode(only):
    cache = Cache(index=jnp.int32(0), source=only, steps=jnp.zeros(6))
    return beam_search(step, cache, jnp.array([3, 5]), 5, 3, 3, prefix_BxP=jnp.array([[3], [4]]),
                       prefix_lengths_B=jnp.array([1, 0]))

  for only in range(6):
    found = decode(only)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert found.tokens_BxMxL[0, 0, 0] == 3 and (only in (PAD, BOS) or found.tokens_BxMxL[1, 0, 0] == only)


def test_equal_hypotheses_are_ranked_by_hypothesis_then_by_token():
  def step(tokens_RxT, cache):
    return jnp.zeros((*tokens_RxT.shape, 6)).at[..., EOS].set(-5.0), cache

  cache = Cache(index=jnp.int32(0), source=(), steps=jnp.zeros(3))
  found = jax.jit(lambda: beam_search(step, cache, jnp.array([2]), 2, 3, 3))()
  assert found.tokens_BxMxL.tolist() == [[[3, 3], [3, 4], [3, 5]]]


def test_compiled_once_for_all_limits_and_prefixes(toy):
  model, traced = toy(), []

  @jax.jit
  def decode(sources, limits_B, prefix_BxP, prefix_lengths_B):
    traced.append(1)
    return beam_search(model.step, model.init_cache(sources, 3), limits_B, 6, 3, 2, prefix_BxP=prefix_BxP,
                       prefix_lengths_B=prefix_lengths_B)

  for limit in (0, 3, 6):
    decode(model.sources(2), jnp.array([limit, 4]), jnp.full((2, 3), limit % 6), jnp.array([0, limit // 2]))
  assert len(traced) == 1


@pytest.mark.parametrize('settings, name', [
    ({'num_hypotheses': 4}, 'num_hypotheses'), ({'num_hypotheses': 0}, 'num_hypotheses'), ({'alpha': -1.0}, 'alpha'),
    ({'form': 'wu'}, 'form'), ({'stop': 'never'}, 'stop'), ({'length': 0}, 'length'),
], ids=str)
def test_settings_out_of_range_are_refused(toy, settings, name):
  model = toy()
  settings = {'length': 3, 'beam_size': 3} | settings
  with pytest.raises(ValueError, match=name):
    beam_search(model.step, model.init_cache(model.sources(2), 3), jnp.array([3, 3]), **settings)
