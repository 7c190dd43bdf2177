"""Recipes: Python files that define the config of a run, or the configs of several to compare."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from tfm.config import Config, ConfigError, nearest


def read_recipe(path: Path) -> tuple[Config, str]:
  """The `config` of a recipe file and its docstring."""
  module = _execute(path)
  config = getattr(module, 'config', None)
  if not isinstance(config, Config):
    raise ConfigError(f'{path} does not define `config = Config(...)`.')
  return config, module.__doc__ or ''


def read_comparison(path: Path, only: tuple[str, ...] = ()) -> dict[str, Config]:
  """The `configs` of a recipe for several models, by name: all, or those named in `only`."""
  configs = getattr(_execute(path), 'configs', None)
  if not isinstance(configs, dict) or not configs or not all(isinstance(each, Config) for each in configs.values()):
    raise ConfigError(f'{path} does not define `configs = {{name: Config(...), ...}}`.')
  for name in only:
    if name not in configs:
      raise ConfigError(f"{path} has no model '{name}'{nearest(name, configs) or '.'} It has {', '.join(configs)}.")
  return {name: config for name, config in configs.items() if not only or name in only}


def _execute(path: Path) -> ModuleType:
  if not path.is_file():
    raise ConfigError(f'There is no config file {path}; give one of configs/*.py or your own.')
  if path.suffix != '.py':
    raise ConfigError(f'{path} is not a Python file; give one of configs/*.py or your own.')
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
