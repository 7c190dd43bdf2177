"""What the comparisons with other libraries share: random parameters, a batch, and a twin in PyTorch.

Nothing here or in the tests of this folder takes a number from `tfm` but the parameters themselves.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tfm.models.build import build_model, initialize
from tfm.models.layout import to_layout
from tfm.special_ids import BOS, EOS, PAD, UNK


def sinusoid(length, d_model):
  """The paper's table (section 3.5), entry by entry in double precision."""
  def entry(position, i):
    angle = position / 10000.0 ** (2 * (i // 2) / d_model)
    return np.cos(angle) if i % 2 else np.sin(angle)

  return np.array([[entry(position, i) for i in range(d_model)] for position in range(length)], np.float32)


def random_params(model, seed=0, gain=1.0, table_gain=1.0):
  """Parameters for `model`, all of them random: the biases and norms too, which start as zeros and ones and would hide
  what is done to them. Matrices keep the scale of their input times `gain`."""
  random = np.random.default_rng(seed)

  def draw(path, leaf):
    # A scanned stack has one more axis in front; the output of attention is the one matrix with two axes of input.
    name, shape = path[-1].key, leaf.shape[1:] if 'layers' in [part.key for part in path] else leaf.shape
    noise = random.standard_normal(leaf.shape, np.float32)
    if name == 'table':
      return noise * np.float32(table_gain * shape[1]**-0.5)
    if name == 'kernel':
      inputs = shape[0] * (shape[1] if path[-2].key == 'output' else 1)
      return noise * np.float32(gain * inputs**-0.5)
    return noise * np.float32(0.3) + np.float32(name == 'scale')

  shapes = jax.eval_shape(lambda key: initialize(model, key), jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def sentences(lengths, vocab_size, seed=0, begin=()):
  """Random ids of these lengths (`begin` and EOS included), padded on the right."""
  random = np.random.default_rng(seed)
  ids_BxT = np.full((len(lengths), max(lengths)), PAD, np.int32)
  for row, length in enumerate(lengths):
    body = random.integers(UNK, vocab_size, length - len(begin) - 1)
    ids_BxT[row, :length] = [*begin, *body, EOS]
  return ids_BxT


@pytest.fixture(scope='session', name='sinusoid')
def sinusoid_():
  return sinusoid


@pytest.fixture(scope='session')
def new_model():
  """`new_model(config, source_vocab_size, target_vocab_size, **how)`: a model and `random_params` for it."""
  def make(config, source_vocab_size, target_vocab_size, **how):
    model = build_model(config, source_vocab_size, target_vocab_size)
    return model, random_params(model, **how)

  return make


@pytest.fixture(scope='session')
def new_batch():
  """`new_batch(source_vocab_size, target_vocab_size, seed)`: source and target sentences of unequal lengths."""
  def make(source_vocab_size, target_vocab_size, seed=0):
    return (sentences([7, 3, 9, 2, 6, 8], source_vocab_size, 2 * seed),
            sentences([4, 10, 7, 3, 8, 6], target_vocab_size, 2 * seed + 1, begin=[BOS]))

  return make


@pytest.fixture(scope='session', name='sentences')
def sentences_():
  return sentences


class TorchTwin:
  """`torch.nn.Transformer` with the weights of an `EncoderDecoder`.

  Its encoder and decoder are passed in (`custom_encoder`, `custom_decoder`): the ones it makes by itself end in a
  LayerNorm with post-norm too, which the paper's do not. Attention has biases in PyTorch: zeros, not trained.
  """

  def __init__(self, torch, config, params):
    self.torch, self.config = torch, config
    nn, D, pre = torch.nn, config.d_model, config.norm == 'pre'
    sizes = dict(d_model=D, nhead=config.num_heads, dim_feedforward=config.d_ff, dropout=0.0, activation='relu',
                 layer_norm_eps=config.norm_epsilon, batch_first=True, norm_first=pre)

    def final_norm():
      return nn.LayerNorm(D, eps=config.norm_epsilon) if pre else None

    self.transformer = nn.Transformer(
        D, config.num_heads, batch_first=True,
        custom_encoder=nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), config.encoder_layers, final_norm(),
                                             enable_nested_tensor=False),
        custom_decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), config.decoder_layers, final_norm()))
    arrays = self.named(params)
    tables = {name: nn.Parameter(torch.empty(array.shape)) for name, array in arrays.items() if '.' not in name}
    self.parameters = {**dict(self.transformer.named_parameters()), **tables}
    for name, parameter in self.parameters.items():
      if name.endswith(('in_proj_bias', 'out_proj.bias')):
        torch.nn.init.zeros_(parameter)
        parameter.requires_grad_(False)
    self.trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
    assert self.trained.keys() == arrays.keys(), self.trained.keys() ^ arrays.keys()
    with torch.no_grad():
      for name, parameter in self.trained.items():
        parameter.copy_(torch.tensor(arrays[name]))
    self.target_table = tables['target_embedding']
    self.source_table = tables.get('source_embedding', self.target_table)
    self.output_table = tables.get('output', self.target_table)

  def named(self, params):
    """Our tree under PyTorch's names and in its shapes; linear, so it serves gradients as well as parameters."""
    params = jax.tree.map(np.asarray, to_layout(params, 'unrolled'))
    tables = [name for name in ('source_embedding', 'target_embedding', 'output') if name in params]
    named = {name: params[name]['table'] for name in tables}

    def put_norm(name, norm):
      named[f'{name}.weight'], named[f'{name}.bias'] = norm['scale'], norm['bias']

    def put_attention(name, attention):
      into_heads = [attention[part]['kernel'] for part in ('query', 'key', 'value')]  # D x H x C each
      named[f'{name}.in_proj_weight'] = np.concatenate([kernel.reshape(len(kernel), -1).T for kernel in into_heads])
      out_HxCxD = attention['output']['kernel']
      named[f'{name}.out_proj.weight'] = out_HxCxD.reshape(-1, out_HxCxD.shape[-1]).T

    for side, norms in (('encoder', ('self_attention_norm', 'mlp_norm')),
                        ('decoder', ('self_attention_norm', 'cross_attention_norm', 'mlp_norm'))):
      layers = {name: layer for name, layer in params[side].items() if name.startswith('layers_')}
      for i in range(len(layers)):
        layer, name = layers[f'layers_{i}'], f'{side}.layers.{i}'
        put_attention(f'{name}.self_attn', layer['self_attention'])
        if side == 'decoder':
          put_attention(f'{name}.multihead_attn', layer['cross_attention'])
        for linear, dense in (('linear1', layer['mlp']['inner']), ('linear2', layer['mlp']['outer'])):
          named[f'{name}.{linear}.weight'], named[f'{name}.{linear}.bias'] = dense['kernel'].T, dense['bias']
        for n, norm in enumerate(norms):
          put_norm(f'{name}.norm{n + 1}', layer[norm])
      if f'{side}_norm' in params:
        put_norm(f'{side}.norm', params[f'{side}_norm'])
    return named

  def logits(self, source_BxS, target_BxT):
    """BxTxV under teacher forcing."""
    torch = self.torch
    source_BxS, target_BxT = torch.tensor(source_BxS).long(), torch.tensor(target_BxT).long()
    T = target_BxT.shape[1]
    x_BxTxD = self.transformer(
        self._embed(self.source_table, source_BxS), self._embed(self.target_table, target_BxT),
        tgt_mask=torch.ones(T, T, dtype=torch.bool).triu(1),
        src_key_padding_mask=source_BxS == PAD, memory_key_padding_mask=source_BxS == PAD,
        tgt_key_padding_mask=target_BxT == PAD)
    return x_BxTxD @ self.output_table.T

  def loss(self, logits_BxTxV, labels_BxT, smoothing, reduction):
    labels = self.torch.tensor(labels_BxT).long().flatten()
    return self.torch.nn.functional.cross_entropy(
        logits_BxTxV.flatten(0, 1), labels, label_smoothing=smoothing, ignore_index=PAD, reduction=reduction)

  def _embed(self, table, ids_BxT):
    D = self.config.d_model
    return table[ids_BxT] * D**0.5 + self.torch.tensor(sinusoid(ids_BxT.shape[1], D))


@pytest.fixture(scope='session')
def torch_twin():
  """`torch_twin(config, params)`: see `TorchTwin`."""
  torch = pytest.importorskip('torch', reason='needs PyTorch to compare with: pip install "tfm[oracle]"')
  torch.set_num_threads(1)
  return lambda config, params: TorchTwin(torch, config, params)
