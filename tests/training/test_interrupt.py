from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest

import tfm.training.loop
from tfm.training.checkpoints import Checkpoints
from tfm.training.interrupt import Interrupt
from tfm.training.loop import train
from tfm.training.run_folder import RunFolder


def send(number: signal.Signals) -> None:
  os.kill(os.getpid(), number)


@pytest.fixture
def outer():
  """Signals that reach the handlers from before; those are back in place at the end."""
  got = []
  handlers = {number: signal.getsignal(number) for number in (SIGTERM, SIGINT)}
  mine = {number: lambda number, frame: got.append(signal.Signals(number)) for number in handlers}
  for number, handler in mine.items():
    signal.signal(number, handler)
  yield got
  found = {number: signal.getsignal(number) for number in handlers}
  for number, handler in handlers.items():
    signal.signal(number, handler)
  assert found == mine


@pytest.mark.parametrize('number', [SIGTERM, SIGINT])
def test_the_first_signal_is_a_request(outer, number):
  with Interrupt() as interrupt:
    assert interrupt.requested is None
    send(number)
    assert interrupt.requested == number.name
  assert outer == []
  send(number)
  assert outer == [number]


@pytest.mark.parametrize('first', [SIGTERM, SIGINT])
def test_a_second_sigint_interrupts_at_once(outer, first):
  with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
    send(first)
    send(SIGINT)
  assert interrupt.requested == first.name


def test_a_second_sigterm_does_not(outer):
  with Interrupt() as interrupt:
    send(SIGINT)
    send(SIGTERM)
    send(SIGTERM)
  assert interrupt.requested == 'SIGTERM' and outer == []


def test_handlers_come_back_after_an_error(outer):
  with pytest.raises(ZeroDivisionError), Interrupt():
    raise ZeroDivisionError
  send(SIGTERM)
  assert outer == [SIGTERM]


def test_a_handler_that_python_did_not_set_becomes_the_default(outer, monkeypatch):
  real, calls = signal.signal, []

  def of_c(number, handler):
    calls.append((number, handler))
    return None  # what Python says of a handler that C set

  with monkeypatch.context() as patch:
    patch.setattr(signal, 'signal', of_c)
    with Interrupt():
      pass
  assert signal.signal is real and calls[2:] == [(SIGTERM, signal.SIG_DFL), (SIGINT, signal.SIG_DFL)]


def test_outside_the_main_thread_nothing_changes(outer):
  seen = []

  def work():
    with Interrupt() as interrupt:
      seen.append((signal.getsignal(SIGTERM), interrupt.requested))

  before = signal.getsignal(SIGTERM)
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [(before, None)]


# -- in the training loop ---------------------------------------------------------------------------------------------


def steps_of(run: Path) -> list[int]:
  return Checkpoints(RunFolder(run).checkpoints).steps()


# Just before a step that is saved anyway, and before one that is not.
@pytest.mark.parametrize('number, step, saved', [(SIGTERM, 5, [3, 5]), (SIGINT, 3, [3])])
def test_training_saves_ends_and_resumes_to_the_same_bytes(undisturbed, tiny, same_bytes, signal_at, outer, tmp_path,
                                                           number, step, saved):
  config = tiny()
  signal_at(step, number)
  outcome = train(config, tmp_path / 'run')
  assert (outcome.step, outcome.reason) == (step, number.name)
  assert outer == [] and steps_of(tmp_path / 'run') == saved
  signal_at(0, number)
  outcome = train(config, tmp_path / 'run')
  assert (outcome.step, outcome.reason) == (6, 'finished')
  same_bytes(tmp_path / 'run', undisturbed(config))


@pytest.mark.parametrize('looks', [1, 2])
def test_whenever_the_signal_comes_what_is_said_to_be_saved_is(quick, tiny, monkeypatch, tmp_path, looks):
  class Late(Interrupt):
    """A signal that comes between two looks at `requested`."""

    left = looks

    @property
    def requested(self):
      self.left -= 1
      return 'SIGTERM' if self.left < 0 else None

    @requested.setter
    def requested(self, value):
      pass

  monkeypatch.setattr(tfm.training.loop, 'Interrupt', Late)
  outcome = train(tiny(), tmp_path / 'run')
  assert outcome.reason == 'SIGTERM' and outcome.step in steps_of(tmp_path / 'run')


def test_a_second_sigterm_does_not_tear_the_last_save(quick, tiny, signal_at, outer, monkeypatch, tmp_path):
  close = Checkpoints.close

  def interrupted(self):
    send(SIGTERM)
    close(self)

  monkeypatch.setattr(Checkpoints, 'close', interrupted)
  signal_at(2, SIGTERM)
  outcome = train(tiny(), tmp_path / 'run')
  assert outer == [] and (outcome.step, outcome.reason) == (2, 'SIGTERM') and steps_of(tmp_path / 'run') == [2]


# -- as a process -----------------------------------------------------------------------------------------------------


def test_the_command_exits_with_0_and_resumes(quick, tiny, compiled_programs, tmp_path):
  recipe, run = tmp_path / 'recipe.py', tmp_path / 'run'
  never = 10**6
  config = tiny(training=dict(steps=never, log_every=1, validate_every=never, checkpoint_every=never))
  recipe.write_text(f'"""A recipe."""\nfrom tfm.config import *\nconfig = {config!r}\n')
  command = [sys.executable, Path(__file__).parents[2] / 'train.py', recipe, '--run', run]
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(compiled_programs),
                 'JAX_DEFAULT_MATMUL_PRECISION': 'highest'}

  def terminate_after(marks: list[str]) -> str:
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
      patience = threading.Timer(300, process.kill)
      patience.start()
      seen = []
      for line in process.stderr:
        seen.append(line)
        if marks and marks[0] in line:
          marks.pop(0)
          if not marks:
            process.send_signal(SIGTERM)
      patience.cancel()
      assert process.wait() == 0 and not marks, ''.join(seen)
      return ''.join(seen)

  said = terminate_after([f'Starting {run}', 'step 2/'])
  (saved,) = steps_of(run)
  assert f'SIGTERM: saved step {saved};' in said and saved >= 2
  said = terminate_after([f'Resuming {run} at step {saved}', f'step {saved + 2}/'])
  assert steps_of(run)[-1] > saved
