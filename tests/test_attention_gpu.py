"""`benchmarks/attention_gpu.py`, tried out where there is no GPU: its numbers mean nothing, its logic does."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).parents[1] / 'benchmarks' / 'attention_gpu.py'


@pytest.fixture
def script(monkeypatch):
  monkeypatch.setenv('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # as the script sets it, and undone afterwards
  spec = importlib.util.spec_from_file_location('attention_gpu', SCRIPT)
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, 'attention_gpu', module)
  spec.loader.exec_module(module)
  return module


def test_it_measures_every_backend_at_every_length(script, monkeypatch, tmp_path, capsys):
  output = tmp_path / 'results.json'
  monkeypatch.setattr(sys, 'argv', [str(SCRIPT), '--tiny', '--rounds', '1', '--repeats', '1', '--output', str(output)])
  script.main()
  found = json.loads(output.read_text())
  assert len(found['rows']) == 2 * 2 * 2 * 2 and all(row['tflops'] >= 0 for row in found['rows'])
  assert found['largest_difference_from_reference']['blockwise'] < 0.05
  assert capsys.readouterr().out.count('forward and backward') == 4


def test_it_counts_operations_as_it_says(script):
  assert script.Shape(2, 10, 3, 8, causal=False).operations(backward=False) == 4 * 2 * 3 * 10 * 10 * 8
  assert script.Shape(2, 10, 3, 8, causal=True).operations(backward=True) == 2 * 2 * 3 * 10 * 10 * 8 * 3.5


def test_what_is_not_measured_has_a_reason(script):
  shape = script.Shape(1, 16, 2, 8, causal=True)
  assert script.why_not('blockwise', shape, 1e9) is None
  assert script.why_not('reference', shape, 1e3) == 'its scores do not fit in memory'
  assert 'AttentionError' in script.measure('ring', shape, False, 1, 1)['reason']


@pytest.mark.skipif(jax.default_backend() == 'gpu', reason='there is a GPU')
def test_without_a_gpu_it_says_so(script, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', [str(SCRIPT)])
  script.main()
  assert capsys.readouterr().out == 'There is no GPU here (JAX sees cpu), so nothing was measured.\n'
  assert script.why_not('pallas', script.Shape(1, 16, 2, 8, causal=True), 1e9).endswith('not for cpu')
