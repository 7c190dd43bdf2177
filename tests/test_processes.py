"""Two processes on loopback are one run: the same weights, one writer, a clear end when one of them is killed."""

from __future__ import annotations

import json
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


def command(run: Path, arguments: list[str], process: int | None = None, processes: int = 2, port: int = 0):
  shared = [] if process is None else ['--distributed.coordinator', f'127.0.0.1:{port}', '--distributed.processes',
                                       str(processes), '--distributed.process', str(process)]
  # Each process has one device, and room for one thread.
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  return subprocess.Popen([sys.executable, str(ROOT / 'train.py'), '--run', str(run), *arguments, *shared],
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


def assert_same_weights(one: Path, other: Path, step: int, tolerance: float) -> None:
  first, second = weights(one, step), weights(other, step)
  assert first.keys() == second.keys()
  for name, array in first.items():
    np.testing.assert_allclose(array, second[name], atol=tolerance, err_msg=name)


def steps(count: int, every: int) -> list[str]:
  return [*TINY, '--training.steps', str(count), '--training.validate-every', str(every),
          '--training.checkpoint-every', str(every)]


@pytest.mark.parametrize('mesh', [[], ['--mesh.data', '1', '--mesh.fsdp', '2']], ids=['data', 'fsdp'])
def test_two_processes_train_like_one(tmp_path, mesh):
  together = finish(two(tmp_path / 'two', [*steps(6, 3), *mesh]))
  assert [code for code, _, _ in together] == [0, 0], together
  (_, out, said), (_, silent_out, silent) = together
  assert 'Process 0 of 2, 1 of 2 devices' in said and 'exact match' in out
  spoken = [line for line in (silent + silent_out).splitlines() if not line.startswith('[Gloo]')]
  assert 'step 6/6' in said and not spoken  # process 0 speaks for all
  alone = finish([command(tmp_path / 'one', steps(6, 3))])
  assert alone[0][0] == 0, alone
  assert_same_weights(tmp_path / 'one', tmp_path / 'two', 6, 1e-5)


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
  arguments = [str(ROOT / 'configs' / 'multi30k_en_de.py'), '--data.root', str(multi30k), '--training.steps', '200',
               '--training.validate-every', '200', '--training.checkpoint-every', '200',
               '--training.validation-sentences', '20', '--optimizer.warmup-steps', '100']

  def train(run: Path, process: int | None = None, port: int = 0):
    shared = [] if process is None else ['--distributed.coordinator', f'127.0.0.1:{port}', '--distributed.processes',
                                         '2', '--distributed.process', str(process)]
    return subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *arguments, '--run', str(run), *shared],
                            env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''})

  port = free_port()
  together = [train(tmp_path / 'two', process, port) for process in range(2)]
  assert [process.wait(3600) for process in together] == [0, 0]
  assert train(tmp_path / 'one').wait(3600) == 0
  # At this rate Adam blows up float32's rounding, so after 200 steps single weights are apart by up to 0.1; what they
  # compute is not.
  records = [[json.loads(line) for line in (tmp_path / run / 'metrics.jsonl').read_text().splitlines()]
             for run in ('one', 'two')]
  for one, two in zip(*records, strict=True):
    assert one.get('tokens') == two.get('tokens')
    np.testing.assert_allclose(one['nll'], two['nll'], rtol=1e-3)
