"""What the structure of a model says about distance before anything is learned (E7 a, b and e)."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tfm.analysis.compute_cost import cost, loop_free_flops, power
from tfm.analysis.distance_plot import plot_by_distance
from tfm.analysis.receptive_field import gradient_norms, log_slope, receptive_field
from tfm.analysis.result import Result
from tfm.analysis.sequence_families import convolutional, recurrent, transformer
from tfm.models.build import build_model, initialize

VOCAB = 16


def at_first(config, seed: int):
  """The model of `config` and its first parameters."""
  model = build_model(config, VOCAB, VOCAB)
  return model, initialize(model, jax.random.key(seed))


def families(width: int, layers: int, attention_layers: int = 1) -> dict:
  """All `width` wide, the CNNs with `layers` convolutions of kernel 3."""
  return {
      'tanh RNN': recurrent(width, d_model=width),
      'LSTM': recurrent(width, 'lstm', width),
      'CNN': convolutional(width, layers=layers, d_model=width),
      'dilated CNN': convolutional(width, 'doubling', layers, width),
      'Transformer': transformer(2 * width, attention_layers, width, num_heads=1),
  }


def gradient_by_distance(seed: int = 0, length: int = 64, width: int = 32, seeds: int = 4) -> Result:
  """E7a: g(d), the norm of d h_T / d x_{T-d}, at the first parameters; mean over `seeds` seeds from `seed` on.

  Raises:
    ValueError: `length` is not above the plain CNN's receptive field of 13.
  """
  layers, first = 6, 4
  field = convolutional(width, layers=layers).receptive_field.decoder
  if length <= field:
    raise ValueError(f'length is {length}, but only beyond the receptive field of {field} is there anything to see; '
                     'raise it.')
  norms, slopes = {}, {}
  for name, config in families(width, layers).items():
    runs = []
    for n in range(seed, seed + seeds):
      model, params = at_first(config, n)
      ids_BxT = jax.random.randint(jax.random.key(n + 1000), (2, length), 0, VOCAB)
      runs.append(np.asarray(gradient_norms(model, params, ids_BxT), np.float64))
    norms[name] = np.mean(runs, axis=0)
    if name != 'CNN':
      slopes[name] = [log_slope(range(first, length), run[first:]) for run in runs]
  slope = {name: float(np.mean(values)) for name, values in slopes.items()}
  plain, exploding = norms['CNN'], _exploding_slope(seed)
  conditions = {
      'slope(tanh RNN) < -0.05': slope['tanh RNN'] < -0.05,
      'slope(LSTM) between those of RNN and attention': slope['tanh RNN'] < slope['LSTM'] < slope['Transformer'],
      '|slope(Transformer)| < 0.01': abs(slope['Transformer']) < 0.01,
      f'CNN exactly 0 from d = {field} on, not before': bool((plain[field:] == 0).all() and (plain[:field] > 0).all()),
      'dilated CNN reaches the first token, |slope| < 0.02':
          bool(norms['dilated CNN'][-1] > 0) and abs(slope['dilated CNN']) < 0.02,
  }
  controlled = abs(exploding - np.log10(1.5)) < 1e-3
  return Result(
      name='E7a',
      claim='The influence of a token on the state falls exponentially with distance in an RNN, ends at the receptive '
      'field in a CNN, and does not depend on distance in attention.',
      criterion='; '.join(conditions),
      measured={'seeds': seeds, 'slope_decades_per_step': slope, 'slope_by_seed': slopes, 'conditions': conditions,
                'norm_by_distance': {name: [float(g) for g in values] for name, values in norms.items()},
                'exploding_slope': exploding},
      verdict='holds' if all(conditions.values()) and controlled else 'fails',
      control='A tanh RNN at rest whose recurrent matrix is 1.5 times orthogonal must explode by log10(1.5) = 0.176 '
      f'decades a step: {exploding:+.4f}.',
      draw=lambda: plot_by_distance('gradient of the last state by distance, at initialisation',
                                    {name: (range(length), g) for name, g in norms.items()},
                                    'norm of d h / d x', log_x=False, log_y=True))


def receptive_fields(seed: int = 0, lengths: tuple[int, ...] = (4, 8, 16), width: int = 4) -> Result:
  """E7b: the receptive field read off the zeros of the Jacobian, and the layers or steps until n tokens are reached."""
  ids_T = jnp.arange(max(lengths) + 6) % VOCAB
  makers = {
      'Transformer': lambda layers: transformer(width, layers, width, 1),
      'dilated CNN': lambda layers: convolutional(width, 'doubling', layers, width),
      'CNN': lambda layers: convolutional(width, 'none', layers, width),
  }
  fields, paths = {}, {}
  for name, make in makers.items():
    fields[name] = []
    # A layer more until the longest distance is inside.
    while not fields[name] or fields[name][-1] <= max(lengths):
      fields[name].append(receptive_field(*at_first(make(len(fields[name]) + 1), seed), ids_T))
    paths[name] = [1 + sum(field <= n for field in fields[name]) for n in lengths]
  # One layer of an RNN reaches everything, by as many steps as there are tokens.
  rnn = recurrent(width, d_model=width)
  paths['tanh RNN'] = [_chain(rnn, n + 1) - _chain(rnn, 1) for n in lengths]
  stated = {name: [min(makers[name](1 + i).receptive_field.decoder, len(ids_T)) for i in range(len(fields[name]))]
            for name in ('CNN', 'dilated CNN')}
  expected = {
      'Transformer': [1] * len(lengths), 'dilated CNN': [math.ceil(math.log2(n / 2 + 1)) for n in lengths],
      'CNN': [math.ceil(n / 2) for n in lengths], 'tanh RNN': list(lengths),
  }
  exact = all(fields[name] == stated[name] for name in stated)
  bounded = fields['CNN'][0] == 3
  return Result(
      name='E7b', claim='The longest path between two tokens is 1 with attention, O(log n) with dilated convolutions, '
      'O(n / k) with convolutions, O(n) in an RNN.',
      criterion='the Jacobian is zero exactly from the receptive field that the config states on; layers (RNN: steps) '
      f'until n tokens back are reached, n = {", ".join(map(str, lengths))}: {expected}',
      measured={'field_by_layers': fields, 'stated_field_by_layers': stated, 'sequence_length': len(ids_T),
                'tokens_back': list(lengths), 'path': paths},
      verdict='holds' if exact and bounded and paths == expected else 'fails',
      control=f'One convolution of kernel 3 must reach no further than 3 tokens: {fields["CNN"][0]}.',
      draw=lambda: plot_by_distance('layers (RNN: steps) until a token is reached',
                                    {name: (lengths, values) for name, values in paths.items()}, 'layers or steps',
                                    log_y=True))


def cost_by_length(lengths: tuple[int, ...] = (256, 512, 1024, 2048), width: int = 8) -> Result:
  """E7e: arithmetic and sequential operations of a forward pass as it gets longer; T >= 8 D everywhere.

  Raises:
    ValueError: a length is below 8 widths.
  """
  if min(lengths) < 8 * width:
    raise ValueError(f'length {min(lengths)} is below 8 x width {width}, where projections hide the T^2 of attention; '
                     'raise it.')
  flops, chains, compiled = {}, {}, {}
  for name, config in families(width, layers=4).items():
    model, params = at_first(config, 0)

    def forward(params, ids_BxT, model=model):
      return model.apply({'params': params}, ids_BxT)

    shapes = [jax.ShapeDtypeStruct((1, T), jnp.int32) for T in lengths]
    costs = [cost(forward, params, ids_BxT) for ids_BxT in shapes]
    flops[name], chains[name] = [c.flops for c in costs], [c.chain for c in costs]
    compiled[name] = loop_free_flops(forward, params, shapes[0])
  work = {name: power(lengths, values) for name, values in flops.items()}
  wait = {name: power(lengths, values) for name, values in chains.items()}
  share = {name: compiled[name] / flops[name][0] for name in flops}
  recurrent_names, attention = ('tanh RNN', 'LSTM'), 'Transformer'
  conditions = {
      'FLOPs of attention grow as T^2 (within 0.1)': abs(work[attention] - 2) < 0.1,
      'FLOPs of RNN and CNN grow as T (within 0.1)': all(abs(work[n] - 1) < 0.1 for n in work if n != attention),
      'sequential operations of RNNs grow as T (within 0.1)': all(abs(wait[n] - 1) < 0.1 for n in recurrent_names),
      'and those of CNN and attention not at all': all(abs(wait[n]) < 0.1 for n in wait if n not in recurrent_names),
  }
  return Result(
      name='E7e',
      claim='Attention pays for its short paths with arithmetic that grows with the square of the length; an RNN pays '
      'with operations that wait for one another.',
      criterion='; '.join(conditions),
      measured={'lengths': list(lengths), 'width': width, 'flops': flops, 'sequential_operations': chains,
                'power_of_flops': work, 'power_of_sequential_operations': wait, 'xla_flops_over_these': share,
                'conditions': conditions},
      verdict='holds' if all(conditions.values()) and share['LSTM'] < 0.9 and min(share['CNN'], share[attention]) >= 1
      else 'fails',
      control="XLA's own count charges a loop's body once, so it must miss most of the LSTM's recurrence: "
      f"{share['LSTM']:.2f} of the products counted here; where there is no loop it has all, and elementwise ones "
      f"too: CNN {share['CNN']:.2f}, Transformer {share[attention]:.2f}.",
      draw=lambda: plot_by_distance('matrix products of a forward pass', {n: (lengths, v) for n, v in flops.items()},
                                    'FLOPs', xlabel='length T', log_y=True))


def _chain(config, length: int) -> int:
  model, params = at_first(config, 0)
  apply = partial(model.apply, method='hidden')
  return cost(lambda params, ids: apply({'params': params}, ids), params,
              jax.ShapeDtypeStruct((1, length), jnp.int32)).chain


def _exploding_slope(seed: int) -> float:
  """Of a tanh RNN that rests at 0, where tanh is linear, with a recurrent matrix of singular values 1.5."""
  width, length = 8, 32
  model, params = at_first(recurrent(width, d_model=width), seed)
  cell = params['decoder']['layers_0']  # orthogonal at first, with biases of 0
  readout = params['decoder']['readout']['maps']
  unit = jnp.eye(width)[None]
  params = {**params, 'target_embedding': {'table': jnp.zeros((VOCAB, width))}, 'decoder': {
      'layers_0': {**cell, 'kernel': unit, 'recurrent': 1.5 * cell['recurrent']},
      'readout': {'maps': {**readout, 'kernel': unit}}}}
  norms = np.asarray(gradient_norms(model, params, jnp.zeros((1, length), jnp.int32)), np.float64)
  return log_slope(range(length), norms)
