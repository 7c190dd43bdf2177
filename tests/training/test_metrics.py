from __future__ import annotations

import io
import json
import logging
import math

import jax.numpy as jnp
import numpy as np
import pytest

from tfm.training.metrics import MetricsLog, Progress, Rate, Throughput
from tfm.training.run_folder import RunFolder


def train(log: MetricsLog, first: int, last: int) -> None:
  for step in range(first, last + 1):
    log.train(step, {'loss': np.float32(1 / step), 'tokens': 100 * step}, {'tokens_per_second': 123.0})
    if step % 3 == 0:
      log.validation(step, {'nll': jnp.float32(2 / step), 'bleu': 30.0 + step})
  log.flush()


def whole(folder) -> bytes:
  log = MetricsLog(folder)
  train(log, 1, 9)
  log.close()
  return RunFolder(folder).metrics.read_bytes()


@pytest.mark.parametrize('torn', [b'', b'{"kind": "train", "st', b'{"kind": "train", "step": 5}'])
def test_killed_and_resumed_gives_the_same_bytes(tmp_path, torn):
  log = MetricsLog(tmp_path / 'b')
  train(log, 1, 8)  # The checkpoint of step 6 is the newest one; 7 and 8 are lost.
  log.close()
  with open(RunFolder(tmp_path / 'b').metrics, 'ab') as file:
    file.write(torn)
  log = MetricsLog(tmp_path / 'b', resume_step=6)
  assert [record['step'] for record in log.history('train')] == [1, 2, 3, 4, 5, 6]
  train(log, 7, 9)
  log.close()
  assert RunFolder(tmp_path / 'b').metrics.read_bytes() == whole(tmp_path / 'a')


def test_history_reads_back_exactly(tmp_path):
  log = MetricsLog(tmp_path)
  train(log, 1, 6)
  assert [(r['step'], r['bleu']) for r in log.history('validation')] == [(3, 33.0), (6, 36.0)]
  assert np.float32(log.history('train')[2]['loss']) == np.float32(1 / 3)
  assert len(log.history()) == 8


def test_nan_and_infinity_are_valid_json_and_come_back(tmp_path):
  log = MetricsLog(tmp_path)
  log.train(1, {'loss': math.nan, 'nll': np.float32('inf'), 'gradient_norm': -math.inf})
  def no_constants(name):
    raise AssertionError(name)
  for line in RunFolder(tmp_path).metrics.read_text().splitlines():
    json.loads(line, parse_constant=no_constants)
  (record,) = log.history()
  assert math.isnan(record['loss']) and record['nll'] == math.inf and record['gradient_norm'] == -math.inf


def test_seconds_go_on_over_a_resume(tmp_path, monkeypatch):
  now = [1000.0]
  monkeypatch.setattr('time.monotonic', lambda: now[0])
  log = MetricsLog(tmp_path)
  now[0] += 10
  log.train(1, {'loss': 1.0})
  now[0] += 10
  log.train(2, {'loss': 1.0})
  log.close()
  now[0] = 5.0  # Another process: another origin of the clock.
  log = MetricsLog(tmp_path, resume_step=1)
  now[0] += 3
  log.train(2, {'loss': 1.0})
  seconds = [json.loads(line)['seconds'] for line in RunFolder(tmp_path).timing.read_text().splitlines()]
  assert seconds == [10.0, 13.0]


def test_clock_readings_stay_out_of_the_metrics(tmp_path):
  log = MetricsLog(tmp_path)
  train(log, 1, 3)
  names = {name for record in log.history() for name in record}
  assert names == {'kind', 'step', 'loss', 'tokens', 'nll', 'bleu'}


def test_damage_inside_is_reported_and_removed(tmp_path, caplog):
  whole(tmp_path)
  path = RunFolder(tmp_path).metrics
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join([*lines[:3], '\0\0\0\n', *lines[3:]]))
  with caplog.at_level(logging.WARNING, 'tfm'):
    log = MetricsLog(tmp_path, resume_step=9)
  assert 'line 4 is damaged' in caplog.text
  assert path.read_text() == ''.join(lines) and len(log.history()) == len(lines)


def test_a_step_before_the_resume_is_refused(tmp_path):
  with pytest.raises(ValueError, match='Step 4 was recorded before'):
    MetricsLog(tmp_path, resume_step=4).train(4, {'loss': 1.0})


def test_tensorboard_gets_every_scalar_and_purges_on_resume(tmp_path):
  from tensorboardX.proto.event_pb2 import Event
  def events(path):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], 'little')  # TFRecord: length, its CRC, bytes, their CRC.
      yield Event.FromString(data[12:12 + length])
      data = data[16 + length:]
  log = MetricsLog(tmp_path)
  train(log, 1, 3)
  log.close()
  log = MetricsLog(tmp_path, resume_step=2)
  train(log, 3, 3)
  log.close()
  files = sorted(RunFolder(tmp_path).tensorboard.iterdir())
  all_events = [event for path in files for event in events(path)]
  scalars = {(value.tag, event.step): value.simple_value for event in all_events for value in event.summary.value}
  assert scalars['train/loss', 2] == 0.5 and scalars['validation/bleu', 3] == 33.0
  assert scalars['train/tokens_per_second', 1] == 123.0
  assert any(event.session_log.status == 1 and event.step == 3 for event in all_events)  # START at the first lost step.


def test_rate_counts_real_tokens_and_not_the_validation():
  now = [0.0]
  throughput = Throughput(total_steps=100, start_step=10, clock=lambda: now[0])
  now[0] = 50.0  # Compilation.
  throughput.count(1000)
  assert throughput.measure(20) == Rate(20.0, 80 * 5.0)
  now[0] = 60.0
  throughput.count(300)
  throughput.pause()
  now[0] = 80.0
  throughput.go_on()
  assert throughput.measure(30) == Rate(30.0, 70 * 3.0)  # The first window no longer counts.
  assert throughput.measure(100).seconds_left == 0


class Terminal(io.StringIO):

  def isatty(self):
    return True


@pytest.mark.parametrize('stream', [Terminal(), io.StringIO()])
def test_progress_is_a_bar_or_lines(stream):
  progress = Progress(100, 10, stream)
  for step in (11, 12):
    progress.advance(step)
  before = stream.getvalue()
  progress.report(12, 1.23456, Rate(98765.4, 61.0))
  progress.note('A sentence.')
  progress.close()
  text = stream.getvalue()
  for part in ('12/100', 'loss 1.2346', '98,765 tokens/s', '01:01 left', 'A sentence.'):
    assert part in text
  if stream.isatty():
    assert '\r' in text and '12% |' in text
  else:
    assert before == '' and '\r' not in text and text.count('\n') == 2
