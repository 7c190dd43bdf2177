"""The one door to batches, from text files to arrays, for each objective."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tfm.config import Config, ConfigError, DataConfig, TokenizerConfig, TrainingConfig, TransformerConfig
from tfm.errors import DataError
from tfm.special_ids import BOS, EOS, PAD
from tfm.text import ragged
from tfm.text.batches import Batch
from tfm.text.corpora import build_corpus
from tfm.text.language_batches import Blocks, Packed
from tfm.text.masking import CausalBatch, MaskedBatch
from tfm.text.objectives import build_batches, build_evaluation_batches
from tfm.text.packed_pairs import PackedPairs
from tfm.text.tokenizer import train_tokenizers

LENGTH = 24
LINES = {'train': [f'{i} ' + 'a' * (i * 7 % 19) for i in range(10, 100)],
         'val': [f'v{i} ' + 'b' * i for i in range(18)]}
SHAPES = {'causal': dict(encoder_layers=0), 'masked': dict(decoder_layers=0), 'span_corruption': {}}
KINDS = ['padded', 'packed', 'blocks', 'masked', 'span_corruption']


@pytest.fixture
def make(tmp_path):
  """`make('packed', seed=3, max_length=8)`: the config of a kind of batches, its corpus and tokenizers."""
  for name, lines in LINES.items():
    (tmp_path / name).write_text(''.join(f'{line}\n' for line in lines))

  def make(kind: str, seed: int = 0, extra_ids: int | None = None, model: dict | None = None, **data):
    objective = 'causal' if kind in ('padded', 'packed', 'blocks') else kind
    extra_ids = {'causal': 0, 'masked': 1, 'span_corruption': 6}[objective] if extra_ids is None else extra_ids
    data = {**dict(corpus='text', source=None, target=None, limit=None, held_out=None, root=str(tmp_path),
                   train='train', validation='val', tokens_per_batch=4 * LENGTH, rows_multiple=2, max_length=LENGTH),
            **({'packing': kind} if objective == 'causal' else {}),
            **({} if kind in ('packed', 'blocks') else {'buckets': 3}), **data}
    config = Config(model=TransformerConfig(**SHAPES[objective], **(model or {})),
                    tokenizer=TokenizerConfig(kind='char', vocab_size=300, extra_ids=extra_ids),
                    data=DataConfig(**data), training=TrainingConfig(seed=seed))
    assert config.objective == objective
    corpus = build_corpus(config.data)
    return config, corpus, train_tokenizers(config.tokenizer, corpus.tokenizer_texts())

  return make


def epoch_of(batches, epoch: int = 0) -> list:
  return [batches.batch_at(epoch * batches.steps_per_epoch + step) for step in range(batches.steps_per_epoch)]


def texts_of(kind: str, batches, tokenizer) -> list[str]:
  """The texts that learning or evaluation saw, put together again from the rows."""
  found = []
  for batch in batches:
    if kind == 'packed':
      found += [ids[segments == number] for ids, segments in zip(*batch) for number in range(1, segments.max() + 1)]
    elif kind == 'masked':
      found += list(np.where(batch.labels_BxT == PAD, *[batch.inputs_BxT, batch.labels_BxT]))
    elif kind == 'span_corruption':
      for source, target in zip(*batch):
        spans = {}
        for i in target[1:]:
          if i >= tokenizer.first_extra:
            spans[i] = current = []
          elif i > EOS:
            current.append(i)
        found.append([i for word in source for i in spans.get(word, [word])])
    else:
      found += list(batch.ids_BxT)
  return [tokenizer.decode(ids) for ids in found if len(ids) and ids[0] != PAD]


def same(one, other) -> bool:
  return len(one) == len(other) and all(np.array_equal(a, b) for x, y in zip(one, other)
                                        for a, b in zip(x, y) if a is not None)


@pytest.mark.parametrize(('kind', 'batch_type'), [
    ('padded', CausalBatch), ('packed', CausalBatch), ('blocks', CausalBatch), ('masked', MaskedBatch),
    ('span_corruption', Batch)])
def test_each_objective_sees_every_text_once_an_epoch(make, kind, batch_type):
  config, corpus, tokenizers = make(kind)
  batches = build_batches(config, corpus, tokenizers)
  assert isinstance(batches, {'blocks': Blocks, 'packed': Packed}.get(kind, object))
  for epoch in range(2):
    made = epoch_of(batches, epoch)
    assert all(isinstance(batch, batch_type) for batch in made)
    assert all(len(batch[0]) % 2 == 0 and len(batch[0]) * (batch[0].shape[1] - 1) <= 4 * LENGTH for batch in made)
    if kind != 'blocks':
      assert sorted(texts_of(kind, made, tokenizers.source)) == sorted(LINES['train'])
  again = build_batches(*make(kind))
  assert same(epoch_of(again), epoch_of(batches)) and not same(epoch_of(batches), epoch_of(batches, 1)[::-1])
  config, *rest = make(kind, seed=1)
  assert not same(epoch_of(build_batches(config, *rest)), epoch_of(batches))
  assert batches.report()


def test_a_stream_of_lines_has_their_ends_and_a_file_has_none(make):
  for documents in ('line', 'file'):
    config, corpus, tokenizers = make('blocks', documents=documents)
    (batch, *_) = build_evaluation_batches(config, corpus.validation(), tokenizers)
    ids = np.concatenate([batch.ids_BxT[0], *batch.ids_BxT[1:, 1:]])
    text = ''.join(f'{line}\n' for line in LINES['val'])
    assert tokenizers.target.decode(ids) == text.replace('\n', '' if documents == 'line' else '\n')[:len(
        tokenizers.target.decode(ids))]
    assert {BOS, EOS} & set(ids) == ({BOS, EOS} if documents == 'line' else set())


@pytest.mark.parametrize('kind', KINDS)
def test_ids_in_a_file_give_the_same_batches(make, kind, monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  cut = [] if kind == 'blocks' else [dict(max_length=14, over_long='truncate')]
  for values in (dict(), dict(max_length=14), dict(max_length=16), *cut):
    config, corpus, tokenizers = make(kind, **values)
    monkeypatch.setattr(ragged, 'IN_MEMORY', 2**20)
    held = epoch_of(build_batches(config, corpus, tokenizers))
    monkeypatch.setattr(ragged, 'IN_MEMORY', 0)
    stored = build_batches(config, corpus, tokenizers)
    assert same(epoch_of(stored), held)
    ids = stored._ids if kind == 'blocks' else (stored._texts if kind == 'packed' else stored._train.texts).ids
    assert isinstance(ids, np.memmap), 'texts larger than memory must not be held'


@pytest.mark.parametrize('kind', KINDS)
def test_processes_share_the_rows(make, kind):
  config, corpus, tokenizers = make(kind)
  whole = build_batches(config, corpus, tokenizers)
  halves = [build_batches(config, corpus, tokenizers, index, 2) for index in range(2)]
  for step in range(whole.steps_per_epoch):
    parts = [half.batch_at(step) for half in halves]
    joined = [None if side[0] is None else np.concatenate(side) for side in zip(*parts)]
    assert same([joined], [whole.batch_at(step)])
  with pytest.raises(ConfigError, match='process_index 2 is not below process_count 2'):
    build_batches(config, corpus, tokenizers, 2, 2)


@pytest.mark.parametrize('kind', KINDS)
def test_validation_has_every_text_and_depends_on_no_seed(make, kind):
  config, corpus, tokenizers = make(kind)
  shapes = build_batches(config, corpus, tokenizers).shapes
  made = build_evaluation_batches(config, corpus.validation(), tokenizers, shapes)
  if kind != 'blocks':
    assert sorted(texts_of(kind, made, tokenizers.source)) == sorted(LINES['val'])
  assert {batch[0].shape[0] for batch in made} <= {shape.rows for shape in shapes}
  for other in (config, dataclasses.replace(config, training=TrainingConfig(seed=7))):
    assert same(build_evaluation_batches(other, corpus.validation(), tokenizers, shapes), made)
  alone = build_evaluation_batches(config, corpus.validation(), tokenizers)
  if kind != 'blocks':
    assert sorted(texts_of(kind, alone, tokenizers.source)) == sorted(LINES['val'])


@pytest.mark.parametrize('kind', ['padded', 'packed', 'masked', 'span_corruption'])
def test_over_long_texts_are_dropped_or_truncated_and_counted(make, kind):
  framing = 3 if kind == 'span_corruption' else 2
  short = [line for line in LINES['train'] if len(line) + framing <= 14]
  assert 0 < len(short) < 90
  for over_long, expected in (('drop', short), ('truncate', [line[:14 - framing] for line in LINES['train']])):
    config, corpus, tokenizers = make(kind, max_length=14, over_long=over_long)
    batches = build_batches(config, corpus, tokenizers)
    made = epoch_of(batches)
    found = texts_of(kind, made, tokenizers.source)
    if kind == 'masked' or over_long == 'drop':
      assert sorted(found) == sorted(expected)
    assert len(found) == len(expected) and set(map(len, found)) == set(map(len, expected))
    done = {'drop': 'dropped', 'truncate': 'truncated'}[over_long]
    assert f'{90 - len(short)} texts longer than 14 tokens were {done}' in batches.report()
    assert max(batch[0].shape[1] for batch in made) <= 15
    if kind in ('padded', 'packed'):
      assert sum((batch.ids_BxT == EOS).sum() for batch in made) == len(expected), 'cut texts end too'
  with pytest.raises(DataError, match='data.max_length'):
    build_batches(*make(kind, max_length=5 if kind == 'span_corruption' else 3))


def test_validation_texts_are_cut_only_where_the_model_or_the_row_ends(make, caplog):
  for kind, model, cut in (('padded', {}, False), ('masked', {}, False), ('packed', {}, True),
                           ('span_corruption', {}, True),
                           ('padded', dict(positions='learned', max_positions=14), True)):
    config, corpus, tokenizers = make(kind, max_length=14, model=model)
    made = build_evaluation_batches(config, corpus.validation(), tokenizers,
                                    build_batches(config, corpus, tokenizers).shapes)
    found = texts_of(kind, made, tokenizers.source)
    most = 14 - (3 if kind == 'span_corruption' else 2)
    assert sorted(found) == sorted(line[:most] if cut else line for line in LINES['val'])
    said = f'{sum(len(line) > most for line in LINES["val"])} texts of the evaluation are too long' in caplog.text
    assert said == cut
    caplog.clear()


def test_packed_pairs_go_through_the_same_door(tmp_path):
  """Too long ones dropped or truncated in training and counted, and all of them there in evaluation, by their words."""
  lines = {language: [f'{i} ' + letter * (i * step % 19) for i in range(10, 100)]
           for language, letter, step in (('en', 'a', 7), ('de', 'b', 5))}
  for language, sentences in lines.items():
    (tmp_path / f'train.{language}').write_text(''.join(f'{line}\n' for line in sentences))
  pairs = list(zip(lines['en'], lines['de']))
  for over_long in ('drop', 'truncate'):
    data = DataConfig(corpus='files', limit=None, held_out=None, root=str(tmp_path), train='train', validation='train',
                      packing='packed', tokens_per_batch=4 * 14, rows_multiple=2, max_length=14, over_long=over_long)
    config = Config(tokenizer=TokenizerConfig(kind='char', vocab_size=300), data=data)
    corpus = build_corpus(data)
    tokenizers = train_tokenizers(config.tokenizer, corpus.tokenizer_texts())
    batches = build_batches(config, corpus, tokenizers)

    def found(batches, both=tokenizers):
      return sorted((both.source.decode(source[ours == number]), both.target.decode(target[theirs == number]))
                    for batch in batches for source, target, ours, theirs in zip(*batch)
                    for number in range(1, ours.max() + 1))

    short = [(a, b) for a, b in pairs if len(a) + 1 <= 14 and len(b) + 2 <= 14]
    expected = short if over_long == 'drop' else [(a[:13], b[:12]) for a, b in pairs]
    assert isinstance(batches, PackedPairs) and found(epoch_of(batches)) == sorted(expected)
    done = {'drop': 'dropped', 'truncate': 'truncated'}[over_long]
    assert f'{len(pairs) - len(short)} pairs longer than 14 tokens were {done}' in batches.report()
    for shapes in (batches.shapes, ()):
      made = build_evaluation_batches(config, corpus.validation(), tokenizers, shapes)
      assert found(made) == sorted(pairs) and len({batch.source_BxS.shape for batch in made}) == 2


def test_texts_of_which_all_is_cut_out_still_fit(make):
  """With spans of single tokens, half of the text, a target is three tokens longer than it."""
  for width_multiple in (1, 2, 4):
    config, corpus, tokenizers = make('span_corruption', mask_rate=0.5, mean_span=1.0, extra_ids=12, max_length=15,
                                      width_multiple=width_multiple, over_long='truncate')
    made = epoch_of(build_batches(config, corpus, tokenizers))
    assert sum(int((batch.source_BxS[:, 0] != PAD).sum()) for batch in made) == 90


def test_too_few_sentinels_are_refused(make):
  with pytest.raises(ConfigError, match=r'A text of 21 tokens has 4 spans and needs 5 sentinels, but '
                                        r'tokenizer\.extra_ids is 4; raise it'):
    build_batches(*make('span_corruption', mask_rate=0.2, mean_span=1.0, extra_ids=4))
  build_batches(*make('span_corruption', mask_rate=0.2, mean_span=1.0, extra_ids=5))
  with pytest.raises(ConfigError, match='data.max_length 4 has no room for a span'):
    build_batches(*make('span_corruption', max_length=4))
