"""The encoder-decoder Transformer (Vaswani et al. 2017, figure 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from tfm.attention.masks import AttentionMask, causal, everything
from tfm.decoding.cache import Cache
from tfm.models.ends import Ends
from tfm.models.layers import split
from tfm.models.multihead import CachedKeysValues
from tfm.models.stack import DecoderStack, EncoderStack


@struct.dataclass
class Memory:
  """The encoder's output, and which of its positions hold a token."""

  states_BxSxD: jax.Array
  mask: AttentionMask


class EncoderDecoder(Ends):
  """Encoder and decoder under the model protocol of `tfm.decoding.cache`.

  `init(key, source_BxS, target_BxT)` makes the parameters, `apply(variables, source_BxS, target_BxT)` gives logits;
  `apply(..., method='encode')` and so on call the other methods. Ids are int32, padding is on the right. Without a
  `dropout_key` there is no dropout.
  """

  source_vocab_size: int
  target_vocab_size: int

  def setup(self):
    c = self.config
    self._make_sides(self.source_vocab_size, self.target_vocab_size)
    self._make_side('source')
    self._make_side('target')
    self.encoder, self.decoder = EncoderStack(c), DecoderStack(c)

  def __call__(self, source_BxS, target_BxT, source_segments_BxS=None, target_segments_BxT=None,
               dropout_key=None) -> jax.Array:
    """Logits of the token after each target position, BxTxV float32 (teacher forcing).

    Args:
      source_segments_BxS, target_segments_BxT: int32, where a row holds several pairs: a number for each, the same on
        both sides. Source and target of a pair see and count themselves alone, and the target sees its own source.
    """
    return self.unembed(self.hidden(source_BxS, target_BxT, source_segments_BxS, target_segments_BxT, dropout_key))

  def hidden(self, source_BxS, target_BxT, source_segments_BxS=None, target_segments_BxT=None,
             dropout_key=None) -> jax.Array:
    """The decoder's last residual stream, BxTxD: what `unembed` turns into logits."""
    encoder_key, decoder_key = split(dropout_key, 2)
    memory = self.encode(source_BxS, dropout_key=encoder_key, segments_BxS=source_segments_BxS)
    return self._decoder_states(target_BxT, memory, decoder_key, target_segments_BxT)

  @property
  def output_vocab_size(self) -> int:
    return self.target_vocab_size

  # -- the model protocol ---------------------------------------------------------------------------------------------

  def encode(self, source_BxS, mask: AttentionMask | None = None, dropout_key=None, segments_BxS=None) -> Memory:
    """The memory. `mask` says which source positions hold tokens; by default those before the padding, or, where a row
    holds several sentences, all: padding is then a segment that no sentence sees."""
    if mask is None:
      mask = self.padding_mask(source_BxS) if segments_BxS is None else everything()
    mask, positions = self._in_row(mask, source_BxS, segments_BxS)
    embed_key, stack_key = split(dropout_key, 2)
    x_BxSxD = self._embed('source', self.source_table, source_BxS, positions, embed_key)
    x_BxSxD = self.encoder(x_BxSxD, mask, positions, self.real(source_BxS), stack_key)
    return Memory(x_BxSxD if self.config.norm == 'post' else self.encoder_norm(x_BxSxD), mask)

  def decode(self, target_BxT, memory: Memory, dropout_key=None, segments_BxT=None) -> jax.Array:
    """Logits BxTxV of all positions at once. Targets begin with <s>: they are the labels shifted right."""
    return self.unembed(self._decoder_states(target_BxT, memory, dropout_key, segments_BxT))

  def init_cache(self, memory: Memory, length: int, rows_per_source: int = 1) -> Cache:
    """Room for `length` tokens of `rows_per_source` hypotheses per source sentence."""
    self._check_positions('target', length)
    rows = memory.states_BxSxD.shape[0] * rows_per_source
    return Cache(index=jnp.int32(0), source=self.decoder.memory_keys_values(memory.states_BxSxD),
                 steps=empty_cache(self.config, rows, length))

  def step(self, tokens_RxT, memory: Memory, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits RxTxV of T more tokens (any T >= 1) after those in the cache, and the grown cache."""
    positions_T = cache.index + jnp.arange(tokens_RxT.shape[1])
    x_RxTxD = self._embed('target', self.target_embedding, tokens_RxT, positions_T, None)
    x_RxTxD, steps = self.decoder.step(x_RxTxD, cache.steps, cache.source, cache.index, positions_T, memory.mask)
    return self.unembed(x_RxTxD), cache.replace(index=cache.index + tokens_RxT.shape[1], steps=steps)

  def _decoder_states(self, target_BxT, memory, dropout_key, segments_BxT=None):
    if (segments_BxT is None) != (memory.mask.query_segments_BxT is None):
      raise ValueError('Segments of one side were given without those of the other; a row holds several pairs on both '
                       'sides or on neither.')
    embed_key, stack_key = split(dropout_key, 2)
    # Padding on the right of a target needs no mask of its own: a causal query never sees what follows it.
    mask, positions = self._in_row(causal(), target_BxT, segments_BxT)
    cross_mask = memory.mask if segments_BxT is None else memory.mask.replace(query_segments_BxT=segments_BxT)
    x_BxTxD = self._embed('target', self.target_embedding, target_BxT, positions, embed_key)
    return self.decoder(x_BxTxD, memory.states_BxSxD, mask, cross_mask, positions, self.real(target_BxT), stack_key)


def empty_cache(config, rows: int, length: int):
  """Keys and values of every decoder layer, of no token yet: a tuple of layers, or stacked along axis 1."""

  def empty(width):
    one = jnp.zeros((rows, config.key_heads, length, width), config.dtype)
    if config.scan_layers:
      return jnp.broadcast_to(one[:, None], (rows, config.decoder_layers, *one.shape[1:]))
    return one

  past = CachedKeysValues(empty(config.key_width), empty(config.value_width))
  return past if config.scan_layers else (past,) * config.decoder_layers
