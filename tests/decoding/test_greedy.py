import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.decoding.cache import Cache
from tfm.decoding.greedy import greedy_search
from tfm.special_ids import BOS, EOS, PAD, SpecialIds


def naive_greedy(model, source_W, limit):
  tokens = []
  while len(tokens) < limit and EOS not in tokens:
    log_probs_V = model.log_probs(source_W, tokens)[-1]
    log_probs_V[[PAD, BOS]] = -np.inf
    tokens.append(int(log_probs_V.argmax()))
  return tokens


@pytest.mark.parametrize('seed', range(3))
def test_equals_a_search_written_without_batch_or_cache(toy, greedy, seed):
  model = toy(vocabulary=9, seed=seed, eos=-1.0)
  sources, limits_B = model.sources(6, seed), np.array([0, 2, 5, 8, 8, 10])
  out = greedy(model, sources, limits_B, 10)
  for row, limit in enumerate(limits_B.tolist()):
    tokens = naive_greedy(model, sources[row], limit)
    assert out.tokens_BxL[row, :out.lengths_B[row]].tolist() == tokens
    np.testing.assert_allclose(out.log_prob_B[row], model.log_prob(sources[row], tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kept', [1, 3, 12])
def test_forcing_its_own_output_gives_the_same_output(toy, greedy, kept):
  model = toy(vocabulary=9, seed=2, eos=-1.0)
  sources, limits_B = model.sources(6), np.full(6, 12)
  free = greedy(model, sources, limits_B, 12)
  forced = greedy(model, sources, limits_B, 12, free.tokens_BxL,
                         np.minimum(free.lengths_B, kept))
  for before, after in zip(jax.tree.leaves(free), jax.tree.leaves(forced)):
    np.testing.assert_allclose(before, after, rtol=1e-6)


def test_ties_go_to_the_lowest_id_and_forbidden_ids_are_not_chosen():
  def step(tokens_RxT, cache):
    return jnp.array([9., 9., 0., 5., 7., 7.])[None, None].repeat(tokens_RxT.shape[0], 0), cache

  cache = Cache(index=jnp.int32(0), source=(), steps=jnp.zeros(1))
  assert greedy_search(step, cache, jnp.array([2]), 2).tokens_BxL.tolist() == [[4, 4]]
  without = greedy_search(step, cache, jnp.array([2]), 2, special=SpecialIds(forbidden=(PAD, BOS, 4, 5)))
  assert without.tokens_BxL.tolist() == [[3, 3]]
