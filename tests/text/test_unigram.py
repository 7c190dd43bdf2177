from collections import Counter

from tokenizers import Tokenizer

from tfm.text.unigram import train_unigram


def pieces(model, word):
  return Tokenizer(model).encode(word).tokens


def test_size_is_kept_and_the_alphabet_stays():
  words = Counter({'abcabc': 50, 'abcd': 30, 'xyz': 20, 'xyzabc': 10})
  for size in (7, 9, 12, 100):
    model = Tokenizer(train_unigram(words, 'abcdxyz', size))
    assert model.get_vocab_size() <= size
    assert set('abcdxyz') <= set(model.get_vocab())


def test_frequent_parts_become_pieces():
  words = Counter({'abcabc': 50, 'abcd': 30, 'xyz': 20, 'xyzabc': 10})
  model = train_unigram(words, 'abcdxyz', 9)
  assert pieces(model, 'xyzabcabc') == ['xyz', 'abcabc']
  assert pieces(model, 'xay') == ['x', 'a', 'y']


def test_order_of_the_words_does_not_matter():
  words = {f'{a}{b}{a}': 3 for a in 'abcdef' for b in 'uvwxyz'}
  forward = train_unigram(words, 'abcdefuvwxyz', 30)
  backward = train_unigram(dict(reversed(words.items())), 'abcdefuvwxyz', 30)
  assert Tokenizer(forward).to_str() == Tokenizer(backward).to_str()
