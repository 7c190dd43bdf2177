from __future__ import annotations

import ast
import dataclasses
import gzip
import inspect
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest

import tfm
from tfm import cli
from tfm.config import (
  Config,
  DataConfig,
  DecodingConfig,
  MeshConfig,
  OptimizerConfig,
  TokenizerConfig,
  TrainingConfig,
  TransformerConfig,
)
from tfm.scores import bleu, exact_match
from tfm.text.corpora import build_corpus
from tfm.training.loop import Outcome
from tfm.training.run_folder import RunFolder

LONG = ['forty-two', 'seventy-seven', 'eighty-three', 'ninety-six']


@dataclass
class Ended:
  """How a command ended, as the shell sees it."""

  code: int
  out: str
  err: str

  @property
  def lines(self) -> list[str]:
    return self.out.splitlines()


@pytest.fixture
def shell(monkeypatch, capsys):
  """`shell(command, stdin=b'...')` runs a function of no arguments in this process, like a program of its own."""

  def run(command, stdin: bytes | io.TextIOBase = b'') -> Ended:
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin)) if isinstance(stdin, bytes) else stdin)
    monkeypatch.setenv('COLUMNS', '100')
    monkeypatch.setattr('tfm.training.compilation_cache.use_compilation_cache', lambda: None)  # it is for the process
    capsys.readouterr()
    code = 0
    try:
      command()
    except SystemExit as ended:
      if isinstance(ended.code, str):
        print(ended.code, file=sys.stderr)
      code = 1 if isinstance(ended.code, str) else ended.code or 0
    return Ended(code, *capsys.readouterr())

  return run


@pytest.fixture
def use(shell, monkeypatch):
  """`use('translate', run, ...)`: the program `tfm`."""

  def run(*arguments, stdin: bytes | io.TextIOBase = b'') -> Ended:
    monkeypatch.setattr(sys, 'argv', ['tfm', *map(str, arguments)])
    return shell(cli.main, stdin)

  return run


@pytest.fixture
def train(shell, monkeypatch, tmp_path):
  """`train(...)`: the program `train.py` up to the training itself; gives how it ended and what it would have run."""
  asked = []

  def stop(config, run, init_run):
    asked.append((config, run, init_run))
    return Outcome(Path(run), 0, 'SIGTERM')

  monkeypatch.setattr('tfm.training.loop.train', stop)
  recipe = tmp_path / 'recipe.py'
  recipe.write_text('"""A recipe of nothing special."""\nfrom tfm.config import Config\nconfig = Config()\n')

  def run(*arguments, path=recipe):
    asked.clear()
    ended = shell(lambda: cli.train_main(path, list(map(str, arguments))))
    return ended, asked[0] if asked else None

  return run


@pytest.fixture(scope='module')
def translator(numbers_run) -> tfm.Translator:
  return tfm.load(numbers_run)


def assert_one_sentence(ended: Ended, sentence: str) -> None:
  assert ended.code == 1
  assert re.fullmatch(f'error: .*{sentence}.*\n', ended.err), ended.err


def write(path: Path, lines: list[str]) -> Path:
  path.write_text(''.join(f'{line}\n' for line in lines))
  return path


# -- tfm translate ----------------------------------------------------------------------------------------------------


def test_one_line_out_for_one_line_in(use, numbers_run, translator):
  text = b'\xef\xbb\xbfforty-two\n\nsix\r\n \t\nsix\xe2\x80\xa8ten\x0cone\nninety-six'
  ended = use('translate', numbers_run, stdin=text)
  assert ended.code == 0 and ended.err == '', 'no progress bar where stderr is no terminal'
  expected = [translation.text for translation in
              translator.translate(['forty-two', '', 'six', '', 'six\u2028ten\x0cone', 'ninety-six'])]
  assert ended.out == ''.join(f'{text}\n' for text in expected)
  assert '\r' not in ended.out and expected[1] == expected[3] == ''
  assert use('translate', numbers_run, stdin=b'').out == ''


def test_files_plain_and_packed(use, numbers_run, tmp_path, translator):
  plain = write(tmp_path / 'in.txt', LONG)
  with gzip.open(tmp_path / 'in.txt.gz', 'wb') as file:
    file.write(plain.read_bytes())
  expected = ''.join(f'{translation.text}\n' for translation in translator.translate(LONG))
  for source in (plain, tmp_path / 'in.txt.gz'):
    ended = use('translate', numbers_run, '--input', source, '--output', tmp_path / 'out.txt')
    assert (ended.code, ended.out, ended.err) == (0, '', '')
    assert (tmp_path / 'out.txt').read_bytes() == expected.encode()


def test_n_best_lines_carry_their_number(use, numbers_run, translator):
  found = translator.translate(LONG[:2], beam_size=4, num_hypotheses=4)
  expected = [f'{number}\t{hypothesis.text}\t{hypothesis.score:.4f}' for number, translation in enumerate(found, 1)
              for hypothesis in translation.hypotheses]
  for chunk in ('1', '7'):
    ended = use('translate', numbers_run, '--beam-size', '4', '--num-hypotheses', '4', '--chunk', chunk,
                stdin='\n'.join(LONG[:2]).encode())
    assert ended.lines == expected


def test_scores_come_first(use, numbers_run, translator):
  ended = use('translate', numbers_run, '--scores', stdin='\n'.join([*LONG, '']).encode())
  assert ended.lines == [f'{translation.score:.4f}\t{translation.text}' for translation in translator.translate(LONG)]


def test_samples_do_not_depend_on_the_chunks(use, numbers_run):
  command = ('translate', numbers_run, '--sampling-temperature', '1.0', '--num-hypotheses', '2')
  text = '\n'.join([LONG[0]] * 4).encode()
  whole = use(*command, '--seed', '3', stdin=text)
  pieces = use(*command, '--seed', '3', '--chunk', '1', stdin=text)
  # Scores of batches of other sizes are rounded otherwise.
  (*texts, scores), (*other_texts, other_scores) = (
      zip(*(line.split('\t') for line in found.out.strip('\n').split('\n'))) for found in (whole, pieces))
  assert texts == other_texts
  assert [*map(float, scores)] == pytest.approx([*map(float, other_scores)], abs=1e-3)
  assert use(*command, '--seed', '4', stdin=text).out != whole.out
  assert len({line.split('\t')[1] for line in whole.lines}) > 2, 'equal lines draw for themselves'


def test_the_checkpoint_can_be_chosen(use, numbers_run):
  text = '\n'.join(LONG).encode()
  for step in ('20', 'best'):
    chosen = tfm.load(numbers_run, 'best' if step == 'best' else int(step)).translate(LONG)
    assert use('translate', numbers_run, '--step', step, stdin=text).lines == [found.text for found in chosen]
  assert use('translate', numbers_run, '--step', '20', stdin=text).out != use('translate', numbers_run, stdin=text).out
  assert_one_sentence(use('translate', numbers_run, '--step', '30'), 'no step 30; there are 20, 40, 60')
  assert use('translate', numbers_run, '--step', 'worst').code == 2


def test_a_bad_line_is_named(use, numbers_run, tmp_path):
  assert_one_sentence(use('translate', numbers_run, stdin=b'six\n\nt\xffwo\nten'),
                      r'Line 3 of standard input is not UTF-8 \(byte 2\)')
  (tmp_path / 'bad.txt').write_bytes(b'six\n\nt\xffwo\nten')
  assert_one_sentence(use('translate', numbers_run, '--input', tmp_path / 'bad.txt'), r'bad\.txt, line 3: byte 2')


def test_an_over_long_line_is_named_by_its_number_in_the_whole_text(use, numbers_run, translator, monkeypatch):
  strict = translator.with_decoding(max_source_length=10)
  monkeypatch.setattr('tfm.pipeline.load', lambda run, step=None: strict)
  ended = use('translate', numbers_run, '--chunk', '2', stdin=b'\n\n\n\nseventy-seven\n')
  assert_one_sentence(ended, 'Sentence 5 has 14 tokens')
  assert ended.out == '\n' * 4, 'what could be translated before it was'


class Terminal(io.StringIO):

  def isatty(self):
    return True


def test_a_terminal_sees_progress_and_is_answered_line_by_line(use, numbers_run, monkeypatch, capsys):
  bar = Terminal()
  monkeypatch.setattr(sys, 'stderr', bar)
  use('translate', numbers_run, stdin=b'\nforty-two\n\n')
  assert '3 lines' in bar.getvalue()

  answered = []

  class Typed(io.StringIO):
    """Somebody who types the next line after reading the answer to the last."""

    isatty = Terminal.isatty

    @property
    def buffer(self):
      for line in (b'forty-two\n', b'\n', b'ninety-six\n'):
        yield line
        answered.append(capsys.readouterr().out.count('\n'))

  quiet = Terminal()
  monkeypatch.setattr(sys, 'stderr', quiet)
  use('translate', numbers_run, stdin=Typed())
  assert answered == [1, 1, 1] and quiet.getvalue() == ''


def test_a_reader_that_has_gone_ends_it_quietly(use, numbers_run, monkeypatch):
  class Closed(io.StringIO):

    def write(self, text):
      raise BrokenPipeError

  monkeypatch.setattr(sys, 'stdout', Closed())
  monkeypatch.setattr(sys, 'stderr', io.StringIO())
  assert use('translate', numbers_run, stdin=b'\n').code == 0


def test_control_c_ends_it_quietly(use, numbers_run, monkeypatch):
  def interrupted(run, step=None):
    raise KeyboardInterrupt

  monkeypatch.setattr('tfm.pipeline.load', interrupted)
  ended = use('translate', numbers_run)
  assert (ended.code, ended.err) == (130, '')


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (['--chunk', '0'], '--chunk is 0'),
    (['--input', 'missing.txt'], r'there is no file missing\.txt'),
    (['--input', '.'], 'cannot be read'),
    (['--output', 'missing/out.txt'], r"No such file or directory: 'missing/out\.txt'"),
    (['--output', '.'], 'Is a directory'),
    (['--num-hypotheses', '3'], 'num_hypotheses 3 exceeds beam_size 1'),
    (['--sampling-temperature', '0'], 'sampling_temperature is 0.0'),
    (['--sampling-topk', '2'], 'need sampling_temperature'),
    (['--length-penalty', '-1'], 'length_penalty is -1'),
])
def test_what_cannot_be_done_is_one_sentence(arguments, sentence, use, numbers_run, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert_one_sentence(use('translate', numbers_run, *arguments, stdin=b'six\n'), sentence)


def test_folders_that_are_no_run_are_one_sentence(use, tmp_path):
  for command in (['translate'], ['evaluate'], ['average', '--last', '2'], ['generate', '--prompt', 'a']):
    assert_one_sentence(use(*command, tmp_path / 'missing'), 'There is no folder .*missing')
    assert_one_sentence(use(*command, tmp_path), 'is not a run')


def test_a_process_of_its_own(numbers_run, tmp_path):
  """Text is UTF-8 on both ends whatever the locale; an error is one line and no traceback."""
  def tfm_process(*arguments):
    return subprocess.run([sys.executable, '-c', 'from tfm.cli import main; main()', *map(str, arguments)],
                          input=b'\n\n', capture_output=True, env={**os.environ, 'PYTHONIOENCODING': 'ascii',
                                                                                  'XDG_CACHE_HOME': str(tmp_path)})

  found = tfm_process('translate', numbers_run)
  assert (found.returncode, found.stdout, found.stderr) == (0, b'\n\n', b'')
  refused = tfm_process('translate', 'no-such-rün')
  assert refused.returncode == 1 and refused.stdout == b''
  assert refused.stderr.startswith(b'error: There is no folder ') and refused.stderr.count(b'\n') == 1


def test_output_is_utf_8_whatever_the_locale(use, numbers_run, translator, monkeypatch):
  written = io.BytesIO()
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, encoding='ascii'))
  monkeypatch.setattr(translator.tokenizers.target, 'decode', lambda ids: 'fünf \n drei')
  monkeypatch.setattr('tfm.pipeline.load', lambda run, step=None: translator)
  assert use('translate', numbers_run, stdin=b'forty-two').code == 0
  sys.stdout.flush()
  assert written.getvalue().decode() == 'fünf   drei\n', 'a line feed in a translation must not make a line'


# -- tfm evaluate -----------------------------------------------------------------------------------------------------


@pytest.fixture
def parallel(tmp_path, translator) -> tuple[Path, Path]:
  """Four lines and a reference that is right in two of them."""
  found = [translation.text for translation in translator.translate(LONG)]
  return write(tmp_path / 'a.en', LONG), write(tmp_path / 'a.de', [*found[:2], 'eins zwei drei', 'vier fünf sechs'])


def test_evaluation_prints_figures_with_signature_and_interval(use, numbers_run, parallel, translator, tmp_path):
  source, reference = parallel
  ended = use('evaluate', numbers_run, '--source', source, '--reference', reference, '--output', tmp_path / 'out.de')
  assert ended.code == 0
  hypotheses = [translation.text for translation in translator.translate(LONG)]
  score = bleu(hypotheses, reference.read_text().splitlines(), bootstrap=True)
  assert ended.lines[0] == str(numbers_run) and ended.lines[1].strip() == str(score)
  for line, name in zip(ended.lines[1:], ('BLEU', 'chrF2', 'BLEU (lower-cased Moses tokens)')):
    assert re.match(rf'  {re.escape(name)} [\d.]+ \+- [\d.]+  nrefs:1\|bs:1000', line), line
  assert ended.lines[4] == '  exact match 50.0 %'
  assert (tmp_path / 'out.de').read_text().splitlines() == hypotheses


def test_evaluation_without_files_is_of_the_test_set(use, numbers_run, translator):
  sources, references = zip(*build_corpus(RunFolder(numbers_run).read_config().data).test())
  exact = exact_match([translation.text for translation in translator.translate(sources)], references)
  assert f'  exact match {exact:.1f} %' in use('evaluate', numbers_run).lines


def test_two_runs_are_compared_by_paired_bootstrap(use, numbers_run, parallel, tmp_path):
  source, reference = parallel
  averaged = use('average', numbers_run, '--steps', '20', '40', '--output', tmp_path / 'averaged').lines
  assert averaged == [str(tmp_path / 'averaged')]
  ended = use('evaluate', numbers_run, *averaged, '--source', source, '--reference', reference)
  table = ended.lines[ended.lines.index('paired bootstrap against the first:') + 1:]
  assert table[0].startswith(f'{numbers_run}: BLEU') and '(p = ' not in table[0]
  assert re.search(r'BLEU .* \(p = 0\.\d+\); chrF2 .* \(p = 0\.\d+\)', table[1]) and table[1].startswith(*averaged)
  assert 'bs:1000' in table[2]


def test_evaluation_needs_files_that_go_together(use, numbers_run, parallel, tmp_path):
  source, reference = parallel
  short, nothing = write(tmp_path / 'short', ['eins']), write(tmp_path / 'nothing', [])
  assert_one_sentence(use('evaluate', numbers_run, '--source', source), 'both --source and --reference')
  assert_one_sentence(use('evaluate', numbers_run, '--reference', reference), 'both --source and --reference')
  assert_one_sentence(use('evaluate', numbers_run, '--source', source, '--reference', short), 'has 4 lines .* 1;')
  assert_one_sentence(use('evaluate', numbers_run, '--source', nothing, '--reference', nothing), 'has no lines')
  assert_one_sentence(use('evaluate', numbers_run, numbers_run), 'named twice')
  assert_one_sentence(use('evaluate'), 'at least one run')


def test_a_run_without_test_set_needs_files(use, numbers_run, monkeypatch):
  class NoTest:

    def test(self):
      return None

  monkeypatch.setattr('tfm.text.corpora.build_corpus', lambda data: NoTest())
  assert_one_sentence(use('evaluate', numbers_run), 'has no test set')


# -- tfm generate -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def generator(letters_run) -> tfm.Generator:
  return tfm.load(letters_run)


def test_a_text_goes_on_behind_its_prompt(use, letters_run, generator):
  found, = generator.generate(['cde'], max_new_tokens=9)
  ended = use('generate', letters_run, '--prompt', 'cde', '--max-new-tokens', '9')
  assert (ended.code, ended.out, ended.err) == (0, f'cde{found.text}\n', '') and found.text.startswith('fg')
  assert use('generate', letters_run, '--max-new-tokens', '9', stdin=b'\xef\xbb\xbfcde\r\n').out == ended.out
  stopped = use('generate', letters_run, '--prompt', 'cde', '--stop', 'g', '--max-new-tokens', '9')
  assert stopped.out == 'cdef\n'
  earlier = tfm.load(letters_run, 40).generate(['cde'], max_new_tokens=2)[0].text
  assert use('generate', letters_run, '--prompt', 'cde', '--step', '40',
             '--max-new-tokens', '2').out == f'cde{earlier}\n'


def test_several_texts_have_seeds_of_their_own(use, letters_run, generator):
  drawn = [generator.generate(['a'], max_new_tokens=9, sampling_temperature=2.0, sampling_topk=9, seed=seed)[0].text
           for seed in (3, 4, 5)]
  ended = use('generate', letters_run, '--prompt', 'a', '--samples', '3', '--seed', '3', '--sampling-temperature', '2',
              '--sampling-topk', '9', '--max-new-tokens', '9')
  assert ended.out == '\n\n'.join(f'a{text}' for text in drawn) + '\n' and len(set(drawn)) > 1


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (['--samples', '0'], '--samples is 0; give 1 or more'),
    (['--samples', '2'], 'a --sampling-temperature for more than 1'),
    (['--max-new-tokens', '0'], 'max_new_tokens is 0'),
    (['--sampling-topk', '2'], 'need sampling_temperature'),
    (['--step', '30'], 'no step 30; there are 40, 80'),
])
def test_what_cannot_be_generated_is_one_sentence(arguments, sentence, use, letters_run):
  assert_one_sentence(use('generate', letters_run, '--prompt', 'a', *arguments), sentence)


def test_runs_of_another_shape_are_one_sentence(use, letters_run, numbers_run):
  assert_one_sentence(use('generate', numbers_run, '--prompt', 'a'), 'is no language model .decoder-only.*translate')
  assert_one_sentence(use('translate', letters_run, stdin=b'a'), 'is no encoder-decoder.*try generate')


# -- tfm average ------------------------------------------------------------------------------------------------------


def test_an_average_translates(use, numbers_run, tmp_path):
  folder = tmp_path / 'averaged'
  assert use('average', numbers_run, '--last', '2', '--output', folder).out == f'{folder}\n'
  ended = use('translate', folder, stdin=b'forty-two\n')
  assert ended.lines == [tfm.load(folder).translate(['forty-two'])[0].text]


def test_what_to_average_is_said_once(use, numbers_run, tmp_path):
  for arguments in ([], ['--last', '2', '--best', '1'], ['--best', '1', '--steps', '20']):
    assert_one_sentence(use('average', numbers_run, *arguments, '--output', tmp_path / 'x'), 'exactly one of')
  assert_one_sentence(use('average', numbers_run, '--last', '9', '--output', tmp_path / 'x'), 'has 3')
  assert not (tmp_path / 'x').exists()


# -- train.py ---------------------------------------------------------------------------------------------------------

VALUES = Config(
    model=TransformerConfig(
        encoder_layers=3, decoder_layers=4, d_model=60, d_ff=70, num_heads=6, num_kv_heads=2, d_k=7, d_v=9, norm='pre',
        norm_type='rms', norm_epsilon=1e-3, qk_norm=True, embedding_norm=True, positions='learned', max_positions=300,
        position_offset=2, feed_forward='swiglu', biases='qkv', experts=4, experts_per_token=3, load_balance=0.25,
        window=5, attention_scale=0.5, attention_softcap=9.0, attention_sinks=True, tying='target',
        scale_embeddings=False, scale_output=True, output_bias=True, logit_softcap=8.0, dropout=0.25,
        attention_dropout=0.5, activation_dropout=0.75, attention_backend='reference', dtype='bfloat16',
        vocab_multiple=4, pad_id=7, scan_layers=True, remat='dots'),
    tokenizer=TokenizerConfig('unigram', 555, False),
    data=DataConfig(source='fr', target='ja', limit=5000, held_out=77, tokens_per_batch=2048, rows_multiple=12,
                    width_multiple=14, buckets=3, max_length=98, over_long='truncate'),
    optimizer=OptimizerConfig(name='adamw', schedule='wsd', learning_rate=2e-3, warmup_steps=123, final_fraction=0.25,
                              decay_fraction=0.5, b1=0.8, b2=0.95, epsilon=1e-7, weight_decay=0.125, clip_norm=1.5,
                              label_smoothing=0.2, ema_decay=0.75),
    mesh=MeshConfig(data=2, fsdp=3, expert=4, tensor=5, context=7),
    training=TrainingConfig(111, 5, 2, 7, 40, 9, 3, 20, 6, 2, 'bleu', 4, False),
    decoding=DecodingConfig(6, 0.9, 'power', 'full', 33, 44, 4321))
FILES = Config(model=TransformerConfig(positions='rope', rope_base=500.0, rope_scaling='yarn', rope_factor=4.0,
                                       rope_original_length=9),
               data=DataConfig('files', limit=None, held_out=None, root='r', train='tr', validation='va', test='te'),
               mesh=MeshConfig(compiler='pmap'))
TEXT = dict(corpus='text', source=None, target=None, limit=None, held_out=None, root='r', train='tr',
            validation_fraction=0.125)
OTHERS = (
    Config(model=TransformerConfig(decoder_layers=0, positions='relative', relative_buckets=8, relative_max_distance=20,
                                   output_transform=True, token_types=2, pooling='first', pooler=True, num_labels=3,
                                   convolution='parallel', kernel_width=9),
           tokenizer=TokenizerConfig(extra_ids=1), data=DataConfig(**TEXT, mask_rate=0.25)),
    Config(model=TransformerConfig(encoder_layers=0),
           data=DataConfig(**TEXT, documents='file', packing='blocks')),
    Config(tokenizer=TokenizerConfig(extra_ids=2), data=DataConfig(**{
        **TEXT, 'corpus': 'huggingface', 'validation_fraction': None}, validation='va', column='words', mean_span=4.0)))
"""Between them they set every leaf to something other than its default."""


def leaves(config: Config) -> dict[str, typing.Any]:
  return {f'{section.name}.{leaf.name}': getattr(getattr(config, section.name), leaf.name)
          for section in dataclasses.fields(Config) for leaf in dataclasses.fields(section.default_factory)}


def option(name: str, value) -> list[str]:
  section, leaf = name.replace('_', '-').split('.')
  return [f'--{section}.{"" if value else "no-"}{leaf}'] if isinstance(value, bool) else [f'--{section}.{leaf}',
                                                                                          str(value)]


def test_every_leaf_can_be_set(train):
  default, reached = leaves(Config()), set()
  for config in (VALUES, FILES, *OTHERS):
    changed = {name: value for name, value in leaves(config).items() if value != default[name]}
    ended, (parsed, *_) = train(*[word for name, value in changed.items() for word in option(name, value)])
    assert ended.code == 0 and parsed == config
    assert [type(value) for value in leaves(parsed).values()] == [type(value) for value in leaves(config).values()]
    reached |= set(changed)
  assert reached == set(default)


def test_none_underscores_and_whole_numbers_are_understood(train, tmp_path):
  recipe = tmp_path / 'other.py'
  recipe.write_text('from tfm.config import *\nconfig = Config(optimizer=OptimizerConfig(clip_norm=1.0))\n')
  _, (config, *_) = train('--optimizer.clip-norm', 'None', '--model.num_heads', 4, '--model.dropout', 0, path=recipe)
  assert config.optimizer.clip_norm is None and config.model.num_heads == 4
  assert config.model.dropout == 0.0 and type(config.model.dropout) is float


def test_the_recipe_is_the_first_argument_or_the_default(train, tmp_path):
  other = tmp_path / 'other.py'
  other.write_text('from tfm.config import *\nconfig = Config(training=TrainingConfig(seed=5))\n')
  _, (config, run, init_run) = train()
  assert (config, run, init_run) == (Config(), str(Path('runs/recipe')), None)
  _, (config, run, init_run) = train(other, '--run', 'here', '--init-from', 'there', '--training.steps', 7)
  assert config == Config(training=TrainingConfig(seed=5, steps=7)) and (run, init_run) == ('here', 'there')


def unboxed(text: str) -> str:
  """The words of help or of an error, without frames and line ends."""
  return ' '.join(re.sub('[│╭╮╰╯─]', ' ', text).split())


def documentation() -> dict[str, str]:
  """The string under every leaf of the config, by its option."""
  modules = {sys.modules[section.default_factory.__module__] for section in dataclasses.fields(Config)}
  classes = {node.name: node for module in modules for node in ast.parse(inspect.getsource(module)).body
             if isinstance(node, ast.ClassDef)}
  return {f'--{section.name}.{leaf.target.id}'.replace('_', '-'): text.value.value
          for section in dataclasses.fields(Config) for body in [classes[section.default_factory.__name__].body]
          for leaf, text in zip(body, body[1:]) if isinstance(leaf, ast.AnnAssign)}


def test_help_documents_every_leaf_and_the_recipe(train):
  ended, asked = train('--help')
  assert ended.code == 0 and asked is None
  words = unboxed(ended.out)
  documented = documentation()
  assert len(documented) == len(leaves(Config()))
  for name, text in documented.items():
    assert f' {name} ' in words.replace(',', ' '), name
    assert ' '.join(text.split()) in words, name
  assert 'A recipe of nothing special.' in words and '--init-from' in words


def types_of_leaves() -> dict[str, tuple]:
  """For every leaf its types, or what it may be chosen from."""
  found = {}
  for section in dataclasses.fields(Config):
    kinds = typing.get_type_hints(section.default_factory)
    for leaf in dataclasses.fields(section.default_factory):
      kind = kinds[leaf.name]
      found[f'{section.name}.{leaf.name}'] = typing.get_args(kind) or (kind,)
  return found


@pytest.mark.parametrize(('name', 'types'), [pytest.param(name, types, id=name)
                                             for name, types in types_of_leaves().items() if str not in types])
def test_a_word_of_the_wrong_type_is_refused(name, types, train):
  option, wrong = f'--{name}'.replace('_', '-'), '1.5' if int in types else 'nonsense'
  ended, asked = train(option, wrong)
  assert ended.code == 2 and asked is None
  assert (wrong if bool in types else option) in ended.err and 'Traceback' not in ended.err


@pytest.mark.parametrize(('typed', 'meant'), [
    ('--model.num-head', '--model.num-heads'), ('--modl.num-heads', '--model.num-heads'),
    ('--optimizer.learning-rat', '--optimizer.learning-rate'), ('--trainig.seed', '--training.seed'),
    ('--decoding.beamsize', '--decoding.beam-size'), ('--init-form', '--init-from'), ('--dropout', '--model.dropout'),
])
def test_an_unknown_option_names_the_nearest(typed, meant, train):
  ended, asked = train(typed, '1')
  assert ended.code == 2 and asked is None
  assert typed in ended.err and f'{meant} ' in ended.err.replace(',', ' ')


def test_an_unknown_option_of_tfm_names_the_nearest(use):
  ended = use('translate', 'run', '--beamsize', '4')
  assert ended.code == 2 and '--beam-size' in ended.err
  ended = use('translat', 'run')
  assert ended.code == 2 and 'translate' in ended.err


def test_values_that_do_not_go_together_are_one_sentence(train):
  for arguments, sentence in [
      (['--model.num-heads', '7'], 'd_model 512 is not divisible by num_heads 7; change one or set d_k and d_v.'),
      (['--tokenizer.no-joint'], "set tokenizer.joint=True or model.tying='target'."),
  ]:
    ended, asked = train(*arguments)
    assert ended.code != 0 and asked is None and 'Traceback' not in ended.err
    assert sentence in unboxed(ended.err)


@pytest.mark.parametrize(('name', 'content', 'sentence'), [
    ('missing.py', None, r'There is no config file .*missing\.py'),
    ('empty.py', '', r'empty\.py does not define `config = Config'),
    ('other.py', 'config = {"model": 3}', r'other\.py does not define `config = Config'),
    ('bad.py', 'from tfm.config import *\nTransformerConfig(dropout=2)', 'dropout is 2.0'),
    ('recipe.json', '{}', r'recipe\.json is not a Python file'),
    ('.', None, 'There is no config file'),
])
def test_a_recipe_that_cannot_be_used(name, content, sentence, train, tmp_path):
  if content is not None:
    (tmp_path / name).write_text(content)
  ended, asked = train(tmp_path / name)
  assert asked is None
  assert_one_sentence(ended, sentence)


def test_training_ends_with_a_report(shell, numbers_run, tmp_path, caplog):
  """A run that has reached its last step: resumed, there is nothing left to do but to report."""
  run = Path(shutil.copytree(numbers_run, tmp_path / 'run'))
  recipe = tmp_path / 'again.py'
  recipe.write_text('from tfm.training.run_folder import RunFolder\n'
                    f'config = RunFolder({str(run)!r}).read_config()\n')
  with caplog.at_level(logging.INFO, logger='tfm'):
    ended = shell(lambda: cli.train_main(recipe, ['--run', str(run)]))
  assert ended.code == 0
  assert 'at step 60 of 60' in ended.err and 'Training ended at step 60 (finished)' in caplog.text
  assert re.search(r'Test set, 10 sentences, beam 1:\n  exact match [\d.]+ %\n', ended.out)
  assert re.search(r'  chrF2 [\d.]+ \+- [\d.]+  nrefs:1', ended.out)
  pairs = build_corpus(RunFolder(run).read_config().data).test()
  shown = [line for line in ended.lines if line.startswith('  -> ')]
  assert len(shown) == 5 and pairs[0][0] in ended.lines
  assert (run / 'attention.png').read_bytes().startswith(b'\x89PNG') and str(run / 'attention.png') in ended.out


# -- tfm export -------------------------------------------------------------------------------------------------------


def test_an_exported_run_translates_like_the_run(use, numbers_run, tmp_path):
  text = '\n'.join(LONG).encode()
  ended = use('export', numbers_run, tmp_path / 'release', '--step', '40')
  assert (ended.code, ended.out, ended.err) == (0, f'{tmp_path / "release"}\n', '')
  assert use('translate', tmp_path / 'release', stdin=text).out == use('translate', numbers_run, '--step', '40',
                                                                       stdin=text).out
  assert_one_sentence(use('export', numbers_run, tmp_path / 'release'), 'release exists; choose another folder')
  assert_one_sentence(use('translate', tmp_path / 'release', '--step', '40'), 'has one set of weights')


def test_exports_for_other_programs(use, numbers_run, tmp_path):
  assert use('export', numbers_run, tmp_path / 'engine', '--format', 'ctranslate2', '--quantization', 'int8').code == 0
  assert {'model.bin', 'config.json', 'shared_vocabulary.json', 'tokenizer'} == set(os.listdir(tmp_path / 'engine'))
  assert use('export', tmp_path / 'missing', tmp_path / 'x').code == 1
  ended = use('export', numbers_run, tmp_path / 'programs', '--format', 'stablehlo', '--platforms', 'cpu', '--batch',
              '2')
  assert ended.code == 0, ended.err
  assert {'encode.bin', 'step.bin', 'manifest.json', 'model.safetensors'} < set(os.listdir(tmp_path / 'programs'))


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (['--quantization', 'int8'], '--quantization has no effect with --format safetensors; remove it'),
    (['--format', 'ctranslate2', '--batch', '2'], '--platforms and --batch have no effect with --format ctranslate2'),
])
def test_options_of_another_format_are_refused(arguments, sentence, use, numbers_run, tmp_path):
  assert_one_sentence(use('export', numbers_run, tmp_path / 'out', *arguments), sentence)
