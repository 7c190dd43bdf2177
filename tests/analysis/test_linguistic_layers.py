"""The grammar's labels are right and balanced, treebanks are read as they are, and what has learned nothing says so."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tfm.analysis import conllu, linguistic_layers, treebank_layers
from tfm.analysis.grammar import (
    CHANGES,
    IDS,
    LEXICON,
    LONGEST,
    MASK_ID,
    STORY,
    TASKS,
    depth,
    draw,
    encode,
    examples,
    inverted,
    is_coordinate,
    labels,
    leaves,
    noun,
    shifted,
    with_odd_word,
    words,
)
from tfm.analysis.linguistic_layers import Scores, gravity, result_of

CLAUSE = ('S', ('PP', ('P', 'near'), ('NP', ('D.sg', 'the'), ('N.sg', 'barn'))),
          ('NP', ('D.pl', 'these'), ('N.pl', 'cows'),
           ('RC', ('REL', 'which'), ('NP', ('D.sg', 'the'), ('N.sg', 'farmer')), ('VT.past', 'milked'))),
          ('VP', ('VT.pl', 'harvest'), ('NP', ('D.sg', 'one'), ('A', 'ripe'), ('N.sg', 'field'))))
SAYING = ('S', ('NP', ('D.sg', 'the'), ('N.sg', 'judge')),
          ('VP', ('VS.past', 'claimed'), ('SBAR', ('THAT', 'that'), ('S', ('NP', ('D.pl', 'the'), ('N.pl', 'clerks')),
                                                                     ('VP', ('VI.pl', 'plead'))))))
APPEAL = ('S', ('NP', ('D.pl', 'some'), ('N.pl', 'crimes')), ('VP', ('VI.past', 'appealed')))
BOTH = ('S', SAYING, ('CC', 'but'), APPEAL)


@pytest.fixture(scope='module')
def trees():
  rng = np.random.default_rng(0)
  return [draw(rng) for _ in range(3000)]


@pytest.mark.parametrize('tree, expected', [
    (CLAUSE, dict(SentLen=3, WC=None, TreeDepth=5, TopConst='PP NP VP', Tense='present', SubjNum='N.pl',
                  ObjNum='N.sg')),
    (SAYING, dict(SentLen=1, WC='judge', TreeDepth=6, TopConst='NP VP', Tense='past', SubjNum='N.sg', ObjNum=None)),
    (BOTH, dict(SentLen=3, WC='judge', TreeDepth=7, TopConst='S CC S', Tense=None, SubjNum=None, ObjNum=None)),
])
def test_labels_of_sentences_made_by_hand(tree, expected):
  assert labels(tree) == expected
  assert noun(tree)[1] == {5: 'cows', 6: 'judge', 7: 'judge'}[expected['TreeDepth']]


def test_depth_by_brackets(trees):
  for tree in (CLAUSE, SAYING, BOTH, *trees[:200]):
    open_brackets = np.cumsum([(c == '(') - (c == ')') for c in repr(tree)])
    assert depth(tree) == open_brackets.max()


def test_every_word_has_one_id_and_no_topic_shares_one():
  assert len(IDS) == len(set(IDS.values())) == MASK_ID - min(IDS.values()) < 300
  counts = Counter(word for topic in LEXICON for several in topic.values() for word in several)
  assert max(counts.values()) == 1


def test_a_seed_gives_the_same_sentences():
  same, again, other = ([draw(rng) for _ in range(20)] for rng in map(np.random.default_rng, (3, 3, 4)))
  assert same == again != other
  assert encode([words(tree) for tree in same]).lengths.max() <= LONGEST + 2


def agreements(tree):
  """(number of the noun, form of the verb) of every clause, and of every relative clause with its noun."""
  if isinstance(tree[1], str):
    return
  children = {child[0]: child for child in tree[1:]}
  if tree[0] == 'S' and 'VP' in children:
    yield noun(children['NP'])[0][2:], children['VP'][1][0][3:]
  if tree[0] == 'NP' and 'RC' in children:
    clause = children['RC']
    who, verb = (tree, clause[2][1]) if clause[2][0] == 'VP' else (clause[2], clause[3])
    yield noun(who)[0][2:], verb[0][3:]
  for child in tree[1:]:
    yield from agreements(child)


def test_verbs_agree_with_their_nouns_and_articles_with_theirs(trees):
  found = Counter(pair for tree in trees for pair in agreements(tree))
  assert set(found) == {(n, v) for n in ('sg', 'pl') for v in (n, 'past')} and min(found.values()) > 500
  for tree in trees:
    there = [name for name, _ in leaves(tree) if name != 'A']
    assert all(after == f'N.{name[2:]}' for name, after in zip(there, there[1:]) if name.startswith('D.'))
    assert len({number for number, topic in enumerate(LEXICON) for name, word in leaves(tree)
                if word in topic.get(name, ())}) == 1


def test_of_two_coordinate_clauses_the_second_has_a_later_verb(trees):
  def place(clause):
    name, word = next(child for child in clause[1:] if child[0] == 'VP')[1]
    number = next(topic[name].index(word) for topic in LEXICON if word in topic[name])
    return STORY.index((name[:2], number))

  steps = {(place(tree[1]), place(tree[3])) for tree in trees if is_coordinate(tree)}
  assert steps == {(a, b) for a in range(5) for b in range(a + 1, 5)}


def test_changes_change_what_they_say(trees):
  rng = np.random.default_rng(1)
  for tree in trees[:300]:
    before, after = words(tree), shifted(tree, rng)
    at = next(i for i in range(len(before)) if before[i] != after[i])
    assert (*before[:at], before[at + 1], before[at], *before[at + 2:]) == after
    classes = leaves(tree)
    odd = [(name, old, new) for (name, old), new in zip(classes, with_odd_word(tree, rng)) if old != new]
    (name, old, new), = odd
    old_topic, new_topic = (next(i for i, topic in enumerate(LEXICON) if word in topic[name]) for word in (old, new))
    assert old_topic != new_topic and name[0] in 'NV' and name[:2] != 'VS'
  assert ' '.join(inverted(BOTH, rng)) == 'some crimes appealed but the judge claimed that the clerks plead'


def test_the_answers_of_every_task_are_balanced_and_right(trees):
  found = dict(examples(trees, 600, np.random.default_rng(2)))
  assert list(found) == list(TASKS)
  by_words = {words(tree): labels(tree) for tree in trees}
  for task, (sentences, labels_M, types_M) in found.items():
    counts = np.bincount(labels_M)
    assert len(sentences) == len(labels_M) == len(types_M) <= 600
    assert counts.max() < 1.45 * counts.min() or task == 'WC', (task, counts)
    if task in CHANGES:
      assert all(sentence in by_words for sentence, changed in zip(sentences, labels_M) if not changed)
    else:
      answers = {(label, by_words[sentence][task]) for sentence, label in zip(sentences, labels_M)}
      assert len(answers) == len(counts) == len({answer for _, answer in answers})
  lengths = np.array([len(sentence) for sentence in found['TreeDepth'].sentences])
  means = [lengths[found['TreeDepth'].labels_M == label].mean() for label in range(3)]
  assert max(means) - min(means) < 1.0  # depth cannot be told from the length


# -- treebanks --------------------------------------------------------------------------------------------------------

TEXT = """\
# text = We'll see, don't we?
1-2\tWe'll\t_\t_\t_\t_\t_\t_\t_\t_
1\tWe\twe\tPRON\tPRP\tNumber=Plur|Person=1\t3\tnsubj\t_\t_
2\t'll\twill\tAUX\tMD\tVerbForm=Fin\t3\taux\t_\t_
3\tsee\tsee\tVERB\tVB\tTense=Pres\t0\troot\t_\t_
3.1\tit\tit\tPRON\tPRP\t_\t_\t_\t3:obj\t_
4\tnow\tnow\tADV\tRB\t_\t3\tadvmod:tmod\t_\t_

1\tYes\tyes\tINTJ\tUH\t_\t0\troot\t_\t_
"""


def test_multiword_tokens_and_empty_nodes_are_no_words():
  first, second = conllu.parse(TEXT)
  assert [word.form for word in first] == ['We', "'ll", 'see', 'now'] and [word.form for word in second] == ['Yes']
  assert first[3].relation == 'advmod' and first[0].features == {'Number': 'Plur', 'Person': '1'}
  assert conllu.depths(first) == [1, 1, 0, 1]
  found = conllu.labels(first)
  assert set(found) == set(conllu.TASKS)
  assert found['tense'] == [None, None, 'Pres', None] and found['number'] == ['Plur', None, None, None]
  assert found['relation'] == ['nsubj', 'aux', 'root', 'advmod'] and found['part of speech'][1] == 'AUX'
  # Heads are 2 and 1 to the right, itself, and 1 to the left.
  assert found['distance of the head'] == ['5', '4', '3', '2']


@pytest.mark.parametrize('old, new, message', [
    ('\tadvmod:tmod', ' advmod', 'line 7: CoNLL-U has ten columns'), ('4\tnow', '5\tnow', "number '5'"),
    ('_\t3\tadvmod', '_\t9\tadvmod', 'a head that is none of its words'), ('_\t3\tadvmod', '_\t_\tadvmod', "head '_'"),
])
def test_what_is_no_conllu_is_refused(old, new, message):
  with pytest.raises(ValueError, match=message):
    conllu.parse(TEXT.replace(old, new))


def test_heads_in_a_circle_are_refused():
  with pytest.raises(ValueError, match='circle'):
    conllu.depths(conllu.parse(TEXT.replace('_\t3\tadvmod', '_\t4\tadvmod'))[0])


def test_without_a_treebank_it_says_so(tmp_path):
  with pytest.raises(ValueError, match='There is no treebank .*dev.conllu.gz'):
    treebank_layers.run_treebank_layers(root=tmp_path)


# -- the verdict ------------------------------------------------------------------------------------------------------


def scores(arises: int, best: float = 0.9, control: float = 0.4) -> Scores:
  """Of a binary task: chance before layer `arises`, then `best`."""
  curve_N = np.where(np.arange(5) < arises, 0.5, best)
  return Scores(curve_N, np.full(5, control), curve_N, 0.5)


KINDS = {'a': 'surface', 'b': 'syntactic', 'c': 'semantic'}


def seeds(*layers, masked=0.5, untrained=(1, 1, 1), **options):
  return [linguistic_layers.Seed(masked, 0.1, {task: scores(at, **options) for task, at in zip(KINDS, layers)},
                                 {task: scores(at, 0.6) for task, at in zip(KINDS, untrained)})] * 3


def test_gravity_is_the_layer_in_which_a_step_stands():
  assert abs(gravity({'a': scores(0)}, ['a'])) < 1e-12 and np.isnan(gravity({'a': scores(0)}, ['a'], embedding=False))
  assert abs(gravity({'a': scores(3)}, ['a']) - 3) < 1e-12
  assert abs(gravity({'a': scores(1), 'b': scores(3)}, ['a', 'b'], embedding=False) - 2) < 1e-12


@pytest.mark.parametrize('found, verdict', [
    (seeds(0, 2, 4), 'holds'), (seeds(0, 2, 2), 'fails'), (seeds(2, 0, 4), 'fails'),
    (seeds(0, 2, 4, untrained=(0, 2, 3)), 'fails'), (seeds(0, 2, 4, control=0.85), 'fails'),
    (seeds(0, 2, 4, masked=0.15), 'not supported at this scale'),
    (seeds(0, 2, 4, best=0.53), 'not supported at this scale'),
    (seeds(0, 2, 4, control=0.95), 'not supported at this scale')])
def test_the_verdict(found, verdict):
  assert result_of('E10', KINDS, found).verdict == verdict


@pytest.mark.slow  # a minute for both
@pytest.mark.parametrize('which', ['grammar', 'treebank'])
def test_what_has_learned_nothing_supports_nothing(which, request):
  small = dict(layers=2, width=16, steps=5, rows=8, probed=200, seeds=1)
  if which == 'grammar':
    kinds = TASKS
    result = linguistic_layers.run_linguistic_layers(
        replace(linguistic_layers.SCALES['cpu'], sentences=50, trees=1000, **small))
  else:
    root = request.getfixturevalue('ud_english_ewt').parent
    kinds = conllu.TASKS
    result = treebank_layers.run_treebank_layers(replace(treebank_layers.SCALES['cpu'], **small), root=root)
  assert result.verdict == 'not supported at this scale'
  assert set(result.measured['selectivity in the best layer']) == set(kinds)
  assert all(len(curve) == 3 for curve in result.measured['accuracy by layer']['trained'].values())
