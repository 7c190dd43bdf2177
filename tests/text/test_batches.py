import dataclasses
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tfm.config import ConfigError, DataConfig, TokenizerConfig
from tfm.special_ids import BOS, EOS, PAD
from tfm.text.batches import Batches, encode_pairs, evaluation_batches, prefetch
from tfm.text.corpora import DataError, build_corpus
from tfm.text.tokenizer import train_tokenizers

DATA = Path(os.environ.get('TFM_DATA', Path(__file__).parents[3] / 'shared' / 'data'))


class Lines:
  """A small finite corpus: sentences of 1 to 24 words, all different."""

  endless = False

  def __init__(self, count=300):
    rng = np.random.default_rng(0)
    sizes = zip(rng.integers(1, 24, count), rng.integers(1, 24, count))
    self.pairs = [(f'{i}' + ' a' * n, f'{i}' + ' b' * m) for i, (n, m) in enumerate(sizes)]

  def train(self):
    return self.pairs

  def validation(self):
    return self.pairs[:50]

  def test(self):
    return None

  def tokenizer_texts(self):
    return self.pairs

  def describe(self):
    return 'lines'


LINES = Lines()
NUMBERS = build_corpus(DataConfig())
SETTINGS = DataConfig(tokens_per_batch=256, max_length=40, buckets=4)


@pytest.fixture(scope='module')
def tokenizers():
  return {corpus: train_tokenizers(TokenizerConfig(vocab_size=400), corpus.tokenizer_texts())
          for corpus in (LINES, NUMBERS)}


@pytest.fixture(params=[LINES, NUMBERS], ids=['finite', 'endless'])
def make(request, tokenizers):
  def make(data=SETTINGS, seed=0, **more):
    return Batches(request.param, tokenizers[request.param], data, seed, **more)

  return make


def same(one, other):
  return all(np.array_equal(a, b) for a, b in zip(one, other))


def sentences(tokenizers, batches):
  """The pairs of texts in `batches`, after a check of the layout of every row."""
  found = []
  for batch in batches:
    assert batch.source_BxS.dtype == batch.target_BxT.dtype == np.int32
    for source, target in zip(*batch):
      length_s, length_t = (source != PAD).sum(), (target != PAD).sum()
      assert (source[length_s:] == PAD).all() and (target[length_t:] == PAD).all()
      if length_s or length_t:
        assert source[length_s - 1] == EOS and target[0] == BOS and target[length_t - 1] == EOS
        found.append((tokenizers.source.decode(source), tokenizers.target.decode(target)))
  return found


def test_every_sentence_once_per_epoch(tokenizers):
  batches = Batches(LINES, tokenizers[LINES], SETTINGS, seed=3)
  for epoch in range(2):
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    assert sorted(sentences(tokenizers[LINES], map(batches.batch_at, steps))) == sorted(LINES.pairs)


def test_epochs_and_seeds_differ_in_order(make):
  batches, other = make(), make(seed=1)
  epoch = batches.steps_per_epoch
  first = [batches.batch_at(step) for step in range(epoch)]
  assert not all(same(batch, batches.batch_at(epoch + i)) for i, batch in enumerate(first))
  assert other.steps_per_epoch == epoch and other.shapes == batches.shapes
  assert not all(same(batch, other.batch_at(i)) for i, batch in enumerate(first))
  make(seed=-1).batch_at(0)


def test_a_batch_is_a_function_of_the_step_alone(make):
  steps = [0, 1, 2, 35, 36, 200, 7, 1, 36]
  batches = make(seed=2)
  forward = {step: batches.batch_at(step) for step in sorted(set(steps))}
  for step in steps:
    assert same(make(seed=2).batch_at(step), forward[step])
    assert same(batches.batch_at(step), forward[step])


def test_shapes_are_static_and_within_the_budget(make):
  batches = make(rows_multiple=2)
  seen = {(*batch.source_BxS.shape, batch.target_BxT.shape[1])
          for batch in map(batches.batch_at, range(2 * batches.steps_per_epoch))}
  assert seen <= {tuple(shape) for shape in batches.shapes} and len(batches.shapes) <= 4
  assert all(rows % 2 == 0 and rows * max(source, target - 1) <= 256 for rows, source, target in seen)


def test_processes_share_the_global_batch_by_rows(make):
  whole = make(rows_multiple=4)
  for count in (2, 4):
    parts = [make(rows_multiple=4, process_index=i, process_count=count) for i in range(count)]
    for step in range(0, 3 * whole.steps_per_epoch, 7):
      slices = [part.batch_at(step) for part in parts]
      assert len({batch.source_BxS.shape for batch in slices}) == 1
      joined = [np.concatenate(side) for side in zip(*slices)]
      assert same(joined, whole.batch_at(step))


def test_process_numbers_and_budgets_are_checked(make):
  with pytest.raises(ConfigError, match='process_index 2'):
    make(process_index=2, process_count=2)
  with pytest.raises(ConfigError, match=r'data\.tokens_per_batch 256'):
    make(rows_multiple=128)
  with pytest.raises(ConfigError, match='max_length 2'):
    make(dataclasses.replace(SETTINGS, max_length=2))


def test_over_long_pairs_are_dropped_and_counted(tokenizers):
  data = dataclasses.replace(SETTINGS, max_length=15)
  encoded = encode_pairs(tokenizers[LINES], LINES.pairs)
  kept = [pair for pair, source, target in zip(LINES.pairs, encoded.source.lengths, encoded.target.lengths)
          if source <= 15 and target <= 15]
  batches = Batches(LINES, tokenizers[LINES], data, 0)
  assert sorted(sentences(tokenizers[LINES], map(batches.batch_at, range(batches.steps_per_epoch)))) == sorted(kept)
  assert 0 < len(kept) < 300
  assert f'{300 - len(kept)} pairs longer than 15 tokens were dropped' in batches.report()
  with pytest.raises(DataError, match='max_length = 3'):
    Batches(LINES, tokenizers[LINES], dataclasses.replace(SETTINGS, max_length=3), 0)


def test_over_long_pairs_are_truncated_with_their_end(tokenizers):
  data = dataclasses.replace(SETTINGS, max_length=15, over_long='truncate')
  batches = Batches(LINES, tokenizers[LINES], data, 0)
  made = [batches.batch_at(step) for step in range(batches.steps_per_epoch)]
  assert max(batch.target_BxT.shape[1] for batch in made) == 15
  found = sentences(tokenizers[LINES], made)
  assert len(found) == 300
  texts = {source.split()[0]: source for source, _ in LINES.pairs}
  assert all(texts[source.split()[0]].startswith(source) for source, _ in found)
  assert 'were truncated' in batches.report()


def test_endless_batches_are_full_and_hold_no_held_out_number(tokenizers):
  batches = Batches(NUMBERS, tokenizers[NUMBERS], SETTINGS, 0)
  held_out = set(NUMBERS.validation() + NUMBERS.test())
  made = [batches.batch_at(step) for step in range(20 * batches.steps_per_epoch)]
  assert all((batch.source_BxS[:, 0] != PAD).all() for batch in made)
  found = sentences(tokenizers[NUMBERS], made)
  assert held_out.isdisjoint(found)


def test_endless_groups_have_the_same_composition(tokenizers):
  batches = Batches(NUMBERS, tokenizers[NUMBERS], SETTINGS, 0)
  epoch = batches.steps_per_epoch
  groups = [sorted((*batch.source_BxS.shape, batch.target_BxT.shape[1])
                   for batch in map(batches.batch_at, range(i * epoch, (i + 1) * epoch))) for i in range(5)]
  assert all(group == groups[0] for group in groups)


def test_endless_pairs_longer_than_every_shape_are_reported(tokenizers):
  batches = Batches(NUMBERS, tokenizers[NUMBERS], SETTINGS, 0)
  batches.shapes[-1] = batches.shapes[-1]._replace(source=14)
  for step in range(0, 4 * batches.steps_per_epoch, batches.steps_per_epoch):
    batches.batch_at(step)
  assert 'drawn pairs longer than every shape were skipped' in batches.report()


def test_evaluation_holds_every_pair_once(tokenizers):
  pairs = [*LINES.pairs[:50], ('x' + ' a' * 300, 'y' + ' b' * 200)]
  encoded = encode_pairs(tokenizers[LINES], pairs)
  shapes = Batches(LINES, tokenizers[LINES], SETTINGS, 0, rows_multiple=4).shapes
  for some in (shapes, []):
    made = evaluation_batches(encoded, SETTINGS, some, rows_multiple=4)
    assert sorted(sentences(tokenizers[LINES], made)) == sorted(pairs)
    new = {(*batch.source_BxS.shape, batch.target_BxT.shape[1]) for batch in made} - set(some)
    assert len(new) == 1
    parts = [evaluation_batches(encoded, SETTINGS, some, 4, i, 2) for i in range(2)]
    for whole, *halves in zip(made, *parts):
      assert same([np.concatenate(side) for side in zip(*halves)], whole)
  with pytest.raises(ConfigError, match='shared out by 28'):
    evaluation_batches(encoded, SETTINGS, shapes, rows_multiple=28)


def test_prefetch_gives_the_same_batches_in_order(make):
  batches = make()
  made = list(prefetch(batches, 5, 60))
  assert [step for step, _ in made] == list(range(5, 60))
  assert all(same(batch, make().batch_at(step)) for step, batch in made[::9])
  assert list(prefetch(batches, 5, 5)) == []


def test_prefetch_runs_ahead_by_its_depth_and_ends_when_closed():
  class Slow:
    asked = 0

    def batch_at(self, step):
      self.asked = step
      return step

  slow, before = Slow(), threading.active_count()
  stream = prefetch(slow, 0, 10 ** 9, depth=3)
  assert next(stream) == (0, 0)
  time.sleep(0.2)
  assert slow.asked == 4
  stream.close()
  assert threading.active_count() == before


def test_prefetch_raises_the_error_of_its_thread():
  class Broken:
    def batch_at(self, step):
      if step == 2:
        raise DataError('line 7')
      return step

  stream = prefetch(Broken(), 0, 9)
  assert [next(stream), next(stream)] == [(0, 0), (1, 1)]
  with pytest.raises(DataError, match='line 7'):
    next(stream)


@pytest.mark.skipif(not (DATA / 'multi30k').is_dir(), reason='no multi30k folder in TFM_DATA')
def test_multi30k_pads_less_than_a_fifth():
  data = DataConfig(corpus='files', limit=None, held_out=None, root=str(DATA / 'multi30k'), train='train',
                    validation='val', buckets=6)
  corpus = build_corpus(data)
  tokenizers = train_tokenizers(TokenizerConfig(vocab_size=10_000), corpus.tokenizer_texts())
  batches = Batches(corpus, tokenizers, data, 0)
  padding = float(batches.report().split('% padding')[0].rsplit(' ', 1)[1])
  assert '29,000 pairs' in batches.report() and padding < 18
