"""SIGTERM and SIGINT ask the training loop to stop; it saves and ends at the next step."""

from __future__ import annotations

import signal
import threading
from types import TracebackType


class Interrupt:
  """While entered, the first SIGTERM or SIGINT sets `requested`; a second SIGINT interrupts at once, as usual.

  Works in a single process too, where JAX's own preemption service does nothing. Outside the main thread, where
  Python allows no handlers, it changes nothing.
  """

  def __init__(self):
    self.requested: str | None = None
    self._before: dict[int, object] = {}

  def __enter__(self) -> Interrupt:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._request)
    return self

  def _request(self, number: int, frame) -> None:
    del frame
    if self.requested is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = signal.Signals(number).name

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
    for number, handler in self._before.items():
      # None: one that was not set from Python, which Python cannot put back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
