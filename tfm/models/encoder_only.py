"""The encoder-only Transformer: a masked language model, sentence vectors, a classifier (BERT, Devlin et al. 2019)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm.attention.masks import AttentionMask
from tfm.models.embedding import Embedding
from tfm.models.ends import Ends
from tfm.models.layers import split
from tfm.models.stack import EncoderStack
from tfm.models.transformer import Memory


class EncoderOnly(Ends):
  """The encoder of `EncoderDecoder` with heads on top.

  `apply(variables, ids_BxT)` gives logits BxTxV of the token *at* each position; `method='embed'` sentence vectors,
  `method='classify'` logits of classes. Ids are int32, padding is on the right. Without a `dropout_key` there is no
  dropout. `types_BxT` says of what kind each token is, where the config has token types; all are of kind 0 without it.
  """

  vocab_size: int

  def setup(self):
    c = self.config
    self.source_embedding = self._make_embedding(self.vocab_size)
    self._make_output(self.vocab_size)
    self._make_side('source')
    self.encoder = EncoderStack(c)
    if c.token_types:
      self.token_types = Embedding(c.token_types, c.d_model, c.dtype)
    if c.pooler:
      self.pooler = nn.Dense(c.d_model, dtype=c.dtype, kernel_init=nn.initializers.xavier_uniform())
    if c.num_labels:
      self.classifier = nn.Dense(c.num_labels, dtype='float32', kernel_init=nn.initializers.xavier_uniform())

  def __call__(self, ids_BxT, types_BxT=None, dropout_key=None) -> jax.Array:
    """Logits BxTxV float32 of the token at each position (masked language model)."""
    hidden_BxTxD = self.hidden(ids_BxT, types_BxT, dropout_key)
    if self.is_initializing():  # parameters come to be where they are used
      self._heads(hidden_BxTxD, jnp.ones(ids_BxT.shape))
    return self.unembed(hidden_BxTxD)

  def hidden(self, ids_BxT, types_BxT=None, dropout_key=None) -> jax.Array:
    """The encoder's output, BxTxD: what `unembed` turns into logits."""
    return self.encode(ids_BxT, None, types_BxT, dropout_key).states_BxSxD

  @property
  def output_vocab_size(self) -> int:
    return self.vocab_size

  def encode(self, ids_BxS, mask: AttentionMask | None = None, types_BxS=None, dropout_key=None) -> Memory:
    """The encoder's output, behind the final norm where there is one; `mask` as in `EncoderDecoder.encode`."""
    c = self.config
    if types_BxS is not None and not c.token_types:
      raise ValueError('types were given, but model.token_types is 0; leave them out.')
    mask = self.padding_mask(ids_BxS) if mask is None else mask
    embed_key, stack_key = split(dropout_key, 2)
    positions_S = jnp.arange(ids_BxS.shape[1])
    types = self.token_types(jnp.zeros_like(ids_BxS) if types_BxS is None else types_BxS) if c.token_types else None
    x_BxSxD = self._embed('source', self.source_embedding, ids_BxS, positions_S, embed_key, types)
    x_BxSxD = self.encoder(x_BxSxD, mask, positions_S, self.real(ids_BxS), stack_key)
    return Memory(x_BxSxD if c.norm == 'post' else self.encoder_norm(x_BxSxD), mask)

  def unembed(self, x_BxTxD) -> jax.Array:
    """What `hidden` gives to logits, BxTxV."""
    return self._project(x_BxTxD)

  def embed(self, ids_BxT, types_BxT=None) -> jax.Array:
    """A vector for each sentence, BxD: pooled as the config says."""
    return self._pool(self.hidden(ids_BxT, types_BxT), self.real(ids_BxT))

  def classify(self, ids_BxT, types_BxT=None, dropout_key=None) -> jax.Array:
    """Logits of the classes for each sentence, BxL float32."""
    if not self.config.num_labels:
      raise ValueError('model.num_labels is 0, so there is no classification head; set it.')
    return self._heads(self.hidden(ids_BxT, types_BxT, dropout_key), self.real(ids_BxT))

  def _pool(self, x_BxTxD, real_BxT):
    if self.config.pooling == 'first':
      x_BxD = x_BxTxD[:, 0]
    else:
      count_Bx1 = jnp.maximum(jnp.sum(real_BxT, axis=1, keepdims=True), 1)
      total_BxD = jnp.sum(x_BxTxD * real_BxT[..., None].astype(x_BxTxD.dtype), axis=1, dtype=jnp.float32)
      x_BxD = (total_BxD / count_Bx1).astype(x_BxTxD.dtype)
    return jnp.tanh(self.pooler(x_BxD)) if self.config.pooler else x_BxD

  def _heads(self, x_BxTxD, real_BxT):
    x_BxD = self._pool(x_BxTxD, real_BxT)
    return self.classifier(x_BxD) if self.config.num_labels else x_BxD
