"""The decoder-only Transformer: a language model (Liu et al. 2018; Radford et al. 2018)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tfm.attention.masks import causal
from tfm.decoding.cache import Cache
from tfm.models.ends import Ends
from tfm.models.layers import split
from tfm.models.stack import DecoderStack
from tfm.models.transformer import empty_cache


class DecoderOnly(Ends):
  """The decoder of `EncoderDecoder` without cross-attention, under the same protocol without memory.

  `apply(variables, ids_BxT)` gives logits BxTxV of the token after each position. Ids are int32, padding is on the
  right. Without a `dropout_key` there is no dropout.
  """

  vocab_size: int

  def setup(self):
    self.target_embedding = self._make_embedding(self.vocab_size)
    self._make_output(self.vocab_size)
    self._make_side('target')
    self.decoder = DecoderStack(self.config)

  def __call__(self, ids_BxT, segments_BxT=None, dropout_key=None) -> jax.Array:
    """Logits BxTxV float32, all positions at once.

    Args:
      segments_BxT: int32, where a row holds several texts: a number for each, and a text sees and counts itself alone.
    """
    return self.unembed(self.hidden(ids_BxT, segments_BxT, dropout_key))

  def hidden(self, ids_BxT, segments_BxT=None, dropout_key=None) -> jax.Array:
    """The last residual stream, BxTxD: what `unembed` turns into logits."""
    embed_key, stack_key = split(dropout_key, 2)
    mask, positions = self._in_row(causal(), ids_BxT, segments_BxT)
    x_BxTxD = self._embed('target', self.target_embedding, ids_BxT, positions, embed_key)
    # Padding on the right needs no mask: a causal query never sees what follows it.
    return self.decoder(x_BxTxD, None, mask, None, positions, self.real(ids_BxT), stack_key)

  @property
  def output_vocab_size(self) -> int:
    return self.vocab_size

  def init_cache(self, rows: int, length: int) -> Cache:
    """Room for `length` tokens in each row."""
    self._check_positions('target', length)
    return Cache(index=jnp.int32(0), source=self.decoder.memory_keys_values(None),
                 steps=empty_cache(self.config, rows, length))

  def step(self, tokens_RxT, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits RxTxV of T more tokens (any T >= 1) after those in the cache, and the grown cache."""
    positions_T = cache.index + jnp.arange(tokens_RxT.shape[1])
    x_RxTxD = self._embed('target', self.target_embedding, tokens_RxT, positions_T, None)
    x_RxTxD, steps = self.decoder.step(x_RxTxD, cache.steps, cache.source, cache.index, positions_T, None)
    return self.unembed(x_RxTxD), cache.replace(index=cache.index + tokens_RxT.shape[1], steps=steps)
