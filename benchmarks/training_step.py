"""A training step of tfm beside PyTorch's: one batch, float32, the same weights, in turn.

    pip install -e '.[bench]'
    python benchmarks/training_step.py [--shapes base tiny nanogpt] [--dropout 0 0.1] [--padded] [--compile]
        [--nanogpt FOLDER] [--rounds 6] [--output FILE.json]

base and tiny are encoder-decoders with label smoothing 0.1 and Adam; nanogpt is its recipe for a CPU, without dropout:

- tfm: the step of train.py with its defaults.
- torch: nn.Transformer, eager, fused Adam; dropout where the paper has it. torch_stock, where there is dropout:
  nn.Transformer's own, on attention patterns and activations too. --compile: torch_compile.
- marian, gpt2: MarianMTModel and GPT2LMHeadModel of transformers, fused Adam.
- nanogpt: https://github.com/karpathy/nanoGPT is no package: --nanogpt takes the folder of a clone.

Ratios are to torch, of nanogpt to nanogpt where it is given and to gpt2 where not. Without dropout the losses of the
first steps say that all compute the same. FLOPs are those of the matrix products, all T x T scores, backward = 2 x
forward, look-ups and logits of padding as `tfm.parallel.flops` counts them; the limit is JAX's product of 2,048-cubed
in the same run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import limits
import shapes
from side_by_side import RESULTS, alternate, ratio, running, serve, summary, write

WARM = 3


def prepare_tfm(shape: shapes.Shape, dropout: float, padded: bool, warm: int):
  from tfm_step import Training
  batch = shape.batch(padded) if shape.model.shape == 'encoder_decoder' else (shape.batch(padded)[0], None)
  training = Training(shape.config(dropout), shape.vocabulary, batch)
  return {'losses': training.run(warm)}, lambda count: [training.seconds(count)]


def write_weights(folder: Path, shape: shapes.Shape) -> None:
  """For the peers: the parameters that tfm begins with by path, with the table of positions, and a MarianMT where the
  model is one. In a process of its own: one that did this before trains 2 to 12 % slower."""
  import numpy as np

  from tfm.interop.huggingface import to_huggingface
  from tfm.models.build import build_model
  from tfm.models.layout import to_layout
  from tfm.models.positions import sinusoidal
  from tfm.special_ids import OURS
  from tfm.training.named_arrays import named_leaves
  from tfm.training.step import fresh_state
  config = shape.config(0.0)
  c = config.model
  params = fresh_state(config, build_model(c, shape.vocabulary, shape.vocabulary)).params
  positions = np.asarray(sinusoidal(np.arange(shape.length), c.d_model, halves=True))
  arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(to_layout(params, 'unrolled')).items()}
  np.savez(folder / 'weights.npz', positions=positions, **arrays)
  if c.shape == 'encoder_decoder':
    to_huggingface(folder / 'marian', c, params, OURS, 'marian')


def engines_of(shape: shapes.Shape, dropout: float, arguments) -> tuple[list[str], str]:
  """The peers of a model, and which of them is the baseline."""
  if shape.model.shape == 'decoder_only':
    given = arguments.nanogpt is not None
    return ['gpt2', *['nanogpt'] * given], 'nanogpt' if given else 'gpt2'
  return ['torch', *['torch_stock'] * (dropout > 0), *['torch_compile'] * arguments.compile, 'marian'], 'torch'


def command(engine: str, shape: str, dropout: float, *more: str) -> list[str]:
  return [str(Path(__file__).resolve()), '--engine', engine, '--shapes', shape, '--dropout', str(dropout), *more]


def measure(name: str, dropout: float, arguments) -> list[dict]:
  from tfm.parallel.flops import model_flops
  shape = shapes.SHAPES[name]
  peers, baseline = engines_of(shape, dropout, arguments)
  tokens = int((shape.batch(arguments.padded)[1][:, 1:] != 0).sum())
  flops = model_flops(shape.model, shape.vocabulary, shape.rows, shape.length, shape.length, halve_causal=False).step
  with tempfile.TemporaryDirectory() as weights:
    more = ['--weights', weights, *['--padded'] * arguments.padded]
    more += ['--nanogpt', arguments.nanogpt] if arguments.nanogpt else []
    subprocess.run([sys.executable, *command('write_weights', name, dropout, *more)], check=True)
    commands = {engine: command(engine, name, dropout, *more) for engine in ('tfm', *peers)}
    with running(commands | limits.commands('matmul')) as engines:
      found = alternate(engines, arguments.rounds, arguments.turn)
  limit = summary(found.pop('matmul'), engines['matmul'].facts['work'])['flops_per_second']
  rows = []
  for engine, rounds in found.items():
    row = {'shape': name, 'dropout': dropout, 'padded': arguments.padded, 'engine': engine, **engines[engine].facts,
           **summary(rounds, {'tokens': tokens, 'flops': flops}), 'baseline': baseline,
           **ratio(rounds, found[baseline]), 'limit_flops_per_second': limit}
    row['share_of_limit'] = row['flops_per_second'] / limit
    rows.append(row)
    print(f'{name:9} dropout {dropout:3} {engine:13} {1e3 * row["seconds"]:8.1f} ms '
          f'[{1e3 * row["range"][0]:.1f}, {1e3 * row["range"][1]:.1f}] {row["tokens_per_second"]:8.0f} tokens/s '
          f'{row["flops_per_second"] / 1e9:6.1f} GFLOP/s = {row["share_of_limit"]:4.0%} of the limit, '
          f'x{row["ratio"]:.2f} [{row["ratio_range"][0]:.2f}, {row["ratio_range"][1]:.2f}] of {baseline}', flush=True)
  if dropout == 0:
    apart = max(abs(a - b) for row in rows for a, b in zip(row['losses'], rows[0]['losses']))
    print(f'{name:9} losses of the first steps {rows[0]["losses"]}, no engine is further away than {apart:.1e}',
          flush=True)
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shapes', nargs='+', choices=shapes.SHAPES, default=['base', 'tiny', 'nanogpt'])
  parser.add_argument('--dropout', type=float, nargs='+', default=[0.0, 0.1], help='of encoder-decoders')
  parser.add_argument('--padded', action='store_true', help='rows of encoder-decoders are half full to full')
  parser.add_argument('--compile', action='store_true', help='torch.compile too: minutes to begin with')
  parser.add_argument('--nanogpt', metavar='FOLDER', help='a clone of nanoGPT')
  parser.add_argument('--rounds', type=int, default=6)
  parser.add_argument('--turn', type=float, default=2.0, help='seconds of a turn')
  parser.add_argument('--small', action='store_true', help='two shapes of one layer, to see that it runs')
  parser.add_argument('--output', type=Path, default=RESULTS / 'training_step.json')
  for hidden in ('--engine', '--weights'):
    parser.add_argument(hidden, help=argparse.SUPPRESS)
  parser.add_argument('--warm', type=int, default=WARM, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.engine:
    if arguments.engine == 'write_weights':
      return write_weights(Path(arguments.weights), shapes.SHAPES[arguments.shapes[0]])
    return serve(lambda: engine(arguments))
  if arguments.small:
    arguments.shapes, arguments.rounds, arguments.turn = ['small', 'small_gpt'], 2, 0.02
  rows = []
  for name in arguments.shapes:
    language = shapes.SHAPES[name].model.shape == 'decoder_only'
    for dropout in [0.0] if language else arguments.dropout:
      rows += measure(name, dropout, argparse.Namespace(**vars(arguments) | {'padded': arguments.padded > language}))
  write(arguments.output, rows=rows)


def engine(arguments):
  """One engine's facts and its clock."""
  shape, dropout = shapes.SHAPES[arguments.shapes[0]], arguments.dropout[0]
  weights = arguments.weights and Path(arguments.weights)
  if arguments.engine == 'tfm':
    return prepare_tfm(shape, dropout, arguments.padded, arguments.warm)
  import torch_step
  return torch_step.prepare(arguments.engine, shape, dropout, arguments.padded, weights, arguments.nanogpt,
                            arguments.warm)


if __name__ == '__main__':
  main()
