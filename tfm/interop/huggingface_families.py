"""The families of Hugging Face that our Transformer can be: a table of modules each, and the fields of config.json.

A family reads config.json into a `TransformerConfig` and writes one back. What it cannot say is found by doing both:
a field that does not come back as it was has no place there. The name of a parameter follows from its module's: kernel,
scale and table are `weight` over there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from tfm.config import TransformerConfig
from tfm.interop.huggingface_config import (
  ACTIVATIONS,
  GATES,
  MOST_POSITIONS,
  THEIR_ACTIVATION,
  Fields,
  HuggingFaceError,
  attention,
  pad_id,
)
from tfm.interop.huggingface_llama import (
  LLAMA,
  read_llama,
  read_mistral,
  read_qwen2,
  read_qwen3,
  write_llama,
  write_mistral,
  write_qwen,
)

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Family:
  """How a `model_type` spells a Transformer."""

  shape: str
  """`TransformerConfig.shape`."""
  prefix: str
  """Of the names of all but the heads; a file of a model without heads leaves it out."""
  read: Callable[[Fields, Tensors], TransformerConfig]
  """The config; the names of the tensors tell which heads there are."""
  write: Callable[[TransformerConfig], dict[str, Any]]
  """The fields of config.json that `read` reads."""
  modules: Callable[[TransformerConfig], dict[str, str]]
  """Their module of each of ours; {i} is the layer. Ours that share a module lie side by side in it, in this order."""
  ties: Mapping[str, str]
  """Second names of a tensor, and its first."""
  ids: Mapping[str, int]
  """Special ids where config.json names none."""
  framing: tuple[str, str] = ('', '')
  """The special tokens before and behind a source, by their name over there."""
  transposed: bool = True
  """Matrices are out x in (nn.Linear) and not in x out."""
  kept: tuple[str, ...] = ()
  """Patterns of names without a place in our model, that are handed through."""


def _both(stack_modules: Callable[[str, str], dict[str, str]]) -> dict[str, str]:
  return stack_modules('source', 'encoder') | stack_modules('target', 'decoder')


# -- BART and Marian ---------------------------------------------------------------------------------------------------


def _bart_stack(side: str, stack: str) -> dict[str, str]:
  ours, theirs = f'{stack}/layers_{{i}}', f'model.{stack}.layers.{{i}}'
  parts = 'q_proj', 'k_proj', 'v_proj', 'out_proj'
  return {
      f'{side}_positions': f'model.{stack}.embed_positions',
      f'{side}_embedding_norm': f'model.{stack}.layernorm_embedding',
      **attention(f'{ours}/self_attention', f'{theirs}.self_attn', parts),
      f'{ours}/self_attention_norm': f'{theirs}.self_attn_layer_norm',
      **attention(f'{ours}/cross_attention', f'{theirs}.encoder_attn', parts),
      f'{ours}/cross_attention_norm': f'{theirs}.encoder_attn_layer_norm',
      f'{ours}/mlp/inner': f'{theirs}.fc1', f'{ours}/mlp/outer': f'{theirs}.fc2',
      f'{ours}/mlp_norm': f'{theirs}.final_layer_norm'}


_BART = {'target_embedding': 'model.shared', 'output_bias': 'final_logits_bias', **_both(_bart_stack)}
_BART_TIES = {name: 'model.shared.weight' for name in (
    'model.encoder.embed_tokens.weight', 'model.decoder.embed_tokens.weight', 'lm_head.weight')}


def _read_bart(f: Fields, tensors: Tensors) -> TransformerConfig:
  f.only('normalize_embedding', True)
  return _read_bart_like(f, tensors, embedding_norm=True, positions='learned', position_offset=2,
                         max_positions=f('max_position_embeddings') + 2)


def _read_marian(f: Fields, tensors: Tensors) -> TransformerConfig:
  f.only('normalize_embedding', False), f.only('share_encoder_decoder_embeddings', True)
  f.only('decoder_vocab_size', f('vocab_size'), None)
  return _read_bart_like(f, tensors, positions='sinusoidal_halves')


def _read_bart_like(f: Fields, tensors: Tensors, **more) -> TransformerConfig:
  learned = more['positions'] == 'learned'
  f.only('static_position_embeddings', not learned)
  for name in ('normalize_before', 'add_final_layer_norm', 'is_decoder'):
    f.only(name, False)
  f.only('tie_word_embeddings', True)
  return TransformerConfig(
      encoder_layers=f('encoder_layers'), decoder_layers=f('decoder_layers'), d_model=f('d_model'),
      d_ff=f.same('encoder_ffn_dim', 'decoder_ffn_dim'),
      num_heads=f.same('encoder_attention_heads', 'decoder_attention_heads'), norm_epsilon=1e-5, biases='all',
      feed_forward=f.named('activation_function', ACTIVATIONS, 'gelu'), scale_embeddings=f('scale_embedding', False),
      output_bias='final_logits_bias' in tensors, dropout=f('dropout', 0.1),
      attention_dropout=f('attention_dropout', 0.0), activation_dropout=f('activation_dropout', 0.0), pad_id=pad_id(f),
      **more)


def _write_bart_like(c: TransformerConfig) -> dict[str, Any]:
  return {
      'is_encoder_decoder': True, 'tie_word_embeddings': True, 'encoder_layers': c.encoder_layers,
      'decoder_layers': c.decoder_layers, 'd_model': c.d_model, 'encoder_ffn_dim': c.d_ff, 'decoder_ffn_dim': c.d_ff,
      'encoder_attention_heads': c.num_heads, 'decoder_attention_heads': c.num_heads,
      'activation_function': THEIR_ACTIVATION[c.feed_forward], 'scale_embedding': c.scale_embeddings,
      'max_position_embeddings': MOST_POSITIONS if c.max_positions is None else c.max_positions - 2,
      'dropout': c.dropout, 'attention_dropout': c.attention_dropout, 'activation_dropout': c.activation_dropout}


def _write_bart(c: TransformerConfig) -> dict[str, Any]:
  return {**_write_bart_like(c), 'architectures': ['BartForConditionalGeneration']}


def _write_marian(c: TransformerConfig) -> dict[str, Any]:
  return {**_write_bart_like(c), 'architectures': ['MarianMTModel'], 'share_encoder_decoder_embeddings': True}


# -- T5 ----------------------------------------------------------------------------------------------------------------


def _t5_modules(c: TransformerConfig) -> dict[str, str]:
  gated = {'gate': 'wi_0', 'inner': 'wi_1', 'outer': 'wo'}
  feed_forward = gated if c.gated else {'inner': 'wi', 'outer': 'wo'}

  def stack_modules(side, stack):
    ours, theirs, last = f'{stack}/layers_{{i}}', f'{stack}.block.{{i}}.layer', 1 if side == 'source' else 2
    return {
        f'{stack}/relative_bias': f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias',
        f'{stack}_norm': f'{stack}.final_layer_norm',
        **attention(f'{ours}/self_attention', f'{theirs}.0.SelfAttention', 'qkvo'),
        f'{ours}/self_attention_norm': f'{theirs}.0.layer_norm',
        **attention(f'{ours}/cross_attention', f'{theirs}.1.EncDecAttention', 'qkvo'),
        f'{ours}/cross_attention_norm': f'{theirs}.1.layer_norm',
        **{f'{ours}/mlp/{part}': f'{theirs}.{last}.DenseReluDense.{name}' for part, name in feed_forward.items()},
        f'{ours}/mlp_norm': f'{theirs}.{last}.layer_norm'}

  return {'target_embedding': 'shared', 'output': 'lm_head', **_both(stack_modules)}


def _read_t5(f: Fields, tensors: Tensors) -> TransformerConfig:
  f.only('is_decoder', False)
  activations = {**ACTIVATIONS, **{f'gated-{name}': gate for name, gate in GATES.items()}, 'gated-gelu': 'geglu_tanh'}
  feed_forward, kind = f.named('feed_forward_proj', activations, 'relu'), f('feed_forward_proj', 'relu')
  f.only('dense_act_fn', 'gelu_new' if kind == 'gated-gelu' else kind.removeprefix('gated-'))
  f.only('is_gated_act', kind.startswith('gated-'))
  # The output matrix is free where the file has another one; `tie_word_embeddings` says only whether states are scaled.
  head = tensors.get('lm_head.weight')
  tied = head is None or np.array_equal(head, tensors.get('shared.weight'))
  return TransformerConfig(
      encoder_layers=f('num_layers'), decoder_layers=f('num_decoder_layers', None) or f('num_layers'),
      d_model=f('d_model'), d_ff=f('d_ff'), num_heads=f('num_heads'), d_k=f('d_kv'), d_v=f('d_kv'), norm='pre',
      norm_type='rms', norm_epsilon=f('layer_norm_epsilon', 1e-6), positions='relative', biases='none',
      relative_buckets=f('relative_attention_num_buckets', 32),
      relative_max_distance=f('relative_attention_max_distance', 128), attention_scale=1.0,
      feed_forward=feed_forward, tying='all' if tied else 'inputs', scale_embeddings=False,
      scale_output=f('scale_decoder_outputs', f('tie_word_embeddings', True)), dropout=f('dropout_rate', 0.1),
      pad_id=pad_id(f))


def _write_t5(c: TransformerConfig) -> dict[str, Any]:
  act = {'geglu_tanh': 'gated-gelu', 'geglu': None, 'swiglu': 'gated-silu'}
  return {
      'architectures': ['T5ForConditionalGeneration'], 'is_encoder_decoder': True, 'num_layers': c.encoder_layers,
      'num_decoder_layers': c.decoder_layers, 'd_model': c.d_model, 'd_ff': c.d_ff, 'num_heads': c.num_heads,
      'd_kv': c.key_width, 'layer_norm_epsilon': c.norm_epsilon, 'relative_attention_num_buckets': c.relative_buckets,
      'relative_attention_max_distance': c.relative_max_distance,
      'feed_forward_proj': act.get(c.feed_forward, THEIR_ACTIVATION[c.feed_forward]) or 'relu',
      'tie_word_embeddings': c.scale_output, 'scale_decoder_outputs': c.scale_output, 'dropout_rate': c.dropout}


# -- BERT and RoBERTa --------------------------------------------------------------------------------------------------


def _bert_modules(prefix: str) -> dict[str, str]:
  ours, theirs = 'encoder/layers_{i}', f'{prefix}encoder.layer.{{i}}'
  return {
      'source_embedding': f'{prefix}embeddings.word_embeddings',
      'source_positions': f'{prefix}embeddings.position_embeddings',
      'token_types': f'{prefix}embeddings.token_type_embeddings',
      'source_embedding_norm': f'{prefix}embeddings.LayerNorm',
      **attention(f'{ours}/self_attention', f'{theirs}.attention',
                   ('self.query', 'self.key', 'self.value', 'output.dense')),
      f'{ours}/self_attention_norm': f'{theirs}.attention.output.LayerNorm',
      f'{ours}/mlp/inner': f'{theirs}.intermediate.dense', f'{ours}/mlp/outer': f'{theirs}.output.dense',
      f'{ours}/mlp_norm': f'{theirs}.output.LayerNorm', 'pooler': f'{prefix}pooler.dense'}


_BERT = {**_bert_modules('bert.'), 'output': 'cls.predictions.decoder', 'output_bias': 'cls.predictions.bias',
         'output_transform': 'cls.predictions.transform.dense', 'output_norm': 'cls.predictions.transform.LayerNorm',
         'classifier': 'classifier'}
_ROBERTA = {**_bert_modules('roberta.'), 'output': 'lm_head.decoder', 'output_bias': 'lm_head.bias',
            'output_transform': 'lm_head.dense', 'output_norm': 'lm_head.layer_norm'}


def _roberta_modules(c: TransformerConfig) -> dict[str, str]:
  return _ROBERTA | ({'pooler': 'classifier.dense', 'classifier': 'classifier.out_proj'} if c.num_labels else {})


def _read_bert(f: Fields, tensors: Tensors) -> TransformerConfig:
  return _read_bert_like(f, tensors, 'cls.predictions', 'classifier', ['bert.pooler.dense'])


def _read_roberta(f: Fields, tensors: Tensors) -> TransformerConfig:
  pad = f('pad_token_id')
  if pad is None:
    raise HuggingFaceError('config.json has pad_token_id=None; RoBERTa counts positions from it, so give one.')
  if 'lm_head.bias' in tensors:
    f.only('hidden_act', 'gelu', 'gelu_python')  # the head has GELU whatever the layers have
  return _read_bert_like(f, tensors, 'lm_head', 'classifier.out_proj', ['roberta.pooler.dense', 'classifier.dense'],
                         position_offset=pad + 1)


def _read_bert_like(f: Fields, tensors: Tensors, head: str, classifier: str, poolers: list[str],
                    **more) -> TransformerConfig:
  f.only('position_embedding_type', 'absolute', None)
  f.only('is_decoder', False), f.only('add_cross_attention', False)
  masked = f'{head}.bias' in tensors
  labels = tensors.get(f'{classifier}.weight')
  tied = f('tie_word_embeddings', True) or not masked
  return TransformerConfig(
      encoder_layers=f('num_hidden_layers'), decoder_layers=0, d_model=f('hidden_size'), d_ff=f('intermediate_size'),
      num_heads=f('num_attention_heads'), norm_epsilon=f('layer_norm_eps', 1e-12), embedding_norm=True,
      positions='learned', max_positions=f('max_position_embeddings'), biases='all',
      feed_forward=f.named('hidden_act', ACTIVATIONS, 'gelu'), tying='all' if tied else 'none', scale_embeddings=False,
      output_bias=masked, output_transform=masked, token_types=f('type_vocab_size', 2), pooling='first',
      pooler=labels is not None or any(f'{name}.weight' in tensors for name in poolers),
      num_labels=0 if labels is None else len(labels),
      dropout=f('hidden_dropout_prob', 0.1), attention_dropout=f('attention_probs_dropout_prob', 0.1), pad_id=pad_id(f),
      **more)


def _write_bert_like(c: TransformerConfig, name: str) -> dict[str, Any]:
  head = 'ForSequenceClassification' if c.num_labels else 'ForMaskedLM' if c.output_transform else 'Model'
  labels = {str(i): f'LABEL_{i}' for i in range(c.num_labels)}
  return {
      'architectures': [name + head], 'num_hidden_layers': c.encoder_layers, 'hidden_size': c.d_model,
      'intermediate_size': c.d_ff, 'num_attention_heads': c.num_heads, 'layer_norm_eps': c.norm_epsilon,
      'max_position_embeddings': c.max_positions or MOST_POSITIONS, 'hidden_act': THEIR_ACTIVATION[c.feed_forward],
      'tie_word_embeddings': c.tying != 'none', 'type_vocab_size': c.token_types or 1, 'hidden_dropout_prob': c.dropout,
      'attention_probs_dropout_prob': c.attention_dropout,
      **({'id2label': labels, 'label2id': {name: int(i) for i, name in labels.items()}} if labels else {})}


# -- GPT-2 -------------------------------------------------------------------------------------------------------------

_GPT2 = {
    'target_embedding': 'transformer.wte', 'target_positions': 'transformer.wpe', 'output': 'lm_head',
    'decoder_norm': 'transformer.ln_f',
    **attention('decoder/layers_{i}/self_attention', 'transformer.h.{i}.attn', ['c_attn'] * 3 + ['c_proj']),
    'decoder/layers_{i}/self_attention_norm': 'transformer.h.{i}.ln_1',
    'decoder/layers_{i}/mlp/inner': 'transformer.h.{i}.mlp.c_fc',
    'decoder/layers_{i}/mlp/outer': 'transformer.h.{i}.mlp.c_proj',
    'decoder/layers_{i}/mlp_norm': 'transformer.h.{i}.ln_2'}


def _read_gpt2(f: Fields, tensors: Tensors) -> TransformerConfig:
  f.only('scale_attn_by_inverse_layer_idx', False), f.only('add_cross_attention', False)
  return TransformerConfig(
      encoder_layers=0, decoder_layers=f('n_layer'), d_model=f('n_embd'), d_ff=f('n_inner', None) or 4 * f('n_embd'),
      num_heads=f('n_head'), norm='pre', norm_epsilon=f('layer_norm_epsilon', 1e-5), positions='learned',
      max_positions=f('n_positions'), biases='all', attention_scale=None if f('scale_attn_weights', True) else 1.0,
      feed_forward=f.named('activation_function', ACTIVATIONS, 'gelu_new'),
      tying='all' if f('tie_word_embeddings', True) else 'none', scale_embeddings=False, dropout=f('resid_pdrop', 0.1),
      attention_dropout=f('attn_pdrop', 0.1), pad_id=pad_id(f))


def _write_gpt2(c: TransformerConfig) -> dict[str, Any]:
  return {
      'architectures': ['GPT2LMHeadModel'], 'n_layer': c.decoder_layers, 'n_embd': c.d_model, 'n_inner': c.d_ff,
      'n_head': c.num_heads, 'layer_norm_epsilon': c.norm_epsilon, 'n_positions': c.max_positions or MOST_POSITIONS,
      'scale_attn_weights': c.attention_scale is None, 'activation_function': THEIR_ACTIVATION[c.feed_forward],
      'tie_word_embeddings': c.tying != 'none', 'resid_pdrop': c.dropout, 'embd_pdrop': c.dropout,
      'attn_pdrop': c.attention_dropout}



# -- all of them -------------------------------------------------------------------------------------------------------


def _decoder_only(read, write, modules=LLAMA, ids=MappingProxyType({}), **more) -> Family:
  embedding = f'{modules["target_embedding"]}.weight'
  return Family('decoder_only', embedding[:embedding.index('.') + 1], read, write, lambda c: modules,
                {'lm_head.weight': embedding}, ids, **more)


_LLAMA_IDS = dict(bos_token_id=1, eos_token_id=2)

FAMILIES = {
    'marian': Family(
        'encoder_decoder', 'model.', _read_marian, _write_marian, lambda c: _BART, _BART_TIES,
        dict(pad_token_id=58100, eos_token_id=0, decoder_start_token_id=58100), ('', 'eos')),
    'bart': Family(
        'encoder_decoder', 'model.', _read_bart, _write_bart, lambda c: _BART, _BART_TIES,
        dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2), ('bos', 'eos'),
        kept=(r'model\.(encoder|decoder)\.version',)),
    't5': Family(
        'encoder_decoder', '', _read_t5, _write_t5, _t5_modules,
        {name: 'shared.weight' for name in (
            'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight', 'lm_head.weight')},
        dict(pad_token_id=0, eos_token_id=1), ('', 'eos'),
        kept=(r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',)),
    'bert': Family(
        'encoder_only', 'bert.', _read_bert, partial(_write_bert_like, name='Bert'), lambda c: _BERT,
        {'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
         'cls.predictions.decoder.bias': 'cls.predictions.bias'}, dict(pad_token_id=0), ('cls', 'sep'),
        kept=(r'cls\.seq_relationship\.(weight|bias)',)),
    'roberta': Family(
        'encoder_only', 'roberta.', _read_roberta, partial(_write_bert_like, name='Roberta'), _roberta_modules,
        {'lm_head.decoder.weight': 'roberta.embeddings.word_embeddings.weight', 'lm_head.decoder.bias': 'lm_head.bias'},
        dict(pad_token_id=1, bos_token_id=0, eos_token_id=2), ('bos', 'eos'),
        kept=(r'roberta\.pooler\.dense\.(weight|bias)',)),
    'llama': _decoder_only(read_llama, write_llama, ids=_LLAMA_IDS, framing=('bos', '')),
    'mistral': _decoder_only(read_mistral, write_mistral, ids=_LLAMA_IDS, framing=('bos', '')),
    'qwen2': _decoder_only(read_qwen2, partial(write_qwen, name='Qwen2')),
    'qwen3': _decoder_only(read_qwen3, partial(write_qwen, name='Qwen3')),
    'gpt2': _decoder_only(_read_gpt2, _write_gpt2, _GPT2, dict(bos_token_id=50256, eos_token_id=50256),
                          transposed=False)}
"""By `model_type`, in the order in which an export tries them."""
