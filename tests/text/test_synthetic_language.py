"""The gold links are checked by another road: a parser that knows the language's word order in its own words."""

from __future__ import annotations

from collections import Counter

import pytest

from tfm.config import DataConfig, TokenizerConfig
from tfm.text.corpora import DataError, build_corpus
from tfm.text.synthetic_language import (
  CLASSES,
  FERTILITIES,
  GRAMMAR,
  LEXICON,
  LONGEST,
  SHORTEST,
  aligned_pairs,
  aligned_splits,
  write_corpus,
)
from tfm.text.tokenizer import train_tokenizers

CLASS_OF = {word: name for name, words in CLASSES.items() for word in words}


class Parser:
  """Reads a source sentence from left to right and says it in the target language.

  It answers with pairs (source place, part of the translation), and shares no code and no table with the generator but
  the classes of words.
  """

  def __init__(self, words):
    self.classes, self.place = [CLASS_OF[word] for word in words], 0

  def sentence(self):
    said = self.clause()
    if self.next() == 'conjunction':
      said += [(self.take('conjunction'), 'all')] + self.clause()
    assert self.place == len(self.classes), 'there are words left'
    return said

  def clause(self):
    subject = self.phrase()
    adverb = [(self.take('adverb'), 'all')] if self.next() == 'adverb' else []
    verb = self.take('intransitive') if self.next() == 'intransitive' else self.take('transitive')
    has_object = self.classes[verb] == 'transitive'
    finite, others = [(verb, 'head')], [(verb, 'tail')]
    end = (self.phrase() if has_object else []) + others
    # The finite word is second: behind the adverb where one is fronted, else behind the subject.
    return adverb + finite + subject + end if adverb else subject + finite + end

  def phrase(self):
    article, adjectives = self.take('article'), []
    while self.next() == 'adjective':
      adjectives.append(self.take('adjective'))
    noun = [(place, 'all') for place in (self.take('noun'), *reversed(adjectives), article)]
    if self.next() != 'preposition':
      return noun
    preposition = self.take('preposition')
    return self.phrase() + [(preposition, 'all')] + noun

  def next(self):
    return self.classes[self.place] if self.place < len(self.classes) else None

  def take(self, name):
    assert self.next() == name, f'{name} expected, {self.next()} found'
    self.place += 1
    return self.place - 1


PARTS = {'all': slice(None), 'head': slice(1), 'tail': slice(1, None)}


def test_links_and_translations_are_those_of_an_independent_parser():
  for pair in aligned_pairs(0, 1500):
    target = [(i, word) for i, part in Parser(pair.source).sentence() for word in LEXICON[pair.source[i]][PARTS[part]]]
    assert tuple(word for _, word in target) == pair.target
    assert {(i, j) for j, (i, _) in enumerate(target)} == pair.links


def test_every_target_word_has_one_link_and_every_source_word_as_many_as_its_translation_has_words():
  for pair in aligned_pairs(1, 500):
    assert [j for _, j in sorted(pair.links, key=lambda link: link[1])] == list(range(len(pair.target)))
    found = Counter(i for i, _ in pair.links)
    assert [found[i] for i in range(len(pair.source))] == [len(LEXICON[word]) for word in pair.source]
    assert all(pair.target[j] in LEXICON[pair.source[i]] for i, j in pair.links)
    assert SHORTEST <= len(pair.source) <= LONGEST


def test_the_language_has_what_makes_alignment_hard():
  pairs = aligned_pairs(2, 3000)
  fertility = Counter(len(LEXICON[word]) for pair in pairs for word in pair.source)
  assert set(fertility) == {0, 1, 2, 3} and min(fertility.values()) > 1000
  assert {len(pair.source) for pair in pairs} == set(range(SHORTEST, LONGEST + 1))
  assert {word for pair in pairs for word in pair.source} == set(LEXICON), 'every word is used'
  assert any(len(set(pair.source)) < len(pair.source) for pair in pairs), 'a word may come twice'
  split = [j for pair in pairs for j in range(len(pair.target) - 1)
           if (sources := [i for i, _ in sorted(pair.links, key=lambda link: link[1])])[j] in sources[j + 2:]
           and sources[j] != sources[j + 1]]
  assert len(split) > 1000, 'translations of a word are torn apart'
  monotone = sum(sorted(pair.links) == sorted(pair.links, key=lambda link: link[1]) for pair in pairs)
  assert monotone < 0.05 * len(pairs)


def test_words_are_unique_and_only_the_last_of_a_translation_is_its_own():
  words = [word for name in CLASSES for word in CLASSES[name]]
  assert len(words) == len(set(words)) == len(LEXICON) == sum(map(len, FERTILITIES.values()))
  assert 60 <= len(LEXICON) <= 100 and {symbol for rules in GRAMMAR.values() for rule in rules
                                         for symbol in rule.source.split()} == {*CLASSES, *GRAMMAR} - {'sentence'}
  last = [translation[-1] for translation in LEXICON.values() if translation]
  before = Counter(word for translation in LEXICON.values() for word in translation[:-1])
  assert len(set(last)) == len(last) and not set(last) & set(before) and not {*last, *before} & set(words)
  for name in ('noun', 'transitive'):
    heads = [LEXICON[word][0] for word in CLASSES[name] if len(LEXICON[word]) > 1]
    assert len(set(heads)) < len(heads), 'the first word of a long translation does not tell the next'


def test_sentences_are_a_function_of_the_seed():
  assert aligned_pairs(3, 50) == aligned_pairs(3, 80)[:50] != aligned_pairs(4, 50)
  assert aligned_splits(3, test=20, train=40) == aligned_splits(3, test=20, train=40) != aligned_splits(
      4, test=20, train=40)
  assert aligned_splits(3, test=20, train=40)['test'] == aligned_splits(3, test=20, train=90)['test']
  assert aligned_pairs(-1, 5) != aligned_pairs(0, 5), 'a seed may be negative'


def test_these_are_the_first_sentences_for_ever():
  """Figures that were measured on this language must stay comparable."""
  first, second = (pair.texts for pair in aligned_pairs(0, 2))
  assert first == ('piki fanu teta piki note nufa piki bopa', 'notes pikis tetas fanus pikis kupun bopas pikis nufas')
  assert second[1].startswith('kuses bomos login dilis kenus badis bafus pikis')


def test_no_sentence_is_in_two_sets_or_twice_in_one():
  splits = aligned_splits(0, test=300, validation=200, train=1500)
  assert {name: len(pairs) for name, pairs in splits.items()} == {'test': 300, 'validation': 200, 'train': 1500}
  sources = [pair.source for pairs in splits.values() for pair in pairs]
  assert len(set(sources)) == len(sources)


def test_files_are_a_corpus_and_keep_the_links(tmp_path):
  splits = aligned_splits(0, validation=10, train=200)
  write_corpus(tmp_path / 'corpus', splits)
  corpus = build_corpus(DataConfig(corpus='files', source='source', target='target', limit=None, held_out=None,
                                   root=str(tmp_path / 'corpus'), train='train', validation='validation'))
  assert corpus.train() == [pair.texts for pair in splits['train']]
  assert corpus.validation() == [pair.texts for pair in splits['validation']]
  lines = (tmp_path / 'corpus' / 'train.links').read_text().splitlines()
  assert [{tuple(map(int, link.split('-'))) for link in line.split()} for line in lines] == [
      set(pair.links) for pair in splits['train']]
  tokenizers = train_tokenizers(TokenizerConfig(kind='word', vocab_size=400, joint=False), corpus.tokenizer_texts())
  for pair in splits['train'][:20]:
    for tokenizer, words, text in zip((tokenizers.source, tokenizers.target), (pair.source, pair.target), pair.texts):
      assert tokenizer.tokens(tokenizer.encode(text)) == [f'▁{word}' for word in words], 'a word is a token'
  with pytest.raises(DataError, match='cannot be written to'):
    write_corpus(tmp_path / 'corpus' / 'train.links', splits)
