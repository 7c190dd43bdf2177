"""N layers in a row, unrolled or scanned; `tfm.models.layout` converts the parameters of one into the other's."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import DenyList

from tfm.attention.masks import AttentionMask, causal, window
from tfm.config import TransformerConfig
from tfm.models.conformer import ConformerLayer, ConvolutionLayer
from tfm.models.layers import DecoderLayer, EncoderLayer, Tokens, split
from tfm.models.positions import RelativeBias, alibi, alibi_slopes
from tfm.models.traced_once import traced_once

REMAT_POLICIES = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _with_remat(layer: type[nn.Module], config: TransformerConfig) -> type[nn.Module]:
  if config.remat == 'none':
    return layer
  # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
  return nn.remat(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers, methods=['__call__'])


def _scanned(layer: type[nn.Module], length: int, broadcast: int, methods: dict[str, dict] | None = None):
  """`layer` looped over stacked parameters: (carry, one value per layer..., `broadcast` values for all)."""
  common = dict(
      # Every collection but the parameters passes too (taps, losses): nn.scan drops silently what is not named.
      variable_axes={'params': 0, DenyList(('params',)): 0},
      split_rngs={'params': True},
      length=length,
      metadata_params={nn.PARTITION_NAME: 'layers'},
  )
  every = {'__call__': dict(in_axes=(0,) + (nn.broadcast,) * broadcast), **(methods or {})}
  return nn.scan(layer, methods={name: {**common, **axes} for name, axes in every.items()})


class Stack(nn.Module):
  """What both stacks have in common: the positions that act inside self-attention."""

  config: TransformerConfig

  bidirectional = False

  def setup(self):
    if self.config.positions == 'relative':
      self.relative_bias = RelativeBias(self.config.relative_buckets, self.config.relative_max_distance,
                                        self.config.num_heads)

  def tokens(self, mask: AttentionMask, T: int, S: int, positions, real_BxT, offset=None) -> Tokens:
    """What the layers are told; `offset` is the position of the first of T queries among S keys (None: 0)."""
    c, bias, first = self.config, None, 0 if offset is None else offset
    if c.window is not None:
      mask = mask & window(c.window, offset)
    if c.positions == 'alibi':
      bias = alibi(alibi_slopes(c.num_heads), T, S, first)
    elif c.positions == 'relative':
      bias = self.relative_bias(T, S, first, bidirectional=self.bidirectional)
    counted = c.experts or (self.bidirectional and c.convolution != 'none')
    return Tokens(mask, positions if c.positions == 'rope' else None, bias, real_BxT if counted else None)


def _not_padding(mask: AttentionMask, B: int, S: int) -> jax.Array:
  """bool BxS: what the mask of an encoder says of its tokens; a convolution can obey nothing else of it."""
  if mask.causal or mask.window or mask.query_segments_BxT is not None or mask.dense is not None:
    raise ValueError('A convolution mixes neighbours whatever a causal, window, segment or dense mask forbids; give '
                     "`encode` a mask of lengths, or a model with convolution='none'.")
  if mask.lengths_B is None:
    return jnp.ones((B, S), bool)
  return jnp.arange(S) < mask.lengths_B[:, None]


class EncoderStack(Stack):
  """The encoder's layers."""

  bidirectional = True

  def setup(self):
    super().setup()
    c = self.config
    kind = {'none': EncoderLayer, 'conformer': ConformerLayer}.get(c.convolution, ConvolutionLayer)
    layer = _with_remat(kind, c)
    if c.scan_layers:
      self.layers = _scanned(layer, c.encoder_layers, broadcast=1)(c)
    else:
      self.layers = [layer(c) for _ in range(c.encoder_layers)]

  def __call__(self, x_BxSxD, mask: AttentionMask, positions, real_BxS=None, dropout_key=None):
    c, (B, S, _) = self.config, x_BxSxD.shape
    if c.convolution != 'none':
      real_BxS = _not_padding(mask, B, S)
    keys, tokens = split(dropout_key, c.encoder_layers), self.tokens(mask, S, S, positions, real_BxS)
    if c.scan_layers:
      return self.layers(x_BxSxD, _stack(keys), tokens)[0]
    for layer, key in zip(self.layers, keys):
      x_BxSxD, _ = traced_once(layer, '__call__', x_BxSxD, key, tokens)
    return x_BxSxD


class DecoderStack(Stack):
  """The decoder's layers: all positions at once, or step by step with a cache. Without an encoder memory is None."""

  def setup(self):
    super().setup()
    c = self.config
    layer = _with_remat(DecoderLayer, c)
    if c.scan_layers:
      # A cache holds rows first (they are reordered in beam search) and layers second.
      self.layers = _scanned(layer, c.decoder_layers, broadcast=3, methods={
          'memory_keys_values': dict(in_axes=(nn.broadcast,), out_axes=1),
          'step': dict(in_axes=(1, 1, nn.broadcast, nn.broadcast, nn.broadcast), out_axes=1),
      })(c)
    else:
      self.layers = [layer(c) for _ in range(c.decoder_layers)]

  def __call__(self, x_BxTxD, memory_BxSxD, mask: AttentionMask, cross_mask, positions, real_BxT=None,
               dropout_key=None):
    c, T = self.config, x_BxTxD.shape[1]
    keys, tokens = split(dropout_key, c.decoder_layers), self.tokens(mask, T, T, positions, real_BxT)
    if c.scan_layers:
      return self.layers(x_BxTxD, _stack(keys), memory_BxSxD, tokens, cross_mask)[0]
    for layer, key in zip(self.layers, keys):
      x_BxTxD, _ = traced_once(layer, '__call__', x_BxTxD, key, memory_BxSxD, tokens, cross_mask)
    return x_BxTxD

  def memory_keys_values(self, memory_BxSxD):
    """Of every layer: a tuple of layers, or stacked along axis 1; None where there is no encoder."""
    if self.config.encoder_layers == 0:
      return None if self.config.scan_layers else (None,) * self.config.decoder_layers
    if self.config.scan_layers:
      return self.layers.memory_keys_values(None, memory_BxSxD)[1]
    return tuple(layer.memory_keys_values(None, memory_BxSxD)[1] for layer in self.layers)

  def step(self, x_RxTxD, past, memory, index, positions, cross_mask):
    T, S = x_RxTxD.shape[1], jax.tree.leaves(past)[0].shape[-2]  # RxKxSxC
    tokens = self.tokens(causal(offset=index), T, S, positions, None, index)
    if self.config.scan_layers:
      return self.layers.step(x_RxTxD, past, memory, index, tokens, cross_mask)
    grown = []
    for layer, layer_past, layer_memory in zip(self.layers, past, memory):
      x_RxTxD, layer_past = traced_once(layer, 'step', x_RxTxD, layer_past, layer_memory, index, tokens, cross_mask)
      grown.append(layer_past)
    return x_RxTxD, tuple(grown)


def _stack(keys):
  return None if keys[0] is None else jnp.stack(keys)
