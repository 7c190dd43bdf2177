"""What the README tells people to type works."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from tfm import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```$', README, re.MULTILINE | re.DOTALL)
PYTHON = [block for language, block in BLOCKS if language == 'python']
SHELL = [line for language, block in BLOCKS if not language for line in block.splitlines()]


@pytest.fixture
def there(tmp_path, monkeypatch, numbers_run):
  """A folder in which `runs/numbers_en_de` is a trained run, as after `python train.py`."""
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'numbers_en_de').symlink_to(numbers_run)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_the_two_commands_are_one_line_each_and_set_up_what_they_need():
  train, test = (line for line in SHELL if line.startswith('python3 -m venv '))
  assert README.count(f'\n```\n{train}\n```\n') == README.count(f'\n```\n{test}\n```\n') == 1
  assert train.endswith('.venv/bin/python train.py')
  assert test.endswith('.venv/bin/python -m pytest -n 2')
  assert all("&& .venv/bin/pip install -q -e '.[" in line for line in (train, test))


def test_python_snippets_run_one_after_the_other(there, capsys):
  pytest.importorskip('matplotlib', reason='needs the extra `plot`')
  names = {}
  for snippet in PYTHON:
    exec(compile(snippet, 'README.md', 'exec'), names)
  assert names['pattern_BxHxTxS'].ndim == 4
  assert names['forced'].text.startswith('acht')
  assert len(names['best'].hypotheses) == 4
  assert (there / 'attention.png').stat().st_size > 0
  assert capsys.readouterr().out


@pytest.mark.parametrize('line', [line for line in SHELL if 'tfm ' in line])
def test_commands_of_tfm_are_understood(line, monkeypatch, tmp_path):
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  monkeypatch.chdir(tmp_path)

  def measure(*_, **__):
    raise cli.UserError('There is no folder to write into: far enough')

  monkeypatch.setattr('tfm.analysis.claims.Claim.run', measure)  # needs neither run nor data
  arguments = shlex.split(line.split('|')[-1])
  monkeypatch.setattr(sys, 'argv', arguments)
  with pytest.raises(SystemExit) as ended:
    cli.main()
  # The run or the data is not there: that it says so shows that all else was understood.
  assert re.match('error: (There is no folder|data.root FOLDER is not a folder)', str(ended.value))


@pytest.mark.parametrize('line', [line for line in SHELL if line.startswith('python train.py ')])
def test_training_commands_are_understood(line, monkeypatch, tmp_path):
  seen = []

  def train(config, run, init_run):
    seen.append((config, run))
    raise cli.UserError('far enough')

  monkeypatch.setattr('tfm.training.loop.train', train)
  monkeypatch.setattr('tfm.training.compilation_cache.use_compilation_cache', lambda: None)
  monkeypatch.chdir(ROOT)
  arguments = shlex.split(line.removeprefix('python train.py ').replace('FOLDER', str(tmp_path)))
  with pytest.raises(SystemExit, match='far enough'):
    cli.train_main(ROOT / 'configs' / 'numbers_en_de.py', arguments)
  (config, run), = seen
  assert config.data.root == str(tmp_path)
  assert run == next((a for flag, a in zip(arguments, arguments[1:]) if flag == '--run'),
                     f'runs/{Path(line.split()[2]).stem}')
