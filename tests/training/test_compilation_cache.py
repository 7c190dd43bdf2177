from __future__ import annotations

from pathlib import Path

import jax
import pytest

from tfm.training.compilation_cache import use_compilation_cache


@pytest.fixture(autouse=True)
def restored():
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', None)
  yield
  jax.config.update('jax_compilation_cache_dir', before)


def test_lies_in_the_cache_folder_of_the_user(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'tfm' / 'xla')


@pytest.mark.parametrize('value', [None, ''])
def test_without_one_named_it_lies_in_the_home(monkeypatch, tmp_path, value):
  monkeypatch.setattr(Path, 'home', lambda: tmp_path)
  if value is None:
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  else:
    monkeypatch.setenv('XDG_CACHE_HOME', value)
  use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / '.cache' / 'tfm' / 'xla')


def test_the_folder_that_the_user_chose_stays(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  jax.config.update('jax_compilation_cache_dir', '/chosen')
  use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == '/chosen'
