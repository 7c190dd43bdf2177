from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis.alignment_error import (
  alignment_error_rate,
  attention_correctness,
  diagonal_links,
  error_table,
  links_of,
  rows_of_words,
  saliency,
  shuffled_rows,
  uniform_links,
  word_pattern,
  word_starts,
)
from tfm.analysis.cross_attention import cross_attention
from tfm.analysis.unweighted_mean import unweighted_mean
from tfm.config import ConvolutionalConfig, RecurrentConfig, TransformerConfig
from tfm.models.build import build_model, initialize

SOURCE_BxS = np.array([[5, 6, 7, 8, 2], [9, 4, 2, 0, 0]], np.int32)
TARGET_BxT = np.array([[1, 7, 9, 4, 2], [1, 5, 2, 0, 0]], np.int32)
TRANSFORMER = dict(encoder_layers=1, decoder_layers=1, d_model=8, d_ff=8, num_heads=2, dropout=0.0)
CONFIGS = {
    'transformer': lambda: TransformerConfig(**TRANSFORMER, tying='target'),
    'scanned, one table': lambda: TransformerConfig(**TRANSFORMER, tying='all', scan_layers=True),
    'fixed vector': lambda: RecurrentConfig(cell='lstm', bidirectional=False, reverse_source=True, bridge='copy',
                                            context='start', d_model=8, d_hidden=8),
    'recurrent attention': lambda: RecurrentConfig(d_model=8, d_hidden=8),
    'convolutional': lambda: ConvolutionalConfig(encoder_layers=1, decoder_layers=1, d_model=8, d_hidden=8,
                                                 tying='none'),
}
ATTENDS = [name for name in CONFIGS if name != 'fixed vector']


@cache
def make(name):
  model = build_model(CONFIGS[name](), 12, 12)
  shapes = jax.eval_shape(partial(initialize, model), jax.random.key(0))
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), shapes)


# -- the rate of error ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('found, sure, possible, expected', [
    ([{(0, 0), (1, 1)}], [{(0, 0), (1, 1)}], None, 0.0),
    ([{(0, 0), (1, 1)}], [{(0, 1), (1, 0)}], None, 1.0),
    # |A & S| = 1, |A & P| = 1, |A| = 2, |S| = 3.
    ([{(0, 0), (1, 1)}], [{(0, 0), (1, 2), (2, 1)}], None, 1 - 2 / 5),
    # A possible link is no error, and not having it is none either: |A & S| = 1, |A & P| = 3, |A| = 3, |S| = 1.
    ([{(0, 0), (1, 1), (2, 2)}], [{(0, 0)}], [{(0, 0), (1, 1), (2, 2), (3, 3)}], 0.0),
    # |A & S| = 1, |A & P| = 2, |A| = 3, |S| = 2.
    ([{(0, 0), (1, 1), (2, 3)}], [{(0, 0), (2, 2)}], [{(0, 0), (2, 2), (1, 1)}], 1 - 3 / 5),
    # Counts are added up before the division: 1 - (2 + 0) / (2 + 4).
    ([{(0, 0)}, {(0, 0), (1, 1)}], [{(0, 0)}, {(0, 1), (1, 0)}], None, 1 - 2 / 6),
    ([set(), {(0, 0)}], [{(0, 0)}, {(0, 0)}], None, 1 - 2 / 3),
])
def test_the_rate_of_error_is_that_counted_by_hand(found, sure, possible, expected):
  assert alignment_error_rate(found, sure, possible) == pytest.approx(expected)


def test_a_rate_that_cannot_be_taken_is_refused():
  with pytest.raises(ValueError, match='links of 1 sentences, sure ones of 2'):
    alignment_error_rate([set()], [{(0, 0)}, {(1, 1)}])
  with pytest.raises(ValueError, match=r'Sentence 0 has the sure link \(1, 1\), which is not among the possible'):
    alignment_error_rate([set()], [{(1, 1)}], [{(0, 0)}])
  with pytest.raises(ValueError, match='no links, neither found nor sure'):
    alignment_error_rate([set()], [set()])


def test_correctness_is_the_weight_on_the_gold_words():
  pattern_TxS = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.0, 0.0, 1.0]])
  # Word 0 has two gold words (0.75), word 1 one (0.2), word 2 none: it does not count.
  assert attention_correctness([pattern_TxS], [{(0, 0), (1, 0), (1, 1)}]) == pytest.approx((0.75 + 0.2) / 2)
  with pytest.raises(ValueError, match='No target word has a gold link'):
    attention_correctness([pattern_TxS], [set()])
  with pytest.raises(ValueError, match='1 patterns and links of 2'):
    attention_correctness([pattern_TxS], [set(), set()])


# -- from patterns to links -------------------------------------------------------------------------------------------


def test_links_are_the_greatest_of_every_row_and_the_first_of_equals():
  assert links_of(np.array([[0.1, 0.9], [0.5, 0.5], [0.6, 0.4]])) == {(1, 0), (0, 1), (0, 2)}
  assert links_of(np.zeros((0, 0))) == frozenset()


def test_indexings_differ_by_one_row():
  pattern_NxTxS = np.random.default_rng(0).random((2, 5, 4))
  by_output, by_input = (rows_of_words(pattern_NxTxS, 3, indexing) for indexing in ('output', 'input'))
  np.testing.assert_array_equal(by_output, pattern_NxTxS[:, :3])
  np.testing.assert_array_equal(by_input, pattern_NxTxS[:, 1:4])
  assert rows_of_words(pattern_NxTxS, 5, 'output').shape == (2, 5, 4)
  with pytest.raises(ValueError, match="5 target tokens need 6 rows with indexing='input', the pattern has 5"):
    rows_of_words(pattern_NxTxS, 5, 'input')


def test_subwords_are_merged_by_their_greatest_weight():
  source, target = ['▁un', 'der', '▁it', '</s>'], ['▁dar', 'un', 'ter', '▁x']
  assert word_starts(source).tolist() == [0, 2] and word_starts(['un', 'der', '▁it']).tolist() == [0, 2]
  pattern_TxS = np.array([[0.1, 0.2, 0.3, 0.9], [0.0, 0.4, 0.1, 0.9], [0.2, 0.1, 0.5, 0.9], [0.7, 0.0, 0.2, 0.9],
                          [0.0, 0.0, 0.8, 0.9]])
  np.testing.assert_array_equal(word_pattern(pattern_TxS, source[:3], target, 'output'), [[0.4, 0.5], [0.7, 0.2]])
  np.testing.assert_array_equal(word_pattern(pattern_TxS, source[:3], target, 'input'), [[0.7, 0.5], [0.0, 0.8]])
  with pytest.raises(ValueError, match='0 source and 4 target tokens'):
    word_pattern(pattern_TxS, [], target, 'output')


def test_the_table_has_every_head_and_the_mean_of_a_layer():
  # Head 0 is right, head 1 is not; their mean is right, though the greatest weight of all is head 1's.
  first = np.array([[[[0.1, 0.5, 0.4]], [[0.55, 0.3, 0.15]]], [[[0.2, 0.3, 0.5]], [[0.1, 0.7, 0.2]]]])
  second = np.array([[[[0.3, 0.7]], [[0.8, 0.2]]], [[[0.6, 0.4]], [[0.3, 0.7]]]])
  table = error_table([first, second], [{(1, 0)}, {(1, 0), (0, 0)}])
  # In sentence 1 both source words are gold, so all are right and miss one: 1 - 4 / 5, or 1 - 2 / 5 if sentence 0 is
  # wrong, as it is for head 1 of layer 0 and for head 0 of layer 1.
  np.testing.assert_allclose(table, [[1 / 5, 3 / 5, 1 / 5], [3 / 5, 1 / 5, 1 / 5]])


# -- controls ---------------------------------------------------------------------------------------------------------


def test_the_diagonal_is_the_identity_where_both_are_as_long_and_never_leaves_the_sentence():
  assert diagonal_links(4, 4) == {(i, i) for i in range(4)}
  assert diagonal_links(2, 4) == {(0, 0), (0, 1), (1, 2), (1, 3)} and diagonal_links(4, 2) == {(1, 0), (3, 1)}
  for S in range(1, 9):
    for T in range(1, 9):
      assert [j for _, j in sorted(diagonal_links(S, T))] == list(range(T))
      assert {i for i, _ in diagonal_links(S, T)} <= set(range(S))
  assert diagonal_links(3, 0) == frozenset()


def test_uniform_links_find_each_source_word_as_often():
  rng = np.random.default_rng(0)
  links = uniform_links(5, 5000, rng)
  assert [j for _, j in sorted(links, key=lambda link: link[1])] == list(range(5000))
  counts = np.bincount([i for i, _ in links])
  assert len(counts) == 5 and (np.abs(counts - 1000) < 150).all()
  assert alignment_error_rate([links], [{(0, j) for j in range(5000)}]) == pytest.approx(0.8, abs=0.03)
  assert uniform_links(5, 20, np.random.default_rng(1)) == uniform_links(5, 20, np.random.default_rng(1))


def test_shuffled_rows_are_the_same_rows_elsewhere_for_all_heads():
  pattern_HxTxS = np.random.default_rng(0).random((2, 6, 3))
  shuffled = shuffled_rows(pattern_HxTxS, np.random.default_rng(1))
  order = [next(t for t in range(6) if (pattern_HxTxS[0, t] == row).all()) for row in shuffled[0]]
  assert sorted(order) == list(range(6)) and order != list(range(6))
  np.testing.assert_array_equal(shuffled, pattern_HxTxS[:, order])


# -- models -----------------------------------------------------------------------------------------------------------


@cache
def saliency_of(name):
  model, params = make(name)
  return np.asarray(jax.jit(partial(saliency, model))(params, SOURCE_BxS, TARGET_BxT))


@pytest.mark.parametrize('name', CONFIGS)
def test_saliency_is_zero_on_padding_and_not_on_words(name):
  found_BxTxS = saliency_of(name)
  assert found_BxTxS.shape == (2, 4, 5) and found_BxTxS.dtype == np.float32
  assert (found_BxTxS[1, :, 3:] == 0.0).all()
  assert (found_BxTxS[0] > 0).all() and (found_BxTxS[1, :2, :3] > 0).all()


@pytest.mark.parametrize('name', ['scanned, one table', 'fixed vector'])
def test_saliency_is_the_slope_of_the_log_probability(name):
  """Against differences: a copy of the model in which one row of the source's table is another."""
  model, params = make(name)
  shared = name == 'scanned, one table'
  table = np.asarray(params['target_embedding' if shared else 'source_embedding']['table'])
  word = SOURCE_BxS[0, 2]

  def log_prob(row_D):
    """Of every target token of sentence 0, T, where word 2 of the source is row_D."""
    own = {'table': jnp.asarray(table).at[word].set(row_D)}
    encoder = {**params, 'target_embedding' if shared else 'source_embedding': own}
    memory = model.apply({'params': encoder}, SOURCE_BxS[:1], method='encode')
    logits = model.apply({'params': params}, TARGET_BxT[:1, :-1], memory, method='decode')
    return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(TARGET_BxT[:1, 1:, None]), axis=-1)[0, :, 0]

  step = 1e-2
  nudges = step * np.eye(table.shape[1])
  up, down = jax.jit(jax.vmap(log_prob))(np.concatenate([table[word] + nudges, table[word] - nudges])).reshape(
      2, len(nudges), -1)
  slopes = (up - down) / (2 * step)
  np.testing.assert_allclose(saliency_of(name)[0, :, 2], np.linalg.norm(slopes, axis=0), rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize('name', ['transformer', 'fixed vector'])
def test_a_sentence_has_the_same_saliency_alone(name):
  model, params = make(name)
  alone = jax.jit(partial(saliency, model))(params, SOURCE_BxS[1:, :3], TARGET_BxT[1:, :3])
  np.testing.assert_allclose(saliency_of(name)[1:, :2, :3], alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', ATTENDS)
def test_an_unweighted_mean_is_what_a_model_with_equal_scores_says(name):
  """Where every query of cross-attention is 0 (Transformer) all scores are equal, and nothing changes."""
  model, params = make(name)

  def both(params, source_BxS, target_BxT):
    return (model.apply({'params': params}, source_BxS, target_BxT),
            unweighted_mean(model, params, source_BxS, target_BxT))

  weighted, found = map(np.asarray, jax.jit(both)(params, SOURCE_BxS, TARGET_BxT))
  assert found.shape == weighted.shape and np.abs(found - weighted).max() > 1e-3
  _, alone = jax.jit(both)(params, SOURCE_BxS[1:, :3], TARGET_BxT[1:])
  np.testing.assert_allclose(found[1:, :3], alone[:, :3], rtol=1e-4, atol=1e-5, err_msg='padding has a weight')
  if name == 'transformer':
    blind = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if 'cross_attention' in str(path) and "'query'" in str(path) else leaf,
        params)
    expected, _ = jax.jit(both)(blind, SOURCE_BxS, TARGET_BxT)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    patterns = jax.jit(partial(cross_attention, model))(blind, SOURCE_BxS, TARGET_BxT)
    np.testing.assert_allclose(patterns[1, :, :, :2, :3], 1 / 3, rtol=1e-5)


def test_a_model_without_weights_has_none_to_make_equal():
  with pytest.raises(ValueError, match='recurrent model does not look back at its source'):
    unweighted_mean(*make('fixed vector'), SOURCE_BxS, TARGET_BxT)
