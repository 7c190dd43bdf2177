"""Training of a unigram language model over word pieces (Kudo 2018, "Subword Regularization", section 3.2).

The trainer of the `tokenizers` library walks over hash tables whose order changes from process to process, so two
runs on the same text end with different vocabularies. This one gives the same result always. It differs from the
paper in the E-step: pieces are counted on the best segmentation of every word (Viterbi, done by the library's
encoder), not summed over all segmentations.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, models

LONGEST_PIECE = 16
SEEDS_PER_PIECE = 8
ROUNDS = 2
KEEP = 0.75


def train_unigram(words: Mapping[str, int], alphabet: Sequence[str], size: int) -> models.Unigram:
  """A unigram model with at most `size` pieces, every symbol of `alphabet` among them.

  Args:
    words: how often every word occurs; words are strings over `alphabet`.
    alphabet: symbols that stay in the vocabulary whatever happens, so that every word can be segmented.
    size: greatest number of pieces, at least len(alphabet).
  """
  words = dict(sorted(words.items()))
  scores = _normalise(_seeds(words, SEEDS_PER_PIECE * size), alphabet)
  while True:
    for _ in range(ROUNDS):
      counts = _count(words, scores)
      scores = _normalise(counts, alphabet)
    optional = [piece for piece in scores if len(piece) > 1]
    room = size - len(alphabet)
    if len(optional) <= room:
      return _model(scores)
    loss = {piece: counts[piece] * (scores[piece] - _without(piece, scores)) for piece in optional}
    kept = max(room, int(KEEP * len(optional)))
    for piece in sorted(optional, key=lambda piece: (-loss[piece], piece))[kept:]:
      del scores[piece]


def _seeds(words: Mapping[str, int], most: int) -> dict[str, int]:
  counts: Counter[str] = Counter()
  for word, count in words.items():
    for start in range(len(word)):
      for end in range(start + 1, min(start + LONGEST_PIECE, len(word)) + 1):
        counts[word[start:end]] += count
  longer = ((-count * len(piece), piece) for piece, count in counts.items() if len(piece) > 1 and count > 1)
  chosen = [piece for _, piece in heapq.nsmallest(most, longer)]
  return {piece: counts[piece] for piece in [*chosen, *(piece for piece in counts if len(piece) == 1)]}


def _normalise(counts: Mapping[str, int], alphabet: Sequence[str]) -> dict[str, float]:
  # The M-step; a symbol that the best segmentations do without keeps half a count, a longer piece is dropped.
  kept = {symbol: max(counts.get(symbol, 0), 0.5) for symbol in alphabet}
  kept |= {piece: float(counts[piece]) for piece in sorted(counts) if len(piece) > 1 and counts[piece] > 0}
  total = math.log(sum(kept.values()))
  return {piece: math.log(count) - total for piece, count in kept.items()}


def _model(scores: Mapping[str, float]) -> models.Unigram:
  return models.Unigram(list(scores.items()), None, False)


def _count(words: Mapping[str, int], scores: Mapping[str, float]) -> Counter[str]:
  encoder = Tokenizer(_model(scores))
  counts: Counter[str] = Counter()
  for word, count in words.items():
    for piece in encoder.encode(word).tokens:
      counts[piece] += count
  return counts


def _without(piece: str, scores: Mapping[str, float]) -> float:
  # Log-probability of the best way to write `piece` with other pieces.
  best = [0.0] + [-math.inf] * len(piece)
  for end in range(1, len(piece) + 1):
    for start in range(end):
      score = scores.get(piece[start:end])
      if score is not None and end - start < len(piece):
        best[end] = max(best[end], best[start] + score)
  return best[-1]
