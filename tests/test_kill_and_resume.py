"""A run killed at 20 random moments ends with the same bytes as one never killed (`benchmarks/kill_and_resume.py`)."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_the_same_run(tmp_path):
  script = Path(__file__).parents[1] / 'benchmarks' / 'kill_and_resume.py'
  done = subprocess.run([sys.executable, str(script), '--kills', '20', '--folder', str(tmp_path)], text=True,
                        capture_output=True)
  assert done.returncode == 0, done.stdout + done.stderr
