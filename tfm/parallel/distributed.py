"""Several processes as one run, through `jax.distributed`."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from tfm.config import require
from tfm.errors import UserError

log = logging.getLogger('tfm')

HEARTBEAT_SECONDS = 30
"""How long a process may be silent before the others give up."""


@dataclass(frozen=True)
class Distributed:
  """How the processes of a run find each other."""

  auto: bool = False
  """Several processes, found by JAX itself: SLURM, GKE, Cloud TPU pods, Open MPI."""
  coordinator: str | None = None
  """HOST:PORT where process 0 listens; with it give the next two."""
  processes: int | None = None
  """Processes in all."""
  process: int | None = None
  """Number of this one, from 0."""

  def initialize(self) -> None:
    """Join the other processes; does nothing for a process that is alone. Must come before any other use of JAX.

    Raises:
      ConfigError: the fields do not go together.
      UserError: the processes did not find each other.
    """
    given = [value is not None for value in (self.coordinator, self.processes, self.process)]
    require(all(given) or not any(given), 'distributed.coordinator, processes and process go together; give all three, '
                                          'or --distributed.auto where a cluster manager knows them.')
    require(not (self.auto and any(given)), 'distributed.auto finds the processes by itself; leave out coordinator, '
                                            'processes and process, or auto.')
    if not self.auto and not any(given):
      return
    if all(given):
      require(0 <= self.process < self.processes, f'distributed.process {self.process} is not below '
                                                  f'distributed.processes {self.processes}; number them from 0.')
    import jax  # not needed, and slow, for --help
    try:
      jax.distributed.initialize(self.coordinator, self.processes, self.process,
                                 heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
      raise UserError(f'The processes did not find each other: {error}. Check that all were started and that the '
                      'coordinator can be reached.') from error
    if jax.process_index() > 0:
      log.setLevel(logging.WARNING)  # process 0 speaks for all
    log.info('Process %d of %d, %d of %d devices.', jax.process_index(), jax.process_count(), jax.local_device_count(),
             jax.device_count())


def part() -> None:
  """Take leave of the other processes: what one of them does afterwards, by itself, may take as long as it likes.

  At their exit JAX would let them wait for one another, and give up after five minutes.
  """
  import jax
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()


def leave_at_once(status: int) -> None:
  """End this process without the farewell that JAX's exit would wait for, when there is nobody left to give it."""
  logging.shutdown()
  os._exit(status)
