"""Keep the CPU's freed buffers mapped.

XLA on CPU allocates its temporary arena with malloc at every call. glibc serves blocks above 32 MiB with a fresh
mmap and unmaps them on free, so each training step pays for touching hundreds of megabytes of new pages (150,000
page faults a step at Transformer-base; a fourth to a third of the time). With mmap off and trimming off the heap is
reused, which takes 13 to 18 % off a step on two cores. A single arena: those beside the first cannot hold more than
64 MiB, so what a thread of theirs asks for would be mapped and unmapped all the same (Transformer-tiny: 60,000 page
faults and a fifth of the time, in those runs in which such a thread came to ask). The price is resident memory: the
process keeps its peak.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 * 2**20), (_M_ARENA_MAX, 1))


def reuse_freed_memory() -> str:
  """Apply the setting to this process, before its first computation; says what happened in one clause."""
  if not sys.platform.startswith('linux'):
    return f'freed memory is left to the allocator of {sys.platform}'
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None or not all([mallopt(option, value) for option, value in _SETTINGS]):
    return 'freed memory is left to the C library, which has no mallopt'
  return 'freed memory is kept mapped (training.reuse_memory)'
