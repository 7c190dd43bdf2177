import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tfm.config import TokenizerConfig
from tfm.special_ids import BOS, EOS, PAD, UNK
from tfm.text import tokenizer as module
from tfm.text.tokenizer import (
  SubwordTokenizer,
  Tokenizer,
  TokenizerError,
  Tokenizers,
  train_tokenizer,
  train_tokenizers,
)

KINDS = ('bpe', 'unigram', 'byte', 'char', 'word')
TEXTS = [
  'The quick brown fox, twenty-one years old, jumps over the lazy dog.',
  'Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.',
  'the dog jumps over the dog; twenty dogs jump over twenty-two foxes',
  '数字の一、二、三。 </s> <pad> café cafe\u0301 ▁ \\ \\xc3',
] * 3
HARD = [
  '', ' ', '  ', 'the', ' the', 'the ', '  the  dog  ', '\r', '\n', 'a\r\nb', '\t\x00\x1b\x85\x1c', '\u2028\u2029\x0c',
  '\u0301', 'e\u0301', '\ufeffx', '</s>', '<pad><s><unk>', '▁', '\\', '👩‍👩‍👧', '\U0010ffff', "don't they're 's 'S",
  'a\xa0 b', 'a \u3000 b',
]


def settings_for(kind):
  return TokenizerConfig(kind=kind, vocab_size=None if kind == 'byte' else 320)


@pytest.fixture(scope='module')
def trained():
  return {kind: train_tokenizer(settings_for(kind), TEXTS) for kind in KINDS}


@pytest.mark.parametrize('kind', KINDS)
def test_any_text_comes_back_unchanged(trained, kind):
  tokenizer = trained[kind]

  @settings(max_examples=200, deadline=None)
  @given(st.text() | st.text(alphabet=" \t\r\nthe dog-twenty'sß数\u0301\xa0\u3000<>/▁\\"))
  def law(text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(UNK < i < tokenizer.vocab_size for i in ids)

  for text in HARD:
    law = example(text)(law)
  law()


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_encoding_by_parts_is_the_encoding_of_the_whole(trained, kind):
  tokenizer = trained[kind]

  @settings(max_examples=200, deadline=None)
  @given(st.lists(st.sampled_from([*' \t\x1c\xa0\u3000_-\'', 'the', 'dog', 's', '12', '数', '\u0301', 'ß', '.'])))
  def law(parts):
    text = ''.join(parts)
    whole = [i + 4 for i in tokenizer._model.encode(' ' + text).ids] if text else []
    assert tokenizer.encode(text) == whole

  law()


@pytest.mark.parametrize('kind', KINDS)
def test_surrogates_are_refused_with_their_place(trained, kind):
  with pytest.raises(TokenizerError, match=r'character 3 .*surrogate'):
    trained[kind].encode('ab\ud800c')


@pytest.mark.parametrize('kind', KINDS)
def test_special_ids_are_distinct_and_stand_for_no_text(trained, kind):
  tokenizer = trained[kind]
  assert sorted({PAD, BOS, EOS, UNK}) == [0, 1, 2, 3]
  ids = tokenizer.encode('the dog')
  assert tokenizer.decode([BOS, *ids[:1], UNK, *ids[1:], EOS, PAD]) == 'the dog'
  assert tokenizer.tokens([PAD, BOS, EOS, UNK]) == ['<pad>', '<s>', '</s>', '<unk>']


@pytest.mark.parametrize('kind', KINDS)
def test_vocabulary_names_every_id_once_and_keeps_to_the_size(trained, kind):
  tokenizer = trained[kind]
  names = tokenizer.vocabulary()
  assert len(names) == len(set(names)) == tokenizer.vocab_size
  assert 260 <= tokenizer.vocab_size <= (settings_for(kind).vocab_size or 260)
  ids = tokenizer.encode('the dog')
  assert tokenizer.tokens(ids) == [names[i] for i in ids]
  assert all(name.isprintable() for name in names)


def test_a_token_that_looks_special_has_another_name():
  tokenizer = train_tokenizer(TokenizerConfig(kind='bpe', vocab_size=300), ['x<pad>'] * 9)
  word = train_tokenizer(TokenizerConfig(kind='char', vocab_size=300), ['▁\\'])
  for each in (tokenizer, word):
    assert len(set(each.vocabulary())) == each.vocab_size
  assert module._readable(b'<pad>') != '<pad>'
  assert module._readable('▁'.encode()) != module._readable(b' ')


@pytest.mark.parametrize('kind', KINDS)
def test_bytes_that_are_not_utf8_decode_to_the_replacement_character(trained, kind):
  tokenizer = trained[kind]
  single = {tokenizer._pieces[i]: i for i in range(4, tokenizer.vocab_size)}
  assert len([piece for piece in single if len(piece) == 1]) == 256
  assert tokenizer.decode([single[b'a'], single[b'\xff'], single[b'b']]) == 'a\ufffdb'


@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'word'])
def test_a_word_has_the_same_tokens_at_the_start_and_inside(trained, kind):
  tokenizer = trained[kind]
  assert tokenizer.encode('dog dog') == 2 * tokenizer.encode('dog')


@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'char', 'word'])
def test_learned_units_shorten_the_text(trained, kind):
  text = TEXTS[1]
  assert len(trained[kind].encode(text)) < len(trained['byte'].encode(text))


@pytest.mark.parametrize('kind', KINDS)
def test_saved_and_loaded_is_the_same(trained, kind, tmp_path):
  trained[kind].save(tmp_path / 'a.json')
  loaded = Tokenizer.load(tmp_path / 'a.json')
  loaded.save(tmp_path / 'b.json')
  assert (tmp_path / 'a.json').read_bytes() == (tmp_path / 'b.json').read_bytes()
  assert loaded.kind == kind and loaded.vocabulary() == trained[kind].vocabulary()
  assert loaded.encode_batch(TEXTS + HARD) == trained[kind].encode_batch(TEXTS + HARD)


def test_bad_files_are_named(tmp_path, trained):
  path = tmp_path / 't.json'
  with pytest.raises(TokenizerError, match='no tokenizer file'):
    Tokenizer.load(path)
  trained['bpe'].save(path)
  content = path.read_text()
  for broken in (content[:200], '{}', '[]', content.replace('"bpe"', '"bqe"', 1), content.replace('"merges"', '"m"')):
    path.write_text(broken)
    with pytest.raises(TokenizerError):
      Tokenizer.load(path)
  path.write_text(json.dumps({**json.loads(content), 'format': module.FORMAT + 1}))
  with pytest.raises(TokenizerError, match='newer tfm'):
    Tokenizer.load(path)


def test_joint_and_separate_tokenizers(tmp_path):
  pairs = [('one two', 'eins zwei')] * 9
  joint = train_tokenizers(TokenizerConfig(vocab_size=300), pairs)
  separate = train_tokenizers(TokenizerConfig(vocab_size=300, joint=False), pairs)
  assert joint.joint and not separate.joint
  assert len(joint.source.encode('eins')) == len(separate.target.encode('eins')) < len(separate.source.encode('eins'))
  for name, tokenizers in (('joint', joint), ('separate', separate)):
    (tmp_path / name).mkdir()
    tokenizers.save(tmp_path / name)
    loaded = Tokenizers.load(tmp_path / name)
    assert loaded.joint == tokenizers.joint
    assert loaded.target.encode('eins') == tokenizers.target.encode('eins')
    assert loaded.source.encode('eins') == tokenizers.source.encode('eins')
  joint.save(tmp_path / 'separate')
  with pytest.raises(TokenizerError, match='remove'):
    Tokenizers.load(tmp_path / 'separate')
  with pytest.raises(TokenizerError, match='no tokenizer file'):
    Tokenizers.load(tmp_path)


def test_training_gives_the_same_bytes_in_every_process(trained, tmp_path):
  script = (
    'import sys, pathlib\n'
    'from tfm.config import TokenizerConfig\n'
    'from tfm.text.tokenizer import train_tokenizer\n'
    'texts = pathlib.Path(sys.argv[1], "texts").read_text(encoding="utf-8").split("\\n")\n'
    'for kind in ("bpe", "unigram", "char", "word"):\n'
    '  train_tokenizer(TokenizerConfig(kind=kind, vocab_size=320), texts).save(sys.argv[1] + kind + sys.argv[2])\n')
  (tmp_path / 'texts').write_text('\n'.join(TEXTS), encoding='utf-8')
  for run in '123':
    environment = {**os.environ, 'PYTHONHASHSEED': run}
    subprocess.run([sys.executable, '-c', script, f'{tmp_path}/', run], check=True, env=environment)
  for kind in ('bpe', 'unigram', 'char', 'word'):
    trained[kind].save(tmp_path / f'{kind}here')
    assert len({path.read_bytes() for path in tmp_path.glob(f'{kind}*')}) == 1, kind


def test_a_fork_after_use_prints_no_warning(tmp_path):
  script = (
    'import os\n'
    'from tfm.config import TokenizerConfig\n'
    'from tfm.text.tokenizer import train_tokenizer\n'
    'before = dict(os.environ)\n'
    'train_tokenizer(TokenizerConfig(vocab_size=300), ["a bc bc"] * 9).encode_batch(["a bc"] * 99)\n'
    'assert dict(os.environ) == before\n'
    'pid = os.fork()\n'
    'os._exit(0) if pid == 0 else os.waitpid(pid, 0)\n')
  environment = {name: value for name, value in os.environ.items() if name != 'TOKENIZERS_PARALLELISM'}
  run = subprocess.run([sys.executable, '-c', script], env=environment, capture_output=True, text=True, check=True)
  assert run.stderr == ''


def test_words_and_separators_cover_any_text():
  for text in HARD:
    assert ''.join(module._WORDS.findall(text)) == text
  assert re.findall(module._WORDS, ' The dog, 21.') == [' The', ' dog', ',', ' 21', '.']


def test_library_ids_are_shifted_and_no_token_is_special(trained):
  model = trained['bpe']._model
  assert isinstance(trained['bpe'], SubwordTokenizer) and not model.get_added_tokens_decoder()
  assert trained['bpe'].vocab_size == model.get_vocab_size() + 4


# -- extra ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_extra_ids_stand_for_no_text_and_change_no_other(trained, kind, tmp_path):
  plain = trained[kind]
  tokenizer = train_tokenizer(dataclasses.replace(settings_for(kind), extra_ids=3), TEXTS)
  size = plain.vocab_size
  assert tokenizer.vocab_size == size + 3 and tokenizer.first_extra == tokenizer.mask_id == size
  assert tokenizer.encode_batch(TEXTS + HARD) == plain.encode_batch(TEXTS + HARD)
  assert tokenizer.vocabulary() == [*plain.vocabulary(), '<extra_0>', '<extra_1>', '<extra_2>']
  assert tokenizer.decode([size, *plain.encode('the dog'), size + 2]) == 'the dog'
  assert tokenizer.tokens([size + 1]) == ['<extra_1>']
  tokenizer.save(tmp_path / 'a.json')
  loaded = Tokenizer.load(tmp_path / 'a.json')
  assert (loaded.extra_ids, loaded.vocabulary()) == (3, tokenizer.vocabulary())
  assert loaded.to_json() == tokenizer.to_json() == (tmp_path / 'a.json').read_text(encoding='utf-8')
  assert json.loads(tokenizer.to_json())['format'] == 2 and json.loads(plain.to_json())['format'] == 1
  assert plain.mask_id is None and 'extra_ids' not in plain.to_json()


def test_the_name_of_an_extra_id_is_just_text():
  for kind in ('bpe', 'word', 'char'):
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=400, extra_ids=2), ['<extra_0>'] * 9)
    ids = tokenizer.encode('<extra_0> <mask>')
    assert tokenizer.decode(ids) == '<extra_0> <mask>' and max(ids) < tokenizer.first_extra
    assert len(set(tokenizer.vocabulary())) == tokenizer.vocab_size
  assert module._readable(b'<extra_0>') != '<extra_0>'


@pytest.mark.parametrize('kind', KINDS)
def test_a_text_in_pieces_has_the_ids_of_the_whole(trained, kind):
  tokenizer = trained[kind]
  for pieces in (['the dog\n', 'jumps over\n\n', ' the dog\n'], ['one piece'], []):
    found = [i for ids in tokenizer.encode_pieces(pieces) for i in ids]
    assert found == tokenizer.encode(''.join(pieces)) and tokenizer.decode(found) == ''.join(pieces)


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_long_parts_are_not_remembered(trained, kind):
  tokenizer = trained[kind]
  before = tokenizer._remembered.cache_info().currsize
  long = '数字' * module.LONGEST_REMEMBERED
  assert tokenizer.decode(tokenizer.encode(long)) == long
  assert tokenizer._remembered.cache_info().currsize == before
