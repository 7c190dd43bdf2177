"""The training step in PyTorch: nn.Transformer, MarianMT and GPT-2 of transformers, nanoGPT; with tfm's weights."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from shapes import Shape
from torch import nn


class EncoderDecoder(nn.Module):
  """nn.Transformer, post-norm, between tied embeddings and the logits.

  Args:
    everywhere: dropout on attention patterns and behind the activation too, where nn.Transformer has it and the paper
      (and tfm, and Marian) has not.
  """

  def __init__(self, shape: Shape, dropout: float, everywhere: bool = False):
    super().__init__()
    c = shape.model
    self.embedding = nn.Embedding(shape.vocabulary, c.d_model)
    self.register_buffer('positions', torch.zeros(shape.length, c.d_model))
    self.dropout = nn.Dropout(dropout)
    self.stacks = nn.Transformer(c.d_model, c.num_heads, c.encoder_layers, c.decoder_layers, c.d_ff, dropout,
                                 layer_norm_eps=c.norm_epsilon, batch_first=True)
    self.stacks.encoder.norm = self.stacks.decoder.norm = None  # as published, and as the others
    for module in self.stacks.modules():
      if not everywhere and isinstance(module, nn.MultiheadAttention):
        module.dropout = 0.0
      elif not everywhere and isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module.dropout.p = 0.0

  def embed(self, ids: torch.Tensor) -> torch.Tensor:
    x = self.embedding(ids) * self.embedding.embedding_dim**0.5
    return self.dropout(x + self.positions[:ids.shape[1]])

  def forward(self, source: torch.Tensor, target: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
    hidden = self.stacks(self.embed(source), self.embed(target), tgt_mask=causal, tgt_is_causal=True,
                         src_key_padding_mask=padding, memory_key_padding_mask=padding)
    return F.linear(hidden, self.embedding.weight)


def encoder_decoder(shape: Shape, dropout: float, weights: Path | None, everywhere: bool = False) -> EncoderDecoder:
  model = EncoderDecoder(shape, dropout, everywhere)
  if weights is None:
    return model
  ours = _read(weights)
  model.positions.copy_(ours.pop('positions'))
  state = {'positions': model.positions, 'embedding.weight': ours['target_embedding/table']}
  for stack in ('encoder', 'decoder'):
    for i in range(getattr(shape.model, f'{stack}_layers')):
      layer, theirs = f'{stack}/layers_{i}', f'stacks.{stack}.layers.{i}'
      norms = [('self_attention', 'self_attn')]
      norms += [('cross_attention', 'multihead_attn')] if stack == 'decoder' else []
      for ours_name, name in norms:
        for kind in ('weight', 'bias'):
          parts = [_flat(ours, f'{layer}/{ours_name}/{part}', kind) for part in ('query', 'key', 'value')]
          state[f'{theirs}.{name}.in_proj_{kind}'] = torch.cat(parts)
        output = ours[f'{layer}/{ours_name}/output/kernel'].reshape(-1, shape.model.d_model)
        state[f'{theirs}.{name}.out_proj.weight'] = output.T
        state[f'{theirs}.{name}.out_proj.bias'] = ours[f'{layer}/{ours_name}/output/bias']
      for name, part in (('linear1', 'inner'), ('linear2', 'outer')):
        state[f'{theirs}.{name}.weight'] = ours[f'{layer}/mlp/{part}/kernel'].T
        state[f'{theirs}.{name}.bias'] = ours[f'{layer}/mlp/{part}/bias']
      for number, part in enumerate([name for name, _ in norms] + ['mlp'], 1):
        state[f'{theirs}.norm{number}.weight'] = ours[f'{layer}/{part}_norm/scale']
        state[f'{theirs}.norm{number}.bias'] = ours[f'{layer}/{part}_norm/bias']
  model.load_state_dict(state)
  return model


def _read(weights: Path) -> dict[str, torch.Tensor]:
  return {name: torch.from_numpy(array) for name, array in np.load(weights / 'weights.npz').items()}


def _flat(ours: dict[str, torch.Tensor], path: str, kind: str) -> torch.Tensor:
  """A projection to heads as rows of a matrix out x in, or its bias."""
  kernel = ours[f'{path}/kernel']
  return kernel.reshape(kernel.shape[0], -1).T if kind == 'weight' else ours[f'{path}/bias'].reshape(-1)


def language_model(shape: Shape, weights: Path, folder: str | None) -> nn.Module:
  """GPT-2 without biases: of nanoGPT in `folder`, or of transformers, where they stay 0 and are not trained."""
  c, ours = shape.model, _read(weights)
  if folder is not None:
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(shape.length, shape.vocabulary, c.decoder_layers, c.num_heads, c.d_model, 0.0, bias=False))
  else:
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=shape.vocabulary, n_positions=shape.length, n_embd=c.d_model, n_layer=c.decoder_layers,
        n_head=c.num_heads, activation_function='gelu', resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
  state = {'transformer.wte.weight': ours['target_embedding/table'], 'lm_head.weight': ours['target_embedding/table'],
           'transformer.wpe.weight': ours['target_positions/table'],
           'transformer.ln_f.weight': ours['decoder_norm/scale']}
  for i in range(c.decoder_layers):
    layer, theirs = f'decoder/layers_{i}', f'transformer.h.{i}'
    attention = [_flat(ours, f'{layer}/self_attention/{part}', 'weight') for part in ('query', 'key', 'value')]
    matrices = {'attn.c_attn': torch.cat(attention),
                'attn.c_proj': ours[f'{layer}/self_attention/output/kernel'].reshape(-1, c.d_model).T,
                'mlp.c_fc': ours[f'{layer}/mlp/inner/kernel'].T, 'mlp.c_proj': ours[f'{layer}/mlp/outer/kernel'].T}
    for name, matrix in matrices.items():
      state[f'{theirs}.{name}.weight'] = matrix if folder is not None else matrix.T  # there in x out
    state[f'{theirs}.ln_1.weight'] = ours[f'{layer}/self_attention_norm/scale']
    state[f'{theirs}.ln_2.weight'] = ours[f'{layer}/mlp_norm/scale']
  missing, unexpected = model.load_state_dict(state, strict=False)
  if unexpected or any(not name.endswith('.bias') for name in missing):
    raise RuntimeError(f'tfm and this GPT-2 do not have the same weights: {missing} {unexpected}')
  for name, parameter in model.named_parameters():
    if name.endswith('.bias'):
      parameter.requires_grad_(False).zero_()
  return model


def build(engine: str, shape: Shape, dropout: float, weights: Path | None, folder: str | None):
  """(model, a function of the batch that gives logits or, for nanoGPT, the loss, optimizer) of an engine by name."""
  o = shape.config(dropout).optimizer
  if engine in ('torch', 'torch_stock', 'torch_compile'):
    model = encoder_decoder(shape, dropout, weights, everywhere=engine == 'torch_stock')
    called = torch.compile(model) if engine == 'torch_compile' else model
    forward = lambda source, target, padding: called(source, target, padding)  # noqa: E731
  elif engine == 'marian':
    from transformers import MarianMTModel
    model = MarianMTModel.from_pretrained(weights / 'marian', attn_implementation='sdpa')
    for stack in (model.model.encoder, model.model.decoder):
      stack.embed_positions.weight.requires_grad_(False)  # sines, which `from_pretrained` makes trainable
    forward = lambda source, target, padding: model(  # noqa: E731
        input_ids=source, attention_mask=None if padding is None else (~padding).long(), decoder_input_ids=target,
        use_cache=False).logits
  else:
    model = language_model(shape, weights, folder if engine == 'nanogpt' else None)
    forward = lambda source, target, padding: model(target, use_cache=False).logits  # noqa: E731
  model.train()
  if engine == 'nanogpt':
    return model, forward, model.configure_optimizers(o.weight_decay, o.learning_rate, (o.b1, o.b2), 'cpu')
  trained = [p for p in model.parameters() if p.requires_grad]
  common = dict(lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.epsilon, fused=True)
  if o.name == 'adam':
    return model, forward, torch.optim.Adam(trained, **common)
  groups = [{'params': [p for p in trained if p.dim() > 1], 'weight_decay': o.weight_decay},
            {'params': [p for p in trained if p.dim() < 2], 'weight_decay': 0.0}]
  return model, forward, torch.optim.AdamW(groups, **common)


def prepare(engine: str, shape: Shape, dropout: float, padded: bool, weights: Path | None, folder: str | None,
            warm: int):
  """Losses of the first `warm` steps, and what times the next ones."""
  with torch.no_grad():
    model, forward, optimizer = build(engine, shape, dropout, weights, folder)
  source, target = (torch.from_numpy(side).long() for side in shape.batch(padded))
  padding = source == 0 if padded else None
  inputs, labels = target[:, :-1].contiguous(), target[:, 1:].contiguous()
  o = shape.config(dropout).optimizer

  def step() -> float:
    optimizer.zero_grad(set_to_none=True)
    if engine == 'nanogpt':
      _, loss = model(inputs, labels)
    else:
      logits = forward(source, inputs, padding)
      loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0, label_smoothing=o.label_smoothing)
    loss.backward()
    if o.clip_norm is not None:
      nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
    optimizer.step()
    return loss.item()

  def run(count: int) -> list[float]:
    began = time.perf_counter()
    for _ in range(count):
      step()
    return [(time.perf_counter() - began) / count]

  return {'losses': [step() for _ in range(warm)], 'threads': torch.get_num_threads()}, run
