"""Sentences with their trees from a small grammar of English, and the ten tasks of SentEval on them (E10).

Number agrees between subject and verb, every clause has a tense of its own, and clauses are embedded, relative or
coordinate. All content words of a sentence are about one topic. The verbs of a topic have an order, as the steps of a
story do: the second of two coordinate clauses tells what comes after the first. So an odd word, or two clauses in the
wrong order, can be told by what the words mean, and by nothing else.

The tasks are those of Conneau et al. 2018 (section 2), read off the trees; in each, all answers are equally frequent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfm.special_ids import BOS, EOS, UNK
from tfm.text.ragged import Ragged

Tree = tuple
"""(label, tree, ...); of a word (class, word)."""

TASKS = {'SentLen': 'surface', 'WC': 'surface', 'TreeDepth': 'syntactic', 'TopConst': 'syntactic',
         'BShift': 'syntactic', 'Tense': 'semantic', 'SubjNum': 'semantic', 'ObjNum': 'semantic', 'SOMO': 'semantic',
         'CoordInv': 'semantic'}
"""Task -> its kind, as Conneau et al. sort them."""

LONGEST = 18
"""Words of a sentence."""

# -- words ------------------------------------------------------------------------------------------------------------

_TOPICS = [[words.split() for words in topic.split('|')] for topic in (
    # nouns | adjectives | transitive verbs | intransitive verbs
    'chef waiter guest oven kettle onion pepper spoon | salty tasty raw | boil roast peel | dine chew',
    'nurse doctor patient ward pill tablet surgeon bandage | sick pale sore | cure treat infect | cough recover',
    'farmer cow horse barn tractor goat field lamb | muddy ripe rural | milk plough harvest | graze wander',
    'sailor captain ship anchor harbor pirate whale island | wet stormy naval | board attack rescue | sail float',
    'teacher pupil pencil lesson poem exam scholar essay | clever lazy strict | grade correct praise | learn fail',
    'lawyer judge crime court guard trial client clerk | guilty legal honest | accuse arrest defend | plead appeal',
)]
_SPEAKING = ['claim', 'report', 'believe', 'suspect', 'mention']
STORY = [('VT', 0), ('VI', 0), ('VT', 1), ('VI', 1), ('VT', 2)]
"""The order of the verbs of every topic: transitive or intransitive, and the number in the lexicon."""


def _forms(kind: str, words: Sequence[str]) -> dict[str, tuple[str, ...]]:
  if kind == 'A':
    return {'A': tuple(words)}
  if kind == 'N':
    return {'N.sg': tuple(words), 'N.pl': tuple(word + 's' for word in words)}
  # In the present the plural is the bare verb, and the past has one form.
  return {f'{kind}.sg': tuple(word + 's' for word in words), f'{kind}.pl': tuple(words),
          f'{kind}.past': tuple(word + ('d' if word.endswith('e') else 'ed') for word in words)}


LEXICON: list[dict[str, tuple[str, ...]]] = [
    {name: forms for kind, words in zip(('N', 'A', 'VT', 'VI'), topic) for name, forms in _forms(kind, words).items()}
    for topic in _TOPICS]
"""For each topic: class -> words."""
COMMON: dict[str, tuple[str, ...]] = {
    'D.sg': ('the', 'one', 'this', 'every'), 'D.pl': ('the', 'some', 'these', 'many'),
    'P': ('near', 'behind', 'beside', 'without'), 'ADV': ('today', 'often', 'suddenly', 'quietly'),
    'CC': ('and', 'but'), 'SUB': ('when', 'because', 'if'), 'REL': ('which',), 'THAT': ('that',),
    **_forms('VS', _SPEAKING)}
"""Words of no topic."""
WORDS = tuple(dict.fromkeys(word for classes in (COMMON, *LEXICON) for words in classes.values() for word in words))
IDS = {word: UNK + 1 + number for number, word in enumerate(WORDS)}
MASK_ID = UNK + 1 + len(WORDS)
CONTENT_WORDS = tuple(word for topic in LEXICON for word in topic['N.sg'][:4])
"""Those of which WC asks which one is there."""

# -- sentences --------------------------------------------------------------------------------------------------------


class _Writer:
  """One sentence in the making."""

  def __init__(self, rng: np.random.Generator):
    self.rng = rng
    self.topic = LEXICON[rng.integers(len(LEXICON))]

  def chance(self, p: float) -> bool:
    return self.rng.random() < p

  def word(self, name: str, number: int | None = None) -> Tree:
    words = self.topic[name] if name in self.topic else COMMON[name]
    return name, words[self.rng.integers(len(words)) if number is None else number]

  def sentence(self) -> Tree:
    if not self.chance(0.25):
      return self.clause(2)
    steps = np.sort(self.rng.choice(len(STORY), 2, replace=False))
    first, second = (self.clause(1, STORY[step]) for step in steps)
    return 'S', first, self.word('CC'), second

  def clause(self, room: int, verb: tuple[str, int] | None = None) -> Tree:
    """`room`: how many times a clause or a phrase may still stand within another."""
    number, form = 'sg' if self.chance(0.5) else 'pl', self.rng.random()
    parts = [self.noun_phrase(number, room), self.verb_phrase(number, room, verb)]
    if form < 0.15:
      parts.insert(0, ('ADVP', self.word('ADV')))
    elif form < 0.3:
      parts.insert(1, ('ADVP', self.word('ADV')))
    elif form < 0.45:
      parts.insert(0, self.prepositional())
    elif form < 0.6 and room > 1:
      parts.insert(0, ('SBAR', self.word('SUB'), self.clause(0)))
    return 'S', *parts

  def verb_phrase(self, number: str, room: int, verb: tuple[str, int] | None) -> Tree:
    form = number if self.chance(0.5) else 'past'
    if verb is None and room and self.chance(0.25):
      return 'VP', self.word(f'VS.{form}'), ('SBAR', self.word('THAT'), self.clause(room - 1))
    kind, which = STORY[self.rng.integers(len(STORY))] if verb is None else verb
    return 'VP', self.word(f'{kind}.{form}', which), *([self.object(room)] if kind == 'VT' else [])

  def object(self, room: int) -> Tree:
    return self.noun_phrase('sg' if self.chance(0.5) else 'pl', room)

  def noun_phrase(self, number: str, room: int) -> Tree:
    parts = [self.word(f'D.{number}'), *([self.word('A')] if self.chance(0.25) else []), self.word(f'N.{number}')]
    more = self.rng.random()
    if room and more < 0.2:
      parts.append(self.prepositional())
    elif room and more < 0.3:
      parts.append(('RC', self.word('REL'), self.verb_phrase(number, 0, None)))
    elif room and more < 0.4:
      other, kind = ('sg' if self.chance(0.5) else 'pl'), STORY[2 * self.rng.integers(3)]
      form = other if self.chance(0.5) else 'past'
      parts.append(('RC', self.word('REL'), self.noun_phrase(other, 0), self.word(f'VT.{form}', kind[1])))
    return 'NP', *parts

  def prepositional(self) -> Tree:
    return 'PP', self.word('P'), self.object(0)


def draw(rng: np.random.Generator) -> Tree:
  """A sentence of at most `LONGEST` words."""
  while True:
    tree = _Writer(rng).sentence()
    if len(leaves(tree)) <= LONGEST:
      return tree


def leaves(tree: Tree) -> list[tuple[str, str]]:
  """(class, word) from left to right."""
  return [tree] if isinstance(tree[1], str) else [leaf for child in tree[1:] for leaf in leaves(child)]


def words(tree: Tree) -> tuple[str, ...]:
  return tuple(word for _, word in leaves(tree))


def encode(sentences: Sequence[Sequence[str]]) -> Ragged:
  """Ids, between <s> and </s>."""
  return Ragged.of([[BOS, *(IDS[word] for word in sentence), EOS] for sentence in sentences])


# -- what is asked ----------------------------------------------------------------------------------------------------


def depth(tree: Tree) -> int:
  """Nodes from the root down to the deepest word, both counted."""
  return 1 if isinstance(tree[1], str) else 1 + max(map(depth, tree[1:]))


def is_coordinate(tree: Tree) -> bool:
  return any(child[0] == 'CC' for child in tree[1:])


def labels(tree: Tree) -> dict[str, Any]:
  """The answers to the seven tasks that ask about a sentence as it is; None where the question has no answer.

  Tense and numbers are those of the main clause; two coordinate ones have none in common.
  """
  there = words(tree)
  asked = [word for word in there if word in CONTENT_WORDS]
  found = {'SentLen': int(np.searchsorted((6, 8, 10, 13), len(there))), 'WC': asked[0] if len(asked) == 1 else None,
           'TreeDepth': min(max(depth(tree), 5), 7), 'TopConst': ' '.join(child[0] for child in tree[1:]),
           'Tense': None, 'SubjNum': None, 'ObjNum': None}
  if not is_coordinate(tree):
    subject, verb = (next(child for child in tree[1:] if child[0] == name) for name in ('NP', 'VP'))
    found['Tense'] = 'past' if verb[1][0].endswith('past') else 'present'
    found['SubjNum'] = noun(subject)[0]
    found['ObjNum'] = noun(verb[2])[0] if len(verb) > 2 and verb[2][0] == 'NP' else None
  return found


def noun(phrase: Tree) -> tuple[str, str]:
  """(class, word) of the head of a noun phrase, or of the subject of the first clause of a sentence."""
  return next(child if child[0].startswith('N.') else noun(child) for child in phrase[1:] if child[0][0] in 'NS'
              and child[0] != 'SBAR')


def shifted(tree: Tree, rng: np.random.Generator) -> tuple[str, ...]:
  """BShift: two neighbouring words change places."""
  there = list(words(tree))
  at = rng.integers(len(there) - 1)
  there[at:at + 2] = there[at + 1], there[at]
  return tuple(there)


def with_odd_word(tree: Tree, rng: np.random.Generator) -> tuple[str, ...]:
  """SOMO: a noun or a verb gives way to one of the same class, hence of the same number and tense, of another topic."""
  there = leaves(tree)
  places = [at for at, (name, _) in enumerate(there) if name[:2] in ('N.', 'VT', 'VI')]
  at = places[rng.integers(len(places))]
  name, word = there[at]
  others = [other for topic in LEXICON if word not in topic[name] for other in topic[name]]
  return tuple(others[rng.integers(len(others))] if here == at else word for here, (_, word) in enumerate(there))


def inverted(tree: Tree, rng: np.random.Generator) -> tuple[str, ...]:
  """CoordInv: the two coordinate clauses change places."""
  del rng
  label, first, conjunction, second = tree
  return words((label, second, conjunction, first))


CHANGES = {'BShift': shifted, 'SOMO': with_odd_word, 'CoordInv': inverted}


class Examples(NamedTuple):
  """Of one task, in random order."""

  sentences: list[tuple[str, ...]]
  labels_M: np.ndarray
  """int, from 0; all are about equally frequent."""
  types_M: np.ndarray
  """The noun that is the subject of the (first) clause: the word whose control label a sentence gets."""


def examples(trees: Sequence[Tree], count: int, rng: np.random.Generator) -> Iterator[tuple[str, Examples]]:
  """For every task up to `count` sentences made from those trees, balanced over its answers.

  Depth is balanced for each length besides, as Conneau et al. have it: otherwise it could be guessed from the length.
  """
  found = [labels(tree) for tree in trees]
  for task in TASKS:
    if task in CHANGES:
      fit = [tree for tree in trees if task != 'CoordInv' or is_coordinate(tree)][:count]
      changed = rng.permutation(np.arange(len(fit)) % 2)
      sentences = [CHANGES[task](tree, rng) if change else words(tree) for tree, change in zip(fit, changed)]
      yield task, Examples(sentences, changed, np.array([noun(tree)[1] for tree in fit]))
    else:
      strata = [len(words(tree)) if task == 'TreeDepth' else 0 for tree in trees]
      rows = _balanced([each[task] for each in found], strata, count, rng)
      names = sorted({found[row][task] for row in rows})
      yield task, Examples([words(trees[row]) for row in rows], np.array([names.index(found[row][task])
                                                                         for row in rows]),
                           np.array([noun(trees[row])[1] for row in rows]))


def _balanced(answers: Sequence[Any], strata: Sequence[Any], count: int, rng: np.random.Generator) -> np.ndarray:
  """Rows in random order; of each stratum every answer as often as the rarest, so those that lack one give none."""
  rows: dict[Any, dict[Any, list[int]]] = {}
  for row, (answer, stratum) in enumerate(zip(answers, strata)):
    if answer is not None:
      rows.setdefault(stratum, {}).setdefault(answer, []).append(row)
  possible = len({answer for by_answer in rows.values() for answer in by_answer})
  kept = [row for by_answer in rows.values() if len(by_answer) == possible for several in by_answer.values()
          for row in several[:min(map(len, by_answer.values()))]]
  return rng.permutation(kept)[:count]
