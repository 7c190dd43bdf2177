from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
import typing
from pathlib import Path

import pytest

from tfm.config import (
  Config,
  ConfigError,
  ConvolutionalConfig,
  DataConfig,
  DecodingConfig,
  MeshConfig,
  OptimizerConfig,
  RecurrentConfig,
  TokenizerConfig,
  TrainingConfig,
  TransformerConfig,
  from_json,
  nearest,
  to_json,
)

RECIPES = sorted((Path(__file__).parents[1] / 'configs').rglob('*.py'))
FILES = dict(corpus='files', root='r', train='t', validation='v', limit=None, held_out=None)
TEXT = {**FILES, 'corpus': 'text', 'source': None, 'target': None}
SECTIONS = [field.default_factory for field in dataclasses.fields(Config)]
ANCESTORS = [RecurrentConfig, ConvolutionalConfig]
"""Whose rules have their examples in tests/models."""
LEAVES = [(section, field.name) for section in SECTIONS for field in dataclasses.fields(section)]


# -- rules ------------------------------------------------------------------------------------------------------------


def positive(section, *names):
  return [(section, {name: bad}, f'{name} is {bad}; give a number above 0') for name in names for bad in (0, -1)]


def fractions(section, *names):
  return [(section, {name: bad}, f'{name} is {bad}.*0 <= .*{name} < 1')
          for name in names for bad in (-0.1, 1.0, float('nan'))]


def several(section, values, sentence):
  return [(section, value, sentence) for value in values]


RULES = [
    *positive(TransformerConfig, 'd_model', 'd_ff', 'num_heads', 'vocab_multiple', 'relative_max_distance',
              'experts_per_token'),
    *[(TransformerConfig, {name: 0.0}, f'{name} is 0.0; give a number above 0')
      for name in ('norm_epsilon', 'rope_base')],
    *[(TransformerConfig, {name: -1}, f'model.{name} is -1.*; give 0 or more')
      for name in ('encoder_layers', 'decoder_layers', 'position_offset', 'experts', 'load_balance', 'token_types',
                   'num_labels')],
    *[(TransformerConfig, {name: bad}, f'{name} is {bad}.*; give a number above 0 or None') for bad in (0, -2)
      for name in ('attention_softcap', 'logit_softcap', 'attention_scale', 'window', 'd_k', 'd_v', 'num_kv_heads')],
    *fractions(TransformerConfig, 'dropout', 'attention_dropout', 'activation_dropout'),
    (TransformerConfig, dict(encoder_layers=0, decoder_layers=0), 'are both 0; give at least one layer'),
    *several(TransformerConfig, [dict(d_model=10, num_heads=4), dict(d_model=10, num_heads=4, d_k=3),
                                 dict(d_model=10, num_heads=4, d_v=3)],
             'd_model 10 is not divisible by num_heads 4; change one or set d_k and d_v'),
    (TransformerConfig, dict(num_kv_heads=3), 'num_heads 8 is not a multiple of num_kv_heads 3; change one'),
    *[(TransformerConfig, {**fields, 'attention_backend': 'blockwise'},
       f"attention_backend='blockwise' never holds the scores and the pattern that {name} change; set it to 'auto'")
      for fields, name in ((dict(attention_dropout=0.1), 'attention_dropout'),
                           (dict(positions='alibi'), "positions='alibi'"),
                           (dict(positions='relative', attention_dropout=0.1),
                            "attention_dropout and positions='relative'"))],
    *[(TransformerConfig, dict(d_model=15, num_heads=5, positions=kind), f"positions='{kind}'.*must be even, not 15")
      for kind in ('sinusoidal', 'sinusoidal_halves')],
    *several(TransformerConfig, [dict(positions='learned'), dict(positions='learned', max_positions=0),
                                 dict(positions='learned', max_positions=2, position_offset=2)],
             "positions='learned' needs a table size: set max_positions"),
    (TransformerConfig, dict(max_positions=9), "max_positions has no effect with positions='sinusoidal'; remove it"),
    (TransformerConfig, dict(position_offset=2), "position_offset has no effect with positions='sinusoidal'; remove"),
    *several(TransformerConfig, [dict(rope_base=5.0), dict(rope_scaling='linear')],
             "rope_base and rope_scaling have no effect with positions='sinusoidal'; remove them"),
    (TransformerConfig, dict(positions='rope', d_k=5), "positions='rope' rotates pairs.* must be even, not 5"),
    (TransformerConfig, dict(positions='rope', rope_factor=2.0), "rope_factor is 2.0 with rope_scaling='none'; give 1"),
    (TransformerConfig, dict(positions='rope', rope_factor=0.5, rope_scaling='linear'),
     "rope_factor is 0.5 with rope_scaling='linear'; give 1 with 'none', and else 1 or more"),
    *several(TransformerConfig, [dict(positions='rope', rope_scaling='yarn'),
                                 dict(positions='rope', rope_scaling='linear', rope_original_length=9)],
             "rope_original_length is .* 'llama3' and 'yarn' need it, the others have no use for it"),
    (TransformerConfig, dict(positions='rope', rope_scaling='yarn', rope_original_length=-1),
     'rope_original_length is -1; give a number above 0'),
    (TransformerConfig, dict(relative_buckets=8),
     "relative_buckets and relative_max_distance have no effect with positions='sinusoidal'; remove them"),
    *several(TransformerConfig, [dict(positions='relative', relative_buckets=bad) for bad in (2, 7)],
             'relative_buckets is .; give an even number of 4 or more'),
    (TransformerConfig, dict(positions='relative', relative_max_distance=16),
     'relative_max_distance 16 leaves no room beyond the 16 buckets of single distances; raise it'),
    (TransformerConfig, dict(experts=2, experts_per_token=3, biases='none'),
     'experts_per_token 3 exceeds experts 2; change one'),
    *several(TransformerConfig, [dict(experts_per_token=1), dict(load_balance=0.1)],
             'experts_per_token and load_balance have no effect without experts; remove them or set experts'),
    *[(TransformerConfig, dict(experts=2, biases=biases), f"biases='{biases}' gives the feed-forward network biases")
      for biases in ('mlp', 'all')],
    *[(TransformerConfig, dict(encoder_layers=0, convolution=kind),
       f"convolution='{kind}' acts in the encoder, which a decoder-only model has not; remove it or set encoder_layers")
      for kind in ('before', 'after', 'parallel')],
    (TransformerConfig, dict(kernel_width=5), "kernel_width has no effect with convolution='none'; remove it or"),
    *several(TransformerConfig, [dict(convolution='after', kernel_width=bad) for bad in (-1, 0, 4)],
             'kernel_width is .*; give an odd number above 0, so that a position is in the middle of what it sees'),
    *[(TransformerConfig, dict(convolution='conformer', norm=norm),
       f"convolution='conformer' has its norms where pre-norm has them, .* set norm='pre', not '{norm}'")
      for norm in ('post', 'sandwich')],
    (TransformerConfig, dict(tying='inputs', encoder_layers=0),
     "tying='inputs' shares two embeddings, but a model that is decoder-only has one"),
    *[(TransformerConfig, {**fields, **stacks}, f'{name} needs an encoder-only model .decoder_layers=0.; remove it')
      for stacks in ({}, dict(encoder_layers=0))
      for name, fields in (('output_transform', dict(output_transform=True)), ('token_types', dict(token_types=2)),
                           ('pooling', dict(pooling='first')), ('pooler', dict(pooler=True)),
                           ('num_labels', dict(num_labels=2)))],

    (TokenizerConfig, dict(kind='byte'), "kind='byte' always has 260 ids; set vocab_size to None"),
    *several(TokenizerConfig, [dict(vocab_size=260), dict(kind='char', vocab_size=None)],
             'needs vocab_size above 260'),
    (TokenizerConfig, dict(extra_ids=-1), 'tokenizer.extra_ids is -1; give 0 or more'),

    *positive(DataConfig, 'tokens_per_batch', 'buckets', 'max_length', 'rows_multiple', 'width_multiple'),
    *fractions(DataConfig, 'mask_rate'),
    *several(DataConfig, [{**TEXT, 'mask_rate': 0.0}, {**TEXT, 'mean_span': 0.5}],
             'data.mask_rate is .* and data.mean_span .*; give a rate above 0, a span of 1 or more'),
    *[(DataConfig, {**TEXT, name: 'de'}, f"data.{name} needs pairs; with corpus='text' set it to None")
      for name in ('source', 'target')],
    *several(DataConfig, [dict(source='de'), dict(target=None), {**FILES, 'source': None}],
             'data.source is .* and data.target .*; give two languages'),
    *[(DataConfig, {name: 'x'}, f"data.{name} needs data.corpus='files'; with 'numbers' leave it out")
      for name in ('root', 'train', 'validation', 'test')],
    *several(DataConfig, [dict(limit=None), dict(held_out=None), dict(held_out=0)],
             "data.corpus='numbers' needs data.limit and a data.held_out above 0"),
    (DataConfig, dict(limit=99, held_out=25), 'data.limit 99.*data.held_out 25; make limit at least 4 x held_out'),
    *[(DataConfig, {**fields, name: None}, f"data.corpus='{fields['corpus']}' needs data.{name}")
      for name in ('root', 'train', 'validation') for fields in (FILES, TEXT)],
    (DataConfig, {**TEXT, 'validation_fraction': 0.1}, "'text' needs data.validation .or, .*fraction instead"),
    *[(DataConfig, {**fields, name: 100},
       f"data.{name} needs data.corpus='numbers'; with '{fields['corpus']}' set it to None")
      for name in ('limit', 'held_out') for fields in (FILES, TEXT)],
    *several(DataConfig, [dict(validation_fraction=0.1), {**FILES, 'validation': None, 'validation_fraction': 0.1},
                          {**TEXT, 'validation': None, 'validation_fraction': 1.0}],
             "data.validation_fraction is .* with corpus=.*; it needs 'text' and a number between 0 and 1"),
    *several(DataConfig, [dict(column='x'), {**TEXT, 'column': 'x'}, {**TEXT, 'corpus': 'huggingface'}],
             "data.column is .* with corpus=.*; 'huggingface' needs it, the others have none"),
    *several(DataConfig, [dict(documents='file'), {**TEXT, 'documents': 'file'},
                          {**TEXT, 'corpus': 'huggingface', 'column': 'x', 'documents': 'file', 'packing': 'blocks'}],
             "data.documents='file' needs data.corpus='text' and data.packing='blocks'; choose 'line'"),
    *[(DataConfig, {**TEXT, 'packing': packing, name: value}, f"data.{name} has no effect with packing='{packing}'")
      for packing, name, value in (('blocks', 'over_long', 'truncate'), ('blocks', 'buckets', 2),
                                   ('packed', 'buckets', 2))],
    *several(DataConfig, [dict(mask_rate=0.3), {**FILES, 'mean_span': 2.0}],
             'data.mask_rate and mean_span have no effect with corpus=.*; leave them out'),
    *[(DataConfig, {**fields, 'packing': 'blocks'},
       f"data.packing='blocks' cuts a stream of one language, but corpus='{corpus}' has pairs; choose 'packed' or")
      for corpus, fields in (('numbers', {}), ('files', FILES))],
    (DataConfig, dict(packing='packed'),
     "data.packing='packed' arranges all pairs of a corpus, but corpus='numbers' draws them for ever; choose 'padded'"),
    (DataConfig, {**FILES, 'packing': 'packed', 'buckets': 2}, "data.buckets has no effect with packing='packed'"),
    (DataConfig, dict(max_length=9, tokens_per_batch=8),
     'data.max_length 9 exceeds data.tokens_per_batch 8.*raise one or lower the other'),

    (OptimizerConfig, dict(learning_rate=0.0), 'learning_rate is 0.0; give a number above 0'),
    (OptimizerConfig, dict(epsilon=-1.0), 'epsilon is -1.0; give a number above 0'),
    (OptimizerConfig, dict(warmup_steps=-1, schedule='linear'), 'optimizer.warmup_steps is -1; give 0 or more'),
    *several(OptimizerConfig, [dict(warmup_steps=0), dict(warmup_steps=0, schedule='rsqrt')],
             'divides by warmup_steps; give warmup_steps above 0'),
    *fractions(OptimizerConfig, 'b1', 'b2', 'label_smoothing'),
    (OptimizerConfig, dict(clip_norm=0.0), 'optimizer.clip_norm is 0.0; give > 0 or None'),
    *several(OptimizerConfig, [dict(schedule='linear', final_fraction=bad) for bad in (-0.1, 1.1, float('nan'))],
             'optimizer.final_fraction is .*; give 0 to 1'),
    *[(OptimizerConfig, dict(schedule=schedule, final_fraction=0.1),
       f"optimizer.final_fraction has no effect with schedule='{schedule}'; set it to 0")
      for schedule in ('noam', 'constant', 'rsqrt')],
    *several(OptimizerConfig, [dict(schedule='wsd'), dict(decay_fraction=0.1)],
             "optimizer.decay_fraction is .* with schedule=.*; give a number such as 0.1 with 'wsd'"),
    *several(OptimizerConfig, [dict(schedule='wsd', decay_fraction=bad) for bad in (0.0, 1.1)],
             'optimizer.decay_fraction is .*; give a number above 0 and at most 1'),
    (OptimizerConfig, dict(name='adamw', weight_decay=-0.1), 'optimizer.weight_decay is -0.1; give 0 or more'),
    *[(OptimizerConfig, dict(name=name, **{field: 0.5}), f"optimizer.{field} has no effect with name='{name}'; leave")
      for name, fields in (('adam', ['weight_decay']), ('lion', ['epsilon']),
                           ('adafactor', ['b1', 'b2', 'epsilon', 'weight_decay'])) for field in fields],
    *several(OptimizerConfig, [dict(ema_decay=0.0), dict(ema_decay=1.0)],
             'optimizer.ema_decay is .*; give a number between 0 and 1, or None'),

    *positive(TrainingConfig, 'steps', 'accumulate', 'log_every', 'validate_every', 'checkpoint_every', 'keep_last',
              'validation_sentences'),
    (TrainingConfig, dict(keep_best=-1), 'training.keep_best is -1; give 0 or more'),
    (TrainingConfig, dict(samples=-1), 'training.samples is -1; give 0 or more'),
    (TrainingConfig, dict(patience=0), 'training.patience is 0; give > 0 or None'),
    (TrainingConfig, dict(validate_every=30, checkpoint_every=20),
     'training.validate_every 30 is not a multiple of checkpoint_every 20.*change one or set keep_best to 0'),
    (TrainingConfig, dict(samples=3, validation_sentences=2),
     'training.samples 3 exceeds validation_sentences 2; lower it'),

    *[(MeshConfig, {name: 0}, f'mesh.{name} is 0; give a number of devices, or -1 for the rest')
      for name in ('fsdp', 'expert', 'tensor', 'context')],
    (MeshConfig, dict(tensor=-1), 'mesh.data and mesh.tensor are both -1; only one axis can take the rest'),
    (MeshConfig, dict(compiler='pmap', fsdp=2), "mesh.compiler='pmap' knows the data axis alone"),

    *positive(DecodingConfig, 'beam_size', 'extra_length', 'batch_tokens'),
    (DecodingConfig, dict(length_penalty=-0.1), 'decoding.length_penalty is -0.1; give 0 or more'),
    (DecodingConfig, dict(max_source_length=0), 'decoding.max_source_length is 0; give > 0 or None'),

    (Config, dict(mesh=MeshConfig(context=2)),
     'mesh.context=2 cuts every sequence into 4 equal parts; set data.width_multiple to a multiple of that, not 2'),
    (Config, dict(mesh=MeshConfig(context=2), data=DataConfig(width_multiple=4, max_length=30)),
     'data.max_length 30 is not a multiple of data.width_multiple 4'),
    (Config, dict(mesh=MeshConfig(expert=2)),
     'mesh.expert=2 shares out experts, but model.experts is 0; set it, or leave mesh.expert at 1'),
    (Config, dict(training=TrainingConfig(accumulate=3)),
     'training.accumulate 3 does not divide data.rows_multiple 8; change one'),
    (Config, dict(tokenizer=TokenizerConfig(joint=False)),
     "model.tying='all'.*tokenizer.joint is False; set tokenizer.joint=True or model.tying='target'"),
    *[(Config, dict(model=TransformerConfig(**stack)),
       f"data.corpus='numbers' has pairs, which a model that is {shape} cannot translate; choose 'text'")
      for stack, shape in ((dict(encoder_layers=0), 'decoder-only'), (dict(decoder_layers=0), 'encoder-only'))],
    (Config, dict(model=TransformerConfig(encoder_layers=0, tying='none'), data=DataConfig(**TEXT),
                  tokenizer=TokenizerConfig(joint=False)), "'text' is one language and has one vocabulary; set .*True"),
    *[(Config, dict(model=TransformerConfig(**stack), data=DataConfig(**TEXT, **{name: value}),
                    tokenizer=TokenizerConfig(extra_ids=99)), f'data.{name} has no effect on a {objective} objective')
      for objective, stack, idle in (
          ('causal', dict(encoder_layers=0), dict(mask_rate=0.3, mean_span=2.0)),
          ('masked', dict(decoder_layers=0), dict(packing='packed', mean_span=2.0)),
          ('span corruption', {}, dict(packing='blocks'))) for name, value in idle.items()],
    *[(Config, dict(model=TransformerConfig(**stack), data=DataConfig(**TEXT),
                    tokenizer=TokenizerConfig(extra_ids=extra_ids)), f'the {objective} objective needs {extra_ids + 1}')
      for objective, stack, extra_ids in (('masked', dict(decoder_layers=0), 0), ('span corruption', {}, 1))],
    (Config, dict(tokenizer=TokenizerConfig(extra_ids=1)),
     'tokenizer.extra_ids has no use in a translation objective; set it to 0'),
    *[(Config, dict(model=TransformerConfig(encoder_layers=0), data=DataConfig(**TEXT),
                    training=TrainingConfig(**training)), 'are about translations, of which there are none here')
      for training in (dict(keep_best_by='bleu'), dict(validation_sentences=9))],
    *[(Config, dict(model=model(), data=DataConfig(**FILES, packing='packed')),
       f"data.packing='packed' puts several pairs in a row, which a {model.kind} model with two stacks cannot tell "
       "apart; choose a Transformer or data.packing='padded'") for model in ANCESTORS],
    (Config, dict(model=TransformerConfig(convolution='after'), data=DataConfig(**FILES, packing='packed')),
     "data.packing='packed' puts several pairs in a row, which model.convolution='after' would mix; remove it or data"),
    *[(Config, dict(model=model(), mesh=MeshConfig(**{axis: 2})),
       f'mesh.{axis}=2 cuts a Transformer, but the model is {model.kind}; leave it at 1')
      for model in ANCESTORS for axis in ('tensor', 'context')],
    (Config, dict(model=TransformerConfig(positions='learned', max_positions=255)),
     r'max_positions 255 is below data.max_length 256 \+ model.position_offset 0; raise max_positions or lower'),
]


@pytest.mark.parametrize(('section', 'fields', 'sentence'), RULES)
def test_each_rule_names_the_fields_and_the_fix(section, fields, sentence):
  with pytest.raises(ConfigError, match=sentence) as raised:
    section(**fields)
  assert '\n' not in str(raised.value)


def trees(*more) -> dict[str, ast.Module]:
  """The modules that have sections, by name."""
  return {name: ast.parse(inspect.getsource(sys.modules[name]))
          for name in sorted({section.__module__ for section in (*SECTIONS, *more, Config)})}


def test_no_rule_is_without_an_example(monkeypatch):
  """Every call of `require...` inside a `check` or a part of one refuses something in `RULES`."""
  calls = {(module, node.lineno): node.end_lineno for module, tree in trees().items() for function in ast.walk(tree)
           if isinstance(function, ast.FunctionDef) and re.match('_?check', function.name)
           for node in ast.walk(function)
           if isinstance(node, ast.Call) and getattr(node.func, 'id', '').startswith('require')}
  assert len(calls) > 60
  refused = set()

  def require(condition, sentence):
    frame = sys._getframe(1)
    while not condition and frame is not None:
      refused.update((module, first) for (module, first), last in calls.items()
                     if module == frame.f_globals['__name__'] and first <= frame.f_lineno <= last)
      frame = frame.f_back
    if not condition:
      raise ConfigError(sentence)

  for module in ('tfm.section', *trees()):
    monkeypatch.setattr(f'{module}.require', require)
  for section, fields, _ in RULES:
    with pytest.raises(ConfigError):
      section(**fields)
  assert refused == set(calls), f'rules without an example, by line: {sorted(set(calls) - refused)}'


def test_combinations_that_do_work():
  TransformerConfig(d_model=10, num_heads=4, d_k=3, d_v=3)
  TransformerConfig(d_model=15, num_heads=5, positions='learned', max_positions=8)
  TrainingConfig(validate_every=30, checkpoint_every=20, keep_best=0)
  Config(tokenizer=TokenizerConfig(joint=False), model=TransformerConfig(tying='target'))
  DataConfig(**FILES)
  DataConfig(**{**TEXT, 'validation': None}, validation_fraction=0.1, packing='blocks', documents='file')
  Config(data=DataConfig(**FILES, packing='packed', over_long='truncate'))
  DataConfig(**{**TEXT, 'corpus': 'huggingface'}, column='text', packing='packed', mean_span=2.0, mask_rate=0.5)
  assert TransformerConfig(d_model=64, num_heads=4).key_width == 16
  assert TransformerConfig(d_model=64, num_heads=4, d_k=5, d_v=7).value_width == 7


# -- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('section', 'leaf'), LEAVES, ids=lambda value: getattr(value, '__name__', value))
def test_a_value_of_another_type_is_refused_by_name(section, leaf):
  kind = typing.get_type_hints(section)[leaf]
  wrong = [b'bytes', [1], {}]
  if kind is not bool:
    wrong.append(True)
  if str not in (kind, *typing.get_args(kind)):
    wrong.append('nonsense')
  if kind in (int, int | None):
    wrong.append(1.0)
  if type(None) not in typing.get_args(kind):
    wrong.append(None)
  for value in wrong:
    with pytest.raises(ConfigError, match=rf'{section.__name__}\.{leaf} is '):
      section(**{leaf: value})


def test_whole_numbers_are_accepted_for_floats():
  for value in (OptimizerConfig(learning_rate=1, clip_norm=2), from_json('{"optimizer": {"clip_norm": 2}}').optimizer):
    assert value.clip_norm == 2.0 and type(value.clip_norm) is float and type(value.learning_rate) is float


def test_a_choice_lists_its_options():
  with pytest.raises(ConfigError, match="norm is 'middle'; choose one of 'post', 'pre'"):
    TransformerConfig(norm='middle')
  with pytest.raises(ConfigError, match='Config.model is .*which is not TransformerConfig or RecurrentConfig'):
    Config(model=OptimizerConfig())
  with pytest.raises(ConfigError, match='Config.data is .*give a DataConfig'):
    Config(data=OptimizerConfig())


def test_frozen():
  for section in (Config(), *(make() for make in SECTIONS + ANCESTORS)):
    with pytest.raises(dataclasses.FrozenInstanceError):
      setattr(section, dataclasses.fields(section)[0].name, None)
  assert hash(Config()) == hash(Config()) and Config() == Config()


# -- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.stem)
def test_a_recipe_survives_json(recipe, monkeypatch):
  from tfm.recipe import read_recipe
  monkeypatch.delenv('TABLE3_ROW', raising=False)
  config, _ = read_recipe(recipe)
  again = from_json(to_json(config))
  assert again == config and to_json(again) == to_json(config)


def test_json_holds_every_leaf():
  stored = json.loads(to_json(Config()))
  names = {(section, leaf) for section in stored for leaf in stored[section]}
  assert names == {('model', 'kind')} | {(field.name, leaf.name) for field in dataclasses.fields(Config)
                                         for leaf in dataclasses.fields(field.default_factory)}


@pytest.mark.parametrize(('text', 'sentence'), [
    ('{"modell": {}}', "config has no field 'modell'; did you mean 'model'?"),
    ('{"model": {"num_head": 2}}', "config.model has no field 'num_head'; did you mean 'num_heads'?"),
    ('{"optimizer": {"qqqq": 2}}', "config.optimizer has no field 'qqqq'"),
    ('{"model": {"num_heads": "2"}}', "config.model.num_heads is '2', which is not int"),
    ('{"model": {"d_k": 2.5}}', 'config.model.d_k is 2.5, which is not int or NoneType'),
    ('{"model": {"norm": "x"}}', "config.model.norm is 'x'; choose one of 'post', 'pre'"),
    ('{"model": 3}', 'config.model should be a table of fields, not 3'),
    ('[]', r'config should be a table of fields, not \[\]'),
    ('{"data": {"limit": 3}}', 'data.limit 3 leaves too few'),
])
def test_bad_json_names_the_key(text, sentence):
  with pytest.raises(ConfigError, match=sentence.replace('?', r'\?')):
    from_json(text)


def test_nearest_names_one_or_nothing():
  assert nearest('dropuot', ['dropout', 'dtype']) == "; did you mean 'dropout'?"
  assert nearest('zzz', ['dropout', 'dtype']) == ''


def test_every_leaf_is_documented():
  classes = (node for tree in trees(*ANCESTORS).values() for node in tree.body if isinstance(node, ast.ClassDef))
  for section in (node for node in classes if node.name.endswith('Config')):
    for leaf, after in zip(section.body, section.body[1:]):
      if isinstance(leaf, ast.AnnAssign) and section.name != 'Config':
        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        assert documented, f'{section.name}.{leaf.target.id} has no documentation'
