"""What the model of this moment makes of a few rows of the validation set, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from tfm.encoder import Encoder
from tfm.generator import Generator
from tfm.loaded import Loaded
from tfm.text.corpora import Pair
from tfm.training.objectives import Batch
from tfm.training.run_folder import write_whole
from tfm.translator import Translator

CONTINUED = 64
"""Tokens that a language model adds to the beginning of a text."""


def write_samples(path: Path, pairs: Sequence[Pair], hypotheses: Sequence[str]) -> None:
  """One file: source, reference and translation of each pair."""
  blocks = [f'source       {source}\nreference    {reference}\ntranslation  {hypothesis}\n'
            for (source, reference), hypothesis in zip(pairs, hypotheses)]
  write_whole(path, '\n'.join(blocks))


def describe_rows(user: Loaded, batch: Batch, count: int) -> str:
  """The first `count` rows of a batch of the user's own objective, and what its model says to them."""
  count = min(count, int((np.asarray(batch[0])[:, 0] != user.special.pad).sum()))  # empty rows come last
  first, second = (None if rows is None else np.asarray(rows)[:count] for rows in batch)
  if isinstance(user, Generator):
    return _continuations(user, first)
  return (_fillings if isinstance(user, Encoder) else _spans)(user, first, second)


def _continuations(user: Generator, ids_BxT: np.ndarray) -> str:
  """Each row's first quarter, and what is drawn after it at temperature 0.8."""
  tokenizer = user.tokenizers.target
  prompts = [tokenizer.decode(row[:max(int((row != user.special.pad).sum()) // 4, 1)].tolist()) for row in ids_BxT]
  found = user.generate([prompt or ' ' for prompt in prompts], max_new_tokens=CONTINUED, sampling_temperature=0.8)
  return '\n'.join(f'text          {one.prompt}\ncontinuation  {one.text}\n' for one in found)


def _fillings(user: Encoder, inputs_BxT: np.ndarray, labels_BxT: np.ndarray) -> str:
  """Each row as it is read, and with the hidden tokens: as they were, and as the model would have them."""
  logits_BxTxV = jax.device_get(user.model.apply({'params': user.params}, inputs_BxT))
  pad, blocks = user.special.pad, []
  for inputs_T, labels_T, logits_TxV in zip(inputs_BxT, labels_BxT, logits_BxTxV):
    length = int((inputs_T != pad).sum())
    versions = inputs_T, labels_T, logits_TxV.argmax(-1)
    shown = [np.where(labels_T == pad, inputs_T, version)[:length] for version in versions]
    blocks.append('\n'.join(f'{name}  {_words(user.tokenizers.source, ids)}'
                            for name, ids in zip(('input    ', 'reference', 'filled   '), shown)))
  return '\n\n'.join(blocks) + '\n'


def _spans(user: Translator, source_BxS: np.ndarray, target_BxT: np.ndarray) -> str:
  """Each row's source and target, and what greedy search writes for it."""
  found = user.write([row[row != user.special.pad].tolist() for row in source_BxS])
  return '\n'.join(
      f'source     {_words(user.tokenizers.source, source_S[source_S != user.special.pad])}\n'
      f'reference  {_words(user.tokenizers.target, target_T[target_T != user.special.pad])}\n'
      f'written    {_words(user.tokenizers.target, ids)}\n'
      for source_S, target_T, ids in zip(source_BxS, target_BxT, found))


def _words(tokenizer, ids) -> str:
  return ' '.join(tokenizer.tokens([int(i) for i in ids]))
