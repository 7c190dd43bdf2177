"""The layers of a recurrent encoder, of a recurrent decoder, and of the decoder that has no state."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from tfm.attention.masks import AttentionMask
from tfm.models.cells import Cell, Maps, State, side_by_side
from tfm.models.dropout import dropout
from tfm.models.layers import split
from tfm.models.recurrent_attention import OVER_TIME, Keys, RecurrentAttention
from tfm.recurrent_config import RecurrentConfig


def make_cell(config: RecurrentConfig, input_width: int, context_width: int = 0) -> Cell:
  return Cell(config.cell, input_width, config.d_hidden, context_width, config.forget_bias, config.dtype)


class RecurrentEncoderLayer(nn.Module):
  """One cell, or two that read in opposite directions and whose states stand side by side."""

  config: RecurrentConfig
  input_width: int

  def setup(self):
    c = self.config
    for direction in self.directions:
      setattr(self, direction, make_cell(c, self.input_width))

  @property
  def directions(self) -> tuple[str, ...]:
    if self.config.bidirectional:
      return 'forward', 'backward'
    return ('backward',) if self.config.reverse_source else ('forward',)

  def __call__(self, x_SxBxX, real_SxB) -> tuple[jax.Array, State]:
    """States SxBxV, 0 at padding, and the last state of each direction, BxV."""
    cells = [getattr(self, direction) for direction in self.directions]
    states, last = zip(*[
        cell.over_time(cell.project(x_SxBxX), cell.empty(x_SxBxX.shape[1]), real_SxB, reverse=direction == 'backward')
        for cell, direction in zip(cells, self.directions)])
    return jnp.concatenate(states, axis=-1), side_by_side(last)


class RecurrentEncoder(nn.Module):
  """Layers on top of one another."""

  config: RecurrentConfig

  def setup(self):
    c = self.config
    widths = [c.d_model] + [c.memory_width] * (c.encoder_layers - 1)
    self.layers = [RecurrentEncoderLayer(c, width) for width in widths]

  def __call__(self, x_SxBxD, real_SxB, dropout_key=None) -> tuple[jax.Array, tuple[State, ...]]:
    """States of the last layer, SxBxV, and the last states of every layer."""
    finals, x, keys = [], x_SxBxD, split(dropout_key, self.config.encoder_layers)
    for i, (layer, key) in enumerate(zip(self.layers, keys)):
      x, last = layer(dropout(x, self.config.dropout, key) if i else x, real_SxB)
      finals.append(last)
    return x.astype(self.config.dtype), tuple(finals)


@struct.dataclass
class Source:
  """What the decoder is told of the source sentences, one row each: the vector v, or keys and values, or nothing."""

  vector_BxV: jax.Array | None = None
  keys: Keys | None = None


NOTHING = Source()


@struct.dataclass
class DecoderState:
  """What the decoder knows of the tokens so far, one row per hypothesis."""

  layers: tuple[State, ...]
  fed_RxD: jax.Array | None = None
  """The last readout, where it is fed to the next step."""


class RecurrentDecoder(nn.Module):
  """Layers on top of one another, what they are told of the source, and the readout. Any number of tokens at a time."""

  config: RecurrentConfig

  def setup(self):
    c = self.config
    into_first = {'start': 0, 'every_step': c.memory_width,
                  'attention': c.memory_width if c.query == 'previous' else c.d_model * c.input_feeding}
    widths = [c.d_model] + [c.d_hidden] * (c.decoder_layers - 1)
    self.layers = [make_cell(c, width, 0 if i or not c.encoder_layers else into_first[c.context])
                   for i, width in enumerate(widths)]
    self.readout = Readout(c)
    if c.cross_attention_shape:
      self.cross_attention = RecurrentAttention(c)
    if c.encoder_layers and c.bridge == 'tanh':
      self.bridge = [Maps(2 if c.cell == 'lstm' else 1, c.d_hidden, c.dtype) for _ in range(c.decoder_layers)]

  # -- what is there before the first token ---------------------------------------------------------------------------

  def source(self, states_BxSxV, finals) -> Source:
    if self.config.context == 'every_step':
      return Source(vector_BxV=finals[-1][0])
    return Source(keys=self.cross_attention.prepare(states_BxSxV) if self.config.context == 'attention' else None)

  def first_state(self, finals) -> DecoderState:
    c = self.config
    layers = finals
    if c.bridge == 'tanh':
      layers = tuple(tuple(jnp.unstack(jnp.tanh(maps(*finals[-1])), axis=-2)) for maps in self.bridge)
    return self._first(layers)

  def empty_state(self, rows: int) -> DecoderState:
    return self._first(tuple(cell.empty(rows) for cell in self.layers))

  def _first(self, layers) -> DecoderState:
    c, rows = self.config, layers[0][0].shape[0]
    return DecoderState(layers, jnp.zeros((rows, c.d_model), c.dtype) if c.input_feeding else None)

  # -- the tokens -----------------------------------------------------------------------------------------------------

  def __call__(self, x_TxRxD, state: DecoderState, source: Source = NOTHING, mask: AttentionMask | None = None,
               positions_T=None, fresh_TxR=None, dropout_key=None) -> tuple[jax.Array, DecoderState]:
    """What the output projection reads, RxTxD, and the state after the last token.

    Args:
      source, mask, positions_T: where there is an encoder: what it says, which of its positions are words, and how many
        tokens came before each of the T.
      fresh_TxR: bool: tokens before which nothing was read. None: none but the first state says so.
    """
    c = self.config
    keys = split(dropout_key, c.decoder_layers)
    projected_TxRxG = self.layers[0].project(x_TxRxD)
    if c.input_feeding:
      x_RxTxD, state = self._feeding(x_TxRxD, projected_TxRxG, state, source, mask, positions_T, keys)
      return dropout(x_RxTxD, c.dropout, keys[0]), state
    context_RxTxV = None
    if source.vector_BxV is not None:
      vector_RxV = jnp.repeat(source.vector_BxV, x_TxRxD.shape[1] // source.vector_BxV.shape[0], axis=0)
      projected_TxRxG = projected_TxRxG + self.layers[0].project_context(vector_RxV)
      context_RxTxV = jnp.broadcast_to(vector_RxV[:, None], (*x_TxRxD.shape[1::-1], vector_RxV.shape[-1]))
    if source.keys is not None and c.query == 'previous':
      h_TxRxW, context_RxTxV, first = self._asking_first(projected_TxRxG, state.layers[0], source, mask, positions_T)
    else:
      h_TxRxW, first = self.layers[0].over_time(projected_TxRxG, state.layers[0], fresh_TxB=fresh_TxR)
    last = [first]
    for cell, before, key in zip(self.layers[1:], state.layers[1:], keys[1:]):
      projected_TxRxG = cell.project(dropout(h_TxRxW, c.dropout, key))
      h_TxRxW, after = cell.over_time(projected_TxRxG, before, fresh_TxB=fresh_TxR)
      last.append(after)
    h_RxTxW, x_RxTxD = jnp.swapaxes(h_TxRxW, 0, 1), jnp.swapaxes(x_TxRxD, 0, 1)
    if source.keys is not None and c.query == 'current':
      context_RxTxV = self.cross_attention(h_RxTxW, positions_T, source.keys, mask)
    x_RxTxD = self.readout(h_RxTxW, context_RxTxV, x_RxTxD)
    return dropout(x_RxTxD, c.dropout, keys[0]), DecoderState(tuple(last))

  def _asking_first(self, projected_TxRxG, state: State, source: Source, mask, positions_T):
    """Bahdanau et al. 2015, appendix A.2.2: c_t from s_t-1, and s_t from s_t-1, c_t and the word before."""

    def one(module, state, inputs):
      projected_RxG, position = inputs
      context_RxV = module.cross_attention.one(state[0], position, source.keys, mask)
      state = module.layers[0](projected_RxG + module.layers[0].project_context(context_RxV), state)
      return state, (state[0], context_RxV)

    last, (h_TxRxW, context_TxRxV) = nn.scan(one, **OVER_TIME)(self, state, (projected_TxRxG, positions_T))
    return self.layers[0].tapped(h_TxRxW), jnp.swapaxes(context_TxRxV, 0, 1), last

  def _feeding(self, x_TxRxD, projected_TxRxG, state: DecoderState, source: Source, mask, positions_T, keys):
    """Luong et al. 2015, figure 4: all layers, the attention and the readout in one loop."""
    c = self.config

    def one(module, state, inputs):
      x_RxD, projected_RxG, position, step_keys = inputs
      projected_RxG = projected_RxG + module.layers[0].project_context(state.fed_RxD)
      after = []
      for i, (cell, before) in enumerate(zip(module.layers, state.layers)):
        if i:
          projected_RxG = cell.project(dropout(after[-1][0], c.dropout, step_keys[i]))
        after.append(cell(projected_RxG, before))
      h_RxW = after[-1][0]
      context_RxV = module.cross_attention.one(h_RxW, position, source.keys, mask)
      fed_RxD = module.readout(h_RxW, context_RxV, x_RxD)
      return DecoderState(tuple(after), fed_RxD), (fed_RxD, tuple(each[0] for each in after))

    step_keys = [None if key is None else jax.random.split(key, x_TxRxD.shape[0]) for key in keys]
    last, (fed_TxRxD, states) = nn.scan(one, **OVER_TIME)(self, state, (x_TxRxD, projected_TxRxG, positions_T,
                                                                        step_keys))
    for cell, h_TxRxW in zip(self.layers, states):
      cell.tapped(h_TxRxW)
    return jnp.swapaxes(fed_TxRxD, 0, 1), last


class Readout(nn.Module):
  """From the state of the last layer, and the context where there is one, to what the output projection reads."""

  config: RecurrentConfig

  def setup(self):
    c = self.config
    self.maps = Maps(2 if c.readout == 'maxout' else 1, c.d_model, c.dtype)

  def __call__(self, h, context, word) -> jax.Array:
    """...xD. `word` is the embedding that the step has read; only 'maxout' looks at it."""
    c = self.config
    inputs = [h, *([] if context is None else [context]), *([word] if c.readout == 'maxout' else [])]
    found = jnp.max(self.maps(*inputs), axis=-2)  # over one piece, or the two of maxout (Goodfellow et al. 2013)
    return (jnp.tanh(found) if c.readout == 'tanh' else found).astype(c.dtype)
