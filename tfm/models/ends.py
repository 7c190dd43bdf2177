"""The two ends that every model has: ids to vectors, and states to logits; and those of the Transformer."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm.attention.masks import AttentionMask, padding, segments
from tfm.attention.taxonomy import AttentionSpec
from tfm.config import ConfigError, TransformerConfig
from tfm.model_section import ModelSection
from tfm.models.dropout import dropout
from tfm.models.embedding import Embedding
from tfm.models.feed_forward import ACTIVATIONS
from tfm.models.linear import linear
from tfm.models.norms import make_norm
from tfm.models.positions import LearnedPositions, positions_in_segments, sinusoidal
from tfm.models.tap import Tap
from tfm.parallel.rules import constrain

Side = Literal['source', 'target']


class TokenEnds(nn.Module):
  """What the models of all families inherit: tables of tokens, the output projection, and which ids are padding."""

  config: ModelSection

  def _make_embedding(self, vocab_size: int) -> Embedding:
    c = self.config
    return Embedding(vocab_size, c.d_model, c.dtype, c.vocab_multiple, unit=c.scale_output)

  def _make_sides(self, source_vocab_size: int, target_vocab_size: int) -> None:
    """The tables of an encoder-decoder, shared as `tying` says."""
    tying = self.config.tying
    if tying in ('inputs', 'all') and source_vocab_size != target_vocab_size:
      raise ConfigError(
          f"model.tying='{tying}' needs one vocabulary, but the source has {source_vocab_size} ids and the target "
          f"{target_vocab_size}; use a joint tokenizer or tying='target'.")
    self.target_embedding = self._make_embedding(target_vocab_size)
    if tying not in ('inputs', 'all'):
      self.source_embedding = self._make_embedding(source_vocab_size)
    self._make_output(target_vocab_size)

  @property
  def source_table(self) -> Embedding:
    """What an encoder reads its ids with."""
    return self.target_embedding if self.config.tying in ('inputs', 'all') else self.source_embedding

  def _make_output(self, vocab_size: int) -> None:
    if self.output_table == 'output':
      self.output = self._make_embedding(vocab_size)
    if self.config.output_bias:
      rows = getattr(self, self.output_table).rows
      self.bias_V = self.param('output_bias', nn.initializers.zeros_init(), (rows,))

  @property
  def output_table(self) -> str:
    """The entry of the parameter tree that turns states into logits."""
    if self.config.tying in ('none', 'inputs'):
      return 'output'
    return 'source_embedding' if self.config.shape == 'encoder_only' else 'target_embedding'

  @property
  def unembed_parameters(self) -> tuple[str, ...]:
    """The entries of the parameter tree that `unembed` reads."""
    return (self.output_table, *(['output_bias'] if self.config.output_bias else []))

  def unembed(self, x_BxTxD) -> jax.Array:
    """States to logits, BxTxV float32."""
    return self._logits(x_BxTxD)

  def _logits(self, x_BxTxD) -> jax.Array:
    c = self.config
    if c.scale_output:
      x_BxTxD = x_BxTxD * jnp.asarray(c.d_model**-0.5, x_BxTxD.dtype)
    return getattr(self, self.output_table).logits(x_BxTxD, self.bias_V if c.output_bias else None, c.logit_softcap)

  def padding_mask(self, ids_BxT) -> AttentionMask:
    """Which positions hold a token: those before the padding."""
    return AttentionMask() if self.config.pad_id is None else padding(ids_BxT, self.config.pad_id)

  def real(self, ids_BxT) -> jax.Array:
    """bool BxT: not padding."""
    pad_id = self.config.pad_id
    return jnp.ones(ids_BxT.shape, bool) if pad_id is None else ids_BxT != pad_id

  def _check_positions(self, side: Side, count: int) -> None:
    limit = self.config.longest
    if limit is not None and count > limit:
      raise ValueError(f'{count} {side} positions exceed the learned table of model.max_positions='
                       f'{self.config.max_positions}, which has room for {limit}.')


class Ends(TokenEnds):
  """What the three shapes of the Transformer inherit. A side is 'source' where an encoder reads, 'target' where a
  decoder does."""

  config: TransformerConfig

  @property
  def attention_specs(self) -> dict[str, AttentionSpec]:
    """Every attention it has, in the survey's terms (Brauwers & Frasincar 2021, table 3); each layer is a hop."""
    c, specs = self.config, {}

    def spec(query_type, layers, window=None):
      many = '_'.join(name for name, is_set in (('multi_head', c.num_heads > 1), ('multi_hop', layers > 1)) if is_set)
      return AttentionSpec(scoring='multiplicative' if c.attention_scale == 1 else 'scaled',
                           alignment='soft' if window is None else 'local_monotonic', query_type=query_type,
                           query_multiplicity=many or 'singular')

    if c.encoder_layers:
      specs['encoder.self_attention'] = spec('self_attentive', c.encoder_layers, c.window)
    if c.decoder_layers:
      specs['decoder.self_attention, masked'] = spec('self_attentive', c.decoder_layers, c.window)
    if c.shape == 'encoder_decoder':
      specs['decoder.cross_attention'] = spec('basic', c.decoder_layers)
    return specs

  def _make_side(self, side: Side) -> None:
    """All of a side but its embedding, which may be shared; setattr, so that parameters find their names."""
    c = self.config
    if c.positions == 'learned':
      setattr(self, f'{side}_positions', LearnedPositions(c.max_positions, c.d_model))
    if c.embedding_norm:
      setattr(self, f'{side}_embedding_norm', make_norm(c))
    if c.norm != 'post':
      setattr(self, f'{"encoder" if side == "source" else "decoder"}_norm', make_norm(c))
    setattr(self, f'{side}_embed', Tap())

  def _make_output(self, vocab_size: int) -> None:
    super()._make_output(vocab_size)
    c = self.config
    if c.output_transform:
      self.output_transform = linear(c.d_model, c)
      self.output_norm = make_norm(c)

  @property
  def unembed_parameters(self) -> tuple[str, ...]:
    c = self.config
    return (*super().unembed_parameters, *(['decoder_norm'] if c.norm != 'post' and c.shape != 'encoder_only' else []),
            *(['output_transform', 'output_norm'] if c.output_transform else []))

  def unembed(self, x_BxTxD) -> jax.Array:
    """Any residual stream of the decoder to logits, BxTxV: the final norm (not post-norm) and the output matrix."""
    return self._project(x_BxTxD if self.config.norm == 'post' else self.decoder_norm(x_BxTxD))

  def _project(self, x_BxTxD) -> jax.Array:
    """States, behind their final norm, to logits, BxTxV float32."""
    c = self.config
    if c.output_transform:
      x_BxTxD = self.output_norm(ACTIVATIONS[c.feed_forward](self.output_transform(x_BxTxD)))
    return self._logits(x_BxTxD)

  def _in_row(self, mask: AttentionMask, ids_BxT, segments_BxT=None) -> tuple[AttentionMask, jax.Array]:
    """The mask of self-attention and the positions, int32 T or BxT: of one text in each row, or of several, each of
    which sees and counts itself alone."""
    if segments_BxT is None:
      return mask, jnp.arange(ids_BxT.shape[1])
    return mask & segments(segments_BxT), positions_in_segments(segments_BxT)

  def _embed(self, side: Side, embedding: Embedding, ids_BxT, positions, dropout_key, more_BxTxD=None):
    """The first residual stream, BxTxD. Positions are int32, T or BxT."""
    c = self.config
    x_BxTxD = embedding(ids_BxT)
    if c.scale_embeddings:
      x_BxTxD = x_BxTxD * jnp.asarray(c.d_model**0.5, x_BxTxD.dtype)
    if c.positions.startswith('sinusoidal'):
      position = sinusoidal(positions, c.d_model, halves=c.positions == 'sinusoidal_halves')
      x_BxTxD = x_BxTxD + position.astype(x_BxTxD.dtype)
    elif c.positions == 'learned':
      self._check_positions(side, ids_BxT.shape[1])
      position = getattr(self, f'{side}_positions')(positions + c.position_offset)
      x_BxTxD = x_BxTxD + position.astype(x_BxTxD.dtype)
    if more_BxTxD is not None:
      x_BxTxD = x_BxTxD + more_BxTxD
    if c.embedding_norm:
      x_BxTxD = getattr(self, f'{side}_embedding_norm')(x_BxTxD)
    x_BxTxD = constrain(x_BxTxD, 'batch', 'length', 'embed')
    return getattr(self, f'{side}_embed')(dropout(x_BxTxD, c.dropout, dropout_key))
