"""`tfm compare`: models of several kinds on the same data, with the same budget, decoding and measures."""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from tfm.errors import UserError

if TYPE_CHECKING:
  from tfm.config import Config
  from tfm.text.corpora import Pair

log = logging.getLogger('tfm')

TOLERANCE = 0.05
"""Models may have this much fewer or more parameters than the middle between the smallest and the largest."""

POSITIONS = (0, 2, 4, 6, 8, 10, 12, 15, 20, 30, 10_000)
"""Edges of the groups of target places for which accuracy is taken."""


def compare(
    recipe: tyro.conf.Positional[Path],
    /,
    output: Path | None = None,
    only: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0,),
    root: str | None = None,
    steps: int | None = None,
    measure_only: bool = False,
) -> None:
  """Train the models of a recipe that are not trained yet, measure all, and write a table and figures.

  Every model and seed has a run folder of its own in the output folder, in which training resumes by itself; so the
  command can be stopped and given again, or the runs be trained by train.py, at the same time or elsewhere.

  Args:
    recipe: Python file that defines `configs`, a Config for each model by name, alike but for model and optimizer.
    output: Folder of runs, table and figures; runs/ and the name of the recipe if left out.
    only: Names of the models; all if left out.
    seeds: Each model is trained once with every seed.
    root: Instead of data.root.
    steps: Instead of training.steps.
    measure_only: Leave out models that are not trained to the end, instead of training them.
  """
  from tfm.config import ConfigError
  from tfm.recipe import read_comparison
  from tfm.text.corpora import build_corpus
  from tfm.training.compilation_cache import use_compilation_cache
  from tfm.training.loop import train
  use_compilation_cache()
  output = Path('runs', recipe.stem) if output is None else output
  configs = {name: _changed(config, root, steps) for name, config in read_comparison(recipe, only).items()}
  sizes = require_comparable(configs)
  log.info('Parameters: %s', ', '.join(f'{name} {size:,}' for name, size in sizes.items()))
  if len(set(seeds)) < len(seeds) or not seeds:
    raise UserError(f'--seeds are {seeds}; give each number once, and at least one.')
  pairs = build_corpus(next(iter(configs.values())).data).test()
  if pairs is None:
    raise ConfigError(f'{recipe} has no test set; set data.test.')
  found: dict[str, list[dict[str, Any]]] = {}
  for seed in seeds:
    for name, config in configs.items():
      run = output / f'{name}-{seed}'
      config = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))
      if not measure_only:
        outcome = train(config, str(run))
        if outcome.reason.startswith('SIG'):
          raise UserError(f'Stopped by {outcome.reason} in {run}; give the command again to go on.')
      elif not _is_trained(run, config):
        log.warning('%s is not trained to step %d; left out.', run, config.training.steps)
        continue
      found.setdefault(name, []).append({'seed': seed, 'parameters': sizes[name], **measured(run, pairs)})
  if not found:
    raise UserError(f'No model in {output} is trained to the end; leave out --measure-only to train them.')
  print(write_report(found, configs, output))


def require_comparable(configs: dict[str, Config]) -> dict[str, int]:
  """Parameters of each model; `ConfigError` unless data, budget, decoding and size are the same."""
  import jax

  from tfm.config import require
  from tfm.models.build import build_model, count_parameters, initialize
  first_name, first = next(iter(configs.items()))
  sizes = {}
  for name, config in configs.items():
    require(config.objective == 'translation', f'{name} does not translate; compare translators.')
    for section in ('data', 'tokenizer', 'training', 'decoding'):
      require(getattr(config, section) == getattr(first, section),
              f"{name} and {first_name} differ in '{section}'; only model and optimizer may differ.")
    require(config.optimizer.label_smoothing == first.optimizer.label_smoothing,
            f'{name} and {first_name} differ in optimizer.label_smoothing; make them equal.')
    model = build_model(config.model, *[config.tokenizer.vocab_size or 260] * 2)
    sizes[name] = count_parameters(jax.eval_shape(lambda key, model=model: initialize(model, key), jax.random.key(0)))
  middle = (min(sizes.values()) + max(sizes.values())) / 2
  require(max(sizes.values()) <= (1 + TOLERANCE) * middle,
          f'The models differ by more than +-{TOLERANCE:.0%} in size: '
          f'{", ".join(f"{name} {size:,}" for name, size in sizes.items())}; change their widths.')
  return sizes


def _changed(config: Config, root: str | None, steps: int | None) -> Config:
  data = config.data if root is None else dataclasses.replace(config.data, root=root)
  training = config.training if steps is None else dataclasses.replace(config.training, steps=steps)
  return dataclasses.replace(config, data=data, training=training)


def _is_trained(run: Path, config: Config) -> bool:
  from tfm.training.average import run_checkpoints
  from tfm.training.run_folder import RunFolder
  folder = RunFolder(run)
  return folder.is_run() and max(run_checkpoints(folder, config).steps(), default=0) >= config.training.steps


# -- measures ---------------------------------------------------------------------------------------------------------


def measured(run: Path, pairs: Sequence[Pair]) -> dict[str, Any]:
  """All figures of a trained translator on these pairs (JSON values)."""
  import numpy as np

  from tfm.analysis.comparison import accuracy_by_position, forced_tokens
  from tfm.pipeline import load
  from tfm.scores import bleu, chrf, exact_match, tokenized_bleu
  from tfm.text.objectives import build_evaluation_batches
  from tfm.training.metrics import read_records
  from tfm.training.run_folder import RunFolder
  from tfm.translator import one_line
  folder = RunFolder(run)
  config, translator = folder.read_config(), load(run)
  sources, references = map(list, zip(*pairs))
  found = translator.translate(sources)
  hypotheses = [one_line(translation.text) for translation in found]
  tokens = forced_tokens(translator.model, translator.params,
                         build_evaluation_batches(config, pairs, translator.tokenizers))
  try:
    lower = tokenized_bleu(hypotheses, references, config.data.target).value
  except ModuleNotFoundError:  # sacremoses, an extra
    lower = None
  rates = [record['tokens_per_second'] for record in read_records(folder.timing) if 'tokens_per_second' in record]
  score = bleu(hypotheses, references, bootstrap=True)
  return {
      'nll': float(np.mean(tokens.nll)), 'accuracy': float(np.mean(tokens.correct)),
      'bleu': score.value, 'interval': score.interval, 'signature': score.signature, 'tokenized_bleu': lower,
      'chrf': chrf(hypotheses, references).value, 'exact': exact_match(hypotheses, references),
      'tokens_per_second': statistics.median(rates) if rates else None,
      'accuracy_by_position': accuracy_by_position(tokens, [p for p in POSITIONS if p <= tokens.position.max()]),
      'source_lengths': [len(translation.source_tokens) for translation in found],
      'hypotheses': hypotheses, 'references': references}


# -- the report -------------------------------------------------------------------------------------------------------


def write_report(found: dict[str, list[dict[str, Any]]], configs: dict[str, Config], output: Path) -> str:
  """Write comparison.json, comparison.md and the figures; returns the page."""
  from tfm.analysis.comparison import length_groups, scores_by_length, sequential_steps
  from tfm.scores import has_4_grams, paired_bootstrap
  first = {name: runs[0] for name, runs in found.items()}
  best = max(first, key=lambda name: first[name]['bleu'])
  references, lengths = first[best]['references'], first[best]['source_lengths']
  groups, mean = length_groups(lengths), round(statistics.mean(lengths))
  by_length = {name: scores_by_length(run['hypotheses'], references, lengths, groups) for name, run in first.items()}
  chain = {name: sequential_steps(configs[name].model, mean, mean) for name in first}
  systems = {name: first[name]['hypotheses'] for name in [best, *(name for name in first if name != best)]}
  config = configs[best]
  counted = 'bleu' if has_4_grams(references) else 'exact'
  title = {'bleu': 'BLEU', 'exact': 'Exact match, per cent,'}[counted]
  page = [
      f'# {output.name}', '',
      f'{config.training.steps:,} updates of up to {config.data.tokens_per_batch:,} tokens each, beam '
      f'{config.decoding.beam_size}, {len(references):,} test sentences; seed{"s" if len(found[best]) > 1 else ""} '
      f'{", ".join(str(run["seed"]) for run in found[best])}. nll and accuracy are of target tokens, teacher forced; '
      f'+- is the 95 % bootstrap interval over sentences. Sequential steps are those of a training pass over {mean} '
      f'and {mean} tokens.', '',
      '| model | parameters | nll | accuracy | BLEU | BLEU, lower-cased tokens | chrF2 | exact | tokens/s | '
      'sequential steps |', '|---' * 10 + '|',
      *(_row(name, runs, chain[name]) for name, runs in found.items()), '',
      f'Signature: {first[best]["signature"]}', '',
      f'## {title} by source length', '', f'| tokens | {" | ".join(f"{low}-{high - 1}" for low, high in groups)} |',
      '|---' * (len(groups) + 1) + '|',
      *(f'| {name} | {" | ".join(_of_group(group, counted) for group in by_length[name])} |' for name in first), '']
  if len(systems) > 1:
    page += ['## Paired bootstrap against the best', '', '```', paired_bootstrap(systems, references), '```', '']
  output.mkdir(parents=True, exist_ok=True)
  page += _draw(first, by_length, chain, output, counted)
  text = '\n'.join(page) + '\n'
  (output / 'comparison.md').write_text(text, encoding='utf-8')
  kept = {name: [{key: value for key, value in run.items() if key not in ('hypotheses', 'references')}
                 for run in runs] for name, runs in found.items()}
  (output / 'comparison.json').write_text(json.dumps(
      {'models': kept, 'by_length': by_length, 'sequential_steps': chain, 'positions': POSITIONS}, indent=1) + '\n')
  return text


def _of_group(group: dict[str, float], counted: str) -> str:
  return f'{group[counted]:.1f}' + (f' +- {group["interval"]:.1f}' if counted == 'bleu' else '')


def _row(name: str, runs: list[dict[str, Any]], chain: int) -> str:
  def over_seeds(key: str, form: str) -> str:
    values = [run[key] for run in runs if run[key] is not None]
    if not values:
      return '-'
    spread = f' (sd {statistics.stdev(values):{form}})' if len(values) > 1 else ''
    return f'{statistics.mean(values):{form}}{spread}'

  interval = statistics.mean(run['interval'] for run in runs)
  return (f'| {name} | {runs[0]["parameters"]:,} | {over_seeds("nll", ".3f")} | {over_seeds("accuracy", ".3f")} | '
          f'{over_seeds("bleu", ".2f")} +- {interval:.2f} | {over_seeds("tokenized_bleu", ".2f")} | '
          f'{over_seeds("chrf", ".2f")} | {over_seeds("exact", ".1f")} | {over_seeds("tokens_per_second", ",.0f")} | '
          f'{chain} |')


def _draw(first, by_length, chain, output: Path, counted: str) -> list[str]:
  """The figures, and the lines of the page that show them; without matplotlib the line that says so."""
  try:
    import matplotlib  # noqa: F401
  except ModuleNotFoundError:
    return ["No figures: pip install 'tfm[plot]' brings matplotlib.", '']
  from tfm.analysis.comparison import plot_costs, plot_lines
  middles = {name: [(group['low'] + group['high']) / 2 for group in groups] for name, groups in by_length.items()}
  starts = {name: POSITIONS[:len(run['accuracy_by_position'])] for name, run in first.items()}
  figures = {
      f'{counted}_by_length': plot_lines({name: (middles[name], [group[counted] for group in groups])
                                          for name, groups in by_length.items()}, 'source length, tokens',
                                         {'bleu': 'BLEU', 'exact': 'exact match, per cent'}[counted]),
      'accuracy_by_position': plot_lines({name: (starts[name], run['accuracy_by_position'])
                                          for name, run in first.items()},
                                         'place in the target, tokens from its beginning', 'accuracy, teacher forced'),
      'costs': plot_costs({name: (run['tokens_per_second'] or 0.0, chain[name]) for name, run in first.items()})}
  for name, figure in figures.items():
    figure.savefig(output / f'{name}.png', dpi=130)
  return [line for name in figures for line in (f'![{name.replace("_", " ")}]({name}.png)', '')]
