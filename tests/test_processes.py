"""Two processes on loopback are one run: the same weights, one writer, a clear end when one of them is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tfm.training.average import run_checkpoints
from tfm.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
TINY = ['--model.encoder-layers', '1', '--model.decoder-layers', '1', '--model.d-model', '16', '--model.d-ff', '32',
        '--model.num-heads', '2', '--model.dropout', '0.1', '--tokenizer.kind', 'char', '--tokenizer.vocab-size', '290',
        '--data.limit', '200', '--data.held-out', '10', '--data.tokens-per-batch', '512', '--data.buckets', '1',
        '--training.log-every', '1', '--training.validation-sentences', '2', '--training.samples', '1',
        '--decoding.extra-length', '4']


def command(run: Path, arguments: list[str], process: int | None = None, processes: int = 2, port: int = 0,
            devices: int = 1):
  shared = [] if process is None else ['--distributed.coordinator', f'127.0.0.1:{port}', '--distributed.processes',
                                       str(processes), '--distributed.process', str(process)]
  flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
  recipe, options = (arguments[:1], arguments[1:]) if arguments[0].endswith('.py') else ([], arguments)
  return subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *recipe, '--run', str(run), *options, *shared],
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


def two(run: Path, arguments: list[str]) -> list[subprocess.Popen]:
  port = free_port()
  return [command(run, arguments, process, port=port) for process in range(2)]


def finish(processes: list[subprocess.Popen], seconds: float = 300) -> list[tuple[int, str, str]]:
  found = []
  for process in processes:
    try:
      out, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
      for each in processes:
        each.kill()
      raise
    found.append((process.returncode, out, said))
  return found


def weights(run: Path, step: int) -> dict[str, np.ndarray]:
  folder = RunFolder(run)
  return run_checkpoints(folder, folder.read_config()).restore_arrays(step)


def assert_same_weights(one: Path, other: Path, step: int, tolerance: float = 0.0) -> None:
  first, second = weights(one, step), weights(other, step)
  assert first.keys() == second.keys()
  for name, array in first.items():
    np.testing.assert_allclose(array, second[name], rtol=0, atol=tolerance, err_msg=name)


def steps(count: int, every: int) -> list[str]:
  return [*TINY, '--training.steps', str(count), '--training.validate-every', str(every),
          '--training.checkpoint-every', str(every)]


@pytest.fixture(scope='module')
def alone(tmp_path_factory) -> Path:
  """Six steps of one process."""
  run = tmp_path_factory.mktemp('alone') / 'one'
  found = finish([command(run, steps(6, 3))])
  assert found[0][0] == 0, found
  return run


@pytest.mark.parametrize('mesh', [[], ['--mesh.data', '1', '--mesh.fsdp', '2']], ids=['data', 'fsdp'])
def test_two_processes_train_like_one(tmp_path, mesh, alone):
  processes = two(tmp_path / 'two', [*steps(6, 3), *mesh])
  processes[1].wait(300)
  assert processes[0].poll() is None  # it translates the test set, for which the other need not wait
  together = finish(processes)
  assert [code for code, _, _ in together] == [0, 0], together
  (_, out, said), (_, silent_out, silent) = together
  assert 'Process 0 of 2, 1 of 2 devices' in said and 'exact match' in out
  spoken = [line for line in (silent + silent_out).splitlines() if not line.startswith('[Gloo]')]
  assert 'step 6/6' in said and not spoken  # process 0 speaks for all
  assert_same_weights(alone, tmp_path / 'two', 6, 1e-5)
  both = finish([command(tmp_path / 'both', [*steps(6, 3), *mesh], devices=2)])
  assert both[0][0] == 0, both
  assert_same_weights(tmp_path / 'both', tmp_path / 'two', 6)  # the same program on the same mesh: to the bit


def test_a_killed_process_ends_the_other_with_a_clear_message_and_one_process_goes_on(tmp_path):
  run = tmp_path / 'run'
  first, second = two(run, steps(100_000, 5))
  deadline = time.monotonic() + 240
  while not (run / 'checkpoints' / '000010').exists() and time.monotonic() < deadline:
    time.sleep(0.2)
  second.kill()
  (code, _, said), _ = finish([first, second], 120)
  assert code == 1
  assert 'Another process of this run has gone' in said and 'Start the run again' in said, said[-2000:]
  saved = max(int(path.name) for path in (run / 'checkpoints').iterdir() if path.name.isdigit())
  assert saved >= 10
  (code, _, said), = finish([command(run, steps(saved + 5, 5))])
  assert code == 0 and f'Resuming {run} at step {saved}' in said, said[-2000:]


def test_sigterm_to_one_of_them_saves_and_ends_both(tmp_path):
  run = tmp_path / 'run'
  processes = two(run, steps(100_000, 5))
  deadline = time.monotonic() + 240
  while not (run / 'checkpoints' / '000005').exists() and time.monotonic() < deadline:
    time.sleep(0.2)
  processes[1].send_signal(signal.SIGTERM)
  found = finish(processes, 120)
  assert [code for code, _, _ in found] == [0, 0], found
  assert 'SIGTERM: saved step' in found[0][2]


@pytest.mark.slow
def test_multi30k_in_two_processes(multi30k, tmp_path):
  """The weights of one process with two devices, to the bit; on one device sums are in another order, and Adam makes of
  their rounding differences of up to 0.1 in single weights after 200 steps at this rate."""
  arguments = [str(ROOT / 'configs' / 'multi30k_en_de.py'), '--data.root', str(multi30k), '--training.steps', '200',
               '--training.validate-every', '200', '--training.checkpoint-every', '200',
               '--training.validation-sentences', '20', '--optimizer.warmup-steps', '100']
  together = finish(two(tmp_path / 'two', arguments), 3600)
  assert [code for code, _, _ in together] == [0, 0], together
  alone = finish([command(tmp_path / 'one', arguments, devices=2)], 3600)
  assert alone[0][0] == 0, alone
  assert_same_weights(tmp_path / 'one', tmp_path / 'two', 200)
  assert (tmp_path / 'one' / 'metrics.jsonl').read_bytes() == (tmp_path / 'two' / 'metrics.jsonl').read_bytes()
