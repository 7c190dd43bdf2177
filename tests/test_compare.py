"""`tfm compare`: what may be compared, what is measured, and the page that comes of it."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from tfm.analysis.comparison import (
    accuracy_by_position,
    forced_tokens,
    length_groups,
    scores_by_length,
    sequential_steps,
)
from tfm.compare import compare, require_comparable, write_report
from tfm.config import (
    Config,
    ConfigError,
    ConvolutionalConfig,
    DataConfig,
    DecodingConfig,
    OptimizerConfig,
    RecurrentConfig,
    TokenizerConfig,
    TrainingConfig,
    TransformerConfig,
)
from tfm.errors import UserError
from tfm.models.build import build_model, initialize
from tfm.recipe import read_comparison
from tfm.training.objectives import batch_sums

RECIPE = '''
from dataclasses import replace
from tfm.config import *
BASE = Config(
    model=TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=16, d_ff=16, num_heads=2),
    tokenizer=TokenizerConfig(kind='char', vocab_size=290),
    data=DataConfig(limit=40, held_out=8, tokens_per_batch=512, buckets=1, max_length=64),
    optimizer=OptimizerConfig(warmup_steps=4),
    training=TrainingConfig(steps=2, log_every=1, validate_every=2, checkpoint_every=2, validation_sentences=4,
                            samples=1),
    decoding=DecodingConfig(beam_size=2, extra_length=4))
configs = {'transformer': BASE,
           'recurrent': replace(BASE, model=RecurrentConfig(d_model=16, d_hidden=8, tying='all', dropout=0.1))}
'''


def config_of(model=None, **sections) -> Config:
  return Config(model=model or TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=16, d_ff=16, num_heads=2),
                tokenizer=TokenizerConfig(vocab_size=400), **sections)


def test_models_of_one_size_and_budget_are_comparable():
  sizes = require_comparable({'one': config_of(), 'two': config_of(optimizer=OptimizerConfig(learning_rate=0.5))})
  assert sizes['one'] == sizes['two'] > 0


@pytest.mark.parametrize(('other', 'sentence'), [
    (dict(training=TrainingConfig(steps=7)), "two and one differ in 'training'; only model and optimizer may differ"),
    (dict(data=DataConfig(limit=500_000)), "two and one differ in 'data'"),
    (dict(decoding=DecodingConfig(beam_size=1)), "two and one differ in 'decoding'"),
    (dict(optimizer=OptimizerConfig(label_smoothing=0.0)), 'differ in optimizer.label_smoothing'),
    (dict(model=TransformerConfig(encoder_layers=2, decoder_layers=2, d_model=16, d_ff=64, num_heads=2)),
     r'The models differ by more than \+-5% in size: one .*, two .*; change their widths'),
])
def test_what_differs_otherwise_is_refused(other, sentence):
  with pytest.raises(ConfigError, match=sentence):
    require_comparable({'one': config_of(), 'two': config_of(**other)})


@pytest.mark.parametrize(('text', 'only', 'sentence'), [
    ('x = 1', (), 'does not define `configs = '), ('configs = {}', (), 'does not define `configs = '),
    ('configs = {"a": 3}', (), 'does not define `configs = '),
    (RECIPE, ('recurent',), "has no model 'recurent'; did you mean 'recurrent'\\? It has transformer, recurrent"),
])
def test_a_recipe_without_such_configs_is_refused(tmp_path, text, only, sentence):
  (tmp_path / 'recipe.py').write_text(text)
  with pytest.raises(ConfigError, match=sentence):
    read_comparison(tmp_path / 'recipe.py', only)


def test_forced_tokens_add_up_to_the_loss_of_training():
  model = build_model(config_of().model, 20, 20)
  params, random = initialize(model, jax.random.key(0)), np.random.default_rng(0)
  batches = []
  for rows, width in ((3, 7), (2, 5)):
    source, target = random.integers(4, 20, (rows, width)), random.integers(4, 20, (rows, width + 1))
    target[:, 0] = 1
    source[0, 3:], target[0, 4:] = 0, 0
    batches.append((source.astype(np.int32), target.astype(np.int32)))
  tokens = forced_tokens(model, params, batches)
  sums = [batch_sums(model, params, batch, 0.0) for batch in batches]
  assert len(tokens.nll) == sum(int(s.tokens) for s in sums)
  np.testing.assert_allclose(tokens.nll.sum(), sum(float(s.nll) for s in sums), rtol=1e-5)
  assert tokens.correct.sum() == sum(int(s.correct) for s in sums)
  first = tokens.source_length == 3
  assert first.sum() == 6 and sorted(tokens.position[first]) == [0, 0, 1, 1, 2, 2]


def test_forced_tokens_of_packed_pairs_are_those_of_each_pair():
  model = build_model(config_of().model, 20, 20)
  params = initialize(model, jax.random.key(0))
  alone = [(np.array([source], np.int32), np.array([target], np.int32))
           for source, target in (([5, 6, 2], [1, 7, 8, 9, 2]), ([4, 2], [1, 10, 2]))]
  packed = [np.concatenate(side, axis=1) for side in zip(*alone)]
  segments = [np.repeat([[1, 2]], [one.shape[1], other.shape[1]], axis=1) for one, other in zip(*alone)]
  found, expected = forced_tokens(model, params, [(*packed, *segments)]), forced_tokens(model, params, alone)
  for name in ('nll', 'correct', 'position', 'source_length'):
    np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4)
  assert found.position.tolist() == [0, 1, 2, 3, 0, 1] and found.source_length.tolist() == [3, 3, 3, 3, 2, 2]


def test_accuracy_by_position_is_of_its_own_group():
  tokens = dataclasses.make_dataclass('T', ['correct', 'position'])(np.array([True, False, True, True]),
                                                                    np.array([0, 0, 1, 5]))
  assert accuracy_by_position(tokens, [0, 1, 6]) == [0.5, 1.0]


@pytest.mark.parametrize('lengths', [list(range(1, 101)), [5] * 10, [1, 1, 1, 2], [3]], ids=str)
def test_every_length_is_in_exactly_one_group(lengths):
  groups = length_groups(lengths)
  assert all(sum(low <= length < high for low, high in groups) == 1 for length in lengths)
  assert all(any(low <= length < high for length in lengths) for low, high in groups)


def test_scores_by_length_are_of_the_sentences_in_the_group():
  references = ['a b c d e', 'f g h i j', 'k l m n o p']
  found = scores_by_length(['a b c d e', 'x', 'k l m n o p'], references, [1, 2, 9], [(1, 2), (2, 3), (3, 10)])
  assert [group['sentences'] for group in found] == [1, 1, 1] and [group['exact'] for group in found] == [100, 0, 100]
  assert found[0]['bleu'] == pytest.approx(100) and found[1]['bleu'] < 5 and found[2]['high'] == 9


def test_a_recurrent_model_waits_for_every_token():
  recurrent = RecurrentConfig(encoder_layers=2, decoder_layers=1, bidirectional=False)
  assert sequential_steps(recurrent, 10, 7) == (10 + 1) + 7
  assert sequential_steps(TransformerConfig(encoder_layers=6, decoder_layers=6), 10, 7) == 12
  assert sequential_steps(ConvolutionalConfig(encoder_layers=3, decoder_layers=4), 10, 7) == 7


def made_up(bleu: float, hypotheses: list[str]) -> dict:
  return {'seed': 0, 'parameters': 1000, 'nll': 1.5, 'accuracy': 0.5, 'bleu': bleu, 'interval': 1.0, 'signature': 's',
          'tokenized_bleu': None, 'chrf': 30.0, 'exact': 50.0, 'tokens_per_second': 1234.0,
          'accuracy_by_position': [0.9, 0.8], 'source_lengths': [3, 4, 9, 9], 'hypotheses': hypotheses,
          'references': ['a b c d', 'e f g h', 'i j k l', 'm n o p']}


def test_where_no_reference_has_four_words_exact_match_is_told_by_length(tmp_path):
  run = {**made_up(0.0, ['a b', 'x', 'c', 'd']), 'references': ['a b', 'c', 'c', 'd']}
  page = write_report({'one': [run]}, {'one': config_of()}, tmp_path)
  assert '## Exact match, per cent, by source length' in page and '+- ' not in page.split('## Exact')[1]


def test_the_page_has_a_row_for_every_model_and_compares_with_the_best(tmp_path):
  right, wrong = ['a b c d', 'e f g h', 'i j k l', 'm n o p'], ['a b c d', 'x', 'i j k l', 'y']
  found = {'worse': [made_up(20.0, wrong)], 'better': [made_up(90.0, right), {**made_up(80.0, right), 'seed': 1}]}
  page = write_report(found, {'worse': config_of(), 'better': config_of()}, tmp_path)
  assert '| better | 1,000 | 1.500 (sd 0.000) | 0.500 (sd 0.000) | 85.00 (sd 7.07) +- 1.00 | - |' in page
  assert '| worse | 1,000 | 1.500 | 0.500 | 20.00 +- 1.00 | - | 30.00 | 50.0 | 1,234 | 2 |' in page
  lines = page.splitlines()
  first = lines.index('```') + 1
  assert lines[first].startswith('better: BLEU') and lines[first + 1].startswith('worse: BLEU')
  pytest.importorskip('matplotlib')
  assert {'comparison.md', 'comparison.json', 'costs.png', 'bleu_by_length.png', 'accuracy_by_position.png'} == {
      path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_command_trains_measures_and_draws(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('tfm.training.compilation_cache.use_compilation_cache', lambda: None)
  monkeypatch.setattr('tfm.compare.TOLERANCE', 0.5)
  recipe = tmp_path / 'small.py'
  recipe.write_text(RECIPE)
  with pytest.raises(UserError, match='No model in .* is trained to the end'):
    compare(recipe, measure_only=True)
  with pytest.raises(UserError, match='--seeds are'):
    compare(recipe, seeds=(1, 1))
  compare(recipe)
  page = capsys.readouterr().out
  folder = tmp_path / 'runs' / 'small'
  assert (folder / 'comparison.md').read_text() == page.removesuffix('\n') or page.startswith('# small')
  # Numbers in German are one word.
  assert {'transformer-0', 'recurrent-0', 'exact_by_length.png', 'accuracy_by_position.png', 'costs.png',
          'comparison.json'} <= {path.name for path in folder.iterdir()}
  kept = json.loads((folder / 'comparison.json').read_text())
  for name in ('transformer', 'recurrent'):
    run, = kept['models'][name]
    assert 0 < run['nll'] < 10 and 0 <= run['accuracy'] <= 1 and run['parameters'] > 1000
    assert f'| {name} |' in page and 'hypotheses' not in run
  assert 'Paired bootstrap against the best' in page
  compare(recipe, measure_only=True, only=('recurrent',))
  assert '| transformer |' not in capsys.readouterr().out
