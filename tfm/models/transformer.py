"""The encoder-decoder Transformer (Vaswani et al. 2017, figure 1)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from tfm.attention.masks import AttentionMask, causal, padding
from tfm.config import ConfigError, TransformerConfig
from tfm.decoding.cache import Cache
from tfm.models.dropout import dropout
from tfm.models.embedding import Embedding
from tfm.models.layers import layer_norm, split
from tfm.models.multihead import KeysValues
from tfm.models.positions import LearnedPositions, sinusoidal
from tfm.models.stack import DecoderStack, EncoderStack
from tfm.models.tap import Tap
from tfm.parallel.rules import constrain
from tfm.special_ids import PAD


@struct.dataclass
class Memory:
  """The encoder's output, and which of its positions hold a token."""

  states_BxSxD: jax.Array
  mask: AttentionMask


class EncoderDecoder(nn.Module):
  """Encoder and decoder under the model protocol of `tfm.decoding.cache`.

  `init(key, source_BxS, target_BxT)` makes the parameters, `apply(variables, source_BxS, target_BxT)` gives logits;
  `apply(..., method='encode')` and so on call the other methods. Ids are int32, padding (0) is on the right.
  Without a `dropout_key` there is no dropout.
  """

  config: TransformerConfig
  source_vocab_size: int
  target_vocab_size: int

  def setup(self):
    c = self.config
    if c.tying == 'all' and self.source_vocab_size != self.target_vocab_size:
      raise ConfigError(
          f"model.tying='all' needs one vocabulary, but the source has {self.source_vocab_size} ids and the target "
          f"{self.target_vocab_size}; use a joint tokenizer or tying='target'.")
    self.target_embedding = Embedding(self.target_vocab_size, c.d_model, c.dtype, c.vocab_multiple)
    if c.tying != 'all':
      self.source_embedding = Embedding(self.source_vocab_size, c.d_model, c.dtype, c.vocab_multiple)
    if c.tying == 'none':
      self.output = Embedding(self.target_vocab_size, c.d_model, c.dtype, c.vocab_multiple)
    if c.positions == 'learned':
      self.source_positions = LearnedPositions(c.max_positions, c.d_model)
      self.target_positions = LearnedPositions(c.max_positions, c.d_model)
    self.encoder, self.decoder = EncoderStack(c), DecoderStack(c)
    if c.norm == 'pre':
      self.encoder_norm, self.decoder_norm = layer_norm(c), layer_norm(c)
    self.source_embed, self.target_embed = Tap(), Tap()

  def __call__(self, source_BxS, target_BxT, dropout_key=None) -> jax.Array:
    """Logits of the token after each target position, BxTxV float32 (teacher forcing)."""
    return self.unembed(self.hidden(source_BxS, target_BxT, dropout_key))

  def hidden(self, source_BxS, target_BxT, dropout_key=None) -> jax.Array:
    """The decoder's last residual stream, BxTxD: what `unembed` turns into logits."""
    encoder_key, decoder_key = split(dropout_key, 2)
    memory = self.encode(source_BxS, dropout_key=encoder_key)
    return self._decoder_states(target_BxT, memory, decoder_key)

  # -- the model protocol ---------------------------------------------------------------------------------------------

  def encode(self, source_BxS, mask: AttentionMask | None = None, dropout_key=None) -> Memory:
    """The memory. `mask` says which source positions hold tokens; by default those before the padding."""
    mask = padding(source_BxS, PAD) if mask is None else mask
    embed_key, stack_key = split(dropout_key, 2)
    x_BxSxD = self.source_embed(self._embed('source', source_BxS, 0, embed_key))
    x_BxSxD = self.encoder(x_BxSxD, mask, stack_key)
    return Memory(self.encoder_norm(x_BxSxD) if self.config.norm == 'pre' else x_BxSxD, mask)

  def decode(self, target_BxT, memory: Memory, dropout_key=None) -> jax.Array:
    """Logits BxTxV of all positions at once. Targets begin with <s>: they are the labels shifted right."""
    return self.unembed(self._decoder_states(target_BxT, memory, dropout_key))

  def init_cache(self, memory: Memory, length: int, rows_per_source: int = 1) -> Cache:
    """Room for `length` tokens of `rows_per_source` hypotheses per source sentence."""
    c = self.config
    self._check_positions('target', length)
    rows = memory.states_BxSxD.shape[0] * rows_per_source

    def empty(width):
      shape = (rows, length, c.num_heads, width)
      one = jnp.zeros(shape, c.dtype)
      if c.scan_layers:
        return jnp.broadcast_to(one[:, None], (rows, c.decoder_layers) + shape[1:])
      return one

    past = KeysValues(empty(c.key_width), empty(c.value_width))
    return Cache(index=jnp.int32(0),
                 source=self.decoder.memory_keys_values(memory.states_BxSxD),
                 steps=past if c.scan_layers else (past,) * c.decoder_layers)

  def step(self, tokens_RxT, memory: Memory, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits RxTxV of T more tokens (any T >= 1) after those in the cache, and the grown cache."""
    x_RxTxD = self.target_embed(self._embed('target', tokens_RxT, cache.index, None))
    x_RxTxD, steps = self.decoder.step(x_RxTxD, cache.steps, cache.source, cache.index, memory.mask)
    return self.unembed(x_RxTxD), cache.replace(index=cache.index + tokens_RxT.shape[1], steps=steps)

  # -- the ends -------------------------------------------------------------------------------------------------------

  def unembed(self, x_BxTxD) -> jax.Array:
    """Any residual stream of the decoder to logits, BxTxV: the final norm (pre-norm only) and the output matrix."""
    if self.config.norm == 'pre':
      x_BxTxD = self.decoder_norm(x_BxTxD)
    return (self.output if self.config.tying == 'none' else self.target_embedding).logits(x_BxTxD)

  @property
  def unembed_parameters(self) -> tuple[str, ...]:
    """The entries of the parameter tree that `unembed` reads."""
    table = 'output' if self.config.tying == 'none' else 'target_embedding'
    return (table, 'decoder_norm') if self.config.norm == 'pre' else (table,)

  def _decoder_states(self, target_BxT, memory, dropout_key):
    embed_key, stack_key = split(dropout_key, 2)
    x_BxTxD = self.target_embed(self._embed('target', target_BxT, 0, embed_key))
    # Padding on the right of a target needs no mask of its own: a causal query never sees what follows it.
    return self.decoder(x_BxTxD, memory.states_BxSxD, causal(), memory.mask, stack_key)

  def _embed(self, side, ids_BxT, first_position, dropout_key):
    c = self.config
    embedding = self.source_embedding if side == 'source' and c.tying != 'all' else self.target_embedding
    x_BxTxD = embedding(ids_BxT)
    if c.scale_embeddings:
      x_BxTxD = x_BxTxD * jnp.asarray(c.d_model**0.5, x_BxTxD.dtype)
    T = ids_BxT.shape[1]
    positions_T = first_position + jnp.arange(T)
    if c.positions == 'sinusoidal':
      position_TxD = sinusoidal(positions_T, c.d_model)
    else:
      self._check_positions(side, T)
      position_TxD = (self.source_positions if side == 'source' else self.target_positions)(positions_T)
    x_BxTxD = constrain(x_BxTxD + position_TxD.astype(x_BxTxD.dtype), 'batch', 'length', 'embed')
    return dropout(x_BxTxD, c.dropout, dropout_key)

  def _check_positions(self, side, count):
    limit = self.config.max_positions
    if limit is not None and count > limit:
      raise ValueError(f'{count} {side} positions exceed the learned table of model.max_positions={limit}.')
