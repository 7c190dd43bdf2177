"""Llama and its kin in Hugging Face: Mistral, Qwen 2, Qwen 3 (see tfm/interop/huggingface_families.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfm.config import TransformerConfig
from tfm.interop.huggingface_config import (
  GATES,
  MOST_POSITIONS,
  THEIR_ACTIVATION,
  Fields,
  HuggingFaceError,
  attention,
  pad_id,
)

Tensors = Mapping[str, np.ndarray]

LLAMA = {
    'target_embedding': 'model.embed_tokens', 'output': 'lm_head', 'decoder_norm': 'model.norm',
    **attention('decoder/layers_{i}/self_attention', 'model.layers.{i}.self_attn',
                 ('q_proj', 'k_proj', 'v_proj', 'o_proj')),
    'decoder/layers_{i}/self_attention/query_norm': 'model.layers.{i}.self_attn.q_norm',
    'decoder/layers_{i}/self_attention/key_norm': 'model.layers.{i}.self_attn.k_norm',
    'decoder/layers_{i}/self_attention_norm': 'model.layers.{i}.input_layernorm',
    'decoder/layers_{i}/mlp/gate': 'model.layers.{i}.mlp.gate_proj',
    'decoder/layers_{i}/mlp/inner': 'model.layers.{i}.mlp.up_proj',
    'decoder/layers_{i}/mlp/outer': 'model.layers.{i}.mlp.down_proj',
    'decoder/layers_{i}/mlp_norm': 'model.layers.{i}.post_attention_layernorm'}

_ROPE_CONSTANTS: dict[str, dict[str, tuple]] = {
    'default': {}, 'linear': {},
    'llama3': {'low_freq_factor': (1,), 'high_freq_factor': (4,)},
    'yarn': {'beta_fast': (32, None), 'beta_slow': (1, None), 'truncate': (True,), 'mscale': (None, 0),
             'mscale_all_dim': (None, 0)}}
"""What `rope_parameters` may say beside the factor: the values that tfm.models.positions has, the first by default."""


def _read_rope(f: Fields) -> dict[str, Any]:
  new, old = f('rope_parameters', None), f('rope_scaling', None)
  rope = Fields(old or new or {}, 'rope_parameters in config.json')
  base = rope('rope_theta', f('rope_theta', 10000.0))
  f.only('partial_rotary_factor', 1.0, None), rope.only('partial_rotary_factor', 1.0, None)
  kind = rope.only('rope_type' if 'rope_type' in rope.values else 'type', *_ROPE_CONSTANTS)
  rope('type', None)
  for name, allowed in _ROPE_CONSTANTS[kind].items():
    rope.only(name, *allowed)
  fields = {'positions': 'rope', 'rope_base': float(base)}
  if kind != 'default':
    fields |= {'rope_scaling': kind, 'rope_factor': float(rope('factor'))}
  if kind in ('llama3', 'yarn'):
    fields['rope_original_length'] = rope('original_max_position_embeddings', None) or f('max_position_embeddings')
  if kind == 'yarn' and rope('attention_factor', None) is not None:
    if not math.isclose(rope('attention_factor'), 0.1 * math.log(fields['rope_factor']) + 1):
      rope.only('attention_factor', None)
  if rope.unread():
    raise HuggingFaceError(f"rope_parameters in config.json has {', '.join(rope.unread())}, which tfm does not know "
                           f"for rope_type '{kind}'.")
  return fields


def _write_rope(c: TransformerConfig) -> dict[str, Any]:
  kind = 'default' if c.rope_scaling == 'none' else c.rope_scaling
  rope = {'rope_type': kind, 'rope_theta': c.rope_base}
  rope |= {name: allowed[0] for name, allowed in _ROPE_CONSTANTS[kind].items() if allowed[0] is not None}
  if kind != 'default':
    rope['factor'] = c.rope_factor
  if c.rope_original_length is not None:
    rope['original_max_position_embeddings'] = c.rope_original_length
  return {'rope_parameters': rope,
          'max_position_embeddings': int((c.rope_original_length or MOST_POSITIONS) * c.rope_factor)}


def _read_llama_like(f: Fields, biases: str = 'none', window: int | None = None, kv_heads: int | None = None,
                     head_dim: int | None = None, qk_norm: bool = False) -> TransformerConfig:
  width = f('head_dim', head_dim)
  return TransformerConfig(
      encoder_layers=0, decoder_layers=f('num_hidden_layers'), d_model=f('hidden_size'), d_ff=f('intermediate_size'),
      num_heads=f('num_attention_heads'), num_kv_heads=f('num_key_value_heads', kv_heads), d_k=width, d_v=width,
      norm='pre', norm_type='rms', norm_epsilon=f('rms_norm_eps', 1e-6), qk_norm=qk_norm,
      feed_forward=f.named('hidden_act', GATES, 'silu'), biases=biases, window=window,
      tying='all' if f('tie_word_embeddings', False) else 'none', scale_embeddings=False, dropout=0.0,
      attention_dropout=f('attention_dropout', 0.0), pad_id=pad_id(f), **_read_rope(f))


def read_llama(f: Fields, tensors: Tensors) -> TransformerConfig:
  f('pretraining_tp', 1)  # how the products are cut up, not what they are
  biases = {(False, False): 'none', (False, True): 'mlp', (True, True): 'all'}
  kind = bool(f('attention_bias', False)), bool(f('mlp_bias', False))
  if kind not in biases:
    raise HuggingFaceError('config.json has attention_bias=True and mlp_bias=False; the Transformer of tfm has biases '
                           'on the output of attention only if the feed-forward network has them too.')
  return _read_llama_like(f, biases[kind])


def read_mistral(f: Fields, tensors: Tensors) -> TransformerConfig:
  return _read_llama_like(f, window=f('sliding_window', 4096), kv_heads=8)


def read_qwen2(f: Fields, tensors: Tensors) -> TransformerConfig:
  f.only('use_mrope', False)
  return _read_llama_like(f, 'qkv', _window(f), kv_heads=32)


def read_qwen3(f: Fields, tensors: Tensors) -> TransformerConfig:
  f.only('attention_bias', False)
  return _read_llama_like(f, 'none', _window(f), kv_heads=32, head_dim=128, qk_norm=True)


def _window(f: Fields) -> int | None:
  width, first, count = f('sliding_window', 4096), f('max_window_layers', 28), f('num_hidden_layers')
  used = f('use_sliding_window', False) and width is not None
  default = ['sliding_attention' if used and i >= first else 'full_attention' for i in range(count)]
  kinds = set(f('layer_types', None) or default)
  if len(kinds) > 1:
    raise HuggingFaceError(f'config.json has layer_types with {" and ".join(sorted(kinds))}; the layers of a '
                           'Transformer of tfm are all alike.')
  return width if kinds == {'sliding_attention'} else None


def _write_llama_like(c: TransformerConfig, name: str) -> dict[str, Any]:
  return {
      'architectures': [f'{name}ForCausalLM'], 'num_hidden_layers': c.decoder_layers, 'hidden_size': c.d_model,
      'intermediate_size': c.d_ff, 'num_attention_heads': c.num_heads, 'num_key_value_heads': c.key_heads,
      'head_dim': c.key_width, 'rms_norm_eps': c.norm_epsilon,
      'hidden_act': THEIR_ACTIVATION[c.feed_forward] if c.gated else 'silu',
      'tie_word_embeddings': c.tying != 'none', 'attention_dropout': c.attention_dropout, **_write_rope(c)}


def write_llama(c: TransformerConfig) -> dict[str, Any]:
  return {**_write_llama_like(c, 'Llama'), 'attention_bias': c.biases == 'all', 'mlp_bias': c.biases in ('mlp', 'all')}


def write_mistral(c: TransformerConfig) -> dict[str, Any]:
  return {**_write_llama_like(c, 'Mistral'), 'sliding_window': c.window}


def write_qwen(c: TransformerConfig, name: str) -> dict[str, Any]:
  kind = 'full_attention' if c.window is None else 'sliding_attention'
  return {**_write_llama_like(c, name), 'use_sliding_window': c.window is not None, 'sliding_window': c.window,
          'max_window_layers': 0, 'layer_types': [kind] * c.decoder_layers}
