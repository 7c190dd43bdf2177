"""SIGTERM and SIGINT ask the training loop to stop; it saves and ends at the next step."""

from __future__ import annotations

import os
import signal
import threading
from types import TracebackType

import jax
from jax.experimental import multihost_utils


class Interrupt:
  """While entered, the first SIGTERM or SIGINT sets `requested`; a second SIGINT interrupts at once, as usual.

  Works in a single process too, where JAX's own preemption service does nothing. Of several processes all must end at
  one step, so there JAX's service takes SIGTERM, `agree` asks it, and SIGINT is passed on as SIGTERM. Outside the main
  thread, where Python allows no handlers, it changes nothing.
  """

  def __init__(self):
    self.requested: str | None = None
    self._before: dict[int, object] = {}
    self._several = jax.process_count() > 1

  def __enter__(self) -> Interrupt:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._pass_on if self._several else self._request)
    return self

  def agree(self, step: int) -> str | None:
    """The signal to end for after `step`, the same in every process; all must ask at every step."""
    if self._several and multihost_utils.reached_preemption_sync_point(step):
      self.requested = 'SIGTERM'
    return self.requested

  def _pass_on(self, number: int, frame) -> None:
    del number, frame
    os.kill(os.getpid(), signal.SIGTERM)

  def _request(self, number: int, frame) -> None:
    del frame
    if self.requested is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = signal.Signals(number).name

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
    for number, handler in self._before.items():
      # None: one that was not set from Python, which Python cannot put back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
