import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.decoding import loop
from tfm.decoding.cache import Cache
from tfm.decoding.greedy import greedy_search
from tfm.decoding.loop import IMPOSSIBLE, LEAST, autoregress
from tfm.special_ids import BOS, EOS, PAD

LIMITS = np.array([0, 1, 3, 7, 12])


def random_choice(log_probs_BxV, t):
  keys_B = jax.vmap(jax.random.key)(jnp.arange(log_probs_BxV.shape[0]) * 100 + t)
  return jax.vmap(jax.random.categorical)(keys_B, log_probs_BxV)


@pytest.fixture
def decoded(toy):
  model = toy(eos=-1.0)
  sources = model.sources(5)
  cache = model.init_cache(sources)
  out, _ = jax.jit(lambda: autoregress(model.step, cache, random_choice, LIMITS, 12))()
  return model, sources, jax.tree.map(np.asarray, out)


def test_impossible_lies_below_any_sum_of_least_log_probs():
  assert IMPOSSIBLE / 10 < 10_000 * LEAST


def test_shape_of_the_output(decoded):
  _, _, out = decoded
  for tokens, length, finished, limit in zip(out.tokens_BxL, out.lengths_B, out.finished_B, LIMITS):
    tokens, length = np.asarray(tokens), int(length)
    assert length <= limit
    assert (tokens[length:] == PAD).all()
    assert not np.isin(tokens[:length], [PAD, BOS]).any()
    assert finished == (length > 0 and tokens[length - 1] == EOS)
    assert finished or length == limit
    assert not (tokens[:max(length - 1, 0)] == EOS).any()
  assert out.finished_B.any() and not out.finished_B[1:].all()  # both endings are seen


def test_log_probs_are_the_models_over_the_whole_vocabulary(decoded):
  model, sources, out = decoded
  for row in range(5):
    tokens = [int(token) for token in out.tokens_BxL[row, :out.lengths_B[row]]]
    np.testing.assert_allclose(out.log_prob_B[row], model.log_prob(sources[row], tokens), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(out.token_log_probs_BxL.sum(1), out.log_prob_B, rtol=1e-5)


def test_a_row_alone_equals_the_row_in_a_batch_and_width_does_not_matter(toy, greedy):
  model = toy(eos=-1.0, seed=3)
  sources = model.sources(5)
  together = greedy(model, sources, LIMITS, 12)
  for row, width in [(0, 12), (2, 12), (3, 7)]:
    one = slice(row, row + 1)
    alone = greedy(model, sources[one], LIMITS[one], width)
    np.testing.assert_array_equal(alone.tokens_BxL[0], together.tokens_BxL[row, :width])
    assert not together.tokens_BxL[row, width:].any()
    np.testing.assert_allclose(alone.log_prob_B[0], together.log_prob_B[row], rtol=1e-6)
    assert alone.finished_B[0] == together.finished_B[row]


def test_the_loop_ends_with_the_last_row(toy):
  model = toy(eos=100.0)
  turns = []

  def step(tokens_RxT, cache):
    jax.debug.callback(lambda: turns.append(1))
    return model.step(tokens_RxT, cache)

  cache = model.init_cache(model.sources(5))
  out = jax.jit(lambda: greedy_search(step, cache, LIMITS, 12))()
  jax.block_until_ready(out)
  jax.effects_barrier()
  assert len(turns) == 1 and out.lengths_B.tolist() == [0, 1, 1, 1, 1]


def test_forced_tokens_of_unequal_lengths_come_first_and_count(toy, greedy):
  model = toy(eos=-1.0, seed=1)
  sources = model.sources(4)
  prefix_BxP = np.array([[9, 9, 9], [4, 9, 9], [5, 3, 4], [5, EOS, 4]]) % model.vocabulary
  prefix_lengths_B = np.array([0, 1, 3, 3])
  out = greedy(model, sources, np.full(4, 6), 6, prefix_BxP, prefix_lengths_B)
  free = greedy(model, sources, np.full(4, 6), 6)
  np.testing.assert_array_equal(out.tokens_BxL[0], free.tokens_BxL[0])
  assert out.tokens_BxL[1, 0] == 4 and out.tokens_BxL[2, :3].tolist() == [5, 3, 4]
  assert out.tokens_BxL[3].tolist() == [5, EOS, 0, 0, 0, 0] and out.finished_B[3] and out.lengths_B[3] == 2
  for row in range(4):
    tokens = [int(token) for token in out.tokens_BxL[row, :out.lengths_B[row]]]
    np.testing.assert_allclose(out.log_prob_B[row], model.log_prob(sources[row], tokens), rtol=1e-5)


def test_the_limit_holds_for_forced_tokens(toy, greedy):
  model = toy()
  out = greedy(model, model.sources(1), jnp.array([2]), 5, jnp.array([[4, 5, 4]]),
                      jnp.array([3]))
  assert out.tokens_BxL[0].tolist() == [4, 5, 0, 0, 0] and not out.finished_B[0]


def test_no_nan_when_one_token_has_all_the_probability():
  def step(tokens_RxT, cache):
    return jnp.full((*tokens_RxT.shape, 6), -jnp.inf).at[..., cache.source].set(0.0), cache

  @jax.jit
  def decode(only):
    cache = Cache(index=jnp.int32(0), source=only, steps=jnp.zeros(2))
    return greedy_search(step, cache, jnp.array([3, 5]), 5, jnp.array([[3], [4]]), jnp.array([1, 0]))

  for only in range(6):
    out = decode(only)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    assert not np.isin(out.tokens_BxL[:, :1], [PAD, BOS]).any()
    assert out.tokens_BxL[0, 0] == 3 and (only in (PAD, BOS) or out.tokens_BxL[1, 0] == only)


def test_compiled_once_for_all_limits_and_prefixes(toy):
  model, traced = toy(), []

  @jax.jit
  def decode(sources, limits_B, prefix_BxP, prefix_lengths_B):
    traced.append(1)
    return greedy_search(model.step, model.init_cache(sources), limits_B, 6, prefix_BxP, prefix_lengths_B)

  for limit in (0, 3, 6):
    decode(model.sources(2), jnp.array([limit, 4]), jnp.full((2, 3), limit), jnp.array([0, limit // 2]))
  assert len(traced) == 1


@pytest.mark.parametrize('arguments, sentence', [
    (dict(length=0), 'at least 1'),
    (dict(length=3, prefix_BxP=jnp.ones((2, 1), int)), 'give both or neither'),
    (dict(length=3, prefix_BxP=jnp.ones((2, 0), int), prefix_lengths_B=jnp.zeros(2, int)), 'width 0'),
])
def test_what_cannot_be_honoured_is_refused(toy, arguments, sentence):
  model = toy()
  with pytest.raises(ValueError, match=sentence):
    greedy_search(model.step, model.init_cache(model.sources(2)), jnp.array([3, 3]), **arguments)


def test_forced_tokens_beyond_the_width_of_the_prefix_are_free():
  forced_B, _ = loop.forced_tokens(jnp.array([[4, 5]]), jnp.array([9]), jnp.int32(2), 1)
  assert not forced_B.any()


def test_highest_is_the_first_maximum():
  values_BxV = jnp.array([[1., 3., 3., 2.], [IMPOSSIBLE] * 4, [0., 1., 2., 3.]])
  assert loop.highest(values_BxV).tolist() == jnp.argmax(values_BxV, -1).tolist() == [1, 0, 3]


@pytest.mark.parametrize('k', [1, 3, 8])
@pytest.mark.parametrize('values', ['apart', 'equal in places', 'all equal'])
@pytest.mark.parametrize('width', [50, 8 * 4 * loop.BLOCK, 8 * 4 * loop.BLOCK + 7])
def test_highest_k_is_top_k_and_equal_values_keep_their_order(k, values, width):
  random = np.random.default_rng(k)
  values_BxN = {'apart': random.normal(size=(5, width)), 'equal in places': random.integers(0, 12, (5, width)),
                'all equal': np.full((5, width), IMPOSSIBLE)}[values].astype(np.float32)
  values_BxN[0, -1] = 1e9  # the last of all, beside the padding
  for found, expected in zip(jax.jit(loop.highest_k, static_argnums=1)(values_BxN, k), jax.lax.top_k(values_BxN, k)):
    np.testing.assert_array_equal(found, expected)
