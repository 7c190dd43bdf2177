"""Rows of the survey's table: what is refused, what is built, what is printed."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention import feature_side, query_side, taxonomy
from tfm.attention.alignments import ALIGNMENTS
from tfm.attention.general import AttentionModule
from tfm.attention.score_functions import SCORES
from tfm.attention.taxonomy import PRESETS, AttentionSpec, build, describe, table
from tfm.config import ConfigError

PAGE = Path(__file__).parents[2] / 'docs' / 'attention.md'
B, T, S, F = 2, 3, 5, 6
X, Y = jnp.ones((B, T, F)), jnp.asarray(np.random.default_rng(0).standard_normal((B, S, F)), jnp.float32)
WIDTHS = dict(query_width=F, feature_width=F)

# preset -> (class, options, inputs)
BUILT = {
    'Bahdanau et al. 2015': (AttentionModule, dict(hidden_width=4, **WIDTHS), (X, Y)),
    'Xu et al. 2015, hard': (AttentionModule, dict(hidden_width=4, **WIDTHS), (X, Y)),
    'Luong et al. 2015, global': (AttentionModule, WIDTHS, (X, Y)),
    'Luong et al. 2015, local-m': (AttentionModule, dict(window=2, **WIDTHS), (X, Y)),
    'Luong et al. 2015, local-p': (AttentionModule, dict(window=2, centre_width=3, **WIDTHS), (X, Y)),
    'Yang et al. 2016': (feature_side.HierarchicalAttention, dict(hidden_width=4, feature_width=F), (Y[:, None],)),
    'Lu et al. 2016, parallel': (feature_side.ParallelCoAttention, dict(hidden_width=4, feature_widths=(F, F)), (X, Y)),
    'Lu et al. 2016, alternating': (feature_side.AlternatingCoAttention,
                                    dict(hidden_width=4, feature_widths=(F, F)), (X, Y)),
    'Ma et al. 2017': (feature_side.InteractiveCoAttention, dict(feature_widths=(F, F)), (X, Y)),
    'Vaswani et al. 2017, self': (query_side.MultiHead, dict(num_heads=2, output_width=F, key_width=3, value_width=3),
                                  (Y, Y)),
    'Vaswani et al. 2017, cross': (query_side.MultiHead, dict(num_heads=2, output_width=F, key_width=3, value_width=3),
                                   (X, Y)),
    'Zheng & Xia 2018': (feature_side.RotatoryAttention, dict(target_width=F, left_width=F, right_width=F), (X, Y, Y)),
    'Wallaart & Frasincar 2019': (feature_side.RotatoryAttention,
                                  dict(target_width=F, left_width=F, right_width=F, hops=3), (X, Y, Y)),
    'Shen et al. 2018': (query_side.SelfAttentive, dict(hidden_width=4, feature_width=F), (Y,)),
    'Kiela et al. 2018': (feature_side.MultiRepresentational,
                          dict(hidden_width=4, embedding_widths=(F, F), width=3), (Y, Y)),
    'Zhao & Zhang 2018': (feature_side.AttentionViaAttention,
                          dict(hidden_width=4, query_width=F, word_width=F, character_width=F), (X, Y, Y)),
    'Tran & Niedereée 2018': (query_side.MultiHop, dict(hidden_width=4, hops=2, **WIDTHS), (X, Y)),
    'Wang et al. 2018': (query_side.Capsules, dict(feature_width=F, classes=2), (Y,)),
}


@pytest.mark.parametrize('name', BUILT)
def test_a_preset_builds_the_module_of_its_paper(name):
  kind, options, inputs = BUILT[name]
  module = build(PRESETS[name], **options)
  assert type(module) is kind
  if hasattr(module, 'parts'):
    assert module.parts.score == PRESETS[name].scoring
    assert module.parts.alignment.replace('_per_feature', '') == PRESETS[name].alignment
  more = dict(key=jax.random.key(1)) if PRESETS[name].alignment == 'hard_sampled' else {}
  found = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), *inputs, **more)[0])
  assert jax.tree.leaves(found)


def test_all_presets_are_built_but_the_one_that_has_two_scores():
  assert set(PRESETS) - set(BUILT) == {'Fan et al. 2018'}
  with pytest.raises(ConfigError, match='build a MultiGrainedCoAttention of an'):
    build(taxonomy.FAN)


def test_presets_differ_and_cover_the_taxonomy():
  assert len(set(PRESETS.values())) == len(PRESETS)
  for field in dataclasses.fields(AttentionSpec):
    if field.name not in ('scoring', 'alignment'):
      used = {getattr(spec, field.name) for spec in PRESETS.values()}
      assert used >= set(get_args(get_type_hints(AttentionSpec)[field.name])) - {'multi_head'}, field.name


def test_it_has_the_surveys_eight_columns_and_every_name_of_a_score_and_an_alignment():
  hints = get_type_hints(AttentionSpec)
  assert len(dataclasses.fields(AttentionSpec)) == 8
  assert get_args(hints['scoring']) == SCORES and get_args(hints['alignment']) == ALIGNMENTS
  for name in SCORES:
    assert AttentionSpec(scoring=name).scoring == name


@pytest.mark.parametrize('fields, message', [
    (dict(alignment='reinforced'), 'lets an agent with a reward of its own'),
    (dict(scoring='dot'), "no score 'dot'"),
    (dict(alignment='soft_per_feature'), "say alignment='soft' and dimensionality='multi'"),
    (dict(dimensionality='multi', scoring='scaled'), 'needs a score for every feature'),
    (dict(dimensionality='multi', alignment='sparsemax'), 'needs a score for every feature'),
    (dict(feature_multiplicity='rotatory'), "is query_type='specialized', not 'basic'"),
    (dict(feature_multiplicity='alternating', query_type='specialized', scoring='general'), 'cannot give'),
    (dict(feature_multiplicity='interactive', query_type='specialized', alignment='hard_sampled'), 'looks once'),
    (dict(feature_levels='hierarchical'), "query_type='self_attentive', not 'basic'"),
    (dict(feature_levels='attention_via_attention', query_type='self_attentive'), 'must come from outside'),
    (dict(query_multiplicity='capsule'), 'learns the query of every class'),
    (dict(query_type='own'), "choose one of 'basic'"),
])
def test_columns_that_do_not_go_together_are_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    AttentionSpec(**fields)


def test_rows_that_no_module_is_are_refused():
  with pytest.raises(ConfigError, match='is HierarchicalAttention and MultiRepresentational and MultiHead together'):
    build(AttentionSpec(feature_levels='hierarchical', feature_representations='multi', query_type='self_attentive',
                        query_multiplicity='multi_head'), hidden_width=4)
  with pytest.raises(ConfigError, match="hops is 1 with query_multiplicity='multi_hop'"):
    build(taxonomy.LCR_ROT_HOP, target_width=F, left_width=F, right_width=F)


def test_a_model_describes_itself():
  specs = {'decoder.cross_attention': taxonomy.VASWANI_CROSS}
  assert describe(SimpleNamespace(attention_specs=specs)) == specs
  assert describe(SimpleNamespace(attention_specs={})) == {}
  with pytest.raises(ConfigError, match='SimpleNamespace does not say what its attentions are'):
    describe(SimpleNamespace())


def test_a_table_has_a_row_for_every_spec():
  lines = table({'here': taxonomy.VASWANI}).splitlines()
  assert len(lines) == 3 and all(line.count('|') == 10 for line in lines)
  assert lines[2] == ('| here | singular | single | single | scaled multiplicative | global | single | self-attentive '
                      '| multi-head + multi-hop |')


def test_every_name_that_is_not_a_word_has_one():
  hints = get_type_hints(AttentionSpec)
  names = {name for hint in hints.values() for name in get_args(hint)} - {'soft_per_feature'}
  assert {name for name in names if '_' in name} <= set(taxonomy.WORDS) <= names


def test_the_page_has_the_table_of_the_presets():
  assert table(PRESETS) in PAGE.read_text()


def test_the_page_names_parts_that_exist():
  lines = PAGE.read_text().splitlines()
  parts = [line.split('|')[1:-1] for line in lines if line.startswith('|') and '`tfm/attention/' in line]
  assert len(parts) > 20
  for part, _, file, names in parts:
    module = importlib.import_module(file.strip(' `').removesuffix('.py').replace('/', '.'))
    assert all(hasattr(module, name) for name in re.findall(r'`(\w+)`', names)), part
