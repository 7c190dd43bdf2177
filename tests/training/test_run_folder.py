from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tfm.config import Config, TrainingConfig
from tfm.training.run_folder import FORMAT, RunFolder, RunFolderError, write_whole


class FakeTokenizers:

  def save(self, folder):
    (folder / 'tokenizer.json').write_text('{}')


def test_create_then_read(tmp_path):
  run = RunFolder(tmp_path / 'run')
  assert not run.is_run()
  config = Config(training=TrainingConfig(steps=7))
  run.create(config, FakeTokenizers())
  assert run.is_run() and run.read_config() == config
  assert (run.tokenizer / 'tokenizer.json').exists()
  assert sorted(path.name for path in run.path.iterdir()) == ['config.json', 'tokenizer']
  with pytest.raises(RunFolderError, match='is a run already'):
    run.create(config, FakeTokenizers())


def test_create_over_a_start_that_was_killed(tmp_path):
  run = RunFolder(tmp_path)
  for folder in (run.tokenizer, run.path / 'tokenizer.tmp'):
    folder.mkdir()
    (folder / 'half').write_text('')
  run.create(Config(), FakeTokenizers())
  assert [path.name for path in run.tokenizer.iterdir()] == ['tokenizer.json']


def test_the_path_is_absolute_and_every_name_is_inside(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  run = RunFolder('here')
  names = ['config_file', 'tokenizer', 'checkpoints', 'metrics', 'timing', 'tensorboard', 'samples']
  assert {getattr(run, name).parent for name in names} == {tmp_path / 'here'}
  assert len({getattr(run, name) for name in names}) == len(names)


def test_what_is_no_run(tmp_path):
  with pytest.raises(RunFolderError, match='There is no folder'):
    RunFolder(tmp_path / 'absent').read_config()
  with pytest.raises(RunFolderError, match='no config.json'):
    RunFolder(tmp_path).read_config()


def test_missing_tokenizer(tmp_path):
  run = RunFolder(tmp_path)
  run.write_config(Config())
  with pytest.raises(RunFolderError, match='no tokenizer'):
    run.read_tokenizers()


def changed(run: RunFolder, **changes) -> None:
  run.write_config(Config())
  run.config_file.write_text(json.dumps({**json.loads(run.config_file.read_text()), **changes}))


def test_newer_format_names_both_versions(tmp_path):
  run = RunFolder(tmp_path)
  changed(run, format=FORMAT + 1, tfm='9.9')
  with pytest.raises(RunFolderError, match=rf'format {FORMAT + 1}, written by tfm 9.9.* up to {FORMAT}; install'):
    run.read_config()


def test_damaged_and_unknown_config(tmp_path):
  run = RunFolder(tmp_path)
  changed(run)
  run.config_file.write_text(run.config_file.read_text()[:-20])
  with pytest.raises(RunFolderError, match='damaged'):
    run.read_config()
  changed(run, config={'modle': {}})
  with pytest.raises(RunFolderError, match="did you mean 'model'"):
    run.read_config()


WRITER = '''
import sys
from pathlib import Path
from tfm.training.run_folder import write_whole
print('go', flush=True)
while True:
  for letter in 'ab':
    write_whole(Path(sys.argv[1]), letter * 3_000_000)
'''


def test_a_kill_leaves_a_whole_file(tmp_path):
  path = tmp_path / 'file'
  for delay in (0.02, 0.05, 0.09):
    process = subprocess.Popen([sys.executable, '-c', WRITER, str(path)], stdout=subprocess.PIPE,
                               env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    content = path.read_text() if path.exists() else 'a' * 3_000_000
    assert len(content) == 3_000_000 and len(set(content)) == 1


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  write_whole(tmp_path / 'file', 'old')
  def fail(descriptor):
    raise OSError('No space left on device')
  monkeypatch.setattr(os, 'fsync', fail)
  with pytest.raises(OSError, match='No space'):
    write_whole(tmp_path / 'file', 'new')
  assert (tmp_path / 'file').read_text() == 'old'


def test_write_whole_replaces(tmp_path):
  write_whole(tmp_path / 'new' / 'file', 'one')
  write_whole(tmp_path / 'new' / 'file', b'two')
  assert (tmp_path / 'new' / 'file').read_text() == 'two'
  assert [path.name for path in (tmp_path / 'new').iterdir()] == ['file']
