from __future__ import annotations

import gzip
import sys
from types import SimpleNamespace

import pytest

from tfm.config import DataConfig
from tfm.text import text_files
from tfm.text.corpora import DataError, build_corpus
from tfm.text.text_files import TextFiles, fingerprint

LINES = [f'line {i} ' + 'x' * (i % 7) for i in range(40)]


@pytest.fixture
def root(tmp_path):
  for name in ('train', 'val', 'test'):
    (tmp_path / name).write_text(''.join(f'{name} {line}\n' for line in LINES))
  return tmp_path


def build(root, **changes) -> TextFiles:
  return build_corpus(DataConfig(**{**dict(corpus='text', source=None, target=None, limit=None, held_out=None,
                                           root=str(root), train='train', validation='val', test='test'), **changes}))


def whole(root, **changes) -> TextFiles:
  return build(root, documents='file', packing='blocks', **changes)


def test_every_line_that_is_not_blank_is_a_text(root):
  (root / 'train').write_bytes('\ufeffa\r\n\n \t\nb\u2028c\x0cd\n e \nf'.encode())
  corpus = build(root)
  expected = ['a', 'b\u2028c\x0cd', ' e ', 'f']
  assert list(corpus.train()) == expected == list(corpus.train()), 'it can be gone through again'
  assert list(corpus.validation()) == [f'val {line}' for line in LINES]
  assert list(corpus.test()) == [f'test {line}' for line in LINES] and build(root, test=None).test() is None
  assert list(corpus.tokenizer_texts()) == [(text,) for text in expected]
  assert not corpus.endless and 'train' in corpus.describe()


def test_a_whole_file_is_one_text_in_pieces_cut_at_line_ends(root, monkeypatch):
  monkeypatch.setattr(text_files, 'PIECE', 30)
  content = '\ufeff a\r\n\n\nb\n' + 'long ' * 20 + '\nend, without a line end'
  (root / 'train').write_text(content, newline='')
  (pieces,) = whole(root).train().pieces()
  pieces = list(pieces)
  assert ''.join(pieces) == content.removeprefix('\ufeff') and len(pieces) == 2
  assert all(piece.endswith('\n') for piece in pieces[:-1])
  assert list(whole(root).train()) == [content.removeprefix('\ufeff')]


@pytest.mark.parametrize('fraction', [0.05, 0.25, 0.5, 0.95])
def test_the_last_part_can_be_held_out(root, fraction):
  for make in (build, whole):
    corpus = make(root, validation=None, validation_fraction=fraction)
    train, validation = (''.join(f'{text}\n' if make is build else text for text in side)
                         for side in (corpus.train(), corpus.validation()))
    assert train + validation == (root / 'train').read_text()
    assert len(validation) == pytest.approx(fraction * len(train + validation), abs=20)
    assert abs(corpus.train().size - len(train)) < 20


def test_gzip_is_read_alike(root):
  plain = build(root, validation=None, validation_fraction=0.3)
  sides = list(plain.train()), list(plain.validation())
  (root / 'train.gz').write_bytes(gzip.compress((root / 'train').read_bytes()))
  with pytest.raises(DataError, match=r'both train and train\.gz; remove'):
    build(root)
  (root / 'train').unlink()
  for name in ('train', 'train.gz'):
    packed = build(root, train=name, validation=None, validation_fraction=0.3)
    assert (list(packed.train()), list(packed.validation())) == sides
    assert packed.train().size == plain.train().size
  (root / 'train.gz').write_bytes((root / 'train.gz').read_bytes()[:-9])
  with pytest.raises(DataError, match=r'train\.gz is not an intact gzip file'):
    build(root)


def test_the_tokenizer_learns_from_the_beginning_of_the_training_text(root, monkeypatch):
  monkeypatch.setattr(text_files, 'SAMPLE', 50)
  (root / 'train').write_text('0123456789\n' * 40)
  assert list(build(root).tokenizer_texts()) == [('0123456789',)] * 5


def test_identity_and_fingerprint_change_with_the_text(root):
  corpus = build(root)
  others = [corpus.validation(), build(root, validation=None, validation_fraction=0.5).train(), whole(root).train()]
  (root / 'train').write_text('other')
  others.append(build(root).train())
  identities = [corpus.train().identity, *(other.identity for other in others)]
  assert len(set(identities)) == 5 == len({fingerprint(identity) for identity in identities})
  assert corpus.test().identity == build(root).test().identity
  assert fingerprint('a', 'bc') != fingerprint('ab', 'c')


def test_what_is_missing_or_empty_is_named(root):
  with pytest.raises(DataError, match=r'neither trian nor trian\.gz; similar names there: train'):
    build(root, train='trian')
  with pytest.raises(DataError, match='nowhere is not a folder'):
    build(root / 'nowhere')
  for name, kind in (('train', 'training'), ('val', 'validation'), ('test', 'test')):
    (root / name).write_text('\n \n')
    with pytest.raises(DataError, match=f'no text for the {kind} set; give at least one line'):
      build(root)
    (root / name).write_text('text\n')


def test_bad_utf8_names_line_and_byte(root):
  (root / 'train').write_bytes('gut\nüb'.encode() + b'\xff\nx\n')
  for make in (build, whole):
    with pytest.raises(DataError, match=r'train, line 2: byte 4 is not UTF-8; convert'):
      list(make(root).train())


# -- data sets of Hugging Face ----------------------------------------------------------------------------------------


class Table:
  """A split of a data set, as `datasets` gives it."""

  column_names = ('id', 'text')

  def __init__(self, *texts):
    self.rows, self._fingerprint = [{'id': i, 'text': text} for i, text in enumerate(texts)], repr(texts)
    self.data = SimpleNamespace(nbytes=sum(len(text or '') for text in texts))

  def __iter__(self):
    return iter(self.rows)

  def __len__(self):
    return len(self.rows)


@pytest.fixture
def datasets(monkeypatch):
  """A stand-in for the package; holds what it was asked for."""
  tables = {'train': Table('one', None, ' ', 'two\nthree'), 'validation': Table('four'), 'empty': Table('', None)}
  asked = []

  def load_dataset(name, split):
    asked.append((name, split))
    if split not in tables:
      raise ValueError(f'Unknown split "{split}"')
    return tables[split]

  def load_from_disk(folder):
    asked.append(folder)
    return tables

  module = SimpleNamespace(load_dataset=load_dataset, load_from_disk=load_from_disk, asked=asked)
  monkeypatch.setitem(sys.modules, 'datasets', module)
  return module


def hugging_face(**changes):
  return build_corpus(DataConfig(**{**dict(corpus='huggingface', source=None, target=None, limit=None, held_out=None,
                                           root='owner/name', train='train', validation='validation', column='text'),
                                    **changes}))


def test_a_column_of_a_data_set_is_read(datasets, tmp_path):
  corpus = hugging_face()
  assert list(corpus.train()) == ['one', 'two\nthree'] == list(corpus.train())
  assert list(corpus.validation()) == ['four'] and corpus.test() is None
  assert list(corpus.tokenizer_texts()) == [('one',), ('two\nthree',)]
  assert datasets.asked == [('owner/name', 'train'), ('owner/name', 'validation')]
  assert corpus.train().identity != corpus.validation().identity
  assert 'owner/name' in corpus.describe() and corpus.train().size == 13
  root = str(tmp_path)
  assert list(hugging_face(root=root, test='validation').test()) == ['four']
  assert datasets.asked[2:] == [(root, 'train'), (root, 'validation'), (root, 'validation')], 'a folder of files'
  (tmp_path / 'dataset_dict.json').write_text('{}')
  assert list(hugging_face(root=root).validation()) == ['four']
  assert datasets.asked[5:] == [root] * 2, 'what save_to_disk wrote'


def test_what_the_data_set_has_not_is_named(datasets, monkeypatch, tmp_path):
  (tmp_path / 'dataset_dict.json').write_text('{}')
  for root in ('owner/name', str(tmp_path)):
    with pytest.raises(DataError, match="no split 'dev' that could be read"):
      hugging_face(root=root, validation='dev')
  with pytest.raises(DataError, match="no column 'txt'; data.column must be one of id, text"):
    hugging_face(column='txt')
  with pytest.raises(DataError, match='no text for the validation set'):
    hugging_face(validation='empty')
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ModuleNotFoundError, match=r"pip install 'tfm\[datasets\]'"):
    hugging_face()
