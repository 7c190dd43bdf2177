"""The two ends that every shape of Transformer has: ids to the residual stream, and the residual stream to logits."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm.attention.masks import AttentionMask, padding
from tfm.config import TransformerConfig
from tfm.models.dropout import dropout
from tfm.models.embedding import Embedding
from tfm.models.feed_forward import ACTIVATIONS
from tfm.models.norms import make_norm
from tfm.models.positions import LearnedPositions, sinusoidal
from tfm.models.tap import Tap
from tfm.parallel.rules import constrain

Side = Literal['source', 'target']


class Ends(nn.Module):
  """What the three shapes inherit. A side is 'source' where an encoder reads, 'target' where a decoder does."""

  config: TransformerConfig

  def _make_embedding(self, vocab_size: int) -> Embedding:
    c = self.config
    return Embedding(vocab_size, c.d_model, c.dtype, c.vocab_multiple, unit=c.scale_output)

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
    c = self.config
    if self.output_table == 'output':
      self.output = self._make_embedding(vocab_size)
    if c.output_transform:
      self.output_transform = nn.Dense(c.d_model, use_bias=c.biases in ('mlp', 'all'), dtype=c.dtype,
                                       kernel_init=nn.initializers.xavier_uniform())
      self.output_norm = make_norm(c)
    if c.output_bias:
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
    c = self.config
    return (self.output_table, *(['decoder_norm'] if c.norm != 'post' and c.shape != 'encoder_only' else []),
            *(['output_transform', 'output_norm'] if c.output_transform else []),
            *(['output_bias'] if c.output_bias else []))

  def unembed(self, x_BxTxD) -> jax.Array:
    """Any residual stream of the decoder to logits, BxTxV: the final norm (not post-norm) and the output matrix."""
    return self._project(x_BxTxD if self.config.norm == 'post' else self.decoder_norm(x_BxTxD))

  def _project(self, x_BxTxD) -> jax.Array:
    """States, behind their final norm, to logits, BxTxV float32."""
    c = self.config
    if c.output_transform:
      x_BxTxD = self.output_norm(ACTIVATIONS[c.feed_forward](self.output_transform(x_BxTxD)))
    if c.scale_output:
      x_BxTxD = x_BxTxD * jnp.asarray(c.d_model**-0.5, x_BxTxD.dtype)
    return getattr(self, self.output_table).logits(x_BxTxD, self.bias_V if c.output_bias else None, c.logit_softcap)

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
