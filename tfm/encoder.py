"""Text in; vectors, classes or the words behind masks out: an encoder-only model with its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tfm.errors import UserError
from tfm.models.build import with_layout
from tfm.models.encoder_only import EncoderOnly
from tfm.models.layout import to_layout
from tfm.special_ids import SpecialIds
from tfm.text.tokenizer import Tokenizers


class EncoderError(UserError):
  """A text or an argument that cannot be honoured."""


@dataclass(frozen=True)
class Filling:
  """A guess at a masked token."""

  token: str
  probability: float
  text: str
  """The sentence with it in place."""


class Encoder:
  """A trained encoder-only model with its tokenizer.

  Args:
    model, params: an `EncoderOnly` and its parameters, in either layout.
    tokenizers: of both sides, of which an encoder has the source's; its `mask_id` and `mask_token` hide a token.
    special: how the model wants its texts framed.
  """

  def __init__(self, model: EncoderOnly, params: Any, tokenizers: Tokenizers, special: SpecialIds):
    self.model = with_layout(model, False)
    self.params = jax.tree.map(jnp.asarray, to_layout(params, 'unrolled'))
    self.tokenizers, self.special = tokenizers, special
    self._tokenizer = tokenizers.source

  def embed(self, texts: Sequence[str], *, batch_rows: int = 64) -> np.ndarray:
    """A vector for each text, BxD float32: pooled as `model.pooling` says, special tokens included."""
    return self._of_all(texts, 'embed', batch_rows, self.model.config.d_model)

  def classify(self, texts: Sequence[str], *, batch_rows: int = 64) -> np.ndarray:
    """Probabilities of the classes for each text, BxL float32.

    Raises:
      EncoderError: the model has no classification head.
    """
    labels = self.model.config.num_labels
    if not labels:
      raise EncoderError('this model has no classification head (model.num_labels is 0); train or load one that has.')
    return np.asarray(jax.nn.softmax(self._of_all(texts, 'classify', batch_rows, labels), axis=-1))

  def fill_mask(self, text: str, *, top_k: int = 5) -> list[list[Filling]]:
    """The `top_k` most probable tokens for every mask in a text, most probable first; other masks stay as they are.

    Raises:
      EncoderError: the text has no mask, or the model none.
    """
    if self._tokenizer.mask_id is None:
      raise EncoderError('this model was not trained with masks; use a masked language model.')
    parts = text.split(self._tokenizer.mask_token)
    if len(parts) < 2:
      raise EncoderError(f'{text!r} has no {self._tokenizer.mask_token}; write it where a token is to be guessed.')
    if not 1 <= top_k <= self.model.vocab_size:
      raise EncoderError(f'top_k is {top_k}; give 1 to {self.model.vocab_size}.')
    ids, places = [], []
    for number, part in enumerate(self._tokenizer.encode_batch(parts)):
      if number:
        places.append(len(self.special.source_prefix) + len(ids))
        ids.append(self._tokenizer.mask_id)
      ids += part
    (row_S,), _ = next(self._batches([ids], 1))
    probabilities_SxV = np.asarray(jax.nn.softmax(_apply(self.model, '__call__', self.params, row_S[None])[0], axis=-1))
    found = []
    for number, place in enumerate(places):
      best = np.argsort(-probabilities_SxV[place], kind='stable')[:top_k].tolist()
      found.append([Filling(self._tokenizer.tokens([i])[0], float(probabilities_SxV[place, i]),
                            self._filled(parts, number, i)) for i in best])
    return found

  def _filled(self, parts: list[str], number: int, token: int) -> str:
    joined = self._tokenizer.mask_token.join
    return joined(parts[:number + 1]) + self._tokenizer.decode([token]) + joined(parts[number + 1:])

  def _of_all(self, texts: Sequence[str], method: str, batch_rows: int, width: int) -> np.ndarray:
    if isinstance(texts, str):
      raise EncoderError('a list of texts is needed; put a single one in a list.')
    if batch_rows < 1:
      raise EncoderError(f'batch_rows is {batch_rows}; give 1 or more.')
    out = np.zeros((len(texts), width), np.float32)
    for ids_BxS, indices in self._batches(self._tokenizer.encode_batch(list(texts)), batch_rows):
      out[indices] = np.asarray(_apply(self.model, method, self.params, ids_BxS))[:len(indices)]
    return out

  def _batches(self, rows: Sequence[list[int]], batch_rows: int) -> Iterator[tuple[np.ndarray, list[int]]]:
    """(ids_BxS, which texts they are): texts of about one length together, in few shapes."""
    rows = [[*self.special.source_prefix, *ids, *self.special.source_suffix] for ids in rows]
    limit = self.model.config.longest
    for index, ids in enumerate(rows):
      if limit is not None and len(ids) > limit:
        raise EncoderError(f'Text {index + 1} has {len(ids)} tokens, but the model learned only {limit} positions '
                           '(model.max_positions); shorten it.')
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for begin in range(0, len(order), batch_rows):
      indices = order[begin:begin + batch_rows]
      width = max(16, 1 << (max(len(rows[index]) for index in indices) - 1).bit_length())
      height = min(batch_rows, 1 << (len(indices) - 1).bit_length())
      ids_BxS = np.full((height, min(width, limit or width)), self.special.pad, np.int32)
      for place, index in enumerate(indices):
        ids_BxS[place, :len(rows[index])] = rows[index]
      yield ids_BxS, indices

  def with_params(self, params: Any) -> Encoder:
    """The same encoder with other weights."""
    return Encoder(self.model, params, self.tokenizers, self.special)


@partial(jax.jit, static_argnames=('model', 'method'))
def _apply(model, method: str, params, ids_BxS):
  return model.apply({'params': params}, ids_BxS, method=method)
