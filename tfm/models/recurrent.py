"""Recurrent encoder-decoders and language models, under the protocol of `tfm.decoding.cache`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from tfm.attention.masks import AttentionMask
from tfm.attention.taxonomy import AttentionSpec
from tfm.decoding.cache import Cache
from tfm.models.cells import State
from tfm.models.dropout import dropout
from tfm.models.embedding import Embedding
from tfm.models.ends import Side, TokenEnds
from tfm.models.layers import split
from tfm.models.positions import positions_in_segments
from tfm.models.recurrent_attention import real_keys
from tfm.models.recurrent_stacks import RecurrentDecoder, RecurrentEncoder, Source
from tfm.models.tap import Tap
from tfm.models.window import WindowDecoder
from tfm.parallel.rules import constrain
from tfm.recurrent_config import RecurrentConfig


class RecurrentEnds(TokenEnds):
  """What the two shapes have in common."""

  config: RecurrentConfig

  @property
  def attention_specs(self) -> dict[str, AttentionSpec]:
    """Its attention in the survey's terms, where it has one."""
    c = self.config
    if c.cross_attention_shape is None:
      return {}
    return {'decoder.cross_attention': AttentionSpec(scoring=c.score, alignment=c.alignment)}

  def _embed(self, side: Side, embedding: Embedding, ids_BxT, dropout_key) -> jax.Array:
    """What the first layer reads, BxTxD, with entries of size 1, as the first weights are made for."""
    c = self.config
    x_BxTxD = embedding(ids_BxT) * jnp.asarray(c.d_model**0.5, c.dtype)
    x_BxTxD = constrain(x_BxTxD, 'batch', 'length', 'embed')
    return getattr(self, f'{side}_embed')(dropout(x_BxTxD, c.dropout, dropout_key))


@struct.dataclass
class RecurrentMemory:
  """The encoder's states, which of its positions hold a token, and the last states of every layer."""

  states_BxSxV: jax.Array
  mask: AttentionMask
  finals: tuple[State, ...]


class RecurrentEncoderDecoder(RecurrentEnds):
  """Encoder and decoder, with a vector of fixed width or attention between them.

  `apply(variables, source_BxS, target_BxT)` gives logits BxTxV. Ids are int32, padding is on the right. Without a
  `dropout_key` there is no dropout.
  """

  source_vocab_size: int
  target_vocab_size: int

  def setup(self):
    self._make_sides(self.source_vocab_size, self.target_vocab_size)
    self.source_embed, self.target_embed = Tap(), Tap()
    self.encoder, self.decoder = RecurrentEncoder(self.config), RecurrentDecoder(self.config)

  def __call__(self, source_BxS, target_BxT, dropout_key=None) -> jax.Array:
    """Logits of the token after each target position, BxTxV float32 (teacher forcing)."""
    return self.unembed(self.hidden(source_BxS, target_BxT, dropout_key))

  def hidden(self, source_BxS, target_BxT, dropout_key=None) -> jax.Array:
    """What `unembed` turns into logits, BxTxD."""
    encoder_key, decoder_key = split(dropout_key, 2)
    return self._read_out(target_BxT, self.encode(source_BxS, dropout_key=encoder_key), decoder_key)

  @property
  def output_vocab_size(self) -> int:
    return self.target_vocab_size

  def encode(self, source_BxS, mask: AttentionMask | None = None, dropout_key=None) -> RecurrentMemory:
    """The memory. `mask` says which source positions hold tokens; by default those before the padding."""
    mask = self.padding_mask(source_BxS) if mask is None else mask
    embed_key, stack_key = split(dropout_key, 2)
    x_BxSxD = self._embed('source', self.source_table, source_BxS, embed_key)
    real_BxS = real_keys(mask, *source_BxS.shape)
    states_SxBxV, finals = self.encoder(jnp.swapaxes(x_BxSxD, 0, 1), None if real_BxS is None else real_BxS.T,
                                        stack_key)
    return RecurrentMemory(jnp.swapaxes(states_SxBxV, 0, 1), mask, finals)

  def decode(self, target_BxT, memory: RecurrentMemory, dropout_key=None) -> jax.Array:
    """Logits BxTxV of all positions at once. Targets begin with <s>: they are the labels shifted right."""
    return self.unembed(self._read_out(target_BxT, memory, dropout_key))

  def init_cache(self, memory: RecurrentMemory, length: int, rows_per_source: int = 1) -> Cache:
    """The state before the first token of `rows_per_source` hypotheses per source sentence, for any `length`."""
    self._check_positions('target', length)
    steps = self.decoder.first_state(memory.finals)
    return Cache(index=jnp.int32(0), source=self.decoder.source(memory.states_BxSxV, memory.finals),
                 steps=jax.tree.map(lambda leaf: jnp.repeat(leaf, rows_per_source, axis=0), steps))

  def step(self, tokens_RxT, memory: RecurrentMemory, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits RxTxV of T more tokens (any T >= 1) after those in the cache, and the cache after them."""
    x_RxTxD, steps = self._decoder(tokens_RxT, cache.steps, cache.source, memory.mask, cache.index, None)
    return self.unembed(x_RxTxD), cache.replace(index=cache.index + tokens_RxT.shape[1], steps=steps)

  def _read_out(self, target_BxT, memory: RecurrentMemory, dropout_key):
    # Padding on the right of a target needs no mask: a state never knows what follows it.
    source = self.decoder.source(memory.states_BxSxV, memory.finals)
    return self._decoder(target_BxT, self.decoder.first_state(memory.finals), source, memory.mask, 0, dropout_key)[0]

  def _decoder(self, tokens_RxT, steps, source: Source, mask, index, dropout_key):
    embed_key, stack_key = split(dropout_key, 2)
    x_RxTxD = self._embed('target', self.target_embedding, tokens_RxT, embed_key)
    positions_T = index + jnp.arange(tokens_RxT.shape[1])
    return self.decoder(jnp.swapaxes(x_RxTxD, 0, 1), steps, source, mask, positions_T, dropout_key=stack_key)


class RecurrentDecoderOnly(RecurrentEnds):
  """A language model: latent autoregressive with a recurrent state, or autoregressive over a window of tokens.

  `apply(variables, ids_BxT)` gives logits BxTxV of the token after each position. Ids are int32, padding is on the
  right. Without a `dropout_key` there is no dropout.
  """

  vocab_size: int

  def setup(self):
    self.target_embedding = self._make_embedding(self.vocab_size)
    self._make_output(self.vocab_size)
    self.target_embed = Tap()
    self.decoder = (WindowDecoder if self.config.cell == 'window' else RecurrentDecoder)(self.config)

  def __call__(self, ids_BxT, segments_BxT=None, dropout_key=None) -> jax.Array:
    """Logits BxTxV float32, all positions at once.

    Args:
      segments_BxT: int32, where a row holds several texts: a number for each, and each begins with an empty state.
    """
    return self.unembed(self.hidden(ids_BxT, segments_BxT, dropout_key))

  def hidden(self, ids_BxT, segments_BxT=None, dropout_key=None) -> jax.Array:
    """What `unembed` turns into logits, BxTxD."""
    read_BxT = None if segments_BxT is None else positions_in_segments(segments_BxT)
    return self._decoder(ids_BxT, self.decoder.empty_state(ids_BxT.shape[0]), read_BxT, dropout_key)[0]

  @property
  def output_vocab_size(self) -> int:
    return self.vocab_size

  def init_cache(self, rows: int, length: int) -> Cache:
    """The state before the first token of each row, for any `length`."""
    self._check_positions('target', length)
    return Cache(index=jnp.int32(0), source=None, steps=self.decoder.empty_state(rows))

  def step(self, tokens_RxT, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits RxTxV of T more tokens (any T >= 1) after those in the cache, and the cache after them."""
    x_RxTxD, steps = self._decoder(tokens_RxT, cache.steps, None, None)
    return self.unembed(x_RxTxD), cache.replace(index=cache.index + tokens_RxT.shape[1], steps=steps)

  def _decoder(self, ids_RxT, steps, read_RxT, dropout_key):
    embed_key, stack_key = split(dropout_key, 2)
    x_RxTxD = self._embed('target', self.target_embedding, ids_RxT, embed_key)
    if self.config.cell == 'window':
      return self.decoder(x_RxTxD, steps, read_RxT, stack_key)
    fresh_TxR = None if read_RxT is None else read_RxT.T == 0
    return self.decoder(jnp.swapaxes(x_RxTxD, 0, 1), steps, fresh_TxR=fresh_TxR, dropout_key=stack_key)
