"""Multi-head attention (Vaswani et al. 2017, section 3.2.2), with the variants that later models brought."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from tfm.attention.attend import attend
from tfm.attention.masks import AttentionMask
from tfm.config import TransformerConfig
from tfm.models.dropout import dropout
from tfm.models.linear import flat_dot_general
from tfm.models.norms import make_norm
from tfm.models.positions import rope
from tfm.models.tap import Tap
from tfm.parallel.rules import constrain

HEADED = 'batch', 'length', 'heads', 'head_width'


@struct.dataclass
class KeysValues:
  """Projected keys and values, of a memory or of the tokens so far."""

  keys_BxSxKxC: jax.Array
  values_BxSxKxC: jax.Array

  @property
  def cached(self) -> CachedKeysValues:
    return CachedKeysValues(jnp.swapaxes(self.keys_BxSxKxC, 1, 2), jnp.swapaxes(self.values_BxSxKxC, 1, 2))


@struct.dataclass
class CachedKeysValues:
  """The same as decoding keeps it: heads first, as products of matrices want it. Tokens first, every step would
  transpose all that was read so far (a quarter of a step on a CPU, 64 sentences)."""

  keys_BxKxSxC: jax.Array
  values_BxKxSxC: jax.Array

  @property
  def by_token(self) -> KeysValues:
    return KeysValues(jnp.swapaxes(self.keys_BxKxSxC, 1, 2), jnp.swapaxes(self.values_BxKxSxC, 1, 2))


class MultiHeadAttention(nn.Module):
  """Concat(head_1, ..., head_H) W^O with head_i = Attention(x W_i^Q, y W_i^K, y W_i^V); no biases, as in the paper.

  Positions are an argument where they act inside attention (rope), and not elsewhere: cross-attention has none.
  """

  config: TransformerConfig

  def setup(self):
    c = self.config
    xavier = nn.initializers.xavier_uniform()  # Glorot & Bengio 2010, over the flattened input x output matrix

    def heads(count, width, kernel_init=xavier):
      return nn.DenseGeneral((count, width), use_bias=c.biases in ('qkv', 'all'), dtype=c.dtype,
                             kernel_init=kernel_init, dot_general=flat_dot_general)

    # Scores begin at the usual size whatever their factor is, as in T5, whose queries are that much smaller.
    usual = 1.0 if c.attention_scale is None else 1.0 / (c.attention_scale**2 * c.key_width)
    self.query = heads(c.num_heads, c.key_width,
                       xavier if usual == 1.0 else nn.initializers.variance_scaling(usual, 'fan_avg', 'uniform'))
    self.key, self.value = heads(c.key_heads, c.key_width), heads(c.key_heads, c.value_width)
    self.output = nn.DenseGeneral(c.d_model, axis=(-2, -1), use_bias=c.biases == 'all', dtype=c.dtype,
                                  kernel_init=xavier, dot_general=flat_dot_general)
    if c.qk_norm:
      self.query_norm, self.key_norm = make_norm(c), make_norm(c)
    if c.attention_sinks:
      self.sinks_H = self.param('sinks', nn.initializers.zeros_init(), (c.num_heads,))
    self.scores, self.pattern, self.z = Tap(), Tap(), Tap()

  def __call__(self, x_BxTxD, y_BxSxD, mask: AttentionMask, dropout_key=None, positions=None, bias=None):
    """Queries from x, keys and values from y: self-attention if they are the same, else cross-attention. BxTxD.

    Args:
      positions: int32, T or BxT, of the tokens of self-attention, for rope.
      bias: added to the scores, broadcastable to BxHxTxS.
    """
    # Initialisation wants shapes, of a length that no kernel was made for.
    backend = 'reference' if self.is_initializing() else self.config.attention_backend
    return self.attend(x_BxTxD, self.keys_values(y_BxSxD, positions), mask, dropout_key, positions, bias,
                       backend=backend)

  @property
  def reads_pattern(self) -> bool:
    """Whether somebody asked to see or to replace what only a kernel that holds the pattern can show."""
    return self.is_mutable_collection('intermediates') or any(
        self.has_variable('taps', name) for name in ('scores', 'pattern'))

  def keys_values(self, y_BxSxD, positions=None) -> KeysValues:
    keys, values = (constrain(project(y_BxSxD), *HEADED) for project in (self.key, self.value))
    return KeysValues(self._placed(keys, 'key', positions), values)

  def attend(self, x_RxTxD, source: KeysValues, mask: AttentionMask, dropout_key=None, positions=None, bias=None, *,
             backend='auto'):
    """Attention to keys that exist already; x may hold several rows (beams) for each row of the source."""
    R, T, _ = x_RxTxD.shape
    B, c = source.keys_BxSxKxC.shape[0], self.config
    q_RxTxHxC = self._placed(constrain(self.query(x_RxTxD), *HEADED), 'query', positions)
    # The beams of a sentence become queries of one row: its keys are stored and read once, not M times.
    q_BxTxHxC = q_RxTxHxC.reshape(B, R // B * T, c.num_heads, -1)
    drops = dropout_key is not None and c.attention_dropout > 0
    z_BxTxHxC = attend(
        q_BxTxHxC, source.keys_BxSxKxC, source.values_BxSxKxC, mask, bias=bias, scale=c.attention_scale,
        softcap=c.attention_softcap, sinks_H=self.sinks_H if c.attention_sinks else None, backend=backend,
        dropout=(lambda pattern: dropout(pattern, c.attention_dropout, dropout_key)) if drops else None,
        tap=lambda name, value: getattr(self, name)(value), needs_pattern=self.reads_pattern)
    return self.output(z_BxTxHxC.reshape(R, T, c.num_heads, -1))

  def extend(self, x_RxTxD, past: CachedKeysValues, index, mask: AttentionMask, positions=None,
             bias=None) -> tuple[jax.Array, CachedKeysValues]:
    """Self-attention of T new tokens after `index` cached ones; `past` has room for them."""
    new = self.keys_values(x_RxTxD, positions).cached
    past = jax.tree.map(lambda old, now: jax.lax.dynamic_update_slice_in_dim(old, now, index, axis=2), past, new)
    return self.attend(x_RxTxD, past.by_token, mask, positions=positions, bias=bias), past

  def _placed(self, heads_BxTxHxC, name, positions):
    """Queries or keys, normed and turned to their positions, where the config says so."""
    c = self.config
    if c.qk_norm:
      heads_BxTxHxC = getattr(self, f'{name}_norm')(heads_BxTxHxC)
    if positions is None or c.positions != 'rope':
      return heads_BxTxHxC
    return rope(heads_BxTxHxC, positions, base=c.rope_base, scaling=c.rope_scaling, factor=c.rope_factor,
                original_length=c.rope_original_length)
