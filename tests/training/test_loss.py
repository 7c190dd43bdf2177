from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm.training.loss
from tfm.training.loss import Sums, chunked_token_sums, token_sums

B, T, D, V = 6, 4, 3, 11


@pytest.fixture
def batch():
  """(logits, labels, weights): six rows of unequal length, the last one empty."""
  random = np.random.default_rng(0)
  logits_BxTxV = random.normal(scale=3.0, size=(B, T, V)).astype(np.float32)
  labels_BxT = random.integers(0, V, (B, T)).astype(np.int32)
  weights_BxT = (np.arange(T) < np.array([4, 3, 1, 4, 2, 0])[:, None]).astype(np.float32)
  return logits_BxTxV, labels_BxT, weights_BxT


def by_hand(logits_BxTxV, labels_BxT, weights_BxT, smoothing):
  """The sums of the definition, in float64: -sum_v q_v log p_v with q = (1 - e) one-hot + e / V."""
  logits = np.asarray(logits_BxTxV, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  onehot = np.eye(V)[labels_BxT]
  q = (1 - smoothing) * onehot + smoothing / V
  losses = -(q * log_p).sum(-1), -(onehot * log_p).sum(-1), log_p.argmax(-1) == labels_BxT, np.ones((B, T))
  return [(value * weights_BxT).sum() for value in losses]


def naive_loss(logits_BxTxV, labels_BxT, weights_BxT, smoothing):
  """The same for autodiff."""
  q_BxTxV = (1 - smoothing) * jax.nn.one_hot(labels_BxT, logits_BxTxV.shape[-1]) + smoothing / logits_BxTxV.shape[-1]
  return -jnp.sum(jnp.sum(q_BxTxV * jax.nn.log_softmax(logits_BxTxV), axis=-1) * weights_BxT)


def fields(sums: Sums) -> list[float]:
  return [sums.loss, sums.nll, sums.correct, sums.tokens]


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.5])
def test_sums_are_those_of_the_definition(batch, smoothing):
  sums = token_sums(*batch, smoothing)
  np.testing.assert_allclose(fields(sums), by_hand(*batch, smoothing), rtol=1e-5)
  assert all(value.dtype == jnp.float32 and value.shape == () for value in fields(sums))


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.5])
def test_gradient_is_that_of_the_naive_formula(batch, smoothing):
  logits_BxTxV, *rest = batch
  found = jax.grad(lambda logits: token_sums(logits, *rest, smoothing).loss)(logits_BxTxV)
  np.testing.assert_allclose(found, jax.grad(naive_loss)(logits_BxTxV, *rest, smoothing), atol=1e-6)


@pytest.mark.parametrize('wide', [2**15, 2**15 + 1, 70001])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_so_it_is_with_as_many_words_as_are_taken_in_parts(wide, smoothing):
  """The last of them is the most probable."""
  logits = np.random.default_rng(1).normal(size=(1, 3, wide)).astype(np.float32)
  logits[..., -1] = 9
  labels, weights = np.array([[wide - 1, 0, 2**15 - 1]]), np.array([[1.0, 1.0, 1.0]], np.float32)
  found, gradient = jax.value_and_grad(lambda logits: token_sums(logits, labels, weights, smoothing).loss)(logits)
  expected, gradients = jax.value_and_grad(naive_loss)(logits, labels, weights, smoothing)
  assert float(found) == pytest.approx(float(expected), rel=1e-5)
  np.testing.assert_allclose(gradient, gradients, atol=1e-6)
  assert float(token_sums(logits, labels, weights, smoothing).correct) == (labels == wide - 1).sum()


def test_least_loss_is_the_entropy_of_the_smoothed_target():
  e = 0.2
  right, wrong = 1 - e + e / V, e / V
  logits_1x1xV = np.full((1, 1, V), math.log(wrong), np.float32)
  logits_1x1xV[..., 7] = math.log(right)

  def loss(logits_1x1xV):
    return token_sums(logits_1x1xV, np.array([[7]]), np.ones((1, 1)), e).loss

  entropy = -right * math.log(right) - (V - 1) * wrong * math.log(wrong)
  assert float(loss(logits_1x1xV)) == pytest.approx(entropy, rel=1e-5)
  np.testing.assert_allclose(jax.grad(loss)(logits_1x1xV), 0.0, atol=1e-6)


def test_nll_and_hits_do_not_depend_on_smoothing(batch):
  plain, smooth = token_sums(*batch, 0.0), token_sums(*batch, 0.3)
  assert float(plain.loss) == float(plain.nll) == float(smooth.nll) != float(smooth.loss)
  assert float(plain.correct) == float(smooth.correct)


def test_a_token_is_correct_where_its_label_is_the_most_probable():
  logits_1x3xV = np.zeros((1, 3, V), np.float32)
  logits_1x3xV[0, range(3), [4, 5, 6]] = 1.0
  sums = token_sums(logits_1x3xV, np.array([[4, 5, 9]]), np.array([[1.0, 0.0, 1.0]]), 0.1)
  assert (float(sums.correct), float(sums.tokens)) == (1.0, 2.0)


@pytest.mark.parametrize('garbage', [1e4, np.inf, np.nan])
def test_what_has_no_weight_has_no_say(batch, garbage):
  logits_BxTxV, labels_BxT, weights_BxT = batch
  spoiled_BxTxV = np.where(weights_BxT[..., None] == 0, np.float32(garbage), logits_BxTxV)
  gradient = jax.grad(lambda logits: token_sums(logits, labels_BxT, weights_BxT, 0.1).loss)
  np.testing.assert_array_equal(gradient(spoiled_BxTxV), gradient(logits_BxTxV))
  np.testing.assert_array_equal(gradient(spoiled_BxTxV)[weights_BxT == 0], 0.0)
  np.testing.assert_array_equal(fields(token_sums(spoiled_BxTxV, labels_BxT, weights_BxT, 0.1)),
                                fields(token_sums(logits_BxTxV, labels_BxT, weights_BxT, 0.1)))


def test_a_batch_of_padding_has_no_loss_and_no_gradient(batch):
  logits_BxTxV, labels_BxT, weights_BxT = batch
  value, gradient = jax.value_and_grad(lambda x: token_sums(x, labels_BxT, 0 * weights_BxT, 0.1).loss)(logits_BxTxV)
  assert float(value) == 0.0 and not np.any(gradient)


# -- in chunks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def head(batch):
  """(params, hidden): something to unembed. `other` is a parameter that the unembedding does not use."""
  random = np.random.default_rng(1)
  params = {'table': random.normal(size=(D, V)).astype(np.float32), 'bias': random.normal(size=V).astype(np.float32),
            'other': np.ones(3, np.float32)}
  return params, random.normal(size=(B, T, D)).astype(np.float32)


def unembed(params, hidden_BxTxD):
  return hidden_BxTxD @ params['table'] + params['bias']


def chunked(params, hidden_BxTxD, labels_BxT, weights_BxT) -> Sums:
  return chunked_token_sums(unembed, params, hidden_BxTxD, labels_BxT, weights_BxT, 0.1, V)


# So many rows at a time; where six rows cannot be cut so, the next smaller pieces are taken.
@pytest.mark.parametrize('rows, scans', [(6, 0), (5, 1), (2, 1), (0, 1)])
def test_chunks_change_neither_sums_nor_gradients(batch, head, monkeypatch, rows, scans):
  _, *targets = batch

  def whole(params, hidden_BxTxD):
    return token_sums(unembed(params, hidden_BxTxD), *targets, 0.1)

  def in_chunks(params, hidden_BxTxD):
    return chunked(params, hidden_BxTxD, *targets)

  expected = jax.value_and_grad(lambda *a: ((s := whole(*a)).loss, s), (0, 1), has_aux=True)(*head)
  monkeypatch.setattr(tfm.training.loss, 'most_logits', lambda params: rows * T * V)
  found = jax.value_and_grad(lambda *a: ((s := in_chunks(*a)).loss, s), (0, 1), has_aux=True)(*head)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
  np.testing.assert_allclose(fields(in_chunks(*head)), fields(whole(*head)), rtol=1e-5)  # without a gradient
  assert str(jax.make_jaxpr(in_chunks)(*head)).count('scan[') == scans


def test_rows_that_cannot_be_divided_come_one_at_a_time(monkeypatch):
  random, prime = np.random.default_rng(2), 5
  hidden_BxTxD = random.normal(size=(prime, T, D)).astype(np.float32)
  params = {'table': random.normal(size=(D, V)).astype(np.float32), 'bias': np.zeros(V, np.float32)}
  targets = random.integers(0, V, (prime, T)).astype(np.int32), np.ones((prime, T), np.float32)
  expected = fields(chunked(params, hidden_BxTxD, *targets))
  monkeypatch.setattr(tfm.training.loss, 'most_logits', lambda params: 3 * T * V)
  np.testing.assert_allclose(fields(chunked(params, hidden_BxTxD, *targets)), expected, rtol=1e-5)
  assert f'f32[1,{T},{V}]' in str(jax.make_jaxpr(chunked)(params, hidden_BxTxD, *targets))


@pytest.mark.parametrize('rows', [6, 2])
@pytest.mark.parametrize('factor', [3.0, 0.0])
def test_a_scaled_loss_has_a_scaled_gradient(batch, head, monkeypatch, rows, factor):
  _, *targets = batch
  monkeypatch.setattr(tfm.training.loss, 'most_logits', lambda params: rows * T * V)
  plain, scaled = (jax.grad(lambda *a, f=f: f * chunked(*a, *targets).loss, (0, 1))(*head) for f in (1.0, factor))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, factor * b, rtol=1e-5, atol=1e-6), scaled, plain)


def test_bfloat16_states_have_a_bfloat16_gradient_and_float32_sums(batch, head, monkeypatch):
  _, *targets = batch
  params, hidden_BxTxD = head
  monkeypatch.setattr(tfm.training.loss, 'most_logits', lambda params: 2 * T * V)

  def loss(hidden_BxTxD):
    sums = chunked_token_sums(lambda p, x: unembed(p, x.astype(jnp.float32)), params, hidden_BxTxD, *targets, 0.1, V)
    return sums.loss, sums

  (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.bfloat16(hidden_BxTxD))
  assert gradient.dtype == jnp.bfloat16 and value.dtype == sums.nll.dtype == jnp.float32


def test_the_logits_of_the_whole_batch_never_exist(batch, head, monkeypatch):
  _, *targets = batch
  gradient = jax.value_and_grad(lambda *a: chunked(*a, *targets).loss, (0, 1))

  def largest() -> int:
    """Elements of the largest array in the program as written, and in the one that is compiled."""
    program = jax.jit(gradient).lower(*head)
    text = str(jax.make_jaxpr(gradient)(*head)) + program.compile().as_text()
    return max(math.prod(map(int, shape.split(','))) for shape in re.findall(r'f32\[([\d,]+)\]', text))

  assert largest() >= B * T * V
  monkeypatch.setattr(tfm.training.loss, 'most_logits', lambda params: 2 * T * V)
  jax.clear_caches()
  assert largest() == 2 * T * V
