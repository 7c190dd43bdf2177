"""The model's section of the config: what a Transformer is made of, each part with the paper it comes from.

`docs/parts.md` is the same list as a table, with the line that implements each part and the oracle that checks it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tfm.model_section import ModelSection, Shape
from tfm.section import require, require_fraction, require_positive


@dataclass(frozen=True)
class TransformerConfig(ModelSection):
  """The Transformer; defaults are the base model of "Attention Is All You Need" (Vaswani et al. 2017, Table 3).

  With both stacks it is an encoder-decoder, with `encoder_layers=0` decoder-only (a language model), with
  `decoder_layers=0` encoder-only.
  """

  kind = 'transformer'

  encoder_layers: int = 6
  """N of the encoder (section 3.1); 0: there is none, the model is decoder-only."""
  decoder_layers: int = 6
  """N of the decoder (section 3.1); 0: there is none, the model is encoder-only."""
  d_model: int = 512
  """D, width of the residual stream."""
  d_ff: int = 2048
  """F, inner width of the feed-forward network (equation 2)."""
  num_heads: int = 8
  """H, attention heads per layer (section 3.2.2)."""
  num_kv_heads: int | None = None
  """K, key/value heads, each for H / K query heads (GQA, Ainslie et al. 2023; 1: MQA, Shazeer 2019); None is H."""
  d_k: int | None = None
  """C, width of a query/key head; None means d_model / num_heads."""
  d_v: int | None = None
  """Width of a value head; None means d_model / num_heads."""

  norm: Literal['post', 'pre', 'sandwich'] = 'post'
  """'post': norm(x + f(x)) as published. 'pre': x + f(norm(x)) and a final norm (Xiong et al. 2020). 'sandwich':
  x + norm(f(norm(x))) and a final norm (Ding et al. 2021)."""
  norm_type: Literal['layer', 'rms'] = 'layer'
  """LayerNorm (Ba et al. 2016), or RMSNorm, without mean and bias (Zhang & Sennrich 2019)."""
  norm_epsilon: float = 1e-6
  """Added to the variance (or mean square) in every norm."""
  qk_norm: bool = False
  """Norm over the width of every query and key head (Dehghani et al. 2023, section 2.1)."""
  embedding_norm: bool = False
  """Norm over embedding + position (BERT, Devlin et al. 2019; BART, Lewis et al. 2020)."""

  positions: Literal['sinusoidal', 'sinusoidal_halves', 'learned', 'rope', 'alibi', 'relative', 'none'] = 'sinusoidal'
  """'sinusoidal': section 3.5, sines and cosines interleaved; '_halves': all sines first (Marian). 'learned': a table
  (Table 3, row E). 'rope': rotated queries and keys (Su et al. 2021). 'alibi': a penalty linear in the distance (Press
  et al. 2022). 'relative': a learned bias for each bucket of distances (T5, Raffel et al. 2020). 'none' (Haviv et al.
  2022). The last four act in self-attention only."""
  max_positions: int | None = None
  """Rows of the learned position table; None without one: there is no limit."""
  position_offset: int = 0
  """Row of the learned table for the first token (RoBERTa and BART: 2)."""
  rope_base: float = 10000.0
  """Base of the wavelengths of 'rope'."""
  rope_scaling: Literal['none', 'linear', 'llama3', 'yarn'] = 'none'
  """Stretch 'rope' for longer texts: all wavelengths (Chen et al. 2023), or the long ones only, as in Llama 3.1 or by
  YaRN (Peng et al. 2023)."""
  rope_factor: float = 1.0
  """How much longer the texts are than those trained on; 1 with rope_scaling='none'."""
  rope_original_length: int | None = None
  """Length of the texts trained on, for 'llama3' and 'yarn'."""
  relative_buckets: int = 32
  """Buckets of 'relative' (T5, section 2.1)."""
  relative_max_distance: int = 128
  """Distance from which on all share the last bucket of 'relative'."""

  feed_forward: Literal['relu', 'gelu', 'gelu_tanh', 'silu', 'swiglu', 'geglu', 'geglu_tanh'] = 'relu'
  """Activation (GELU: Hendrycks & Gimpel 2016, exact or by tanh; SiLU), or gated by one: act(x W_g) * (x W_1) (GLU
  variants, Shazeer 2020)."""
  biases: Literal['mlp', 'qkv', 'all', 'none'] = 'mlp'
  """Which linear maps have one: the feed-forward ones as published, the input side of attention (Qwen 2), all (GPT-2,
  BERT), none (Llama, T5). LayerNorm has one with 'mlp' and 'all'."""
  experts: int = 0
  """E, feed-forward networks per layer, of which a router chooses some for each token (mixture of experts); 0: one
  network and no router."""
  experts_per_token: int = 2
  """How many a token goes through, weighted by the router's softmax over them (Mixtral, Jiang et al. 2024); one is
  weighted by its softmax over all (Switch Transformer, Fedus et al. 2022)."""
  load_balance: float = 0.01
  """Weight of the load-balance loss (Switch Transformer, Fedus et al. 2022, equation 4; taken over each sequence)."""

  convolution: Literal['none', 'before', 'after', 'parallel', 'conformer'] = 'none'
  """In the encoder's layers, the module of Gulati et al. 2020 (section 2.2; LayerNorm for BatchNorm, whose statistics
  would make a sentence depend on its batch): before attention, after it, or added to it on the same input (section
  3.4.2). 'conformer': after it, between two feed-forward networks of half weight, and a norm at the end (section 2.4).
  Biases as in the feed-forward network."""
  kernel_width: int = 7
  """Positions that a convolution sees, as many before its own as behind it, hence odd (section 3.4.5: 32, of frames of
  speech)."""

  window: int | None = None
  """Self-attention sees this many positions, its own included, and no further (Beltagy et al. 2020); None: all."""
  attention_scale: float | None = None
  """Factor on the scores; None is 1 / sqrt(C) (equation 1). T5: 1."""
  attention_softcap: float | None = None
  """Scores become cap * tanh(score / cap) (Gemma 2, 2024)."""
  attention_sinks: bool = False
  """A trained score for each head that competes in the softmax and has no value, so that a head may look nowhere
  (Xiao et al. 2023, section 3.3; gpt-oss, 2025)."""

  tying: Literal['none', 'inputs', 'target', 'all'] = 'all'
  """Shared matrices (section 3.4): 'target' target embedding = output projection; 'inputs' source = target embedding;
  'all' the three. With one stack there is one embedding, and 'target' and 'all' share it with the output."""
  scale_embeddings: bool = True
  """Multiply embeddings by sqrt(d_model) (section 3.4)."""
  scale_output: bool = False
  """Divide the last states by sqrt(d_model) before the output projection (T5, where it is tied)."""
  output_bias: bool = False
  """A bias for every token of the vocabulary (BERT, Marian)."""
  output_transform: bool = False
  """Encoder-only: linear map, activation and norm before the output projection (BERT)."""
  logit_softcap: float | None = None
  """Logits become cap * tanh(logit / cap) (Gemma 2, 2024)."""
  token_types: int = 0
  """Encoder-only: kinds of token that have an embedding of their own, as sentence A and B (BERT); 0: none."""
  pooling: Literal['first', 'mean'] = 'mean'
  """Encoder-only: a sentence's vector is that of its first token (BERT), or the mean over its tokens."""
  pooler: bool = False
  """Encoder-only: linear map and tanh over the sentence's vector (BERT)."""
  num_labels: int = 0
  """Encoder-only: classes of a classification head over the sentence's vector; 0: no such head."""

  dropout: float = 0.1
  """P_drop on every sub-layer output and on embedding + position (section 5.4)."""
  attention_dropout: float = 0.0
  """Dropout on the attention pattern; not in the paper's text, common in toolkits."""
  activation_dropout: float = 0.0
  """Dropout after the activation; not in the paper's text, common in toolkits."""
  attention_backend: Literal['auto', 'reference', 'blockwise', 'cudnn', 'pallas', 'ring', 'ulysses'] = 'auto'
  """Kernel for whole sequences; 'auto' takes the first that can do what is asked and logs which, another name is an
  error where it cannot. Steps of decoding, one token after cached ones, are always 'auto'."""
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  """Type of the computation; parameters, softmax, logits and loss are float32 always."""
  vocab_multiple: int = 1
  """Rows of the embedding tables are rounded up to a multiple of this, so that mesh.tensor divides them; the rows
  beyond the vocabulary are never predicted."""
  pad_id: int | None = 0
  """Id of padding, always on the right; None: the vocabulary has none (GPT-2). tfm's own tokenizers have 0."""
  scan_layers: bool = False
  """One compiled layer looped over stacked parameters (compiles faster) instead of N layers in a row."""
  remat: Literal['none', 'full', 'dots'] = 'none'
  """What the backward pass recomputes: nothing, everything in a layer, or all but the matrix products."""

  def check(self):
    require_positive(self, 'd_model', 'd_ff', 'num_heads', 'norm_epsilon', 'vocab_multiple', 'relative_max_distance',
                     'experts_per_token', 'rope_base')
    for name in ('encoder_layers', 'decoder_layers', 'position_offset', 'experts', 'load_balance', 'token_types',
                 'num_labels'):
      require(getattr(self, name) >= 0, f'model.{name} is {getattr(self, name)}; give 0 or more.')
    for name in ('attention_softcap', 'logit_softcap', 'attention_scale', 'window', 'd_k', 'd_v', 'num_kv_heads'):
      value = getattr(self, name)
      require(value is None or value > 0, f'{name} is {value}; give a number above 0 or None.')
    for name in ('dropout', 'attention_dropout', 'activation_dropout'):
      require_fraction(name, getattr(self, name))
    require(self.encoder_layers + self.decoder_layers > 0,
            'model.encoder_layers and model.decoder_layers are both 0; give at least one layer.')
    self._check_heads()
    self._check_positions()
    self._check_parts()
    self._check_ends()

  def _check_heads(self):
    for name in ('d_k', 'd_v'):
      require(getattr(self, name) is not None or self.d_model % self.num_heads == 0,
              f'd_model {self.d_model} is not divisible by num_heads {self.num_heads}; change one or set d_k and d_v.')
    require(self.num_heads % self.key_heads == 0,
            f'num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; change one.')
    refused = [name for name, is_set in (('attention_dropout', self.attention_dropout > 0),
                                         ("positions='alibi'", self.positions == 'alibi'),
                                         ("positions='relative'", self.positions == 'relative')) if is_set]
    require(not refused or self.attention_backend in ('auto', 'reference'),
            f"attention_backend='{self.attention_backend}' never holds the scores and the pattern that "
            f"{' and '.join(refused)} change; set it to 'auto' or 'reference'.")

  def _check_positions(self):
    kind = self.positions
    require(not kind.startswith('sinusoidal') or self.d_model % 2 == 0,
            f"positions='{kind}' pairs sines with cosines, so d_model must be even, not {self.d_model}.")
    require(kind != 'learned' or (self.max_positions or 0) > self.position_offset,
            "positions='learned' needs a table size: set max_positions to the longest sequence in tokens, plus "
            'position_offset.')
    require(kind == 'learned' or self.max_positions is None,
            f"max_positions has no effect with positions='{kind}'; remove it or choose positions='learned'.")
    require(kind == 'learned' or self.position_offset == 0,
            f"position_offset has no effect with positions='{kind}'; remove it or choose positions='learned'.")
    require(kind == 'rope' or (self.rope_base, self.rope_scaling) == (10000.0, 'none'),
            f"rope_base and rope_scaling have no effect with positions='{kind}'; remove them or choose 'rope'.")
    require(kind != 'rope' or self.key_width % 2 == 0,
            f"positions='rope' rotates pairs, so the width of a query/key head must be even, not {self.key_width}.")
    require(self.rope_factor == 1.0 if self.rope_scaling == 'none' else self.rope_factor >= 1.0,
            f"rope_factor is {self.rope_factor} with rope_scaling='{self.rope_scaling}'; give 1 with 'none', and else "
            '1 or more.')
    require((self.rope_original_length is not None) == (self.rope_scaling in ('llama3', 'yarn')),
            f"rope_original_length is {self.rope_original_length} with rope_scaling='{self.rope_scaling}'; 'llama3' "
            "and 'yarn' need it, the others have no use for it.")
    require((self.rope_original_length or 1) > 0,
            f'rope_original_length is {self.rope_original_length}; give a number above 0.')
    require(kind == 'relative' or (self.relative_buckets, self.relative_max_distance) == (32, 128),
            f"relative_buckets and relative_max_distance have no effect with positions='{kind}'; remove them.")
    require(self.relative_buckets >= 4 and self.relative_buckets % 2 == 0,
            f'relative_buckets is {self.relative_buckets}; give an even number of 4 or more.')
    require(self.relative_max_distance > self.relative_buckets // 2,
            f'relative_max_distance {self.relative_max_distance} leaves no room beyond the '
            f'{self.relative_buckets // 2} buckets of single distances; raise it.')

  def _check_parts(self):
    require(self.experts == 0 or self.experts_per_token <= self.experts,
            f'experts_per_token {self.experts_per_token} exceeds experts {self.experts}; change one.')
    require(self.experts > 0 or (self.experts_per_token, self.load_balance) == (2, 0.01),
            'experts_per_token and load_balance have no effect without experts; remove them or set experts.')
    require(self.experts == 0 or self.biases in ('qkv', 'none'),
            f"biases='{self.biases}' gives the feed-forward network biases, which experts have not; choose 'qkv' or "
            "'none'.")
    require(self.convolution == 'none' or self.encoder_layers > 0,
            f"convolution='{self.convolution}' acts in the encoder, which a decoder-only model has not; remove it or "
            'set encoder_layers.')
    require(self.convolution != 'none' or self.kernel_width == 7,
            "kernel_width has no effect with convolution='none'; remove it or choose a convolution.")
    require(self.kernel_width > 0 and self.kernel_width % 2 == 1,
            f'kernel_width is {self.kernel_width}; give an odd number above 0, so that a position is in the middle of '
            'what it sees.')
    require(self.convolution != 'conformer' or self.norm == 'pre',
            f"convolution='conformer' has its norms where pre-norm has them, and one at the end; set norm='pre', not "
            f"'{self.norm}'.")

  def _check_ends(self):
    require(self.tying != 'inputs' or self.shape == 'encoder_decoder',
            f"tying='inputs' shares two embeddings, but a model that is {self.shape.replace('_', '-')} has one; choose "
            "'none' or 'all'.")
    for name, idle in (('output_transform', False), ('token_types', 0), ('pooling', 'mean'), ('pooler', False),
                       ('num_labels', 0)):
      require(self.shape == 'encoder_only' or getattr(self, name) == idle,
              f'{name} needs an encoder-only model (decoder_layers=0); remove it.')

  @property
  def shape(self) -> Shape:
    if self.encoder_layers == 0:
      return 'decoder_only'
    return 'encoder_decoder' if self.decoder_layers else 'encoder_only'

  @property
  def key_heads(self) -> int:
    return self.num_kv_heads or self.num_heads

  @property
  def key_width(self) -> int:
    return self.d_k or self.d_model // self.num_heads

  @property
  def value_width(self) -> int:
    return self.d_v or self.d_model // self.num_heads

  @property
  def gated(self) -> bool:
    return self.feed_forward in ('swiglu', 'geglu', 'geglu_tanh')

  @property
  def uses_dropout(self) -> bool:
    return max(self.dropout, self.attention_dropout, self.activation_dropout) > 0

  @property
  def cross_attention_shape(self) -> tuple[int, int] | None:
    return (self.decoder_layers, self.num_heads) if self.shape == 'encoder_decoder' else None

  def with_layout(self, scan_layers: bool) -> TransformerConfig:
    return dataclasses.replace(self, scan_layers=scan_layers)
