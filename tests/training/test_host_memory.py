from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from tfm.training.host_memory import reuse_freed_memory

PAGES = '''
import ctypes
from tfm.training.host_memory import reuse_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
  return int(open('/proc/self/statm').read().split()[1]) * 4096

def left_after_free(size=64 * 2**20):
  before, block = resident(), libc.malloc(size)
  ctypes.memset(block, 1, size)
  libc.free(block)
  return resident() - before > size / 2

print(left_after_free())
print(reuse_freed_memory())
print(left_after_free())
'''


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='needs glibc')
def test_freed_memory_stays_mapped():
  # In a process of its own: the setting cannot be taken back.
  output = subprocess.run([sys.executable, '-c', PAGES], check=True, capture_output=True, text=True, timeout=60,
                          env=os.environ).stdout
  assert output.splitlines() == ['False', 'freed memory is kept mapped (training.reuse_memory)', 'True']


@pytest.mark.parametrize('system', ['darwin', 'win32'])
def test_other_systems_are_left_alone(monkeypatch, system):
  monkeypatch.setattr(sys, 'platform', system)
  monkeypatch.delattr(ctypes, 'CDLL')
  assert reuse_freed_memory() == f'freed memory is left to the allocator of {system}'


class Refuses:
  """A C library whose mallopt knows no option."""

  def mallopt(self, option: int, value: int) -> int:
    return 0


@pytest.mark.parametrize('library', [object(), Refuses()])
def test_a_c_library_without_mallopt_is_said(monkeypatch, library):
  monkeypatch.setattr(sys, 'platform', 'linux')
  monkeypatch.setattr(ctypes, 'CDLL', lambda name: library)
  assert 'left to the C library' in reuse_freed_memory()
