"""Metrics of a run: JSON lines, TensorBoard, and what the terminal shows.

`metrics.jsonl` holds only figures that follow from config and seed, so a run that was killed and resumed ends with the
same bytes as one that never was. What the clock says goes to `timing.jsonl`. TensorBoard gets both.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax
from tqdm import tqdm

from tfm.training.run_folder import RunFolder, write_whole

log = logging.getLogger('tfm')


class MetricsLog:
  """Appends the figures of a run; on resume, first forgets everything after the step it resumes from.

  Write all records of a step, then `flush`, then save the checkpoint of that step: then whatever step a killed run
  resumes from, its records are on disk. Of several processes one writes; the others (`writes=False`) only remember.
  """

  def __init__(self, folder: str | os.PathLike[str], resume_step: int = 0, writes: bool = True):
    run = RunFolder(folder)
    self._writes = writes
    self._tensorboard_folder = run.tensorboard
    self._tensorboard = None
    self._resume_step = resume_step
    if writes:
      run.path.mkdir(parents=True, exist_ok=True)
      _forget(run.metrics, resume_step)
      _forget(run.timing, resume_step)
    self._records = [record for record in read_records(run.metrics) if record['step'] <= resume_step]
    earlier = [record for record in read_records(run.timing) if record['step'] <= resume_step]
    self._seconds_before = earlier[-1]['seconds'] if earlier else 0.0
    self._started = time.monotonic()
    self._metrics, self._timing = (open(path if writes else os.devnull, 'a', encoding='utf-8')
                                   for path in (run.metrics, run.timing))

  @property
  def seconds(self) -> float:
    """Wall-clock seconds behind the current weights, over all resumes; work lost in a kill is not counted."""
    return self._seconds_before + time.monotonic() - self._started

  def train(self, step: int, values: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
    """Record a training step: `values` must follow from config and seed alone, `timing` need not."""
    self._record('train', step, values, timing)

  def validation(self, step: int, values: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
    """Record a validation, likewise."""
    self._record('validation', step, values, timing)

  def history(self, kind: str | None = None) -> list[dict[str, Any]]:
    """The records so far, those of earlier sittings included: kind ('train', 'validation'), step, and the values."""
    return [record for record in self._records if kind in (None, record['kind'])]

  def flush(self) -> None:
    """Return when everything written so far would survive a power cut."""
    if not self._writes:
      return
    for file in (self._metrics, self._timing):
      file.flush()
      os.fsync(file.fileno())
    if self._tensorboard is not None:
      self._tensorboard.flush()

  def close(self) -> None:
    self.flush()
    self._metrics.close()
    self._timing.close()
    if self._tensorboard is not None:
      self._tensorboard.close()

  def _record(self, kind: str, step: int, values: Mapping[str, Any], timing: Mapping[str, Any] | None) -> None:
    if step <= self._resume_step:
      raise ValueError(f'Step {step} was recorded before this run resumed from step {self._resume_step}.')
    clock = {'seconds': round(self.seconds, 3), **(timing or {})}
    self._records.append({'kind': kind, 'step': step, **{name: _plain(value) for name, value in values.items()}})
    if not self._writes:
      return
    _append(self._metrics, {'kind': kind, 'step': step, **values})
    _append(self._timing, {'kind': kind, 'step': step, **clock})
    for name, value in {**values, **clock}.items():
      if isinstance(_plain(value), float | int):
        self._writer().add_scalar(f'{kind}/{name}', _plain(value), step)

  def _writer(self):
    if self._tensorboard is None:
      from tensorboardX import SummaryWriter  # Slow to import, and not needed to read a log.
      # Points that an earlier sitting wrote after the checkpoint disappear from the curves.
      purge = self._resume_step + 1 if self._resume_step else None
      # Files are named by the second: without the suffix, a quick resume would overwrite the earlier sitting's.
      self._tensorboard = SummaryWriter(str(self._tensorboard_folder), purge_step=purge,
                                        filename_suffix=f'.{os.getpid()}.{self._resume_step}')
    return self._tensorboard


_SPOKEN = {'nan': math.nan, 'inf': math.inf, '-inf': -math.inf}
"""JSON has no NaN and no infinity; they are stored as these strings."""


def _append(file: TextIO, record: Mapping[str, Any]) -> None:
  values = {name: _plain(value) for name, value in record.items()}
  spoken = {name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()}
  file.write(json.dumps(spoken, allow_nan=False) + '\n')
  file.flush()


def _plain(value: Any) -> Any:
  """Python numbers for NumPy and JAX scalars."""
  value = jax.device_get(value)
  return value.item() if hasattr(value, 'item') else value


def _parse(line: str) -> dict[str, Any] | None:
  """A record, or None for a line that is not whole."""
  try:
    record = json.loads(line) if line.endswith('\n') else None
  except ValueError:
    return None
  if not isinstance(record, dict) or not isinstance(record.get('step'), int):
    return None
  return {name: _SPOKEN.get(value, value) if isinstance(value, str) else value for name, value in record.items()}


def _lines(path: Path) -> list[str]:
  return path.read_bytes().decode('utf-8', errors='replace').splitlines(keepends=True) if path.exists() else []


def read_records(path: Path) -> list[dict[str, Any]]:
  """The records of a file of this log; none where there is no file, and without a line that a kill cut short."""
  return [record for record in map(_parse, _lines(path)) if record is not None]


def _forget(path: Path, step: int) -> None:
  """Drop records after `step`, and lines that are not whole."""
  lines = _lines(path)
  records = [_parse(line) for line in lines]
  # A torn last line is what a kill leaves; one before it is damage, worth a word.
  for number, record in enumerate(records[:-1], 1):
    if record is None:
      log.warning('%s, line %d is damaged; it was removed.', path, number)
  kept = [line for line, record in zip(lines, records) if record is not None and record['step'] <= step]
  if kept != lines:
    write_whole(path, ''.join(kept))


@dataclass(frozen=True)
class Rate:
  """How fast training goes."""

  tokens_per_second: float
  """Real tokens (no padding) since the last measurement, validation and saving not counted."""
  seconds_left: float
  """Until the last step, at the pace so far, everything counted."""


class Throughput:
  """Counts tokens against the clock. `clock` gives seconds and can be replaced in tests."""

  def __init__(self, total_steps: int, start_step: int = 0, clock: Callable[[], float] = time.monotonic):
    self._total, self._clock = total_steps, clock
    # Steps, seconds from which the pace is taken; moved past the first window, which is mostly compilation.
    self._pace_from = (start_step, clock())
    self._window_start, self._tokens, self._windows = clock(), 0, 0
    self._paused_at: float | None = None

  def count(self, tokens: int) -> None:
    """Add the real tokens of a step."""
    self._tokens += tokens

  def pause(self) -> None:
    """Stop the clock of tokens per second (not of the time left), for a validation."""
    self._paused_at = self._clock()

  def go_on(self) -> None:
    if self._paused_at is not None:
      self._window_start += self._clock() - self._paused_at
      self._paused_at = None

  def measure(self, step: int) -> Rate:
    """The rate since the last call; `step` is the number of updates made."""
    now = self._clock()
    first_step, first_time = self._pace_from
    pace = (now - first_time) / max(step - first_step, 1)
    rate = Rate(self._tokens / max(now - self._window_start, 1e-9), max(self._total - step, 0) * pace)
    if self._windows == 0:
      self._pace_from = (step, now)
    self._window_start, self._tokens, self._windows = now, 0, self._windows + 1
    return rate


class Progress:
  """What the user sees on stderr: a bar if it is a terminal, otherwise one line per log interval; never both."""

  def __init__(self, total_steps: int, start_step: int = 0, stream: TextIO | None = None):
    self._stream = stream or sys.stderr
    self._total = total_steps
    self._bar = (tqdm(total=total_steps, initial=start_step, file=self._stream, unit='step', dynamic_ncols=True,
                      bar_format='{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}{postfix}')
                 if self._stream.isatty() else None)

  def advance(self, step: int) -> None:
    """Move the bar to `step`."""
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def report(self, step: int, loss: float, rate: Rate) -> None:
    """Show loss (nats per token), real tokens per second and the time left."""
    text = (f'loss {loss:.4f}, {rate.tokens_per_second:,.0f} tokens/s, '
            f'{tqdm.format_interval(rate.seconds_left)} left')
    if self._bar is not None:
      self._bar.set_postfix_str(text)
    else:
      self._line(f'step {step}/{self._total}, {text}')

  def note(self, sentence: str) -> None:
    """Print a sentence above the bar, or as a line."""
    if self._bar is not None:
      self._bar.write(sentence, file=self._stream)
    else:
      self._line(sentence)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def _line(self, text: str) -> None:
    print(text, file=self._stream, flush=True)
