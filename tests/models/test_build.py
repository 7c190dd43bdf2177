from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import TransformerConfig
from tfm.models.build import build_model, count_parameters, initialize, with_layout
from tfm.models.layout import to_layout
from tfm.recipe import read_recipe

CONFIGS = Path(__file__).parents[2] / 'configs'
V = 37_000


def parameters_of(config: TransformerConfig, source_vocab_size: int, target_vocab_size: int):
  """Shapes only: nothing is allocated."""
  model = build_model(config, source_vocab_size, target_vocab_size)
  return jax.eval_shape(partial(initialize, model), jax.random.key(0))


def arithmetic(c: TransformerConfig, source_vocab_size: int, target_vocab_size: int) -> int:
  """The number of parameters by the paper's description."""
  attention = 2 * c.d_model * c.num_heads * (c.key_width + c.value_width)
  mlp, norm = 2 * c.d_model * c.d_ff + c.d_ff + c.d_model, 2 * c.d_model
  layers = c.encoder_layers * (attention + mlp + 2 * norm) + c.decoder_layers * (2 * attention + mlp + 3 * norm)
  tables = {'none': source_vocab_size + 2 * target_vocab_size, 'target': source_vocab_size + target_vocab_size,
            'all': target_vocab_size}[c.tying]
  return layers + (tables + 2 * (c.max_positions or 0)) * c.d_model + 2 * norm * (c.norm == 'pre')


@pytest.mark.parametrize('norm, tying, max_positions, d_k', [
    ('post', 'none', None, 5), ('post', 'target', 9, 5), ('post', 'all', 9, None),
    ('pre', 'none', 9, None), ('pre', 'target', None, None), ('pre', 'all', None, 5)])
def test_parameters_are_those_of_the_paper_and_no_more(norm, tying, max_positions, d_k):
  config = TransformerConfig(encoder_layers=1, decoder_layers=3, d_model=16, d_ff=24, num_heads=2, norm=norm, d_k=d_k,
                             tying=tying, positions='learned' if max_positions else 'sinusoidal',
                             max_positions=max_positions)
  source_vocab_size = 17 if tying == 'all' else 19
  assert count_parameters(parameters_of(config, source_vocab_size, 17)) == arithmetic(config, source_vocab_size, 17)


@pytest.fixture(scope='module')
def table3():
  """{row: millions of parameters}, counted on the models themselves."""
  path = CONFIGS / 'table3.py'
  variants = {}
  exec(compile(path.read_text(), path, 'exec'), variants)  # a recipe is a script
  return {row: count_parameters(parameters_of(config.model, V, V)) / 1e6
          for row, config in variants['VARIANTS'].items() if not row.startswith('D')}


TABLE3 = {'A-h1': 0, 'A-h4': 0, 'A-h16': 0, 'A-h32': 0, 'B-dk16': -7.1, 'B-dk32': -4.7, 'C-N2': -29.4, 'C-N4': -14.7,
          'C-N8': 14.7, 'C-d256': -36.2, 'C-d1024': 100.8, 'C-ff1024': -12.6, 'C-ff4096': 25.2, 'big': 151.1,
          'E-learned': 0.3}
"""Row minus base in millions, for 37,000 ids tied three ways and no biases in attention. (The paper prints whole
millions: B -7 -5, C -29 -15 +15 -37 +103 -12 +25, big +148.)"""


def test_table_3_by_differences_of_parameter_counts(table3):
  assert table3['base'] == pytest.approx(63.0, abs=0.1)
  assert set(table3) == {*TABLE3, 'base'}
  for row, difference in TABLE3.items():
    assert table3[row] - table3['base'] == pytest.approx(difference, abs=0.06), row


def test_the_recipes_of_base_and_big_are_the_rows_of_table_3(monkeypatch):
  for row in ('base', 'big'):
    monkeypatch.setenv('TABLE3_ROW', row)
    assert read_recipe(CONFIGS / 'table3.py')[0] == read_recipe(CONFIGS / f'transformer_{row}.py')[0]
  monkeypatch.setenv('TABLE3_ROW', 'B-dk61')
  with pytest.raises(ValueError, match="B-dk61.*did you mean 'B-dk16'"):
    read_recipe(CONFIGS / 'table3.py')


# -- first values -----------------------------------------------------------------------------------------------------

CONFIG = TransformerConfig(encoder_layers=2, decoder_layers=3, d_model=32, d_ff=48, num_heads=2, d_k=8, d_v=24,
                           norm='pre', tying='none', positions='learned', max_positions=40, scan_layers=True)
KEY = jax.random.key(0)


@pytest.fixture(scope='module')
def start():
  """key -> parameters, compiled once."""
  return jax.jit(partial(initialize, build_model(CONFIG, 50, 60)))


@pytest.fixture(scope='module')
def fresh(start):
  return start(KEY)


FAN = {'query': (32, 16), 'key': (32, 16), 'value': (32, 48), 'output': (48, 32), 'inner': (32, 48), 'outer': (48, 32)}
"""Inputs and outputs of each matrix, all heads together."""


def test_matrices_are_xavier_uniform(fresh):
  """Glorot & Bengio 2010: U(-a, a), a = sqrt(6 / (inputs + outputs))."""
  found = 0
  for path, leaf_Nx in jax.tree_util.tree_leaves_with_path({name: fresh[name] for name in ('encoder', 'decoder')}):
    if path[-1].key != 'kernel':
      continue
    found += 1
    limit = (6 / sum(FAN[path[-2].key]))**0.5
    for leaf in leaf_Nx:  # each layer for itself
      assert 0.98 * limit < np.abs(leaf).max() <= limit
      # The variance of a uniform sample of size n scatters by sqrt(0.8 / n).
      assert abs(leaf.var() / (limit**2 / 3) - 1) < 4 * (0.8 / leaf.size)**0.5
    assert abs(np.corrcoef(leaf_Nx[0].ravel(), leaf_Nx[1].ravel())[0, 1]) < 4 / leaf_Nx[0].size**0.5
  assert found == 6 + 10


def test_tables_have_variance_one_over_d(fresh):
  for name in ('source_embedding', 'target_embedding', 'output', 'source_positions', 'target_positions'):
    table = fresh[name]['table']
    assert abs(table.std() * 32**0.5 - 1) < 4 / (2 * table.size)**0.5
  # Two tables are two draws.
  tables = [fresh[name]['table'][:40].ravel() for name in ('source_embedding', 'target_embedding', 'output')]
  for one, other in itertools.combinations(tables, 2):
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / one.size**0.5


def test_norms_begin_as_the_identity_and_biases_at_zero(fresh):
  ones, zeros = 0, 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
    if path[-1].key == 'scale':
      ones += 1
      np.testing.assert_array_equal(leaf, 1)
    elif path[-1].key == 'bias':
      zeros += 1
      np.testing.assert_array_equal(leaf, 0)
  assert (ones, zeros) == (5 + 2, 5 + 2 + 4)


def test_the_first_values_do_not_depend_on_how_the_model_is_computed(fresh):
  config = replace(CONFIG, scan_layers=False, dtype='bfloat16', remat='full')
  params = jax.jit(partial(initialize, build_model(config, 50, 60)))(KEY)
  jax.tree.map(np.testing.assert_array_equal, to_layout(params, 'scanned'), fresh)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}


def test_another_key_gives_other_values(start, fresh):
  def compare(path, leaf, other):
    if path[-1].key in ('kernel', 'table'):
      assert abs(np.corrcoef(leaf.ravel(), other.ravel())[0, 1]) < 4.5 / leaf.size**0.5, path

  jax.tree_util.tree_map_with_path(compare, fresh, start(jax.random.key(1)))


def test_with_layout_changes_the_layout_and_nothing_else():
  model = build_model(CONFIG, 50, 60)
  assert not with_layout(model, False).config.scan_layers
  assert with_layout(with_layout(model, False), True) == model
