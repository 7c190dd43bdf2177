"""The input pipeline alone: tokens a second, padding and shapes, beside what a training step consumes.

    TFM_DATA=DIR python benchmarks/data_pipeline.py [--buckets N] [--consumption TOKENS_PER_SECOND] [--rounds 5]
        [--output FILE.json]

DIR holds multi30k/ (train.en.gz, train.de.gz and so on), which is measured padded, in the shapes of its recipe or N,
and packed, in one; without it only the embedded corpus is measured, numbers in words, whose sentences are drawn,
spelled and tokenised on the way. Tokens are those of the target that a step learns from; at the end of a pair another
one follows in its row, which is not learned, so that position counts as padding. The clock runs over epochs of
`batch_at`, on one thread as in training; reading, tokenizer and plan are apart.
The consumption is measured in the same run, of `training_step.py`'s tiny shape with dropout, unless it is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import training_step
from side_by_side import RESULTS, alternate, running, serve, summary, write

from tfm.config import Config, DataConfig
from tfm.recipe import read_recipe

HERE = Path(__file__).resolve().parent
RECIPES = {'multi30k': 'multi30k_en_de.py', 'multi30k packed': 'multi30k_en_de.py', 'numbers': 'numbers_en_de.py'}
NEEDED = 20
"""On CPU the pipeline should make so many times what a step consumes, so that it never shows."""


def config_of(corpus: str, buckets: int | None, small: bool) -> Config:
  config, _ = read_recipe(HERE.parent / 'configs' / RECIPES[corpus])
  changes = {} if buckets is None else {'buckets': buckets}
  if corpus == 'multi30k packed':
    changes |= {'packing': 'packed', 'buckets': DataConfig.buckets}
  if corpus != 'numbers':
    changes['root'] = str(data_folder())
  elif small:
    changes |= {'limit': 1000, 'held_out': 10}
  return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def data_folder() -> Path:
  return Path(os.environ.get('TFM_DATA', '')) / 'multi30k'


def prepare(corpus: str, buckets: int | None, small: bool):
  """Facts of the first epoch, and what times the next ones."""
  from tfm.text.corpora import build_corpus
  from tfm.text.objectives import build_batches
  from tfm.text.tokenizer import train_tokenizers
  config, marks = config_of(corpus, buckets, small), [time.perf_counter()]
  texts = build_corpus(config.data)
  marks.append(time.perf_counter())
  tokenizers = train_tokenizers(config.tokenizer, texts.tokenizer_texts())
  marks.append(time.perf_counter())
  batches = build_batches(config, texts, tokenizers)
  marks.append(time.perf_counter())
  steps = batches.steps_per_epoch
  first = [batches.batch_at(step) for step in range(steps)]
  tokens = sum(labels(*batch) for batch in first)
  real = tokens + sum(int((source != 0).sum()) for source, *_ in first)
  positions = sum(source.size + target[:, 1:].size for source, target, *_ in first)
  sizes = sorted({(len(source), source.shape[1], target.shape[1] - 1) for source, target, *_ in first})
  facts = {'work': {'tokens': tokens}, 'steps': steps, 'padding': 1 - real / positions, 'shapes': sizes,
           'preparation_seconds': dict(zip(('corpus', 'tokenizer', 'batches'), np.diff(marks).tolist()))}
  epochs = iter(range(1, 10**9))

  def run(count: int) -> list[float]:
    seconds = []
    for epoch in (next(epochs) for _ in range(count)):
      began = time.perf_counter()
      for step in range(epoch * steps, (epoch + 1) * steps):
        batches.batch_at(step)
      seconds.append(time.perf_counter() - began)
    return seconds

  return facts, run


def labels(source_BxS: np.ndarray, target_BxT: np.ndarray, *segments: np.ndarray) -> int:
  """Tokens of a batch that a step learns from."""
  counts_BxT = target_BxT[:, 1:] != 0
  if segments:
    counts_BxT &= segments[1][:, 1:] == segments[1][:, :-1]
  return int(counts_BxT.sum())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--buckets', type=int, help="shapes at most; the recipe's number if left out")
  parser.add_argument('--consumption', type=float, metavar='TOKENS_PER_SECOND', help='measured if left out')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--turn', type=float, default=2.0, help='seconds of a turn')
  parser.add_argument('--small', action='store_true', help='small numbers and a small step, to see that it runs')
  parser.add_argument('--output', type=Path, default=RESULTS / 'data_pipeline.json')
  parser.add_argument('--engine', choices=RECIPES, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.engine:
    return serve(lambda: prepare(arguments.engine, arguments.buckets, arguments.small))
  corpora = [name for name in RECIPES if name == 'numbers' or (data_folder().is_dir() and not arguments.small)]
  commands = {name: [str(HERE / 'data_pipeline.py'), '--engine', name, *['--small'] * arguments.small,
                     *(['--buckets', str(arguments.buckets)] if arguments.buckets else [])] for name in corpora}
  shape = 'small' if arguments.small else 'tiny'
  if arguments.consumption is None:
    commands['step'] = training_step.command('tfm', shape, 0.1)
  with running(commands) as engines:
    found = alternate(engines, 2 if arguments.small else arguments.rounds, 0.02 if arguments.small else arguments.turn)
  consumption = arguments.consumption
  if consumption is None:
    tokens = training_step.shapes.SHAPES[shape].rows * training_step.shapes.SHAPES[shape].length
    consumption = summary(found.pop('step'), {'tokens': tokens})['tokens_per_second']
  rows = []
  for name, rounds in found.items():
    facts = engines[name].facts
    row = {'corpus': name, **facts, **summary(rounds, facts['work']), 'consumption_tokens_per_second': consumption}
    row['times_consumption'] = row['tokens_per_second'] / consumption
    rows.append(row)
    print(f'{name:15} {row["tokens_per_second"]:10,.0f} tokens/s, {row["times_consumption"]:.0f} times the step\'s '
          f'{consumption:,.0f} (needed: {NEEDED}); {row["padding"]:.1%} of positions are padding, {len(row["shapes"])} '
          f'shapes; beforehand {sum(row["preparation_seconds"].values()):.1f} s')
  if 'multi30k' not in found and not arguments.small:
    print('multi30k was not measured: set TFM_DATA to the folder that holds multi30k/.')
  write(arguments.output, rows=rows)


if __name__ == '__main__':
  main()
