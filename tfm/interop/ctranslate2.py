"""To CTranslate2, an inference engine in C++ with int8 (https://github.com/OpenNMT/CTranslate2).

The folder holds model.bin, config.json and vocabularies as CTranslate2 wants them, our tokenizer/, and, for `bpe` and
`unigram`, a tokenizer.json that the `tokenizers` library reads by itself (docs/export.md).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tfm.config import TransformerConfig
from tfm.errors import UserError
from tfm.interop.plain_tokenizer import vocabulary, write_plain_tokenizers
from tfm.interop.release import Release, new_folder, require_transformer
from tfm.models.layout import to_layout
from tfm.models.positions import sinusoidal
from tfm.special_ids import OURS, UNK

Quantization = Literal['int8', 'int8_float32', 'int8_float16', 'int16', 'float16', 'float32']

MOST_POSITIONS = 2048
"""Rows of the position table where the model has no limit of its own."""
NEVER = -1e4
"""Output bias of <pad> and <s>: as probability 0, and still a number in float16."""

ACTIVATIONS = {'relu': 'RELU', 'gelu': 'GELU', 'gelu_tanh': 'GELUTanh', 'silu': 'SWISH', 'swiglu': 'SWISH',
               'geglu': 'GELU', 'geglu_tanh': 'GELUTanh'}


class CTranslate2Error(UserError):
  """A model that CTranslate2 cannot run; the message names the fields."""


def write_ctranslate2(release: Release, folder: str | os.PathLike[str],
                      quantization: Quantization | None = None) -> Path:
  """Write a new folder that `ctranslate2.Translator` (decoder-only: `Generator`) opens.

  Args:
    release: weights and tokenizers; the special ids must be those of our tokenizers.
    folder: to write.
    quantization: of the weights on disk; None is float32.

  Raises:
    CTranslate2Error: the model has a part that CTranslate2 has not.
    ModuleNotFoundError: ctranslate2 is missing; it comes with the extra `ctranslate2`.
  """
  require_supported(release.config.model)
  if not _is_ours(release):
    raise CTranslate2Error("The model does not have tfm's own tokenizers; convert it with CTranslate2's converters.")
  spec = build_spec(release)
  spec.validate()
  spec.optimize(quantization)
  with new_folder(folder) as building:
    spec.save(str(building))
    (building / 'tokenizer').mkdir()
    release.tokenizers.save(building / 'tokenizer')
    write_plain_tokenizers(release.tokenizers, building)
  return Path(folder)


def require_supported(config: TransformerConfig) -> None:
  """Raise `CTranslate2Error` with every field that CTranslate2 has nothing for."""
  require_transformer(config, CTranslate2Error, 'CTranslate2')
  c = config
  has = {
      'encoder-only (decoder_layers=0)': c.shape == 'encoder_only',
      f'd_k {c.key_width} beside d_v {c.value_width}': c.key_width != c.value_width,
      f"rope_scaling='{c.rope_scaling}'": c.rope_scaling in ('llama3', 'yarn'),
      f'window={c.window}': c.window is not None,
      f'attention_softcap={c.attention_softcap}': c.attention_softcap is not None,
      'attention_sinks=True': c.attention_sinks,
      f'experts={c.experts}': c.experts > 0,
      f"convolution='{c.convolution}'": c.convolution != 'none',
      'qk_norm=True with an encoder': c.qk_norm and c.encoder_layers > 0,
      "positions='alibi' with an encoder": c.positions == 'alibi' and c.encoder_layers > 0,
      "positions='relative' without an encoder": c.positions == 'relative' and c.encoder_layers == 0,
  }
  refused = [field for field, is_set in has.items() if is_set]
  if refused:
    raise CTranslate2Error(f'CTranslate2 cannot run a model with {", ".join(refused)}; export it to safetensors or '
                           'stablehlo.')


def _is_ours(release: Release) -> bool:
  pair, special = release.tokenizers, release.special
  if release.config.model.shape == 'decoder_only':  # how a prompt begins is said by who calls the engine
    special = dataclasses.replace(special, source_prefix=OURS.source_prefix, source_suffix=OURS.source_suffix)
  return pair is not None and special == OURS and release.vocab_sizes == (pair.source.vocab_size,
                                                                          pair.target.vocab_size)


def build_spec(release: Release):
  """CTranslate2's own description of the model, weights included."""
  specs = _library()
  params, c = to_layout(release.params, 'unrolled'), release.config.model
  both = c.shape == 'encoder_decoder'
  decoder = specs.TransformerDecoderSpec(
      c.decoder_layers, c.num_heads, with_encoder_attention=both, alibi=c.positions == 'alibi',
      external_pre_post_encoder_layers=both and c.norm == 'sandwich', **_common(specs, c))
  _fill_stack(decoder, params, c, 'target', 'decoder')
  _fill_embedding(decoder.embeddings, params['target_embedding'], release.vocab_sizes[1])
  _fill_output(decoder, params, c, release.vocab_sizes[1])
  words = vocabulary(release.tokenizers.target)
  if both:
    encoder = specs.TransformerEncoderSpec(c.encoder_layers, c.num_heads, **_common(specs, c))
    _fill_stack(encoder, params, c, 'source', 'encoder')
    name = 'target_embedding' if c.tying in ('inputs', 'all') else 'source_embedding'
    _fill_embedding(encoder.embeddings[0], params[name], release.vocab_sizes[0])
    spec = specs.TransformerSpec(encoder, decoder)
    spec.register_source_vocabulary(vocabulary(release.tokenizers.source))
    spec.register_target_vocabulary(words)
    spec.config.add_source_eos = True
    spec.config.decoder_start_token = words[OURS.start]
  else:
    spec = specs.TransformerDecoderModelSpec(decoder)
    spec.register_vocabulary(words)
  for name, id_ in (('bos', OURS.start), ('eos', OURS.ends[0]), ('unk', UNK)):
    setattr(spec.config, f'{name}_token', words[id_])
  spec.config.layer_norm_epsilon = c.norm_epsilon
  return spec


def _library():
  try:
    from ctranslate2.specs import transformer_spec
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError("The export needs CTranslate2: pip install 'tfm[ctranslate2]'.") from error
  return transformer_spec


def _common(specs, c: TransformerConfig) -> dict[str, Any]:
  """Arguments of both stacks."""
  rope = {}
  if c.positions == 'rope':
    rope = dict(rotary_dim=0, rotary_interleave=False, rotary_base=c.rope_base)  # 0: the whole width
    if c.rope_scaling == 'linear':
      linear = specs.attention_spec.RotaryScalingType.Linear
      rope |= dict(rotary_scaling_type=linear, rotary_scaling_factor=c.rope_factor)
  return dict(
      pre_norm=c.norm != 'post', activation=getattr(specs.common_spec.Activation, ACTIVATIONS[c.feed_forward]),
      layernorm_embedding=c.embedding_norm, ffn_glu=c.gated, rms_norm=c.norm_type == 'rms',
      num_heads_kv=None if c.key_heads == c.num_heads else c.key_heads, head_dim=c.key_width, qk_norm=c.qk_norm,
      pre_post_layer_norm=c.norm == 'sandwich', relative_attention_bias=c.positions == 'relative', **rope)


def _fill_stack(spec, params, c: TransformerConfig, side: str, stack: str) -> None:
  spec.scale_embeddings = c.scale_embeddings
  if c.positions not in ('rope', 'alibi', 'relative'):
    spec.position_encodings.encodings = _positions(params, c, side)
  if c.embedding_norm:
    _fill_norm(spec.layernorm_embedding, params[f'{side}_embedding_norm'])
  if c.norm != 'post':
    _fill_norm(spec.layer_norm, params[f'{stack}_norm'])
  for i, layer in enumerate(spec.layer):
    ours = params[stack][f'layers_{i}']
    _fill_attention(layer.self_attention, ours['self_attention'], c, fused='self')
    if c.positions == 'relative':
      layer.self_attention.relative_attention_bias = _copy(params[stack]['relative_bias']['table'])
      layer.self_attention.relative_attention_max_distance = np.int32(c.relative_max_distance)
    if 'cross_attention' in ours:
      _fill_attention(layer.attention, ours['cross_attention'], c, fused='cross')
    _fill_linear(layer.ffn.linear_0, ours['mlp']['gate' if c.gated else 'inner'])
    if c.gated:
      _fill_linear(layer.ffn.linear_0_noact, ours['mlp']['inner'])
    _fill_linear(layer.ffn.linear_1, ours['mlp']['outer'])
    _fill_layer_norms(layer, ours, c)


def _fill_layer_norms(layer, ours, c: TransformerConfig) -> None:
  if c.norm != 'sandwich':
    _fill_norm(layer.self_attention.layer_norm, ours['self_attention_norm'])
    _fill_norm(layer.ffn.layer_norm, ours['mlp_norm'])
    if 'cross_attention' in ours:
      _fill_norm(layer.attention.layer_norm, ours['cross_attention_norm'])
    return
  _fill_norm(layer.input_layer_norm, ours['self_attention_norm'])
  _fill_norm(layer.post_attention_layer_norm, ours['self_attention_post_norm'])
  _fill_norm(layer.pre_feedforward_layer_norm, ours['mlp_norm'])
  _fill_norm(layer.post_feedforward_layer_norm, ours['mlp_post_norm'])
  if 'cross_attention' in ours:
    _fill_norm(layer.external_pre_encoder_attention_layer_norm, ours['cross_attention_norm'])
    _fill_norm(layer.external_post_encoder_attention_layer_norm, ours['cross_attention_post_norm'])


def _fill_attention(spec, ours, c: TransformerConfig, fused: Literal['self', 'cross']) -> None:
  """Heads flattened, and those that read the same states in one matrix: q, k, v, or k, v in cross-attention."""
  groups = [['query', 'key', 'value']] if fused == 'self' else [['query'], ['key', 'value']]
  for linear, names in zip(spec.linear, groups):
    linear.weight = np.concatenate([_copy(ours[name]['kernel']).reshape(c.d_model, -1).T for name in names])
    if 'bias' in ours['query']:
      linear.bias = np.concatenate([_copy(ours[name]['bias']).reshape(-1) for name in names])
  output = {name: _copy(leaf) for name, leaf in ours['output'].items()}
  _fill_linear(spec.linear[-1], {**output, 'kernel': output['kernel'].reshape(-1, c.d_model)})
  if c.attention_scale is not None:
    spec.queries_scale = np.float32(c.attention_scale)
  if c.qk_norm:
    spec.q_norm, spec.k_norm = (type(spec.q_norm)(rms_norm=c.norm_type == 'rms') for _ in range(2))
    _fill_norm(spec.q_norm, ours['query_norm'])
    _fill_norm(spec.k_norm, ours['key_norm'])


def _fill_output(spec, params, c: TransformerConfig, vocab_size: int) -> None:
  table = params['output' if c.tying in ('none', 'inputs') else 'target_embedding']['table']
  spec.projection.weight = _copy(table)[:vocab_size]
  bias = _copy(params['output_bias'])[:vocab_size] if c.output_bias else np.zeros(vocab_size, np.float32)
  if c.logit_softcap is None:
    bias[list(OURS.forbidden)] = NEVER
  else:
    spec.final_logit_softcapping = np.float32(c.logit_softcap)  # after the bias, which therefore cannot forbid
  spec.projection.bias = bias
  if c.scale_output:
    spec.scale_outputs = np.float32(c.d_model**-0.5)


def _fill_embedding(spec, ours, vocab_size: int) -> None:
  spec.weight = _copy(ours['table'])[:vocab_size]


def _fill_linear(spec, ours) -> None:
  spec.weight = np.ascontiguousarray(_copy(ours['kernel']).T)
  if 'bias' in ours:
    spec.bias = _copy(ours['bias'])


def _fill_norm(spec, ours) -> None:
  spec.gamma = _copy(ours['scale'])
  if hasattr(spec, 'beta'):
    spec.beta = _copy(ours['bias']) if 'bias' in ours else np.zeros_like(spec.gamma)


def _positions(params, c: TransformerConfig, side: str) -> np.ndarray:
  if c.positions == 'learned':
    return _copy(params[f'{side}_positions']['table'])[c.position_offset:]
  if c.positions == 'none':
    return np.zeros((MOST_POSITIONS, c.d_model), np.float32)
  return _copy(sinusoidal(np.arange(MOST_POSITIONS), c.d_model, halves=c.positions == 'sinusoidal_halves'))


def _copy(leaf) -> np.ndarray:
  return np.array(leaf, np.float32)  # quantization works in place
