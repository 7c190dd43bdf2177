"""What a GPU or TPU reaches: training steps with their MFU and roofline, and decoding at batch 1 with its own.

    python benchmarks/accelerator.py [--chip h200] [--only base big 1b_2k 1b_8k decoding] [--profile FOLDER]
        [--output FILE.json]
    python benchmarks/attention.py

bfloat16, one device, random ids, no padding, no dropout:

- base, big: Transformer-base and -big, 256 rows of 96 + 96 tokens, 37,000 words. 1b_2k, 1b_8k: a language model of
  950 million parameters (16 layers of width 2,048, RMS norm, rope, SwiGLU, 32,000 words), 16 rows of 2,048 and 4 of
  8,192 tokens. Where a batch does not fit, half as many rows are tried, and the row says how many it was.
- decoding: the language model continues one prompt by 256 tokens, weights in bfloat16.

MFU: model FLOPs as `tfm.parallel.flops` counts them (a causal query is charged for the keys it may see; 3 x forward;
recomputation does not count) over seconds times the peak of the chip. `mfu_full` charges all T x T scores, as PyTorch's
published figures do. The roofline is `tfm plan`'s: the longer of products at peak and bytes at full bandwidth. The
limit of decoding is reading every weight once a token.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from shapes import Shape
from side_by_side import RESULTS, alternate, each, summary, write
from tfm_step import Training

from tfm.config import TokenizerConfig, TransformerConfig
from tfm.generator import Generator
from tfm.models.build import build_model, count_parameters, initialize
from tfm.parallel.chips import Chip, chip_named
from tfm.parallel.estimate import estimate
from tfm.parallel.flops import model_flops
from tfm.parallel.mesh import AXES
from tfm.special_ids import SpecialIds
from tfm.text.buckets import Shape as BatchShape
from tfm.text.tokenizer import train_tokenizers

_PAPER = dict(dtype='bfloat16', scan_layers=True)
_BILLION = TransformerConfig(0, 16, 2048, 5632, 16, norm='pre', norm_type='rms', positions='rope',
                             feed_forward='swiglu', biases='none', tying='none', scale_embeddings=False, **_PAPER)
SHAPES = {
    'base': Shape(TransformerConfig(6, 6, 512, 2048, 8, **_PAPER), 37_000, 256, 96),
    'big': Shape(TransformerConfig(6, 6, 1024, 4096, 16, **_PAPER), 37_000, 256, 96),
    '1b_2k': Shape(_BILLION, 32_000, 16, 2048),
    '1b_8k': Shape(_BILLION, 32_000, 4, 8192),
}
DECODING, NEW_TOKENS = 'decoding', 256


def small(shape: Shape) -> Shape:
  layers = {name: min(1, getattr(shape.model, name)) for name in ('encoder_layers', 'decoder_layers')}
  return Shape(dataclasses.replace(shape.model, d_model=32, d_ff=64, num_heads=2, **layers), 300, 4, 16)


def with_remat(shape: Shape, remat: str) -> Shape:
  return dataclasses.replace(shape, model=dataclasses.replace(shape.model, remat=remat))


class Step:
  """A training step on one batch, compiled and run once; as `alternate` wants an engine."""

  def __init__(self, shape: Shape):
    batch = shape.batch(padded=False)
    if shape.model.shape == 'decoder_only':
      batch = batch[0], None
    self.training = Training(shape.config(0.0), shape.vocabulary, batch)
    self.training.run(1)

  def go(self, count: int) -> list[float]:
    return [self.training.seconds(count)]


def fitting(shape: Shape) -> tuple[Shape, Step]:
  """The step with as many rows as fit: half of them again and again."""
  while True:
    try:
      return shape, Step(shape)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error) or shape.rows == 1:
        raise
      shape = dataclasses.replace(shape, rows=shape.rows // 2)


def training_row(name: str, shape: Shape, chip: Chip, rounds: int, turn: float, profile: Path | None) -> dict:
  shape, step = fitting(shape)
  found = alternate({name: step}, rounds, turn)[name]
  if profile is not None:
    with jax.profiler.trace(str(profile / name)):
      step.go(3)
  sizes = shape.rows, shape.length, shape.length
  halved, full = (model_flops(shape.model, shape.vocabulary, *sizes, halve_causal=halve).step
                  for halve in (True, False))
  row = {'name': name, 'rows': shape.rows, 'length': shape.length, 'remat': shape.model.remat,
         'parameters': count_parameters(step.training.state.params),
         **summary(found, {'tokens': shape.rows * shape.length, 'flops': halved})}
  bound = estimate(step.training.config, dict.fromkeys(AXES, 1), shape.vocabulary,
                   BatchShape(shape.rows, shape.length, shape.length + 1), chip).roofline
  return row | {'mfu': halved / row['seconds'] / chip.bf16_flops, 'mfu_full': full / row['seconds'] / chip.bf16_flops,
                'roofline_seconds': bound.overlapped, 'roofline_limit': bound.limit,
                'share_of_roofline': bound.overlapped / row['seconds']}


def decoding_row(shape: Shape, chip: Chip, rounds: int, turn: float) -> dict:
  model = build_model(shape.model, shape.vocabulary, shape.vocabulary)
  params = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), initialize(model, key)))(
      jax.random.key(0))
  words = [f'w{number}' for number in range(shape.vocabulary - 260)]
  tokenizers = train_tokenizers(TokenizerConfig(kind='word', vocab_size=shape.vocabulary), [(' '.join(words),)])
  # No id ends a text, so that all are equally long.
  generator = Generator(model, params, tokenizers, SpecialIds(ends=(), source_prefix=(1,)))
  write_some = functools.partial(generator.generate, [' '.join(words[:16])], max_new_tokens=NEW_TOKENS)
  engine = argparse.Namespace(go=each(write_some))
  write_some()
  found = alternate({DECODING: engine}, rounds, turn)[DECODING]
  row = {'name': DECODING, 'parameters': count_parameters(params), 'rows': 1, 'length': NEW_TOKENS,
         **summary(found, {'tokens': NEW_TOKENS})}
  read = count_parameters(params) - params['target_embedding']['table'].size  # one row of it is looked up
  row['roofline_seconds'] = NEW_TOKENS * 2 * read / chip.bandwidth
  return row | {'roofline_limit': 'hbm', 'share_of_roofline': row['roofline_seconds'] / row['seconds']}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--chip', default='h200', help='whose peaks it is measured against, as in tfm plan')
  parser.add_argument('--only', nargs='+', choices=[*SHAPES, DECODING], default=[*SHAPES, DECODING])
  parser.add_argument('--remat', choices=('none', 'dots', 'full'), default='none')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--turn', type=float, default=2.0, help='seconds of a turn')
  parser.add_argument('--profile', type=Path, help="a folder for JAX's profile of three steps of each")
  parser.add_argument('--small', action='store_true', help='one layer, on any device, to see that it runs')
  parser.add_argument('--output', type=Path, default=RESULTS / 'accelerator.json')
  arguments = parser.parse_args()
  if jax.default_backend() == 'cpu' and not arguments.small:
    print('There is no accelerator here (JAX sees cpu), so nothing was measured.')
    return
  chip, rounds, turn = chip_named(arguments.chip), arguments.rounds, arguments.turn
  shapes = SHAPES
  if arguments.small:
    shapes, rounds, turn = {name: small(shape) for name, shape in SHAPES.items()}, 2, 0.02
  rows = []
  for name in arguments.only:
    try:
      row = decoding_row(shapes['1b_2k'], chip, rounds, turn) if name == DECODING else training_row(
          name, with_remat(shapes[name], arguments.remat), chip, rounds, turn, arguments.profile)
    except Exception as error:  # said here, and the others are still measured
      row = {'name': name, 'reason': f'{type(error).__name__}: {str(error).splitlines()[0]}'[:200]}
    rows.append(row)
    print(line(row), flush=True)
    write(arguments.output, device=str(jax.devices()[0].device_kind), chip=chip.name, bf16_flops=chip.bf16_flops,
          bandwidth=chip.bandwidth, rows=rows)


def line(row: dict) -> str:
  if 'reason' in row:
    return f'{row["name"]:9} {row["reason"]}'
  mfu = f'MFU {row["mfu"]:.1%} ({row["mfu_full"]:.1%} with all T x T scores), ' if 'mfu' in row else ''
  return (f'{row["name"]:9} {row["parameters"] / 1e6:.0f} M parameters, {row["rows"]} x {row["length"]} tokens: '
          f'{1e3 * row["seconds"]:.2f} ms, {row["tokens_per_second"]:,.0f} tokens/s, {mfu}'
          f'{row["share_of_roofline"]:.1%} of the roofline ({row["roofline_limit"]})')


if __name__ == '__main__':
  main()
