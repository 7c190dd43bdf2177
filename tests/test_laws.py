"""Laws of the Transformer that hold however it is configured: each runs over cases that cover all pairs of choices."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tfm.config import TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.models.tap import Tap
from tfm.models.transformer import EncoderDecoder

CHOICES = {
    'norm': ('post', 'pre'),
    'tying': ('none', 'target', 'all'),
    'positions': ('sinusoidal', 'learned'),
    'dtype': ('float32', 'bfloat16'),
    'layout': ('unrolled', 'scanned'),
    'remat': ('none', 'full', 'dots'),
    'widths': ('d_model/H', 'own'),
}
CASES = [
    ('post', 'none', 'sinusoidal', 'float32', 'unrolled', 'none', 'own'),
    ('pre', 'none', 'learned', 'bfloat16', 'unrolled', 'full', 'd_model/H'),
    ('pre', 'none', 'sinusoidal', 'bfloat16', 'scanned', 'dots', 'd_model/H'),
    ('pre', 'target', 'learned', 'float32', 'scanned', 'none', 'own'),
    ('post', 'target', 'sinusoidal', 'bfloat16', 'unrolled', 'full', 'own'),
    ('post', 'target', 'learned', 'float32', 'scanned', 'dots', 'd_model/H'),
    ('pre', 'all', 'learned', 'bfloat16', 'unrolled', 'none', 'd_model/H'),
    ('pre', 'all', 'learned', 'float32', 'scanned', 'full', 'own'),
    ('post', 'all', 'sinusoidal', 'float32', 'unrolled', 'dots', 'own'),
]


def test_the_cases_cover_every_pair_of_choices():
  for (i, first), (j, second) in itertools.combinations(enumerate(CHOICES.values()), 2):
    assert {(case[i], case[j]) for case in CASES} == set(itertools.product(first, second))


D, S, T = 16, 8, 6
SOURCE_BxS = np.array([[5, 6, 7, 8, 9, 2, 0, 0], [4, 9, 2, 0, 0, 0, 0, 0], [0] * 8, [3, 8, 5, 5, 12, 4, 7, 2]])
TARGET_BxT = np.array([[1, 7, 11, 4, 16, 0], [1, 9, 6, 0, 0, 0], [1, 5, 5, 12, 8, 6], [1, 3, 0, 0, 0, 0]])
LENGTHS_B = np.array([6, 3, 0, 8])
"""Sentence 2 is empty."""


@dataclass(frozen=True)
class Case:
  """One model with random parameters, and what several laws need of it, each compiled once."""

  model: EncoderDecoder
  variables: dict

  @cached_property
  def forward(self):
    """(source_BxS, target_BxT) -> logits_BxTxV."""
    return jax.jit(lambda source, target: self.model.apply(self.variables, source, target))

  @cached_property
  def start(self):
    """source_BxS -> memory and a cache with two rows per sentence."""
    def run(source_BxS):
      memory = self.model.apply(self.variables, source_BxS, method='encode')
      return memory, self.model.apply(self.variables, memory, S, 2, method='init_cache')
    return jax.jit(run)

  @cached_property
  def step(self):
    """(tokens_RxT, memory, cache) -> (logits_RxTxV, cache)."""
    return jax.jit(
        lambda tokens, memory, cache: self.model.apply(self.variables, tokens, memory, cache, method='step'))

  def assert_close(self, actual, expected, tolerance):
    """Logits are of size 1; bfloat16 keeps 8 bits of every value on the way."""
    np.testing.assert_allclose(actual, expected, atol=tolerance if self.model.config.dtype == 'float32' else 0.05)


@pytest.fixture(scope='module', params=CASES, ids='-'.join)
def case(request) -> Case:
  choice = dict(zip(CHOICES, request.param))
  config = TransformerConfig(
      encoder_layers=2, decoder_layers=2, d_model=D, d_ff=24, num_heads=2, norm=choice['norm'], tying=choice['tying'],
      positions=choice['positions'], max_positions=S if choice['positions'] == 'learned' else None,
      dtype=choice['dtype'], scan_layers=choice['layout'] == 'scanned', remat=choice['remat'],
      **(dict(d_k=6, d_v=10) if choice['widths'] == 'own' else {}))
  model = build_model(config, 17 if config.tying == 'all' else 19, 17)
  random = np.random.default_rng(0)

  def fill(path, leaf):
    # Norms and biases too: what is left at 0 or 1 could be forgotten unnoticed.
    return np.asarray((path[-1].key == 'scale') + 0.25 * random.standard_normal(leaf.shape), np.float32)

  shapes = jax.eval_shape(partial(initialize, model), jax.random.key(0))
  return Case(model, {'params': jax.tree_util.tree_map_with_path(fill, shapes)})


def test_logits_are_finite_float32_and_differ_from_word_to_word(case):
  logits_BxTxV = case.forward(SOURCE_BxS, TARGET_BxT)
  assert logits_BxTxV.shape == (4, T, 17) and logits_BxTxV.dtype == jnp.float32
  assert np.isfinite(logits_BxTxV).all() and np.std(logits_BxTxV, axis=-1).min() > 0.1


def test_a_sentence_alone_and_one_in_a_batch_with_padding_get_the_same_logits(case):
  batch_BxTxV = case.forward(SOURCE_BxS, TARGET_BxT)
  alone_1xTxV = case.forward(SOURCE_BxS[1:2, :3], TARGET_BxT[1:2, :3])
  case.assert_close(batch_BxTxV[1, :3], alone_1xTxV[0], 2e-6)


def test_the_order_of_sentences_in_a_batch_does_not_matter(case):
  order = np.array([2, 0, 3, 1])
  case.assert_close(case.forward(SOURCE_BxS[order], TARGET_BxT[order]),
                    np.asarray(case.forward(SOURCE_BxS, TARGET_BxT))[order], 1e-6)


def test_what_follows_a_target_word_does_not_change_its_logits(case):
  changed_BxT = np.where(np.arange(T) < 4, TARGET_BxT, 13)
  before, after = (np.asarray(case.forward(SOURCE_BxS, target)) for target in (TARGET_BxT, changed_BxT))
  np.testing.assert_array_equal(after[:, :4], before[:, :4])
  assert (np.abs(after - before)[:, 4:].max(-1) > 1e-3).all()


def nudged(nudges: dict):
  """Adds a value to what the taps of these names pass on."""
  def intercept(call, args, kwargs, context):
    value, module = call(*args, **kwargs), context.module
    if not isinstance(module, Tap) or context.method_name != '__call__' or module.name not in nudges:
      return value
    return value + nudges[module.name].astype(value.dtype)

  return intercept


def test_gradients_flow_exactly_from_where_a_word_may_look(case):
  """d logits[b, t] / d embedding[c, s] is exactly 0 across sentences, for s > t and for padding, and elsewhere not."""
  weights_V = jnp.asarray(np.random.default_rng(1).standard_normal(17), jnp.float32)

  def outputs_BxT(nudges):
    with nn.intercept_methods(nudged(nudges)):
      return case.model.apply(case.variables, SOURCE_BxS, TARGET_BxT) @ weights_V

  nudges = {'source_embed': jnp.zeros((4, S, D)), 'target_embed': jnp.zeros((4, T, D))}
  jacobian = jax.jit(jax.jacrev(outputs_BxT))(nudges)
  reaches = {name: np.any(np.asarray(x_BxTxBxSxD) != 0, axis=-1) for name, x_BxTxBxSxD in jacobian.items()}
  same_sentence = np.eye(4, dtype=bool)[:, None, :, None]
  real_BxS = np.arange(S) < LENGTHS_B[:, None]
  np.testing.assert_array_equal(reaches['target_embed'], same_sentence & np.tri(T, dtype=bool)[None, :, None, :])
  np.testing.assert_array_equal(reaches['source_embed'],
                                np.broadcast_to(same_sentence & real_BxS[None, None], (4, T, 4, S)))


ROWS = np.array([0, 0, 1, 1])
"""Two hypotheses of sentence 0, two of sentence 1."""


def decode(case, tokens_RxT, widths, memory, cache):
  """Logits of all tokens, fed in pieces of these widths."""
  logits, at = [], 0
  for width in widths:
    logits_RxTxV, cache = case.step(tokens_RxT[:, at:at + width], memory, cache)
    assert logits_RxTxV.dtype == jnp.float32
    logits.append(logits_RxTxV)
    at += width
  assert cache.index == at
  return np.concatenate(logits, axis=1), cache


@pytest.mark.parametrize('widths', [(1, 1, 1, 1, 1, 1), (3, 3), (1, 3, 1, 1)], ids=str)
def test_cached_decoding_equals_teacher_forcing(case, widths):
  """Also for two rows per sentence, each with words of its own, that share one memory."""
  whole_RxTxV = case.forward(SOURCE_BxS[ROWS], TARGET_BxT)
  memory, cache = case.start(SOURCE_BxS[:2])
  logits_RxTxV, _ = decode(case, TARGET_BxT, widths, memory, cache)
  case.assert_close(logits_RxTxV, whole_RxTxV, 1e-5)


def test_a_reordered_cache_continues_the_rows_it_was_taken_from(case):
  rows_R = np.array([1, 0, 3, 3])
  memory, cache = case.start(SOURCE_BxS[:2])
  _, cache = decode(case, TARGET_BxT, (3,), memory, cache)
  continued_RxT = np.concatenate([TARGET_BxT[rows_R, :3], TARGET_BxT[::-1, 3:] + 4], axis=1)
  cache = cache.reorder(jnp.asarray(rows_R))
  logits_RxTxV = []
  for t in range(3, T):
    one_RxTxV, cache = case.step(continued_RxT[:, t:t + 1], memory, cache)
    logits_RxTxV.append(one_RxTxV)
  whole_RxTxV = case.forward(SOURCE_BxS[ROWS], continued_RxT)
  case.assert_close(np.concatenate(logits_RxTxV, axis=1), whole_RxTxV[:, 3:], 1e-5)
