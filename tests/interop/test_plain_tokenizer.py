from __future__ import annotations

import pytest
import tokenizers as library

from tfm.config import TokenizerConfig
from tfm.interop.plain_tokenizer import vocabulary, write_plain_tokenizers
from tfm.text.tokenizer import train_tokenizers

TEXTS = ['a dog', 'two  dogs ', ' \t x', '', ' ', '</s> <pad>', '<s>', 'Ġ▁', "don't", 'é🙂\n\n y', '\u2028 12,5 %']


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_the_library_alone_gives_our_ids_and_our_text(kind, tmp_path):
  # Taught the names of the special tokens, which it must not confuse with them.
  taught = [('</s> and <pad> <s>', 'x</s></s>'), ('<pad><pad>', '</s><s>'), ('<unk>', '<unk>')] * 20
  pair = train_tokenizers(TokenizerConfig(kind=kind, vocab_size=330), taught)
  file, = write_plain_tokenizers(pair, tmp_path)
  plain, ours = library.Tokenizer.from_file(str(file)), pair.source
  names = vocabulary(ours)
  assert len(set(names)) == ours.vocab_size == plain.get_vocab_size()
  assert [plain.token_to_id(name) for name in names] == list(range(ours.vocab_size))
  for text in TEXTS + [text for pair in taught for text in pair]:
    found = plain.encode(text)
    assert found.ids == ours.encode(text) and min(found.ids, default=4) > 3
    assert found.tokens == [names[i] for i in found.ids]
    assert plain.decode(found.ids) == text


def test_one_file_a_side_or_none(tmp_path):
  pairs = [('a dog', 'ein Hund')] * 4
  two = train_tokenizers(TokenizerConfig(kind='bpe', vocab_size=270, joint=False), pairs)
  assert [file.name for file in write_plain_tokenizers(two, tmp_path)] == ['tokenizer.source.json',
                                                                         'tokenizer.target.json']
  own = train_tokenizers(TokenizerConfig(kind='char', vocab_size=270), pairs)
  assert write_plain_tokenizers(own, tmp_path) == [] and vocabulary(own.source) == own.source.vocabulary()
