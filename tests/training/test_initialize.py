from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import Config
from tfm.models.layout import to_layout
from tfm.training.checkpoints import CheckpointError, Checkpoints
from tfm.training.initialize import init_from
from tfm.training.run_folder import RunFolder


class Words:
  """The part of a tokenizer that matters here."""

  def __init__(self, words: str):
    self.words = words.split()

  def vocabulary(self):
    return list(self.words)


class Pair:

  def __init__(self, source: str, target: str):
    self.source, self.target = Words(source), Words(target)

  def save(self, folder):
    (folder / 'words').write_text(' '.join(self.source.words) + '\n' + ' '.join(self.target.words))


OLD = Pair('pad bos eos unk cat dog', 'pad bos eos unk Hund Katze Maus')


def make_params(seed: int, pair: Pair, width: int = 4, layers: int = 2) -> dict:
  keys = iter(jax.random.split(jax.random.key(seed), 20))
  def layer():
    return {'dense': {'kernel': jax.random.normal(next(keys), (width, 3))}}
  def table(tokenizer):
    return {'table': jax.random.normal(next(keys), (len(tokenizer.words), width))}
  return {'source_embedding': table(pair.source), 'target_embedding': table(pair.target), 'output': table(pair.target),
          'encoder': {f'layers_{i}': layer() for i in range(layers)},
          'decoder': {f'layers_{i}': layer() for i in range(layers)}}


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Builds a run whose newest checkpoint holds the given parameters."""
  monkeypatch.setattr(RunFolder, 'read_tokenizers',
                      lambda self: Pair(*(self.tokenizer / 'words').read_text().split('\n')))
  def build(params: dict, layout: str = 'unrolled') -> RunFolder:
    folder = RunFolder(tmp_path / 'old')
    folder.create(Config(), OLD)
    checkpoints = Checkpoints(folder.checkpoints)
    checkpoints.save_params(300, to_layout(params, layout), {'layout': layout})
    checkpoints.close()
    return folder
  return build


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('here', ['scanned', 'unrolled'])
@pytest.mark.parametrize('there', ['scanned', 'unrolled'])
def test_the_same_model_takes_everything_in_any_layout(run, here, there):
  old, new = make_params(1, OLD), make_params(2, OLD)
  params, report = init_from(run(old, there).path, to_layout(new, here), OLD)
  assert_equal(params, to_layout(old, here))
  assert 'Took 4 arrays' in report and '7 of 7 rows of output/table' in report and 'step 300' in report
  assert 'Fresh' not in report and 'Not used' not in report


def test_rows_follow_their_tokens(run):
  old = make_params(1, OLD)
  pair = Pair('pad bos eos unk dog bird cat', 'pad bos eos unk Katze Vogel')
  new = make_params(2, pair)
  params, report = init_from(run(old), new, pair)
  for module, words, old_words in (('source_embedding', pair.source, OLD.source),
                                   ('target_embedding', pair.target, OLD.target), ('output', pair.target, OLD.target)):
    for row, word in enumerate(words.words):
      expected = (old[module]['table'][old_words.words.index(word)] if word in old_words.words
                  else new[module]['table'][row])
      np.testing.assert_array_equal(params[module]['table'][row], expected)
  assert '6 of 7 rows of source_embedding/table' in report and '5 of 6 rows of output/table' in report


def test_a_permuted_vocabulary_of_equal_size_is_mapped_too(run):
  old = make_params(1, OLD)
  pair = Pair('pad bos eos unk dog cat', 'pad bos eos unk Maus Hund Katze')
  params, _ = init_from(run(old), make_params(2, pair), pair)
  swapped = old['source_embedding']['table'][jnp.array([0, 1, 2, 3, 5, 4])]
  np.testing.assert_array_equal(params['source_embedding']['table'], swapped)


def test_what_only_one_model_has_is_named(run):
  old = make_params(1, OLD, layers=3)
  new = make_params(2, OLD, layers=2)
  new['decoder']['final_norm'] = {'scale': jnp.ones(4)}
  params, report = init_from(run(old), new, OLD)
  assert_equal(params['decoder']['final_norm'], new['decoder']['final_norm'])
  assert_equal(params['encoder']['layers_1'], old['encoder']['layers_1'])
  fresh, unused = report.split('Not used')
  assert 'decoder/final_norm/scale' in fresh and 'encoder/layers_2/dense/kernel' in unused


def test_other_shapes_are_all_listed(run):
  folder = run(make_params(1, OLD))
  with pytest.raises(CheckpointError) as error:
    init_from(folder, make_params(2, OLD, width=5), OLD)
  for part in ('output/table is (7, 4) there and (7, 5) here', 'encoder/layers_0/dense/kernel', 'decoder/layers_1'):
    assert part in str(error.value)


def test_a_table_that_is_not_the_tokenizers(run):
  with pytest.raises(CheckpointError, match='7 rows, but its vocabulary has 3 tokens'):
    init_from(run(make_params(1, OLD)), make_params(2, OLD), Pair('pad bos eos unk cat dog', 'pad bos eos'))


def test_nothing_in_common(run):
  folder = run(make_params(1, OLD))
  with pytest.raises(CheckpointError, match='no parameter in common'):
    init_from(folder, {'decoder': {'other': jnp.ones(3)}}, OLD)
