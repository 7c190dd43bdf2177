"""What is asked of the model in a batch, and the sums over it, against the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.special_ids import BOS, EOS, PAD
from tfm.training.objectives import abstract_batch, batch_sums, inputs_and_labels

V = 17
SHAPES = {'encoder_decoder': (1, 1), 'decoder_only': (0, 2), 'encoder_only': (2, 0)}


def make(shape: str, **fields):
  layers = dict(zip(('encoder_layers', 'decoder_layers'), SHAPES[shape]))
  config = TransformerConfig(**{**dict(d_model=8, d_ff=8, num_heads=2, dropout=0.0, **layers), **fields})
  assert config.shape == shape
  model = build_model(config, V, V)
  return model, jax.tree.map(lambda leaf: 3 * leaf, initialize(model, jax.random.key(0)))


def rows(*lengths, seed=0) -> np.ndarray:
  """<s> words </s> and padding."""
  random = np.random.default_rng(seed)
  padded = np.full((len(lengths), max(lengths) + 2), PAD, np.int32)
  for row, length in zip(padded, lengths):
    row[:length + 2] = [BOS, *random.integers(4, V, length), EOS]
  return padded


def by_hand(logits_BxTxV, asked: list[tuple[int, int, int]], smoothing: float) -> list[float]:
  """loss, nll, correct, tokens over what is asked: (row, place, label)."""
  sums = np.zeros(4)
  for b, t, label in asked:
    logits_V = np.asarray(logits_BxTxV, np.float64)[b, t]
    log_p_V = logits_V - np.log(np.exp(logits_V).sum())
    nll = -log_p_V[label]
    sums += (1 - smoothing) * nll - smoothing * log_p_V.mean(), nll, logits_V.argmax() == label, 1
  return sums.tolist()


def check(model, params, batch, logits_BxTxV, asked, smoothing=0.1) -> None:
  sums = jax.jit(lambda params, batch: batch_sums(model, params, batch, smoothing))(params, batch)
  np.testing.assert_allclose([sums.loss, sums.nll, sums.correct, sums.tokens],
                             by_hand(logits_BxTxV, asked, smoothing), rtol=1e-4)
  _, labels_BxT, counts_BxT = inputs_and_labels(model, batch)
  assert [(b, t, int(labels_BxT[b, t])) for b, t in zip(*np.nonzero(np.asarray(counts_BxT)))] == asked


def test_translation_asks_for_the_target():
  model, params = make('encoder_decoder')
  source, target = rows(4, 1)[:, 1:], rows(2, 5, seed=1)
  asked = [(b, t, row[t + 1]) for b, row in enumerate(target.tolist()) for t in range(6) if row[t + 1] != PAD]
  assert len(asked) == 3 + 6
  check(model, params, (source, target), model.apply({'params': params}, source, target[:, :-1]), asked)


@pytest.mark.parametrize('pad_id', [0, None])
def test_a_causal_model_is_asked_for_the_next_token(pad_id):
  """Where the vocabulary has no padding (GPT-2), every id is a label."""
  model, params = make('decoder_only', pad_id=pad_id)
  ids = rows(4, 1)
  asked = [(b, t, row[t + 1]) for b, row in enumerate(ids.tolist()) for t in range(5)
           if row[t + 1] != PAD or pad_id is None]
  assert len(asked) == (5 + 2 if pad_id == 0 else 10)
  check(model, params, (ids, None), model.apply({'params': params}, ids[:, :-1]), asked)


def test_texts_of_a_packed_row_are_learned_as_if_each_were_alone():
  model, params = make('decoder_only')
  texts = [row[row != PAD].tolist() for row in rows(3, 1, 4)]
  ids, segments = np.zeros((2, 14), np.int32), np.zeros((2, 14), np.int32)
  ids[0, :len(texts[0] + texts[1])], segments[0, :8] = texts[0] + texts[1], [1] * 5 + [2] * 3
  ids[1, :len(texts[2])], segments[1, :6] = texts[2], 1
  asked = [(0, t, ids[0, t + 1]) for t in (0, 1, 2, 3, 5, 6)] + [(1, t, ids[1, t + 1]) for t in range(5)]
  logits = model.apply({'params': params}, ids[:, :-1], segments[:, :-1])
  check(model, params, (ids, segments), logits, asked)
  alone = [batch_sums(model, params, (np.array([text], np.int32), None), 0.1) for text in texts]
  packed = batch_sums(model, params, (ids, segments), 0.1)
  np.testing.assert_allclose(packed.loss, sum(sums.loss for sums in alone), rtol=1e-5)
  assert packed.tokens == sum(sums.tokens for sums in alone)


def by_side(pairs, widths: tuple[int, int], rows: list[list[int]]):
  """(sources, targets, segments of both) of rows that hold the pairs with these numbers."""
  sides = [np.zeros((len(rows), width), np.int32) for width in widths * 2]
  for place, numbers in enumerate(rows):
    for side in range(2):
      held = [pairs[number][side] for number in numbers]
      ids, segments = sum(held, []), sum(([n] * len(one) for n, one in enumerate(held, 1)), [])
      sides[side][place, :len(ids)], sides[side + 2][place, :len(ids)] = ids, segments
  return tuple(sides)


def test_pairs_of_a_packed_row_are_learned_as_if_each_were_alone():
  """Sums and gradients of packed rows are those of the same pairs padded, one in each row."""
  model, params = make('encoder_decoder', encoder_layers=2)
  pairs = [(source[source != PAD].tolist()[1:], target[target != PAD].tolist())
           for source, target in zip(rows(3, 1, 4, 2), rows(2, 5, 1, 3, seed=1))]
  packed = by_side(pairs, (9, 14), [[0, 2], [3, 1], []])
  padded = by_side(pairs, (7, 9), [[0], [1], [2], [3]])[:2]
  logits = model.apply({'params': params}, packed[0], packed[1][:, :-1], packed[2], packed[3][:, :-1])
  first, second = len(pairs[0][1]), len(pairs[3][1])
  asked = [(0, t, packed[1][0, t + 1]) for t in range(first + len(pairs[2][1]) - 1) if t != first - 1]
  asked += [(1, t, packed[1][1, t + 1]) for t in range(second + len(pairs[1][1]) - 1) if t != second - 1]
  check(model, params, packed, logits, asked)

  @jax.jit
  def loss_and_gradients(params, batch):
    def loss(params):
      sums = batch_sums(model, params, batch, 0.1)
      return sums.loss, sums

    return jax.value_and_grad(loss, has_aux=True)(params)

  params = jax.tree.map(lambda leaf: leaf / 3, params)  # so that rounding is not amplified
  ((_, sums), gradients), ((_, others), expected) = (loss_and_gradients(params, batch) for batch in (packed, padded))
  for name in ('loss', 'nll', 'correct', 'tokens'):
    np.testing.assert_allclose(getattr(sums, name), getattr(others, name), rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5 * np.abs(b).max()), gradients, expected)


def test_a_masked_model_is_asked_for_what_was_hidden_alone():
  model, params = make('encoder_only')
  labels = np.zeros((2, 6), np.int32)
  labels[0, [1, 4]], labels[1, 1] = [9, 11], 5
  inputs = rows(4, 1)
  asked = [(0, 1, 9), (0, 4, 11), (1, 1, 5)]
  check(model, params, (inputs, labels), model.apply({'params': params}, inputs), asked)


@pytest.mark.parametrize('shape', SHAPES)
def test_the_balance_of_experts_is_in_the_loss_but_not_in_nll(shape):
  second = {'encoder_decoder': rows(3, 2, seed=1), 'decoder_only': None, 'encoder_only': rows(5, 3, seed=1)}[shape]
  batch = rows(5, 3), second
  found = []
  for weight in (0.0, 1.0, 2.0):
    model, params = make(shape, experts=4, biases='none', load_balance=weight)
    found.append(batch_sums(model, params, batch, 0.1))
  plain, once, twice = found
  assert once.loss > plain.loss + 1
  np.testing.assert_allclose(twice.loss - once.loss, once.loss - plain.loss, rtol=1e-4)
  assert plain.nll == once.nll == twice.nll and plain.tokens == once.tokens
  inputs, labels_BxT, counts_BxT = inputs_and_labels(model, batch)
  asked = [(b, t, int(labels_BxT[b, t])) for b, t in zip(*np.nonzero(np.asarray(counts_BxT)))]
  np.testing.assert_allclose([plain.loss, plain.nll],
                             by_hand(model.apply({'params': params}, *inputs), asked, 0.1)[:2], rtol=1e-4)


@pytest.mark.parametrize(('shape', 'packed'), [*[(shape, False) for shape in SHAPES], ('encoder_decoder', True),
                                               ('decoder_only', True)])
def test_an_abstract_batch_is_one_that_the_objective_reads(shape, packed):
  model, params = make(shape)
  batch = abstract_batch(shape, 3, 6, 6, packed)
  assert len(batch) == (4 if packed and shape == 'encoder_decoder' else 2)
  assert (batch[-1] is None) == (shape == 'decoder_only' and not packed)
  _, labels, counts = jax.eval_shape(lambda batch: inputs_and_labels(model, batch), batch)
  assert labels.shape == counts.shape == (3, 6) and counts.dtype == bool
  assert jax.eval_shape(lambda batch: batch_sums(model, params, batch, 0.0), batch).loss.dtype == jnp.float32
