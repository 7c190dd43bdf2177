from __future__ import annotations

import re
import shlex
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tfm import cli
from tfm.config import Config, ConfigError
from tfm.models.build import build_model, initialize
from tfm.models.layout import layout_of
from tfm.recipe import read_recipe

FOLDER = Path(__file__).parents[1] / 'configs'
RECIPES = sorted(FOLDER.rglob('*.py'))
COMMAND = re.compile(r'^ +(?:(?P<variables>(?:\w+=\S+ )*)(?P<program>python train\.py|tfm))(?: (?P<arguments>.*))?$',
                     re.MULTILINE)

each_recipe = pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def no_row(monkeypatch):
  for name in ('TABLE3_ROW', 'MODEL'):
    monkeypatch.delenv(name, raising=False)


@each_recipe
def test_it_has_a_command_that_parses(recipe, monkeypatch, tmp_path):
  _, docstring = read_recipe(recipe)
  commands = list(COMMAND.finditer(docstring))
  trained, stop = [], RuntimeError('far enough')

  def train(config, run, init_run):
    trained.append(config)
    raise stop

  monkeypatch.setattr('tfm.training.loop.train', train)
  monkeypatch.setattr('tfm.training.compilation_cache.use_compilation_cache', lambda: None)
  monkeypatch.chdir(tmp_path)
  for command in commands:
    for name, value in (pair.split('=') for pair in command['variables'].split()):
      monkeypatch.setenv(name, value)
    arguments = shlex.split(command['arguments'] or '')
    if command['program'] == 'tfm':
      # What it names is not there: that it says so shows that all else was understood.
      monkeypatch.setattr(sys, 'argv', ['tfm', *arguments])
      with pytest.raises(SystemExit) as ended:
        cli.main()
      absent = 'error: There is no folder', 'error: There is no config file'
      assert str(ended.value.code).startswith(absent), command[0]
    else:
      path = FOLDER.parent / arguments.pop(0) if arguments and arguments[0].endswith('.py') else FOLDER / 'default'
      assert path == recipe or (path.name == 'default' and recipe.stem == 'numbers_en_de'), command[0]
      with pytest.raises(RuntimeError) as ended:
        cli.train_main(recipe, arguments)
      assert ended.value is stop
  assert trained, f'{recipe.name} names no command that trains it'
  assert all(isinstance(config, Config) for config in trained)


@each_recipe
def test_its_model_builds(recipe):
  config, _ = read_recipe(recipe)
  vocabulary = config.tokenizer.vocab_size or 260
  model = build_model(config.model, vocabulary, vocabulary)
  params = jax.eval_shape(partial(initialize, model), jax.random.key(0))
  assert layout_of(params) == ('scanned' if config.model.scan_layers else 'unrolled')
  ids_BxT = jax.ShapeDtypeStruct((2, min(12, config.data.max_length)), jnp.int32)
  sides = 2 if config.model.shape == 'encoder_decoder' else 1
  logits_BxTxV = jax.eval_shape(model.apply, {'params': params}, *[ids_BxT] * sides)
  assert logits_BxTxV.shape == (*ids_BxT.shape, vocabulary) and logits_BxTxV.dtype == jnp.float32


def test_an_unknown_row_of_table_3_names_the_nearest(monkeypatch):
  monkeypatch.setenv('TABLE3_ROW', 'A-h33')
  with pytest.raises(ConfigError, match="'A-h33'.*did you mean 'A-h3?2?'"):
    read_recipe(FOLDER / 'table3.py')
