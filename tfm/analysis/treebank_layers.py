"""E10 on natural text: what a treebank says of each word, read from the layers of a small masked language model.

The English Web Treebank has no sentence labels, so what is asked of a sentence in `tfm.analysis.linguistic_layers` is
asked of every word here, and the control labels are those of Hewitt & Liang 2019: drawn once for each word type.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

from tfm.analysis import conllu
from tfm.analysis.linguistic_layers import Scale, Scores, Seed, masked_accuracy, result_of, scores_of, states_of, train
from tfm.analysis.result import Result
from tfm.special_ids import BOS, EOS, UNK
from tfm.text.ragged import Ragged

SCALES = {
    'cpu': Scale(layers=6, width=64, steps=800, rows=32, probed=4000, seeds=3, dropout=0.1),
    'accel': Scale(layers=12, width=128, steps=5000, rows=128, probed=10_000, seeds=5, learning_rate=5e-4, dropout=0.1)}
LONGEST = 25
"""Words of a sentence; longer ones are left out."""


def run_treebank_layers(scale: Literal['cpu', 'accel'] | Scale = 'cpu', seed: int = 0,
                        root: Path | None = None) -> Result:
  """What the English Web Treebank says of its words, read from a model that has learned from a part of its text.

  Of the development set three fifths of the sentences are learned from and two are what probes are fitted on; accuracy
  is measured on the test set.

  Args:
    root: holds ud_english_ewt/dev.conllu.gz and test.conllu.gz; None is TFM_DATA, or ../shared/data.

  Raises:
    DataError: the treebank is not there.
  """
  size = scale if isinstance(scale, Scale) else SCALES[scale]
  folder = Path(os.environ.get('TFM_DATA', '../shared/data') if root is None else root) / 'ud_english_ewt'
  dev, test = ([sentence for sentence in conllu.read(folder / f'{name}.conllu.gz') if len(sentence) <= LONGEST]
               for name in ('dev', 'test'))
  found = [_on_treebank(size, each, dev, test) for each in range(seed, seed + size.seeds)]
  return result_of('E10 treebank', conllu.TASKS, found)


def _on_treebank(size: Scale, seed: int, dev: list, test: list) -> Seed:
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(dev))
  split = len(dev) * 3 // 5
  learned, fitted = ([dev[i] for i in part] for part in (order[:split], order[split:]))
  counts = Counter(word.form.lower() for sentence in learned for word in sentence)
  ids = {form: UNK + 1 + number for number, form in enumerate(sorted(form for form in counts if counts[form] > 1))}
  mask_id = UNK + 1 + len(ids)

  def encode(sentences) -> Ragged:
    return Ragged.of([[BOS, *(ids.get(word.form.lower(), UNK) for word in each), EOS] for each in sentences])

  texts = encode(learned)
  model, first, params = train(size, seed, texts, mask_id, LONGEST + 2)
  answers: dict[str, list] = {name: [] for name in conllu.TASKS}
  for sentence in (*fitted, *test):
    for name, found in conllu.labels(sentence).items():
      answers[name] += found
  both = encode([*fitted, *test])
  types_M = np.array([word.form.lower() for sentence in (*fitted, *test) for word in sentence])
  test_M = np.arange(len(types_M)) >= sum(map(len, fitted))
  chosen = {}
  for name, several in answers.items():
    rows = [rng.permutation([row for row in np.flatnonzero(part) if several[row] is not None])[:size.probed]
            for part in (~test_M, test_M)]
    chosen[name] = np.concatenate(rows)

  def scores(params) -> dict[str, Scores]:
    states_NxMxD = np.concatenate([states[:, is_word] for states, is_word, _ in states_of(model, params, both)], axis=1)
    found = {}
    for name, rows in chosen.items():
      labels_M = np.unique([answers[name][row] for row in rows], return_inverse=True)[1]
      found[name] = scores_of(states_NxMxD[:, rows], labels_M, types_M[rows], test_M[rows], seed)
    return found

  return Seed(*masked_accuracy(model, params, size, texts, encode(fitted), mask_id), scores(params), scores(first))
