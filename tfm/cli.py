"""The command line: `train.py`; `tfm translate | generate | evaluate | inspect | average | export | plan | compare |
claims`."""

from __future__ import annotations

import codecs
import io
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, TextIO

import tyro

from tfm.claims import claims
from tfm.compare import compare
from tfm.config import Config
from tfm.errors import UserError
from tfm.evaluate import evaluate
from tfm.inspect import inspect
from tfm.parallel.distributed import Distributed, leave_at_once, part
from tfm.recipe import read_recipe

log = logging.getLogger('tfm')


def main() -> None:
  """`tfm`: use trained runs, compare them, or plan one."""
  commands = {'translate': translate, 'generate': generate, 'evaluate': evaluate, 'inspect': inspect,
              'average': average, 'export': export, 'plan': plan, 'compare': compare, 'claims': claims}
  _run(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog='tfm', description='Use, compare and plan runs.'))


def _run(command: Callable[[], None]) -> None:
  """Run a command; what the user can mend is one sentence on stderr, not a traceback."""
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  log.setLevel(logging.INFO)
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(encoding='utf-8')  # as text is read, whatever the locale
  try:
    command()
  except BrokenPipeError:
    sys.stderr.close()  # the reader of our output has gone; there is nobody to tell
  except (UserError, FloatingPointError, OSError, ModuleNotFoundError) as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    sys.exit(130)


# -- train.py ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainArguments:
  """What to train and where."""

  config: Annotated[Config, tyro.conf.arg(name='')]
  run: str | None = None
  """Run folder; if it holds a run, training resumes. Default: runs/ and the name of the config."""
  init_from: str | None = None
  """Take the first weights (and nothing else) from this run."""
  distributed: Distributed = field(default_factory=Distributed)


def train_main(default_config: Path, arguments: list[str] | None = None) -> None:
  """Train as the arguments say; the first one may be a config file."""
  arguments = sys.argv[1:] if arguments is None else arguments
  path = default_config
  if arguments and not arguments[0].startswith('-'):
    path, arguments = Path(arguments[0]), arguments[1:]
  _run(lambda: _train(path, arguments))


def _train(path: Path, arguments: list[str]) -> None:
  config, docstring = read_recipe(path)
  # The kind of model is the recipe's: its fields are options, the other kinds' are not.
  given = tyro.cli(TrainArguments, default=TrainArguments(config), args=arguments, prog='train.py [CONFIG.py]',
                   description=docstring, config=(tyro.conf.AvoidSubcommands,))
  from tfm.pipeline import load
  from tfm.text.corpora import build_corpus
  from tfm.training.compilation_cache import use_compilation_cache
  from tfm.training.loop import PeerLost, train
  from tfm.training.report import picture, test_report, text_report
  use_compilation_cache()
  given.distributed.initialize()
  run = given.run or str(Path('runs') / path.stem)
  try:
    outcome = train(given.config, run, given.init_from)
  except PeerLost as error:
    print(f'error: {error}', file=sys.stderr, flush=True)
    leave_at_once(1)
  part()
  log.info('Training ended at step %d (%s): %s', outcome.step, outcome.reason, outcome.folder)
  if outcome.reason.startswith('SIG') or not outcome.reports:
    return
  if given.config.objective != 'translation':
    print(text_report(load(outcome.folder), given.config))
    return
  pairs = build_corpus(given.config.data).test()
  if pairs is not None:
    translator = load(outcome.folder)
    print(test_report(translator, pairs))
    print(picture(translator, pairs[0][0], outcome.folder / 'attention.png'))


# -- tfm --------------------------------------------------------------------------------------------------------------

Step = int | Literal['best'] | None


def translate(
    run: tyro.conf.Positional[str],
    /,
    step: Step = None,
    input: Path | None = None,
    output: Path | None = None,
    beam_size: int | None = None,
    num_hypotheses: int = 1,
    length_penalty: float | None = None,
    sampling_temperature: float | None = None,
    sampling_topk: int = 0,
    sampling_topp: float = 1.0,
    seed: int = 0,
    scores: bool = False,
    chunk: int = 1024,
) -> None:
  """Translate lines: one line in, one line out, in order.

  Args:
    run: Run folder.
    step: Which checkpoint: a number, 'best' (of the validated ones), or the newest if left out.
    input: Text file, plain or .gz; standard input if left out.
    output: File to write; standard output if left out.
    beam_size: Hypotheses kept while searching; the run's setting if left out, 1 is greedy.
    num_hypotheses: Write so many lines per line: number, text and score, separated by tabs.
    length_penalty: Alpha; the run's setting if left out.
    sampling_temperature: Sample at this temperature instead of searching.
    sampling_topk: Sample from the k most probable tokens.
    sampling_topp: Sample from the most probable tokens that make up this probability.
    seed: Seed of the samples.
    scores: Write score and text, separated by a tab.
    chunk: Lines translated together; output appears after each chunk. A terminal is answered line by line.
  """
  from tfm.pipeline import open_run
  from tfm.text.corpora import read_lines
  from tfm.translator import Translator
  if chunk < 1:
    raise UserError(f'--chunk is {chunk}; give 1 or more.')
  translator = open_run(run, step)
  if not isinstance(translator, Translator):
    raise UserError(f'{run} is no encoder-decoder, so it cannot translate; try generate.')
  interactive = input is None and sys.stdin.isatty()
  lines = iter(read_lines(input)) if input is not None else _stdin_lines()
  sink = open(output, 'w', encoding='utf-8', newline='\n') if output is not None else sys.stdout
  bar = _bar(interactive)
  before = 0  # lines of earlier chunks
  try:
    while block := list(islice(lines, 1 if interactive else chunk)):
      found = translator.translate(
          block, beam_size=beam_size, num_hypotheses=num_hypotheses, length_penalty=length_penalty,
          sampling_temperature=sampling_temperature, sampling_topk=sampling_topk, sampling_topp=sampling_topp,
          seed=seed, offset=before, progress=lambda done, before=before: bar.update(before + done - bar.n))
      for number, translation in enumerate(found, before + 1):
        _write(sink, number, translation, num_hypotheses, scores)
      sink.flush()
      before += len(block)
  finally:
    bar.close()
    if output is not None:
      sink.close()


def _write(sink: TextIO, number: int, translation, num_hypotheses: int, scores: bool) -> None:
  from tfm.translator import one_line
  for hypothesis in translation.hypotheses:
    text = one_line(hypothesis.text)
    if num_hypotheses > 1:
      print(number, text, f'{hypothesis.score:.4f}', sep='\t', file=sink)
    else:
      print(*([f'{hypothesis.score:.4f}'] if scores else []), text, sep='\t', file=sink)


def _stdin_lines() -> Iterator[str]:
  """Lines of standard input by the rules of `tfm.text.corpora.read_lines`, as they come."""
  for number, line in enumerate(sys.stdin.buffer, 1):
    if number == 1:
      line = line.removeprefix(codecs.BOM_UTF8)
    try:
      yield line.decode('utf-8').removesuffix('\n').removesuffix('\r')
    except UnicodeDecodeError as error:
      raise UserError(f'Line {number} of standard input is not UTF-8 (byte {error.start + 1}); convert it.') from error


def _bar(interactive: bool):
  from tqdm import tqdm
  return tqdm(unit=' lines', file=sys.stderr, disable=interactive or not sys.stderr.isatty())


def generate(
    run: tyro.conf.Positional[str],
    /,
    prompt: str | None = None,
    step: Step = None,
    max_new_tokens: int = 256,
    sampling_temperature: float | None = None,
    sampling_topk: int = 0,
    sampling_topp: float = 1.0,
    stop: tuple[str, ...] = (),
    samples: int = 1,
    seed: int = 0,
) -> None:
  """Continue a text with a language model; it appears as it is written.

  Args:
    run: Run folder, release, or 'hf:' and the name or folder of a Hugging Face model.
    prompt: Beginning of the text; standard input, to its end, if left out.
    step: Which checkpoint: a number, 'best' (of the validated ones), or the newest if left out.
    max_new_tokens: Most tokens to write.
    sampling_temperature: Sample at this temperature; the most probable token each time if left out.
    sampling_topk: Sample from the k most probable tokens.
    sampling_topp: Sample from the most probable tokens that make up this probability.
    stop: End before the first of these strings.
    samples: Write so many texts, one after the other, with seeds from --seed on.
    seed: Seed of the samples.
  """
  from tfm.generator import Generator
  from tfm.pipeline import open_run
  if samples < 1 or (samples > 1 and sampling_temperature is None):
    raise UserError(f'--samples is {samples}; give 1 or more, and a --sampling-temperature for more than 1.')
  prompt = '\n'.join(_stdin_lines()) if prompt is None else prompt
  generator = open_run(run, step)
  if not isinstance(generator, Generator):
    raise UserError(f'{run} is no language model (decoder-only), so it cannot generate; try translate.')
  for number in range(samples):
    print(prompt, end='', flush=True)
    for piece in generator.stream(prompt, max_new_tokens=max_new_tokens, sampling_temperature=sampling_temperature,
                                  sampling_topk=sampling_topk, sampling_topp=sampling_topp, stop=stop,
                                  seed=seed + number):
      print(piece, end='', flush=True)
    print('\n' if number + 1 < samples else '')


def average(
    run: tyro.conf.Positional[str],
    /,
    last: int | None = None,
    best: int | None = None,
    steps: tuple[int, ...] | None = None,
    output: Path | None = None,
) -> None:
  """Average the weights of several checkpoints into a run folder that translates like any other.

  Args:
    run: Run folder.
    last: The newest so many checkpoints.
    best: The best so many validated checkpoints.
    steps: These checkpoints.
    output: Folder to write; RUN/averaged if left out.
  """
  from tfm.training.average import average_run
  if sum(choice is not None for choice in (last, best, steps)) != 1:
    raise UserError('Give exactly one of --last, --best and --steps.')
  print(average_run(run, last=last, best=best, steps=steps, output=output))


def export(
    run: tyro.conf.Positional[str],
    output: tyro.conf.Positional[Path],
    /,
    format: Literal['safetensors', 'huggingface', 'ctranslate2', 'stablehlo'] = 'safetensors',
    step: Step = None,
    quantization: Literal['int8', 'int8_float32', 'int8_float16', 'int16', 'float16', 'float32'] | None = None,
    platforms: tuple[Literal['cpu', 'cuda', 'rocm', 'tpu'], ...] = ('cpu', 'cuda', 'tpu'),
    batch: int | None = None,
) -> None:
  """Write the weights in a form that other programs read (docs/export.md).

  Args:
    run: Run folder, release, or 'hf:' and the name or folder of a Hugging Face model.
    output: Folder to write; it must not exist.
    format: safetensors: a release, which tfm.load opens too. huggingface: for `transformers`. ctranslate2: for that
      engine. stablehlo: a release and programs that JAX runs without tfm.
    step: Which checkpoint: a number, 'best' (of the validated ones), or the newest if left out.
    quantization: ctranslate2: type of the weights; float32 if left out.
    platforms: stablehlo: what the programs are lowered for.
    batch: stablehlo: sentences in every call; any number if left out.
  """
  from tfm.pipeline import read
  if quantization is not None and format != 'ctranslate2':
    raise UserError(f'--quantization has no effect with --format {format}; remove it.')
  if format != 'stablehlo' and (batch is not None or platforms != ('cpu', 'cuda', 'tpu')):
    raise UserError(f'--platforms and --batch have no effect with --format {format}; remove them.')
  release = read(run, step)
  if format == 'ctranslate2':
    from tfm.interop.ctranslate2 import write_ctranslate2
    print(write_ctranslate2(release, output, quantization))
  elif format == 'huggingface':
    from tfm.interop.huggingface import to_huggingface
    print(to_huggingface(output, release.config.model, release.params, release.special,
                         vocab_size=release.vocab_sizes[1]))
  elif format == 'stablehlo':
    from tfm.interop.stablehlo import write_stablehlo
    print(write_stablehlo(release, output, platforms, batch))
  else:
    from tfm.interop.release import write_release
    print(write_release(release, output))


def plan(
    config: tyro.conf.Positional[Path],
    /,
    devices: int,
    chip: str,
    fsdp: int | None = None,
    tensor: int | None = None,
    context: int | None = None,
    tokens_per_batch: int | None = None,
) -> None:
  """Will it fit, how fast, on which mesh: compiles the training step for chips that are not there (docs/plan.md).

  Args:
    config: Recipe, a Python file as for train.py.
    devices: Chips in all.
    chip: One of v5p, v6e, h100, h200, b200.
    fsdp: Instead of the recipe's mesh.fsdp; with any of these three, mesh.data takes what they leave.
    tensor: Instead of mesh.tensor.
    context: Instead of mesh.context.
    tokens_per_batch: Instead of data.tokens_per_batch.
  """
  from tfm.parallel.plan import plan as plan_of
  from tfm.parallel.plan import with_mesh
  recipe, _ = read_recipe(config)
  print(plan_of(with_mesh(recipe, tokens_per_batch, fsdp=fsdp, tensor=tensor, context=context), devices, chip))
