"""Every notebook runs from top to bottom, and is small and tidy enough to be read on the web."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / 'notebooks').glob('*.ipynb'))
STEPS = 10
LARGEST = 300_000


@pytest.fixture
def this_python(tmp_path, monkeypatch):
  """Kernel 'python3' is the interpreter of the tests, whatever kernels the machine has."""
  folder = tmp_path / 'jupyter' / 'kernels' / 'python3'
  folder.mkdir(parents=True)
  spec = {'argv': [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}'],
          'display_name': 'Python 3', 'language': 'python'}
  (folder / 'kernel.json').write_text(json.dumps(spec))
  monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'jupyter'))


def test_there_are_notebooks():
  assert NOTEBOOKS


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, this_python, tmp_path, monkeypatch):
  nbclient = pytest.importorskip('nbclient', reason='needs the extra `test`: nbclient and ipykernel')
  pytest.importorskip('ipykernel', reason='needs the extra `test`: nbclient and ipykernel')
  import nbformat
  monkeypatch.setenv('TFM_NOTEBOOK_STEPS', str(STEPS))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(notebook, timeout=900, kernel_name='python3',
                                   resources={'metadata': {'path': str(tmp_path)}})
  client.execute()
  outputs = [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]
  assert any('image/png' in output.get('data', {}) for output in outputs), 'no picture'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_is_as_it_should_be_committed(path):
  notebook = json.loads(path.read_text())
  assert path.stat().st_size < LARGEST, 'too large to read on the web; run it anew with smaller pictures'
  assert f'colab.research.google.com/github/OWNER/tfm/blob/main/notebooks/{path.name}' in path.read_text()
  cells = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
  counts = [cell['execution_count'] for cell in cells]
  assert counts == list(range(1, len(cells) + 1)), 'the outputs are not those of one run from top to bottom'
  outputs = json.dumps([cell['outputs'] for cell in cells])
  assert '"output_type": "error"' not in outputs
  assert str(Path.home()) not in outputs and 'site-packages' not in outputs, 'outputs show a path of one machine'
