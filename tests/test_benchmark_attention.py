"""`benchmarks/attention.py`, tried out in small: its numbers mean nothing, its logic does."""

import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / 'benchmarks' / 'attention.py'


@pytest.fixture
def script(monkeypatch, benchmark_script):
  monkeypatch.setenv('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # as the script sets it, and undone afterwards
  module = benchmark_script('attention')
  monkeypatch.setattr(module, 'reuse_freed_memory', lambda: 'the allocator of the tests is left alone')
  monkeypatch.setattr(sys.modules['side_by_side'], 'PAUSE', 0)
  return module


def test_it_measures_every_backend_at_every_length(script, monkeypatch, tmp_path, capsys):
  output = tmp_path / 'results.json'
  monkeypatch.setattr(script, 'torch_is_there', lambda: False)
  monkeypatch.setattr(sys, 'argv', [str(SCRIPT), '--small', '--output', str(output)])
  script.main()
  found = json.loads(output.read_text())
  assert len(found['rows']) == 2 * 2 * 2 * 3  # passes, masks, lengths, backends
  for row in found['rows']:
    assert row['reason'].startswith('there is no PyTorch') if row['backend'] == 'torch' else row['seconds'] > 0
  assert found['largest_difference_from_reference']['blockwise'] < 0.05
  assert capsys.readouterr().out.count('forward and backward') == 2 * 4  # as they come, and in the table


def test_pytorch_is_measured_beside_them(script):
  pytest.importorskip('torch', reason='the peer of the benchmark')
  shape = script.Shape(1, 16, 2, 8, causal=True)
  rows = {row['backend']: row for row in script.measure(['blockwise', 'torch'], shape, True, 2, 0.001, 1e9)}
  assert rows['torch']['ratio'] == 1 and rows['blockwise']['ratio'] > 0


def test_it_counts_operations_as_it_says(script):
  assert script.Shape(2, 10, 3, 8, causal=False).operations(backward=False) == 4 * 2 * 3 * 10 * 10 * 8
  assert script.Shape(2, 10, 3, 8, causal=True).operations(backward=True) == 2 * 2 * 3 * 10 * 10 * 8 * 3.5


def test_what_is_not_measured_has_a_reason(script):
  shape = script.Shape(1, 16, 2, 8, causal=True)
  assert script.why_not('blockwise', shape, 1e9) is None
  assert script.why_not('reference', shape, 1e3) == 'its scores do not fit in memory'
  ring, = script.measure(['ring'], shape, False, 1, 0.001, 1e9)
  assert 'mesh' in ring['reason'] and 'seconds' not in ring
  if not script.on_gpu():
    assert script.why_not('pallas', shape, 1e9).endswith('not for cpu')


def test_a_kernel_that_fails_does_not_stop_the_others(script, monkeypatch):
  works = script.jax_call

  def jax_call(name, *more):
    if name == 'blockwise':
      raise RuntimeError('no room\nand more of it')
    return works(name, *more)

  monkeypatch.setattr(script, 'jax_call', jax_call)
  shape = script.Shape(1, 16, 2, 8, causal=True)
  broken, fine = script.measure(['blockwise', 'reference'], shape, False, 1, 0.001, 1e9)
  assert broken['reason'] == 'RuntimeError: no room' and fine['seconds'] > 0
