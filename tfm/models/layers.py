"""The layers that are stacked N times (Vaswani et al. 2017, section 3.1 and figure 1)."""

from __future__ import annotations

import flax.linen as nn
import jax

from tfm.attention.masks import AttentionMask
from tfm.config import TransformerConfig
from tfm.models.dropout import dropout
from tfm.models.multihead import KeysValues, MultiHeadAttention
from tfm.models.tap import Tap
from tfm.parallel.rules import constrain


def layer_norm(config: TransformerConfig, name: str | None = None) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=config.norm_epsilon, dtype=config.dtype, name=name)


def residual(config: TransformerConfig, norm: nn.LayerNorm, x, sublayer, dropout_key):
  """One sub-layer with its skip connection, norm and dropout.

  post: norm(x + dropout(sublayer(x))), as published. pre: x + dropout(sublayer(norm(x))).
  """
  if config.norm == 'post':
    x = norm(x + dropout(sublayer(x), config.dropout, dropout_key))
  else:
    x = x + dropout(sublayer(norm(x)), config.dropout, dropout_key)
  return constrain(x, 'batch', 'length', 'embed')


def split(key: jax.Array | None, count: int) -> list[jax.Array | None]:
  """`count` keys from one; no key (no dropout) splits into no keys."""
  return [None] * count if key is None else [jax.random.fold_in(key, i) for i in range(count)]


class FeedForward(nn.Module):
  """max(0, x W_1 + b_1) W_2 + b_2 (equation 2)."""

  config: TransformerConfig

  def setup(self):
    c = self.config
    self.inner = nn.Dense(c.d_ff, dtype=c.dtype, kernel_init=nn.initializers.xavier_uniform())
    self.outer = nn.Dense(c.d_model, dtype=c.dtype, kernel_init=nn.initializers.xavier_uniform())
    self.act = Tap()

  def __call__(self, x_BxTxD, dropout_key=None):
    act_BxTxF = self.act(constrain(nn.relu(self.inner(x_BxTxD)), 'batch', 'length', 'mlp'))
    return self.outer(dropout(act_BxTxF, self.config.activation_dropout, dropout_key))


class EncoderLayer(nn.Module):
  """Self-attention, then the feed-forward network."""

  config: TransformerConfig

  def setup(self):
    self.self_attention, self.mlp = MultiHeadAttention(self.config), FeedForward(self.config)
    self.self_attention_norm, self.mlp_norm = layer_norm(self.config), layer_norm(self.config)
    self.resid_pre, self.resid_mid, self.resid_post = Tap(), Tap(), Tap()

  def __call__(self, x_BxSxD, dropout_key, mask: AttentionMask):
    c, keys = self.config, split(dropout_key, 4)
    x = self.resid_pre(x_BxSxD)
    x = residual(c, self.self_attention_norm, x, lambda y: self.self_attention(y, y, mask, keys[0]), keys[1])
    x = self.resid_mid(x)
    x = residual(c, self.mlp_norm, x, lambda y: self.mlp(y, keys[2]), keys[3])
    return self.resid_post(x), None


class DecoderLayer(nn.Module):
  """Masked self-attention, attention to the encoder's output, then the feed-forward network."""

  config: TransformerConfig

  def setup(self):
    c = self.config
    self.self_attention, self.cross_attention = MultiHeadAttention(c), MultiHeadAttention(c)
    self.mlp = FeedForward(c)
    self.self_attention_norm, self.cross_attention_norm, self.mlp_norm = layer_norm(c), layer_norm(c), layer_norm(c)
    self.resid_pre, self.resid_mid, self.resid_mid_cross, self.resid_post = Tap(), Tap(), Tap(), Tap()

  def __call__(self, x_BxTxD, dropout_key, memory_BxSxD, self_mask: AttentionMask, cross_mask: AttentionMask):
    """All T positions at once (teacher forcing)."""

    def attend_self(y, key):
      return self.self_attention(y, y, self_mask, key)

    def attend_cross(y, key):
      return self.cross_attention(y, memory_BxSxD, cross_mask, key)

    return self._sublayers(x_BxTxD, attend_self, attend_cross, dropout_key), None

  def memory_keys_values(self, _, memory_BxSxD):
    """What cross-attention needs of the memory, computed once for all steps."""
    return None, self.cross_attention.keys_values(memory_BxSxD)

  def step(self, x_RxTxD, past: KeysValues, memory: KeysValues, index, cross_mask: AttentionMask):
    """T new tokens after `index` cached ones: returns their states and the grown cache."""
    grown = {}

    def attend_self(y, _):
      z, grown['past'] = self.self_attention.extend(y, past, index)
      return z

    def attend_cross(y, _):
      return self.cross_attention.attend(y, memory, cross_mask)

    return self._sublayers(x_RxTxD, attend_self, attend_cross, None), grown['past']

  def _sublayers(self, x, attend_self, attend_cross, dropout_key):
    c, keys = self.config, split(dropout_key, 6)
    x = self.resid_pre(x)
    x = residual(c, self.self_attention_norm, x, lambda y: attend_self(y, keys[0]), keys[1])
    x = self.resid_mid(x)
    x = residual(c, self.cross_attention_norm, x, lambda y: attend_cross(y, keys[2]), keys[3])
    x = self.resid_mid_cross(x)
    x = residual(c, self.mlp_norm, x, lambda y: self.mlp(y, keys[4]), keys[5])
    return self.resid_post(x)
