"""E14: attention's weights follow the input, a convolution's do not.

Both mix positions, y = M(x) V(x); what differs is M. Of a convolution it is one band for every input, of attention the
pattern, of a gated convolution (and of an RNN) the effective operator: the Jacobian at that input.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tfm.analysis.engine import read
from tfm.analysis.result import Result, as_result, interval
from tfm.config import ConvolutionalConfig, TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.models.cells import Cell
from tfm.models.convolution import GatedConvolution


def run_mixing(length: int = 12, width: int = 8, inputs: int = 32, seeds: int = 5, seed: int = 0) -> Result:
  """D = E||M(x) - E M||_F / ||E M||_F over random inputs x, for each kind of mixing, at random weights."""
  several = range(seed, seed + seeds)
  found = {name: [spread(operators(kind, length, width, inputs, each)) for each in several]
           for name, kind in KINDS.items()}
  shift = {padding: max(shift_error(padding, length, width, each) for each in several)
           for padding in ('circular', 'zero')}
  conditions = {
      'convolution: D < 1e-6': max(found['convolution']) < 1e-6,
      'attention: D > 0.1': min(found['attention']) > 0.1,
      'a convolution commutes with shifts where its ends meet (1e-5), and not where zeros stand beyond them':
          shift['circular'] < 1e-5 < shift['zero']}
  control = max(found['attention, one input']) < 1e-6
  measured = {'conditions': conditions, **{f'D, {name}': interval(values) for name, values in found.items()},
              'error of shifting, circular': shift['circular'], 'error of shifting, zeros': shift['zero']}

  def plot(axes):
    axes.barh(list(found), [np.mean(values) for values in found.values()])
    axes.set_xlabel('D: how much the mixing operator follows the input')

  return as_result('E14', 'attention mixes with weights that follow the input, a convolution with fixed ones',
                   '; '.join(conditions),
                   f'attention to one and the same input: {"does not vary" if control else "VARIES"}', measured,
                   'holds' if all(conditions.values()) and control else 'fails', plot)


def spread(operators_ExTxS: np.ndarray) -> float:
  """D over the first axis."""
  mean = operators_ExTxS.mean(0)
  return float(np.linalg.norm(operators_ExTxS - mean, axis=(1, 2)).mean() / np.linalg.norm(mean))


def operators(kind, length: int, width: int, inputs: int, seed: int) -> np.ndarray:
  """M(x) for each input, ExTxS."""
  return np.asarray(kind(length, width, inputs, jax.random.key(seed)), np.float64)


def _attention(length, width, inputs, key, same=False):
  model = build_model(TransformerConfig(encoder_layers=1, decoder_layers=0, d_model=width, d_ff=width, num_heads=2,
                                        dropout=0.0, positions='none', pad_id=None), 64, 64)
  ids = jax.random.randint(key, (inputs, length), 0, 64)
  name = 'encoder.layers[0].self_attention.pattern'
  patterns = read(model, _random(initialize(model, key), key), (ids[:1].repeat(inputs, 0) if same else ids,), name)
  return patterns[name].mean(1)


def _random(params, key):
  """Scores large enough to differ: at its first weights attention is almost uniform, whatever it reads."""
  return jax.tree.map(lambda leaf: leaf * (3.0 if leaf.ndim == 3 else 1.0), params)


def _convolution(length, width, inputs, key, gated=False):
  config = ConvolutionalConfig(d_model=width, d_hidden=width, dropout=0.0, positions='none', max_positions=None)
  module = GatedConvolution(config, 0, causal=False)
  xs = jax.random.normal(jax.random.fold_in(key, 1), (inputs, length, width))
  return _effective(module, _gated if gated else _linear, module.init(key, xs), xs)


def _gated(module, x_TxF):
  return module(x_TxF[None])[0]


def _linear(module, x_TxF):
  """Without its gate: the half of the kernel that is let through, no bias."""
  kernel = module.kernel[..., :x_TxF.shape[-1]]
  return jax.lax.conv_general_dilated(x_TxF[None], kernel, (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC'))[0]


def _recurrent(length, width, inputs, key):
  module = Cell('gru', width, width)
  xs = jax.random.normal(jax.random.fold_in(key, 1), (inputs, length, width))
  return _effective(module, _states, module.init(key, xs[0], method=_states), xs)


def _states(module, x_TxW):
  return module.over_time(module.project(x_TxW[:, None]), module.empty(1))[0][:, 0]


@partial(jax.jit, static_argnums=(0, 1))
def _effective(module, mixed, variables, x_ExTxF):
  """||d y_t / d x_s||_F for each input, ExTxT."""
  one = jax.jacrev(lambda x_TxF: module.apply(variables, x_TxF, method=mixed))
  return jax.vmap(lambda x_TxF: jnp.linalg.norm(one(x_TxF), axis=(1, 3)))(x_ExTxF)


KINDS = {'convolution': _convolution, 'gated convolution': partial(_convolution, gated=True), 'GRU': _recurrent,
         'attention': _attention, 'attention, one input': partial(_attention, same=True)}


def shift_error(padding: str, length: int, width: int, seed: int) -> float:
  """max |shift(conv(x)) - conv(shift(x))|, over max |conv(x)|, where shifting goes round."""
  keys = jax.random.split(jax.random.key(seed))
  x, kernel = jax.random.normal(keys[0], (1, length, width)), jax.random.normal(keys[1], (3, width, width))

  def convolved(x):
    around = jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode='wrap' if padding == 'circular' else 'constant')
    return jax.lax.conv_general_dilated(around, kernel, (1,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC'))

  found = convolved(x)
  return float(jnp.abs(jnp.roll(found, 1, axis=1) - convolved(jnp.roll(x, 1, axis=1))).max() / jnp.abs(found).max())
