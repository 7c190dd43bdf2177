"""The layers that are stacked N times (Vaswani et al. 2017, section 3.1 and figure 1)."""

from __future__ import annotations

import flax.linen as nn
import jax
from flax import struct

from tfm.attention.masks import AttentionMask
from tfm.config import TransformerConfig
from tfm.models.dropout import dropout
from tfm.models.experts import Experts
from tfm.models.feed_forward import FeedForward
from tfm.models.multihead import CachedKeysValues, MultiHeadAttention
from tfm.models.norms import make_norm
from tfm.models.tap import Tap
from tfm.parallel.rules import constrain


@struct.dataclass
class Tokens:
  """What all layers of a stack are told of its tokens, besides their states."""

  mask: AttentionMask
  """Of self-attention."""
  positions: jax.Array | None = None
  """int32, T or BxT, where attention needs them (rope)."""
  bias: jax.Array | None = None
  """Added to the scores of self-attention, 1xHxTxS (alibi, relative)."""
  real_BxT: jax.Array | None = None
  """bool: not padding. For what counts tokens (experts) or mixes neighbours (convolution)."""


def split(key: jax.Array | None, count: int) -> list[jax.Array | None]:
  """`count` keys from one; no key (no dropout) splits into no keys."""
  return [None] * count if key is None else [jax.random.fold_in(key, i) for i in range(count)]


class Layer(nn.Module):
  """What the layers of both stacks have in common: sub-layers with a skip connection and norms around each."""

  config: TransformerConfig

  def setup(self):
    c = self.config
    self.self_attention, self.mlp = MultiHeadAttention(c), (Experts if c.experts else FeedForward)(c)
    self.self_attention_norm, self.mlp_norm = make_norm(c), make_norm(c)
    if c.norm == 'sandwich':
      self.self_attention_post_norm, self.mlp_post_norm = make_norm(c), make_norm(c)
    self.resid_pre, self.resid_mid, self.resid_post = Tap(), Tap(), Tap()

  def residual(self, name, x, sublayer, dropout_key, weight=1.0):
    """One sub-layer, called `name`, with its skip connection, norm and dropout; `weight` is a factor on its output.

    post: norm(x + dropout(sublayer(x))), as published. pre: x + dropout(sublayer(norm(x))). sandwich: x +
    dropout(post_norm(sublayer(norm(x)))).
    """
    c, norm = self.config, getattr(self, f'{name}_norm')
    y = sublayer(x if c.norm == 'post' else norm(x))
    if c.norm == 'sandwich':
      y = getattr(self, f'{name}_post_norm')(y)
    if weight != 1.0:
      y = weight * y
    x = x + dropout(y, c.dropout, dropout_key)
    return constrain(norm(x) if c.norm == 'post' else x, 'batch', 'length', 'embed')

  def feed_forward(self, name, x, tokens: Tokens, keys, weight=1.0):
    more = (tokens.real_BxT,) if self.config.experts else ()
    return self.residual(name, x, lambda y: getattr(self, name)(y, keys[0], *more), keys[1], weight)


class EncoderLayer(Layer):
  """Self-attention, then the feed-forward network."""

  def __call__(self, x_BxSxD, dropout_key, tokens: Tokens):
    keys = split(dropout_key, 4)
    x = self.resid_pre(x_BxSxD)
    x = self.resid_mid(self.residual('self_attention', x, lambda y: self.attend(y, tokens, keys[0]), keys[1]))
    return self.resid_post(self.feed_forward('mlp', x, tokens, keys[2:])), None

  def attend(self, y, tokens: Tokens, key):
    return self.self_attention(y, y, tokens.mask, key, tokens.positions, tokens.bias)


class DecoderLayer(Layer):
  """Masked self-attention, attention to the encoder's output where there is one, then the feed-forward network."""

  def setup(self):
    super().setup()
    c = self.config
    if c.encoder_layers:
      self.cross_attention, self.cross_attention_norm = MultiHeadAttention(c), make_norm(c)
      self.resid_mid_cross = Tap()
      if c.norm == 'sandwich':
        self.cross_attention_post_norm = make_norm(c)

  def __call__(self, x_BxTxD, dropout_key, memory_BxSxD, tokens: Tokens, cross_mask: AttentionMask | None):
    """All T positions at once (teacher forcing)."""

    def attend_self(y, key):
      return self.self_attention(y, y, tokens.mask, key, tokens.positions, tokens.bias)

    def attend_cross(y, key):
      return self.cross_attention(y, memory_BxSxD, cross_mask, key)

    return self._sublayers(x_BxTxD, attend_self, attend_cross, tokens, dropout_key), None

  def memory_keys_values(self, _, memory_BxSxD):
    """What cross-attention needs of the memory, computed once for all steps."""
    return None, self.cross_attention.keys_values(memory_BxSxD).cached

  def step(self, x_RxTxD, past: CachedKeysValues, memory: CachedKeysValues | None, index, tokens: Tokens,
           cross_mask: AttentionMask | None):
    """T new tokens after `index` cached ones: returns their states and the grown cache."""
    grown = {}

    def attend_self(y, _):
      z, grown['past'] = self.self_attention.extend(y, past, index, tokens.mask, tokens.positions, tokens.bias)
      return z

    def attend_cross(y, _):
      return self.cross_attention.attend(y, memory.by_token, cross_mask)

    return self._sublayers(x_RxTxD, attend_self, attend_cross, tokens, None), grown['past']

  def _sublayers(self, x, attend_self, attend_cross, tokens: Tokens, dropout_key):
    keys = split(dropout_key, 6)
    x = self.resid_pre(x)
    x = self.resid_mid(self.residual('self_attention', x, lambda y: attend_self(y, keys[0]), keys[1]))
    if self.config.encoder_layers:
      x = self.resid_mid_cross(self.residual('cross_attention', x, lambda y: attend_cross(y, keys[2]), keys[3]))
    return self.resid_post(self.feed_forward('mlp', x, tokens, keys[4:]))
