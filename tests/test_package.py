"""Laws of the package as a whole: light to import, no floor imports from above, files short."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tfm

ROOT = Path(tfm.__file__).parent
FILES = sorted(ROOT.rglob('*.py'))

FLOORS = [
    {'', 'errors', 'special_ids', 'section', 'config', 'model_section', 'model_config', 'recurrent_config',
     'convolutional_config', 'data_config'},
    {'attention', 'decoding', 'parallel'},
    {'models', 'text', 'scores'},
    {'analysis', 'interop', 'training', 'translator', 'generator', 'encoder', 'loaded', 'parallel.compile',
     'parallel.estimate', 'parallel.plan'},
    {'pipeline', 'recipe', 'evaluate', 'compare', 'inspect', 'claims', 'cli'},
]
HEAVY = ('jax', 'flax', 'optax', 'orbax', 'numpy', 'tokenizers', 'sacrebleu', 'num2words', 'tyro', 'tqdm',
         'tensorboardX', 'matplotlib')


def module_name(file: Path) -> str:
  parts = ['tfm', *file.relative_to(ROOT).with_suffix('').parts]
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_name(file): file for file in FILES}


def imports(file: Path) -> set[str]:
  """Modules of tfm that a file imports, at the top or inside functions, but not those for type checkers alone."""
  found = set()

  def visit(node: ast.AST) -> None:
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith('TYPE_CHECKING'):
      for other in node.orelse:
        visit(other)
      return
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{file} has a relative import, which this test cannot follow'
      found.update(f'{node.module}.{alias.name}' if f'{node.module}.{alias.name}' in MODULES else node.module
                   for alias in node.names)
    for child in ast.iter_child_nodes(node):
      visit(child)

  visit(ast.parse(file.read_text()))
  return found & set(MODULES)


def floor(module: str) -> int:
  room, *file = (module.split('.') + [''])[1:]
  names = ['.'.join([room, *file]).rstrip('.'), room]  # a file may stand on another floor than its room
  number = next((number for name in names for number, rooms in enumerate(FLOORS) if name in rooms), None)
  assert number is not None, f'{module} is on no floor; give its room one in this test and in the design'
  return number


def test_import_is_light():
  code = f'import json, sys, tfm; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))'
  loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
  assert json.loads(loaded) == []


def test_every_public_name_resolves():
  for name in tfm.__all__:
    assert getattr(tfm, name) is not None
  assert set(tfm.__all__) <= set(dir(tfm))
  with pytest.raises(AttributeError, match="module 'tfm' has no attribute 'nonsense'"):
    getattr(tfm, 'nonsense')  # noqa: B009
  assert tfm.load is importlib.import_module('tfm.pipeline').load


@pytest.mark.parametrize('module', MODULES)
def test_no_module_imports_from_a_floor_above(module):
  above = {other for other in imports(MODULES[module]) if floor(other) > floor(module)}
  assert not above, f'{module} (floor {floor(module)}) imports {above}'


def test_no_circle():
  graph = {module: imports(file) - {module} for module, file in MODULES.items()}
  while leaves := [module for module, others in graph.items() if not others & set(graph)]:
    for module in leaves:
      del graph[module]
  assert not graph, f'these import each other in a circle: {sorted(graph)}'


@pytest.mark.parametrize('module', MODULES)
def test_files_are_short_and_refuse_in_sentences(module):
  text = MODULES[module].read_text()
  assert len(text.splitlines()) <= 400
  asserts = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]
  assert not asserts, f'{module} asserts in lines {asserts}; raise an error with a sentence instead'


def test_the_median_file_is_below_200_lines():
  lengths = sorted(len(file.read_text().splitlines()) for file in FILES)
  assert lengths[len(lengths) // 2] < 200


def test_the_package_is_typed():
  assert (ROOT / 'py.typed').exists()
