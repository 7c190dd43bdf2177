import gzip
import re

import pytest

from tfm.config import DataConfig
from tfm.text.corpora import DataError, ParallelFiles, build_corpus, read_lines
from tfm.text.numbers import Numbers

FILES = {f'{stem}.{language}': f'{stem} {language} 1\n{stem} {language} 2\n'
         for stem in ('train', 'val', 'test') for language in ('de', 'en')}


@pytest.fixture
def root(tmp_path):
  for name, text in FILES.items():
    (tmp_path / name).write_text(text)
  return tmp_path


def build(root, **changes):
  return build_corpus(DataConfig(**{**dict(corpus='files', source='de', target='en', limit=None, held_out=None,
                                           root=str(root), train='train', validation='val', test='test'), **changes}))


def test_files_become_pairs_in_order(root):
  corpus = build(root)
  assert isinstance(corpus, ParallelFiles) and not corpus.endless
  assert corpus.train() == [('train de 1', 'train en 1'), ('train de 2', 'train en 2')] == corpus.tokenizer_texts()
  assert corpus.validation()[0] == ('val de 1', 'val en 1')
  assert corpus.test()[1] == ('test de 2', 'test en 2')
  assert 'de to en' in corpus.describe() and '2 pairs' in corpus.describe()
  assert build(root, test=None).test() is None


def test_numbers_are_built_by_default():
  assert isinstance(build_corpus(DataConfig()), Numbers)


def test_gzip_is_read_alike(root):
  plain = build(root).train()
  for name in ('train.de', 'val.en'):
    (root / f'{name}.gz').write_bytes(gzip.compress((root / name).read_bytes()))
    (root / name).unlink()
  assert build(root).train() == plain


def test_both_plain_and_gzip_is_an_error(root):
  (root / 'train.de.gz').write_bytes(gzip.compress(b'x\n'))
  with pytest.raises(DataError, match=r'both train\.de and train\.de\.gz'):
    build(root)


def test_missing_files_name_what_was_tried_and_what_is_there(root):
  with pytest.raises(DataError, match=r'neither valid\.de nor valid\.de\.gz; similar names there: .*val\.de'):
    build(root, validation='valid')
  with pytest.raises(DataError, match='not a folder'):
    build(root / 'nowhere')
  with pytest.raises(DataError, match=r'no file .*trian\.de; similar names there: train\.de'):
    read_lines(root / 'trian.de')
  with pytest.raises(DataError, match='cannot be read'):
    read_lines(root)


def test_uneven_files_name_both_counts(root):
  (root / 'train.en').write_text('only one\n')
  with pytest.raises(DataError, match=r'train\.de has 2 lines, train\.en 1;'):
    build(root)


@pytest.mark.parametrize('name', ['train.de', 'val.en', 'test.de'])
@pytest.mark.parametrize('blank', ['', ' \t', '\u3000', '\r'])
def test_empty_lines_name_file_and_line(root, name, blank):
  (root / name).write_text(f'x\n{blank}\n')
  with pytest.raises(DataError, match=rf'{re.escape(name)}, line 2 is empty; remove'):
    build(root)


def test_empty_files_are_errors(root):
  for language in ('de', 'en'):
    (root / f'val.{language}').write_text('')
  with pytest.raises(DataError, match=r'val\.de has no lines'):
    build(root)


def test_bad_utf8_names_line_and_byte(tmp_path):
  path = tmp_path / 'x.de'
  path.write_bytes('gut\nüb'.encode() + b'\xff\nx\n')
  with pytest.raises(DataError, match=r'x\.de, line 2: byte 4 \(0xff\) is not UTF-8'):
    read_lines(path)
  path.write_bytes(b'\xe4\n')
  with pytest.raises(DataError, match=r'line 1: byte 1 \(0xe4\)'):
    read_lines(path)


def test_damaged_gzip_is_an_error(tmp_path):
  path = tmp_path / 'x.de.gz'
  whole = gzip.compress(bytes(range(200)) * 9)
  for broken in (whole[:-9], whole[:40], b'plain text\n', whole[:30] + b'\x00' * 9 + whole[39:]):
    path.write_bytes(broken)
    with pytest.raises(DataError, match=r'x\.de\.gz is not an intact gzip file'):
      read_lines(path)


def test_only_line_feeds_end_lines(tmp_path):
  path = tmp_path / 'x'
  path.write_bytes('a\u2028b\x0cc\x85\r\nd\re\n\nf'.encode())
  assert read_lines(path) == ['a\u2028b\x0cc\x85', 'd\re', '', 'f']
  path.write_bytes('\ufeffa\n\ufeffb\n\n'.encode())
  assert read_lines(path) == ['a', '\ufeffb', '']
  path.write_bytes(b'')
  assert read_lines(path) == []
