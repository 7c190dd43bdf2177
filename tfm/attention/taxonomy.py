"""The survey's taxonomy of attention: eight columns that describe any attention (Brauwers & Frasincar 2021, figure 3).

`AttentionSpec` is a row of its table 3, `build` makes the module of a row, `describe` and `table` say which rows a
model has. A model or its config takes part by having `attention_specs`, a dict from the name of an attention to its
spec, so that this file need not know any model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, runtime_checkable

import flax.linen as nn

from tfm.attention import feature_side, query_side
from tfm.attention.alignments import AlignmentName, check_alignment
from tfm.attention.general import AttentionModule, AttentionParts
from tfm.attention.score_functions import ScoreName, check_score
from tfm.section import ConfigError, Section, require

CO_ATTENTION = 'alternating', 'interactive', 'parallel', 'multi_grained'


@dataclass(frozen=True)
class AttentionSpec(Section):
  """One attention, by the survey's eight columns; the defaults are those of Bahdanau et al. 2015."""

  feature_multiplicity: Literal['singular', 'alternating', 'interactive', 'parallel', 'multi_grained',
                                'rotatory'] = 'singular'
  """One input, or how several inputs attend to each other (section 3.1.1)."""
  feature_levels: Literal['single', 'attention_via_attention', 'hierarchical'] = 'single'
  """Section 3.1.2."""
  feature_representations: Literal['single', 'multi'] = 'single'
  """Section 3.1.3."""
  scoring: ScoreName = 'additive'
  """Section 3.2.1."""
  alignment: AlignmentName = 'soft'
  """Section 3.2.2."""
  dimensionality: Literal['single', 'multi'] = 'single'
  """One weight for a value, or one for each of its features (section 3.2.3)."""
  query_type: Literal['basic', 'specialized', 'self_attentive'] = 'basic'
  """Section 3.3.1."""
  query_multiplicity: Literal['singular', 'multi_head', 'multi_hop', 'multi_head_multi_hop', 'capsule'] = 'singular'
  """Section 3.3.2; the survey counts a stack of Transformer layers as heads and hops both."""

  def __post_init__(self):
    check_score(self.scoring)
    check_alignment(self.alignment)
    super().__post_init__()

  def check(self):
    require(self.alignment != 'soft_per_feature',
            "alignment='soft_per_feature' is soft alignment with a weight for every feature; say alignment='soft' and "
            "dimensionality='multi'.")
    require(self.dimensionality == 'single' or (self.scoring, self.alignment) == ('additive', 'soft'),
            f"dimensionality='multi' needs a score for every feature and a softmax over them, which "
            f"scoring='{self.scoring}' with alignment='{self.alignment}' have not; choose 'additive' and 'soft'.")
    require(self.feature_multiplicity not in (*CO_ATTENTION, 'rotatory') or self.query_type == 'specialized',
            f"feature_multiplicity='{self.feature_multiplicity}' makes the query of one input from another, which is "
            f"query_type='specialized', not '{self.query_type}'; change one.")
    require(self.feature_multiplicity not in ('alternating', 'parallel') or self.scoring == 'additive',
            f"feature_multiplicity='{self.feature_multiplicity}' has scores without a query of their own, which "
            f"scoring='{self.scoring}' cannot give; choose 'additive'.")
    require(self.feature_levels != 'hierarchical' or self.query_type == 'self_attentive',
            f"feature_levels='hierarchical' has no query from outside, which is query_type='self_attentive', not "
            f"'{self.query_type}'; change one.")
    require(self.feature_levels != 'attention_via_attention' or self.query_type != 'self_attentive',
            "feature_levels='attention_via_attention' asks two levels the same question, which must come from outside; "
            "choose query_type='basic' or 'specialized'.")
    require(self.query_multiplicity != 'capsule' or self.query_type == 'self_attentive',
            f"query_multiplicity='capsule' learns the query of every class, which is query_type='self_attentive', not "
            f"'{self.query_type}'; change one.")
    require(self.alignment not in ('local_monotonic', 'hard_sampled') or self.feature_multiplicity == 'singular',
            f"alignment='{self.alignment}' draws a sample or follows the output's position, and "
            f"feature_multiplicity='{self.feature_multiplicity}' looks once at all of its input; change one.")


BAHDANAU = AttentionSpec()
XU_HARD = AttentionSpec(alignment='hard_sampled')
LUONG = AttentionSpec(scoring='general')
LUONG_LOCAL_M = AttentionSpec(scoring='general', alignment='local_monotonic')
LUONG_LOCAL_P = AttentionSpec(scoring='general', alignment='local_predictive')
YANG_HAN = AttentionSpec(feature_levels='hierarchical', query_type='self_attentive')
LU = AttentionSpec(feature_multiplicity='parallel', query_type='specialized')
LU_ALTERNATING = AttentionSpec(feature_multiplicity='alternating', query_type='specialized')
MA_IAN = AttentionSpec(feature_multiplicity='interactive', scoring='activated_general', query_type='specialized')
FAN = AttentionSpec(feature_multiplicity='multi_grained', query_type='specialized')
LCR_ROT = AttentionSpec(feature_multiplicity='rotatory', scoring='activated_general', query_type='specialized')
LCR_ROT_HOP = dataclasses.replace(LCR_ROT, query_multiplicity='multi_hop')
SHEN = AttentionSpec(dimensionality='multi', query_type='self_attentive')
KIELA = AttentionSpec(feature_representations='multi', query_type='self_attentive')
ZHAO_ZHANG = AttentionSpec(feature_levels='attention_via_attention')
TRAN = AttentionSpec(query_multiplicity='multi_hop')
WANG_CAPSULE = AttentionSpec(scoring='multiplicative', query_type='self_attentive', query_multiplicity='capsule')
VASWANI = AttentionSpec(scoring='scaled', query_type='self_attentive', query_multiplicity='multi_head_multi_hop')
VASWANI_CROSS = dataclasses.replace(VASWANI, query_type='basic')

PRESETS: dict[str, AttentionSpec] = {
    'Bahdanau et al. 2015': BAHDANAU, 'Xu et al. 2015, hard': XU_HARD, 'Luong et al. 2015, global': LUONG,
    'Luong et al. 2015, local-m': LUONG_LOCAL_M, 'Luong et al. 2015, local-p': LUONG_LOCAL_P,
    'Yang et al. 2016': YANG_HAN, 'Lu et al. 2016, parallel': LU, 'Lu et al. 2016, alternating': LU_ALTERNATING,
    'Ma et al. 2017': MA_IAN, 'Vaswani et al. 2017, self': VASWANI, 'Vaswani et al. 2017, cross': VASWANI_CROSS,
    'Fan et al. 2018': FAN, 'Zheng & Xia 2018': LCR_ROT, 'Wallaart & Frasincar 2019': LCR_ROT_HOP,
    'Shen et al. 2018': SHEN, 'Kiela et al. 2018': KIELA, 'Zhao & Zhang 2018': ZHAO_ZHANG,
    'Tran & Niedereée 2018': TRAN, 'Wang et al. 2018': WANG_CAPSULE}


def build(spec: AttentionSpec, **options: Any) -> nn.Module:
  """The module of a row of the taxonomy.

  Args:
    options: the fields of `AttentionParts` but for score and alignment, and those of the module (its widths).

  Raises:
    ConfigError: the row joins several mechanisms that no module here joins; nest theirs.
  """
  names = {field.name for field in fields(AttentionParts)}
  own = {name: value for name, value in options.items() if name not in names}
  alignment = 'soft_per_feature' if spec.dimensionality == 'multi' else spec.alignment
  module = _one_mechanism(spec)
  if module is feature_side.ParallelCoAttention:
    return module(alignment=alignment, **options)
  parts = AttentionParts(score=spec.scoring, alignment=alignment,
                         **{name: value for name, value in options.items() if name in names})
  if module is query_side.SelfAttentive and 'query' not in own:
    own['query'] = 'constant' if spec.scoring == 'additive' else 'learned'
  if module is feature_side.RotatoryAttention:
    hops = own.get('hops', 1)
    require((hops > 1) == (spec.query_multiplicity == 'multi_hop'),
            f"hops is {hops} with query_multiplicity='{spec.query_multiplicity}'; give 2 or more with 'multi_hop', and "
            "1 with 'singular'.")
  return module(parts, **own)


@runtime_checkable
class Described(Protocol):
  """A model, or the config of one, that says what its attentions are."""

  @property
  def attention_specs(self) -> Mapping[str, AttentionSpec]: ...


def describe(model: Described) -> dict[str, AttentionSpec]:
  """The attentions of a model (or of its config) by name; empty if it has none.

  Raises:
    ConfigError: it does not say.
  """
  require(isinstance(model, Described),
          f'{type(model).__name__} does not say what its attentions are; give it a property attention_specs, a dict '
          'from names to AttentionSpec.')
  return dict(model.attention_specs)


WORDS = {
    'scaled': 'scaled multiplicative', 'cosine': 'similarity (cosine)', 'euclidean': 'similarity (Euclidean)',
    'soft': 'global', 'sparsemax': 'global (sparsemax)', 'entmax15': 'global (1.5-entmax)', 'hard': 'hard (greatest)',
    'hard_sampled': 'hard', 'local_monotonic': 'local (monotonic)', 'local_predictive': 'local (predictive)',
    'local_window': 'local (predictive, no Gaussian)', 'alternating': 'coarse-grained co-attention (alternating)',
    'interactive': 'coarse-grained co-attention (interactive)', 'parallel': 'fine-grained co-attention (parallel)',
    'multi_grained': 'multi-grained co-attention', 'attention_via_attention': 'attention-via-attention',
    'self_attentive': 'self-attentive', 'multi_head': 'multi-head', 'multi_hop': 'multi-hop',
    'multi_head_multi_hop': 'multi-head + multi-hop', 'biased_general': 'biased general',
    'activated_general': 'activated general'}
"""The survey's words for our names, where they are not the same."""


def table(specs: Mapping[str, AttentionSpec]) -> str:
  """The survey's table 3 in markdown: an attention a row, its eight columns."""
  columns = [field.name for field in fields(AttentionSpec)]
  titles = ['', *(name.replace('_', ' ') for name in columns)]
  rows = [[name, *(WORDS.get(value, value) for value in (getattr(spec, column) for column in columns))]
          for name, spec in specs.items()]
  return ''.join(f'| {" | ".join(cells)} |\n' for cells in (titles, ['---'] * len(titles), *rows))


def _one_mechanism(spec: AttentionSpec):
  """The module class of what is not the default in a spec."""
  by_features = {
      'alternating': feature_side.AlternatingCoAttention, 'interactive': feature_side.InteractiveCoAttention,
      'parallel': feature_side.ParallelCoAttention, 'rotatory': feature_side.RotatoryAttention,
      'attention_via_attention': feature_side.AttentionViaAttention,
      'hierarchical': feature_side.HierarchicalAttention, 'multi': feature_side.MultiRepresentational}
  by_queries = {'multi_head': query_side.MultiHead, 'multi_head_multi_hop': query_side.MultiHead,
                'multi_hop': query_side.MultiHop, 'capsule': query_side.Capsules}
  require(spec.feature_multiplicity != 'multi_grained',
          'Multi-grained co-attention has two scores, and a spec has one; build a MultiGrainedCoAttention of an '
          'InteractiveCoAttention and a ParallelCoAttention.')
  chosen = [by_features[value] for value in (spec.feature_multiplicity, spec.feature_levels,
                                             spec.feature_representations) if value in by_features]
  if spec.query_multiplicity in by_queries and not (spec.feature_multiplicity == 'rotatory'
                                                    and spec.query_multiplicity == 'multi_hop'):
    chosen.append(by_queries[spec.query_multiplicity])
  if len(chosen) > 1:
    raise ConfigError(f'No one module is {" and ".join(module.__name__ for module in chosen)} together; build each and '
                      'give one what the other returns.')
  by_type = {'basic': AttentionModule, 'specialized': query_side.Specialized,
             'self_attentive': query_side.SelfAttentive}
  return chosen[0] if chosen else by_type[spec.query_type]
