"""What every cell and its loop over time promise; `tests/oracle/test_torch_recurrent.py` checks the formulas."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.models.cells import GATES, Cell

T, B, X, W = 5, 3, 4, 6
LENGTHS_B = np.array([5, 2, 0])
REAL_TxB = np.arange(T)[:, None] < LENGTHS_B


@pytest.fixture(params=GATES)
def made(request, random_params):
  cell = Cell(request.param, X, W)
  random = np.random.default_rng(1)
  x_TxBxX = random.standard_normal((T, B, X)).astype(np.float32)
  state = tuple(random.standard_normal(part.shape).astype(np.float32) for part in cell.empty(B))
  variables = random_params(cell, jnp.zeros((B, GATES[request.param] * W)), state)

  def run(x_TxBxX, state, *masks, **how):
    def body(cell):
      return cell.over_time(cell.project(x_TxBxX), state, *masks, **how)
    return jax.tree.map(np.asarray, jax.jit(lambda: cell.apply(variables, method=body))())

  return run, x_TxBxX, state


def rows(state, *which):
  return tuple(part[list(which)] for part in state)


def assert_same(actual, expected):
  jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6), actual, expected)


def test_a_state_is_carried_over_padding_whose_outputs_are_0(made):
  run, x_TxBxX, state = made
  states_TxBxW, last = run(x_TxBxX, state, REAL_TxB)
  assert (states_TxBxW[~REAL_TxB] == 0).all() and (np.abs(states_TxBxW[REAL_TxB]).max(-1) > 0).all()
  alone_Tx1xW, alone = run(x_TxBxX[:2, 1:2], rows(state, 1))
  assert_same(states_TxBxW[:2, 1:2], alone_Tx1xW)
  assert_same(rows(last, 1), alone)
  assert_same(rows(last, 2), rows(state, 2))


def test_backwards_a_row_is_read_from_its_own_last_token(made):
  run, x_TxBxX, state = made
  states_TxBxW, last = run(x_TxBxX, state, REAL_TxB, reverse=True)
  for row, length in enumerate(LENGTHS_B[:2]):
    turned_Tx1xW, turned = run(x_TxBxX[:length, row:row + 1][::-1], rows(state, row))
    assert_same(states_TxBxW[:length, row:row + 1], turned_Tx1xW[::-1])
    assert_same(rows(last, row), turned)
  assert (states_TxBxW[~REAL_TxB] == 0).all()


def test_a_fresh_step_forgets_what_was_before(made):
  run, x_TxBxX, state = made
  fresh_TxB = np.arange(T)[:, None] == np.array([2, 0, 9])
  states_TxBxW, last = run(x_TxBxX, state, None, fresh_TxB)
  nothing = tuple(np.zeros_like(part) for part in state)
  first, second = run(x_TxBxX[:2], state), run(x_TxBxX[2:], nothing)
  assert_same(states_TxBxW[:, 0], np.concatenate([first[0], second[0]])[:, 0])
  assert_same(rows(last, 0), rows(second[1], 0))
  assert_same(states_TxBxW[:, 1], run(x_TxBxX, nothing)[0][:, 1])
  assert_same(states_TxBxW[:, 2], run(x_TxBxX, state)[0][:, 2])


@pytest.mark.parametrize('kind', GATES)
def test_first_weights(kind):
  """Orthogonal from state to state, Xavier from the input, each gate by itself; an LSTM begins by remembering."""
  width, inputs = 40, 200
  cell = Cell(kind, inputs, width, context_width=30, forget_bias=1.5)
  state = cell.empty(2)
  params = cell.init(jax.random.key(0), jnp.zeros((2, GATES[kind] * width)), state)['params']
  for matrix in params['recurrent']:
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-5)
  for name, rows_in in (('kernel', inputs), ('context', 30)):
    for matrix in params[name]:
      assert matrix.shape == (rows_in, width)
      limit = (6 / (rows_in + width))**0.5
      assert 0.95 * limit < np.abs(matrix).max() <= limit
  forget = np.zeros((GATES[kind], width))
  if kind == 'lstm':
    forget[1] = 1.5
  np.testing.assert_array_equal(params['bias'], forget)
  assert ('candidate_bias' in params) == (kind == 'gru') and (len(state) == 2) == (kind == 'lstm')


def test_backward_keeps_one_array_of_gates_per_step():
  """An LSTM's loop remembers its gates and states; sigmoids and tanhs are computed again."""
  width = 64
  cell = Cell('lstm', width, width)
  state = cell.empty(8)
  variables = jax.eval_shape(cell.init, jax.random.key(0), jnp.zeros((8, 4 * width)), state)

  def loss(variables, projected):
    return jnp.sum(cell.apply(variables, projected, state, method='over_time')[0]**2)

  (scan, *_) = [equation for equation in jax.make_jaxpr(jax.grad(loss))(
      variables, jax.ShapeDtypeStruct((16, 8, 4 * width), jnp.float32)).eqns if equation.primitive.name == 'scan']
  stacked = sum(x.aval.size for x in scan.outvars[scan.params['num_carry']:])
  assert stacked <= 16 * 8 * (4 + 3) * width
