"""`tfm evaluate`: figures of one run, or of several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from tfm.errors import UserError


def evaluate(
    runs: tyro.conf.Positional[tuple[str, ...]],
    /,
    step: int | Literal['best'] | None = None,
    source: Path | None = None,
    reference: Path | None = None,
    beam_size: int | None = None,
    length_penalty: float | None = None,
    output: Path | None = None,
) -> None:
  """Translators: BLEU and chrF with signatures and bootstrap intervals; several are compared by paired bootstrap.
  Language models: nll, perplexity and accuracy on the test set of the run's config.

  Args:
    runs: Run folders; the first is the baseline of the comparison.
    step: Which checkpoint of each: a number, 'best' (of the validated ones), or the newest if left out.
    source: Text file to translate; the test set of the run's config if left out.
    reference: Its translation, line by line.
    beam_size: The run's setting if left out.
    length_penalty: The run's setting if left out.
    output: Write the translations of the first run here.
  """
  from tfm.training.run_folder import RunFolder
  if not runs:
    raise UserError('Name at least one run folder.')
  if len(set(runs)) < len(runs):
    raise UserError('A run folder is named twice; name each once.')
  given = {'--source': source, '--reference': reference, '--beam-size': beam_size, '--length-penalty': length_penalty,
           '--output': output}
  config = RunFolder(runs[0]).read_config()
  if config.objective == 'translation':
    return _translators(runs, step, config.data, *given.values())
  if unused := [name for name, value in given.items() if value is not None]:
    raise UserError(f'{runs[0]} does not translate, so {" and ".join(unused)} would have no effect; leave '
                    f'{"it" if len(unused) == 1 else "them"} out.')
  return _language_models(runs, step)


def _translators(runs, step, data, source, reference, beam_size, length_penalty, output) -> None:
  from tfm.pipeline import open_run
  from tfm.scores import bleu, chrf, exact_match, paired_bootstrap, tokenized_bleu
  from tfm.translator import Translator, one_line
  sources, references = _sentences(runs[0], data, source, reference)
  systems = {}
  for run in runs:
    translator = open_run(run, step)
    if not isinstance(translator, Translator):
      raise UserError(f'{run} does not translate and cannot be compared with {runs[0]}; evaluate it by itself.')
    found = translator.translate(sources, beam_size=beam_size, length_penalty=length_penalty)
    hypotheses = systems[run] = [one_line(translation.text) for translation in found]
    print(run)
    print(f'  {bleu(hypotheses, references, bootstrap=True)}')
    print(f'  {chrf(hypotheses, references, bootstrap=True)}')
    try:
      print(f'  {tokenized_bleu(hypotheses, references, data.target, bootstrap=True)}')
    except ModuleNotFoundError as error:
      print(f'  {error}')
    print(f'  exact match {exact_match(hypotheses, references):.1f} %')
  if len(systems) > 1:
    print('paired bootstrap against the first:')
    print(paired_bootstrap(systems, references))
  if output is not None:
    output.write_text('\n'.join(systems[runs[0]]) + '\n', encoding='utf-8')


def _sentences(run: str, data, source: Path | None, reference: Path | None) -> tuple[list[str], list[str]]:
  from tfm.text.corpora import build_corpus, read_lines
  if (source is None) != (reference is None):
    raise UserError('Give both --source and --reference, or neither for the test set of the run.')
  if source is None:
    pairs = build_corpus(data).test()
    if pairs is None:
      raise UserError(f'{run} has no test set (data.test); give --source and --reference.')
    sources, references = map(list, zip(*pairs))
    return sources, references
  sources, references = read_lines(source), read_lines(reference)
  if len(sources) != len(references):
    raise UserError(f'{source} has {len(sources)} lines and {reference} {len(references)}; they must match.')
  if not sources:
    raise UserError(f'{source} has no lines; give at least one sentence.')
  return sources, references


def _language_models(runs, step) -> None:
  from tfm.pipeline import open_run
  from tfm.training.report import text_report
  from tfm.training.run_folder import RunFolder
  for run in runs:
    config = RunFolder(run).read_config()
    if config.objective == 'translation':
      raise UserError(f'{run} translates and cannot be compared with {runs[0]}; evaluate it by itself.')
    print(run)
    print(text_report(open_run(run, step), config))
