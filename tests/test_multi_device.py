"""Runs the test files that need several devices in processes that have eight: JAX is told before it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = ['attention/test_ring.py', 'attention/test_ulysses.py', 'attention/test_pallas_mesh.py',
         'analysis/test_engine_mesh.py', 'parallel/test_compile.py', 'parallel/test_elastic.py']


def test_every_file_that_needs_devices_is_listed():
  needy = {str(path.relative_to(TESTS)) for path in TESTS.rglob('test_*.py')
           if 'len(jax.devices()) < 8' in path.read_text() and path != Path(__file__)}
  assert needy == set(FILES)


@pytest.mark.parametrize('file', FILES)
def test_with_eight_devices(file):
  environment = {name: value for name, value in os.environ.items() if not name.startswith('PYTEST_')}
  flags = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
  command = [sys.executable, '-m', 'pytest', '-n', '0', '-p', 'no:cacheprovider', str(TESTS / file)]
  found = subprocess.run(command, env={**environment, 'XLA_FLAGS': flags}, capture_output=True, text=True, timeout=1800)
  assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
  assert 'skipped' not in found.stdout.splitlines()[-1], found.stdout[-2000:]
