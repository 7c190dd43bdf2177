"""Convolutional sequence to sequence learning (Gehring et al. 2017), and its decoder alone as a language model of gated
convolutions (Dauphin et al. 2017)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from tfm.attention.masks import AttentionMask
from tfm.attention.taxonomy import AttentionSpec
from tfm.convolutional_config import ConvolutionalConfig
from tfm.decoding.cache import Cache
from tfm.models.convolution import scale_gradient
from tfm.models.convolutional_blocks import Attended, DecoderStack, EncoderStack, empty_steps, join
from tfm.models.dropout import dropout
from tfm.models.embedding import Embedding
from tfm.models.ends import Side, TokenEnds
from tfm.models.layers import split
from tfm.models.multihead import KeysValues
from tfm.models.positions import LearnedPositions, positions_in_segments
from tfm.models.tap import Tap
from tfm.models.transformer import Memory
from tfm.parallel.rules import constrain


@struct.dataclass
class ConvolutionalMemory(Memory):
  """The encoder's output z, and the embeddings e that attention adds to it."""

  embedded_BxSxD: jax.Array


class ConvolutionalEnds(TokenEnds):
  """What both models have in common: tokens become the sum of the embeddings of word and position (section 3.1)."""

  config: ConvolutionalConfig

  @property
  def attention_specs(self) -> dict[str, AttentionSpec]:
    """In the survey's terms: each layer of the decoder asks anew, knowing what those before it saw (section 3.3)."""
    if self.config.cross_attention_shape is None:
      return {}
    return {'decoder.cross_attention': AttentionSpec(scoring='multiplicative', query_multiplicity='multi_hop')}

  def _make_side(self, side: Side) -> None:
    c = self.config
    if c.positions == 'learned':
      setattr(self, f'{side}_positions', LearnedPositions(c.max_positions, c.d_model))
    setattr(self, f'{side}_embed', Tap())

  def _embed(self, side: Side, embedding: Embedding, ids_BxT, positions, dropout_key):
    """BxTxD. Positions are int32, T or BxT."""
    c, x_BxTxD = self.config, embedding(ids_BxT)
    if c.positions == 'learned':
      self._check_positions(side, ids_BxT.shape[1])
      x_BxTxD = x_BxTxD + getattr(self, f'{side}_positions')(positions).astype(x_BxTxD.dtype)
    x_BxTxD = constrain(x_BxTxD, 'batch', 'length', 'embed')
    return getattr(self, f'{side}_embed')(dropout(x_BxTxD, c.dropout, dropout_key))

  def _step_states(self, tokens_RxT, cache: Cache, attended: Attended | None) -> tuple[jax.Array, Cache]:
    T = tokens_RxT.shape[1]
    g_RxTxD = self._embed('target', self.target_embedding, tokens_RxT, cache.index + jnp.arange(T), None)
    x_RxTxD, steps = self.decoder.step(g_RxTxD, cache.steps, attended)
    return x_RxTxD, cache.replace(index=cache.index + T, steps=steps)


class ConvolutionalEncoderDecoder(ConvolutionalEnds):
  """Encoder and decoder under the model protocol of `tfm.decoding.cache`, with the methods and arguments of
  `tfm.models.transformer.EncoderDecoder`."""

  source_vocab_size: int
  target_vocab_size: int

  def setup(self):
    self._make_sides(self.source_vocab_size, self.target_vocab_size)
    self._make_side('source')
    self._make_side('target')
    self.encoder, self.decoder = EncoderStack(self.config), DecoderStack(self.config)

  def __call__(self, source_BxS, target_BxT, dropout_key=None) -> jax.Array:
    """Logits of the token after each target position, BxTxV float32 (teacher forcing)."""
    return self.unembed(self.hidden(source_BxS, target_BxT, dropout_key))

  def hidden(self, source_BxS, target_BxT, dropout_key=None) -> jax.Array:
    """The decoder's output, BxTxD: what `unembed` turns into logits."""
    encoder_key, decoder_key = split(dropout_key, 2)
    return self._decoder_states(target_BxT, self.encode(source_BxS, dropout_key=encoder_key), decoder_key)

  @property
  def output_vocab_size(self) -> int:
    return self.target_vocab_size

  # -- the model protocol ---------------------------------------------------------------------------------------------

  def encode(self, source_BxS, mask: AttentionMask | None = None, dropout_key=None) -> ConvolutionalMemory:
    """The memory. `mask` says which source positions hold tokens; by default those before the padding."""
    c, S = self.config, source_BxS.shape[1]
    mask = self.padding_mask(source_BxS) if mask is None else mask
    allowed_Bx1x1xS = mask.to_array(1, S)
    real_BxS = None if allowed_Bx1x1xS is None else allowed_Bx1x1xS[:, 0, 0]
    embed_key, stack_key = split(dropout_key, 2)
    e_BxSxD = self._embed('source', self.source_table, source_BxS, jnp.arange(S), embed_key)
    z_BxSxD = self.encoder(e_BxSxD, real_BxS, stack_key)
    if c.scale_encoder_gradient:
      # Every attention of the decoder sends a gradient here; embeddings get theirs in full where attention adds them.
      z_BxSxD = scale_gradient(z_BxSxD, 1 / c.decoder_layers)
    return ConvolutionalMemory(z_BxSxD, mask, e_BxSxD)

  def decode(self, target_BxT, memory: ConvolutionalMemory, dropout_key=None) -> jax.Array:
    """Logits BxTxV of all positions at once. Targets begin with <s>: they are the labels shifted right."""
    return self.unembed(self._decoder_states(target_BxT, memory, dropout_key))

  def init_cache(self, memory: ConvolutionalMemory, length: int, rows_per_source: int = 1) -> Cache:
    """Room for `length` tokens of `rows_per_source` hypotheses per source sentence."""
    self._check_positions('target', length)
    rows = memory.states_BxSxD.shape[0] * rows_per_source
    return Cache(index=jnp.int32(0), source=self._keys_values(memory), steps=empty_steps(self.config, rows))

  def step(self, tokens_RxT, memory: ConvolutionalMemory, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits RxTxV of T more tokens (any T >= 1) after those in the cache, and the next cache."""
    x_RxTxD, cache = self._step_states(tokens_RxT, cache, Attended(cache.source, memory.mask))
    return self.unembed(x_RxTxD), cache

  def _decoder_states(self, target_BxT, memory, dropout_key):
    embed_key, stack_key = split(dropout_key, 2)
    g_BxTxD = self._embed('target', self.target_embedding, target_BxT, jnp.arange(target_BxT.shape[1]), embed_key)
    # Padding on the right of a target needs no mask: a causal convolution never sees what follows.
    return self.decoder(g_BxTxD, Attended(self._keys_values(memory), memory.mask), dropout_key=stack_key)

  def _keys_values(self, memory: ConvolutionalMemory) -> KeysValues:
    values_BxSxD = join(self.config, memory.states_BxSxD, memory.embedded_BxSxD)
    return KeysValues(memory.states_BxSxD[:, :, None], values_BxSxD[:, :, None])


class ConvolutionalDecoderOnly(ConvolutionalEnds):
  """The decoder without attention, under the same protocol without memory, with the methods and arguments of
  `tfm.models.decoder_only.DecoderOnly`."""

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
    """The decoder's output, BxTxD: what `unembed` turns into logits."""
    embed_key, stack_key = split(dropout_key, 2)
    positions = jnp.arange(ids_BxT.shape[1]) if segments_BxT is None else positions_in_segments(segments_BxT)
    g_BxTxD = self._embed('target', self.target_embedding, ids_BxT, positions, embed_key)
    return self.decoder(g_BxTxD, None, segments_BxT, stack_key)

  @property
  def output_vocab_size(self) -> int:
    return self.vocab_size

  def init_cache(self, rows: int, length: int) -> Cache:
    """Room for `length` tokens in each row."""
    self._check_positions('target', length)
    return Cache(index=jnp.int32(0), source=None, steps=empty_steps(self.config, rows))

  def step(self, tokens_RxT, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits RxTxV of T more tokens (any T >= 1) after those in the cache, and the next cache."""
    x_RxTxD, cache = self._step_states(tokens_RxT, cache, None)
    return self.unembed(x_RxTxD), cache
