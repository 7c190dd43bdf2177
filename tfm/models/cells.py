"""Recurrent cells: the next state from the last one and an input, and the loop over a sequence.

What does not depend on the state, the product of input and weights, is made for all steps at once and handed to the
loop as `projected`. Letters: X width of the input, W of the state, G how many gates a cell has. Inside, time is the
first axis: a loop takes slices of it, and one matrix product serves all steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from tfm.models.tap import Tap

State = tuple[jax.Array, ...]
"""float32 BxW each: (h,), or (h, c) of an LSTM."""

GATES = {'tanh': 1, 'lstm': 4, 'gru': 3}


def each_gate(init):
  """`init` for each matrix of a GxIxO array by itself: together they would seem one wide matrix."""
  return lambda key, shape: jnp.stack([init(each, shape[1:]) for each in jax.random.split(key, shape[0])])


XAVIER = each_gate(nn.initializers.xavier_uniform())  # Glorot & Bengio 2010
ORTHOGONAL = each_gate(nn.initializers.orthogonal())  # Saxe et al. 2014: a state keeps its length from step to step


class Maps(nn.Module):
  """P linear maps of one input, each with a bias: ...xI -> ...xPxO. The matrix product is in `dtype`."""

  pieces: int
  outputs: int
  dtype: str

  @nn.compact
  def __call__(self, *inputs: jax.Array) -> jax.Array:
    """The inputs stand side by side; the result is float32."""
    x = jnp.concatenate([each.astype(self.dtype) for each in inputs], axis=-1)
    kernel = self.param('kernel', XAVIER, (self.pieces, x.shape[-1], self.outputs))
    bias = self.param('bias', nn.initializers.zeros_init(), (self.pieces, self.outputs))
    return product(x, kernel).reshape(*x.shape[:-1], self.pieces, self.outputs) + bias


@struct.dataclass
class Weights:
  """What a step needs besides its input."""

  recurrent_GxWxW: jax.Array
  bias_GxW: jax.Array
  candidate_W: jax.Array | None
  """The bias that the GRU's reset gate multiplies."""
  kind: str = struct.field(pytree_node=False)


class Cell(nn.Module):
  """A cell with its weights. Gates are in the order of PyTorch: i f g o of an LSTM, r z n of a GRU.

  Fields: `kind` of GATES; `input_width` X; `width` W; `context_width`, of a second input that the loop makes as it goes
  (0: none); `forget_bias`, first bias of an LSTM's forget gate; `dtype` of the matrix products.
  """

  kind: str
  input_width: int
  width: int
  context_width: int = 0
  forget_bias: float = 1.0
  dtype: str = 'float32'

  def setup(self):
    G, W = GATES[self.kind], self.width
    self.kernel = self.param('kernel', XAVIER, (G, self.input_width, W))
    self.recurrent = self.param('recurrent', ORTHOGONAL, (G, W, W))
    self.bias = self.param('bias', self._first_bias, (G, W))
    if self.kind == 'gru':
      self.candidate = self.param('candidate_bias', nn.initializers.zeros_init(), (W,))
    if self.context_width:
      self.context = self.param('context', XAVIER, (G, self.context_width, W))
    self.states = Tap()

  def _first_bias(self, key, shape):
    bias = jnp.zeros(shape)
    # Remember first, learn to forget later (Gers et al. 2000; Jozefowicz et al. 2015, section 2.2).
    return bias.at[1].set(self.forget_bias) if self.kind == 'lstm' else bias

  @property
  def weights(self) -> Weights:
    return Weights(self.recurrent.astype(self.dtype), self.bias, self.candidate if self.kind == 'gru' else None,
                   self.kind)

  def project(self, x: jax.Array) -> jax.Array:
    """...xX -> ...x(GW), float32."""
    return product(x.astype(self.dtype), self.kernel)

  def project_context(self, context: jax.Array) -> jax.Array:
    return product(context.astype(self.dtype), self.context)

  def empty(self, rows: int) -> State:
    """The state of those who have read nothing."""
    return (jnp.zeros((rows, self.width)),) * (2 if self.kind == 'lstm' else 1)

  def __call__(self, projected_BxG: jax.Array, state: State) -> State:
    """One step; the input comes from `project`."""
    return step(self.weights, projected_BxG, state)

  def over_time(self, projected_TxBxG: jax.Array, state: State, real_TxB: jax.Array | None = None,
                fresh_TxB: jax.Array | None = None, reverse: bool = False) -> tuple[jax.Array, State]:
    """All steps: h of each, TxBxW float32, and the last state.

    Args:
      real_TxB: bool; where it is False the state stays as it is and the output is 0. None: True everywhere.
      fresh_TxB: bool; where it is True nothing has been read before. None: False everywhere.
      reverse: from the last step to the first. Behind a sentence the state is still the first one, so that a row is
        read from its last real token whatever its padding.
    """
    weights = self.weights

    def one(state, inputs):
      projected_BxG, real_B, fresh_B = inputs
      if fresh_B is not None:
        state = choose(~fresh_B, state, jax.tree.map(jnp.zeros_like, state))
      new = step(weights, projected_BxG, state)
      if real_B is None:
        return new, new[0]
      return choose(real_B, new, state), jnp.where(real_B[:, None], new[0], 0.0)

    last, states_TxBxW = jax.lax.scan(one, state, (projected_TxBxG, real_TxB, fresh_TxB), reverse=reverse)
    return self.tapped(states_TxBxW), last

  def tapped(self, states_TxBxW: jax.Array) -> jax.Array:
    """The states of all steps through the tap, whose values are BxTxW."""
    return jnp.swapaxes(self.states(jnp.swapaxes(states_TxBxW, 0, 1)), 0, 1)


def step(weights: Weights, projected_BxG: jax.Array, state: State) -> State:
  """The state after one more input."""
  recurred_BxG = product(state[0].astype(weights.recurrent_GxWxW.dtype), weights.recurrent_GxWxW)
  projected_BxG = projected_BxG + weights.bias_GxW.reshape(-1)
  if weights.kind == 'gru':
    return _gru(projected_BxG, recurred_BxG, weights.candidate_W, *state)
  return (_lstm if weights.kind == 'lstm' else _tanh)(projected_BxG + recurred_BxG, *state)


def _saving_inputs(function):
  """Backward, elementwise functions are computed again from their inputs: cheap, and a third less to remember."""
  return jax.checkpoint(function, prevent_cse=False)


@_saving_inputs
def _tanh(gates_BxW, h_BxW):
  return (jnp.tanh(gates_BxW),)


@_saving_inputs
def _lstm(gates_Bx4W, h_BxW, c_BxW):
  i, f, g, o = jnp.split(gates_Bx4W, 4, axis=-1)
  c_BxW = jax.nn.sigmoid(f) * c_BxW + jax.nn.sigmoid(i) * jnp.tanh(g)
  return jax.nn.sigmoid(o) * jnp.tanh(c_BxW), c_BxW


@_saving_inputs
def _gru(projected_Bx3W, recurred_Bx3W, candidate_W, h_BxW):
  (r_in, z_in, n_in), (r, z, n) = (jnp.split(each, 3, axis=-1) for each in (projected_Bx3W, recurred_Bx3W))
  n = jnp.tanh(n_in + jax.nn.sigmoid(r_in + r) * (n + candidate_W))
  z = jax.nn.sigmoid(z_in + z)
  return ((1 - z) * n + z * h_BxW,)


def product(x: jax.Array, kernel_PxIxO: jax.Array) -> jax.Array:
  """P matrix products in one, in the type of x: ...xI -> ...x(PO), accumulated and returned in float32."""
  pieces, inputs, outputs = kernel_PxIxO.shape
  kernel = jnp.swapaxes(kernel_PxIxO, 0, 1).reshape(inputs, pieces * outputs).astype(x.dtype)
  mesh, rows = jax.sharding.get_abstract_mesh(), x
  if mesh.empty or mesh.size == 1:
    # Twice as fast on CPU as two axes of rows. But several devices share out the second of them, the batch, and would
    # have to gather all of it to make the two one.
    rows = x.reshape(-1, inputs)
  return jnp.matmul(rows, kernel, preferred_element_type=jnp.float32).reshape(*x.shape[:-1], pieces * outputs)


def choose(where_B: jax.Array, state: State, other: State) -> State:
  """`state` in the rows where the condition holds, `other` elsewhere."""
  return jax.tree.map(lambda a, b: jnp.where(where_B[:, None], a, b), state, other)


def side_by_side(states: Sequence[State]) -> State:
  """The states of several cells as one, BxW of all."""
  return tuple(jnp.concatenate(parts, axis=-1) for parts in zip(*states))
