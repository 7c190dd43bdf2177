"""What the documents name exists: files, links, names in files, fields of the config."""

from __future__ import annotations

import ast
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from tfm.config import Config, TransformerConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
CODE = re.compile(r'`([^`\n]+)`')
FIELD = re.compile(r'(?:--)?((?:model|tokenizer|data|optimizer|mesh|training|decoding)\.\w+)$')

each_document = pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)


def rows(document: Path, header: str) -> list[list[str]]:
  """The cells of every row of the tables that have the column `header`."""
  found, inside = [], False
  for line in document.read_text().splitlines():
    cells = [cell.strip() for cell in line.strip('|').split('|')] if line.startswith('|') else []
    if not cells or header in cells:
      inside = header in cells
    elif inside and set(cells[0]) != {'-'}:
      found.append(cells)
  return found


def names_in(file: Path) -> set[str]:
  """Everything that a file defines: functions, classes and methods at any depth, and names at the top."""
  tree = ast.parse(file.read_text())
  defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
  assigned = [target for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)
              for target in getattr(node, 'targets', [getattr(node, 'target', None)])]
  return defined | {name.id for target in assigned for name in ast.walk(target) if isinstance(name, ast.Name)}


def config_fields() -> set[str]:
  return {f'{section.name}.{leaf.name}' for section in fields(Config) if is_dataclass(section.default_factory)
          for leaf in fields(section.default_factory)}


def test_every_answer_of_where_is_true():
  answers = rows(ROOT / 'docs' / 'where.md', 'name')
  assert len(answers) > 40
  for question, files, names in answers:
    files, names = CODE.findall(files), CODE.findall(names)
    assert files and names, question
    defined = [names_in(ROOT / file) for file in files]
    for name in names:
      assert any(name in here for here in defined), f'{question} {name} is not in {files}'
    for file, here in zip(files, defined):
      assert here & set(names), f'{question} {file} has none of {names}'


def test_every_convention_names_its_fields_and_its_file():
  conventions = rows(ROOT / 'docs' / 'conventions.md', 'elsewhere')
  assert len(conventions) > 30
  for what, here, _, field, file in conventions:
    assert what and here
    assert field == '–' or set(CODE.findall(field)) <= config_fields(), f'{what}: {field}'
    assert [(ROOT / path).is_file() for path in CODE.findall(file)] == [True], f'{what}: {file}'


@each_document
def test_links_and_paths_lead_somewhere(document):
  text = document.read_text()
  for link in re.findall(r'\]\(([^)#]+)\)', text):
    assert link.startswith('https://') or (document.parent / link).exists(), link
  text = re.sub(r'https://\S+', '', text)
  for path in re.findall(r'(?:tfm|configs|tests|benchmarks|docs|notebooks)/\w[\w/]*\.(?:py|md|ipynb|png)', text):
    assert (ROOT / path).exists(), path


@each_document
def test_fields_exist(document):
  for code in CODE.findall(document.read_text()):
    if match := FIELD.match(code):
      assert match[1] in config_fields(), code


def test_every_part_of_the_model_has_a_row_whose_file_and_name_are_true():
  parts, named = rows(ROOT / 'docs' / 'parts.md', 'part'), set()
  for part, paper, file, names, oracle in parts:
    assert paper and oracle, part
    here = names_in(ROOT / file.strip('`'))
    assert names and set(CODE.findall(names)) <= here, f'{part}: {names} is not in {file}'
    code = ' '.join(CODE.findall(part))
    named |= set(re.findall(r'\b[a-z]\w+', code))
  choices = {f'{leaf.name}={option!r}' for leaf in fields(TransformerConfig)
             if leaf.name in ('norm', 'norm_type', 'positions', 'feed_forward', 'biases', 'rope_scaling', 'convolution')
             for option in get_args(get_type_hints(TransformerConfig)[leaf.name])}
  values = {value for choice in choices for value in [choice.split('=')[1].strip("'")]}
  no_parts = {'d_model', 'd_ff', 'norm_epsilon', 'max_positions', 'rope_factor', 'rope_original_length',
              'attention_backend', 'dtype', 'pad_id', 'scan_layers', 'remat'}
  assert named >= values | {leaf.name for leaf in fields(TransformerConfig)} - no_parts
