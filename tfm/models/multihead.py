"""Multi-head attention (Vaswani et al. 2017, section 3.2.2)."""

from __future__ import annotations

import flax.linen as nn
import jax
from flax import struct

from tfm.attention.attend import attend
from tfm.attention.masks import AttentionMask, causal
from tfm.config import TransformerConfig
from tfm.models.dropout import dropout
from tfm.models.tap import Tap
from tfm.parallel.rules import constrain

HEADED = 'batch', 'length', 'heads', 'head_width'


@struct.dataclass
class KeysValues:
  """Projected keys and values, of a memory or of the tokens so far. K is H here."""

  keys_BxSxHxC: jax.Array
  values_BxSxHxC: jax.Array


class MultiHeadAttention(nn.Module):
  """Concat(head_1, ..., head_H) W^O with head_i = Attention(x W_i^Q, y W_i^K, y W_i^V); no biases, as in the paper."""

  config: TransformerConfig

  def setup(self):
    c = self.config

    xavier = nn.initializers.xavier_uniform()  # Glorot & Bengio 2010, over the flattened input x output matrix

    def heads(width):
      return nn.DenseGeneral((c.num_heads, width), use_bias=False, dtype=c.dtype, kernel_init=xavier)

    self.query, self.key, self.value = heads(c.key_width), heads(c.key_width), heads(c.value_width)
    self.output = nn.DenseGeneral(c.d_model, axis=(-2, -1), use_bias=False, dtype=c.dtype, kernel_init=xavier)
    self.scores, self.pattern, self.z = Tap(), Tap(), Tap()

  def __call__(self, x_BxTxD, y_BxSxD, mask: AttentionMask, dropout_key=None):
    """Queries from x, keys and values from y: self-attention if they are the same, else cross-attention. BxTxD."""
    # Initialisation wants shapes, of a length that no kernel was made for.
    backend = 'reference' if self.is_initializing() else self.config.attention_backend
    return self.attend(x_BxTxD, self.keys_values(y_BxSxD), mask, dropout_key, backend=backend)

  @property
  def reads_pattern(self) -> bool:
    """Whether somebody asked to see or to replace what only a kernel that holds the pattern can show."""
    return self.is_mutable_collection('intermediates') or any(
        self.has_variable('taps', name) for name in ('scores', 'pattern'))

  def keys_values(self, y_BxSxD) -> KeysValues:
    return KeysValues(*(constrain(project(y_BxSxD), *HEADED) for project in (self.key, self.value)))

  def attend(self, x_RxTxD, source: KeysValues, mask: AttentionMask, dropout_key=None, *, backend='auto'):
    """Attention to keys that exist already; x may hold several rows (beams) for each row of the source."""
    R, T, D = x_RxTxD.shape
    B, c = source.keys_BxSxHxC.shape[0], self.config
    # The beams of a sentence become queries of one row: its keys are stored and read once, not M times.
    q_BxTxHxC = constrain(self.query(x_RxTxD), *HEADED).reshape(B, R // B * T, c.num_heads, -1)
    drops = dropout_key is not None and c.attention_dropout > 0
    z_BxTxHxC = attend(
        q_BxTxHxC, source.keys_BxSxHxC, source.values_BxSxHxC, mask, backend=backend,
        dropout=(lambda pattern: dropout(pattern, c.attention_dropout, dropout_key)) if drops else None,
        tap=lambda name, value: getattr(self, name)(value), needs_pattern=self.reads_pattern)
    return self.output(z_BxTxHxC).reshape(R, T, D)

  def extend(self, x_RxTxD, past: KeysValues, index) -> tuple[jax.Array, KeysValues]:
    """Causal self-attention of T new tokens at positions index ... index + T - 1; `past` has room for them."""
    new = self.keys_values(x_RxTxD)
    past = jax.tree.map(lambda old, now: jax.lax.dynamic_update_slice_in_dim(old, now, index, axis=1), past, new)
    return self.attend(x_RxTxD, past, causal(offset=index)), past
