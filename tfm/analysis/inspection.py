"""What a trained model does with one sentence, as a page: its attentions, its alignment, its predictions by layer.

    page = inspect_page(tfm.load('runs/numbers'), 'sixty-seven')
    page.write('page.html')  # or leave `page` as the last line of a notebook's cell
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tfm.analysis.alignment_error import word_starts
from tfm.analysis.engine import run
from tfm.analysis.lens import to_logits
from tfm.analysis.page import LARGEST, Alignment, Attention, Lens, Page, attention_page
from tfm.analysis.sites import sites
from tfm.encoder import Encoder
from tfm.errors import UserError
from tfm.generator import Generator
from tfm.text.tokenizer import Tokenizer
from tfm.translator import Translator

STEP = 8
"""Rows are padded to a multiple of it, so that few shapes are compiled."""


class InspectionError(UserError):
  """A text or an argument with which there is nothing to show."""


@dataclass(frozen=True)
class _Texts:
  """What a model reads, and what is right to say at each position of its last stack."""

  tokenizer: Tokenizer
  """Of the last stack."""
  read: list[int]
  expected: list[int | None]
  source: list[int] | None = None
  """Of an encoder-decoder."""
  alignment: Alignment | None = None


def inspect_page(loaded: Translator | Generator | Encoder, text: str, target: str | None = None, *,
                 top_k: int = 5) -> Page:
  """A page of every attention of a model, by layer and head; of the alignment, where it attends to a source; and of the
  most probable tokens by layer. Where there is no stream of states between layers (recurrent models), the predictions
  are those of the whole model.

  Args:
    loaded: from `tfm.load`.
    text: what it reads; an encoder's may have masks.
    target: the translation to look at; None: the one that the model writes.
    top_k: how many tokens are kept of each prediction.

  Raises:
    InspectionError: the text is empty, too long for the model or for a browser, or a target is given to a model that
      has none.
    TranslationError: a translator finds it too long.
  """
  if not text.strip():
    raise InspectionError('The text is empty, so there is nothing to show; give a sentence.')
  if not 1 <= top_k <= loaded.model.output_vocab_size:
    raise InspectionError(f'top_k is {top_k}; give 1 to {loaded.model.output_vocab_size}.')
  if target is not None and not isinstance(loaded, Translator):
    raise InspectionError('A target is the translation that an encoder-decoder is to be read with, and this model has '
                          'none; leave it out.')
  if isinstance(loaded, Translator):
    texts = _pair(loaded, text, target)
  else:
    texts = _text(loaded, text) if isinstance(loaded, Generator) else _masked(loaded, text)
  limit = loaded.model.config.longest
  for name, ids in (('text', texts.source or []), ('text' if texts.source is None else 'target', texts.read)):
    if limit is not None and len(ids) > limit:
      raise InspectionError(f'The {name} has {len(ids)} tokens with special ones, but the model learned only {limit} '
                            'positions (model.max_positions); shorten it.')
  attentions, lens = _read(loaded, texts, top_k)
  cross = [each.name for each in attentions if each.name == 'Cross']
  title = text
  if isinstance(loaded, Translator):
    written = texts.read[1 + len(loaded.special.forced):]
    title = f'{text} → {loaded.tokenizers.target.decode(written) if target is None else target}'
  about = type(loaded.model).__name__ + (', with a given translation' if target is not None else '')
  return attention_page(attentions, title=title, about=about, alignment=texts.alignment if cross else None, lens=lens)


# -- ids --------------------------------------------------------------------------------------------------------------


def _pair(loaded: Translator, text: str, target: str | None) -> _Texts:
  special, tokenizer = loaded.special, loaded.tokenizers.target
  job, = loaded._jobs([text], None, 0)  # refuses what is too long in its own words
  if target is None:
    # The ids that were written, not those of the text that they make: one text may be cut in several ways.
    tokens_BxMxL, lengths_BxM, *_ = loaded._found([job], loaded._search(None, 1, None, None, 0, 1.0), 0)[1]
    ids = tokens_BxMxL[0, 0, :lengths_BxM[0, 0]].tolist()
    ended = bool(ids) and ids[-1] in special.ends
    written, last = (ids[:-1], ids[-1]) if ended else (ids, None)
    written, limit = written[len(special.forced):], loaded.model.config.longest
    if 1 + len(special.forced) + len(written) == (limit or 0) + 1:  # cut there, and nobody reads the last one
      written, last = written[:-1], written[-1]
  else:
    written, last = tokenizer.encode(target), special.ends[0]
    if not written:
      raise InspectionError('The target is empty; leave it out to see what the model writes.')
  read = [special.start, *special.forced, *written]
  begin, first = len(special.source_prefix), len(special.forced)
  source_words = job.source[begin:len(job.source) - len(special.source_suffix)]
  alignment = None
  if written and source_words:
    alignment = Alignment('Cross', (begin, begin + len(source_words)), (first, first + len(written)),
                          _word_starts(loaded.tokenizers.source, source_words), _word_starts(tokenizer, written))
  return _Texts(tokenizer, read, [*read[1:], last], job.source, alignment)


def _word_starts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
  # Byte-level tokenizers of Hugging Face write a space as Ġ.
  return word_starts(['▁' + token[1:] if token.startswith('Ġ') else token for token in tokenizer.tokens(ids)]).tolist()


def _text(loaded: Generator, text: str) -> _Texts:
  tokenizer = loaded.tokenizers.target
  read = [*loaded.special.source_prefix, *tokenizer.encode(text)]
  return _Texts(tokenizer, read, [*read[1:], None])


def _masked(loaded: Encoder, text: str) -> _Texts:
  tokenizer, special = loaded.tokenizers.source, loaded.special
  parts = [text] if tokenizer.mask_id is None else text.split(tokenizer.mask_token)
  ids = [i for number, part in enumerate(tokenizer.encode_batch(parts))
         for i in ([tokenizer.mask_id] if number else []) + part]
  read = [*special.source_prefix, *ids, *special.source_suffix]
  # What stands behind a mask nobody has said.
  return _Texts(tokenizer, read, [None if i == tokenizer.mask_id else i for i in read])


# -- values -----------------------------------------------------------------------------------------------------------


def _read(loaded, texts: _Texts, top_k: int) -> tuple[list[Attention], Lens]:
  model, params = loaded.model, loaded.params
  inputs = tuple(_padded(ids, loaded) for ids in (texts.source, texts.read) if ids is not None)
  known = sites(model, params, inputs)
  between = ('encoder' if isinstance(loaded, Encoder) else 'decoder') + '.layers.resid_post'
  patterns = {'Encoder': 'encoder.layers.self_attention.pattern', 'Decoder': 'decoder.layers.self_attention.pattern',
              'Cross': next((name for name in known if name.endswith('cross_attention.pattern')), '')}
  patterns = {view: name for view, name in patterns.items() if name in known}
  size = sum((known[name].layers or 1) * math.prod(known[name].shape) for name in patterns.values())
  if size > LARGEST:
    raise InspectionError(f'The attentions to this text have {size:,} weights, and a browser draws {LARGEST:,} at '
                          'most; shorten it.')
  found = run(model, params, inputs, where=[*patterns.values(), *([between] if between in known else [])])
  read = texts.tokenizer.tokens(texts.read)
  source = read if texts.source is None else loaded.tokenizers.source.tokens(texts.source)
  expected = _names(texts.tokenizer, texts.expected)
  sides = {'Encoder': (source, source), 'Decoder': (read, read), 'Cross': (read, source)}
  attentions = []
  for view, name in patterns.items():
    queries, keys = sides[view]
    pattern = np.asarray(found.readings[name], np.float32)
    pattern = pattern[None] if known[name].layers is None else pattern  # one attention for all layers (recurrent)
    attentions.append(Attention(view, pattern[:, 0, :, :len(queries), :len(keys)], queries, keys, same=view != 'Cross',
                                predicted=None if view == 'Encoder' else expected))
  labels_T = jnp.array([-1 if i is None else i for i in texts.expected], jnp.int32)
  if between in found.readings:
    states_NxTxD = found.readings[between][:, 0, :len(read)]
    rows = [f'layer {n + 1}' for n in range(len(states_NxTxD))]
    best = _by_layer(model, params, states_NxTxD, labels_T, top_k)
  else:
    rows, best = ['the model'], jax.tree.map(lambda x: x[None], _ranked(found.output[0, :len(read)], labels_T, top_k))
  ids_NxTxK, probability_NxTxK, chance_NxT, rank_NxT = jax.device_get(best)
  tokens = [[texts.tokenizer.tokens(cell) for cell in row] for row in ids_NxTxK.tolist()]
  return attentions, Lens(read, rows, tokens, probability_NxTxK, expected, chance_NxT, rank_NxT,
                          'stands here' if isinstance(loaded, Encoder) else 'comes next')


def _padded(ids: Sequence[int], loaded) -> np.ndarray:
  """One row, padded on the right to one of few lengths."""
  limit, length = loaded.model.config.longest, -(-len(ids) // STEP) * STEP
  row = np.full((1, min(length, limit or length)), loaded.special.pad, np.int32)
  row[0, :len(ids)] = ids
  return row


def _names(tokenizer: Tokenizer, ids: Sequence[int | None]) -> list[str | None]:
  return [None if i is None else tokenizer.tokens([i])[0] for i in ids]


@partial(jax.jit, static_argnames=('model', 'top_k'))
def _by_layer(model, params, states_NxTxD, labels_T, top_k: int):
  # Layer by layer: logits of all layers at once would be the largest array of all.
  return jax.lax.map(lambda x_TxD: _ranked(model.apply({'params': params}, x_TxD[None], method=to_logits)[0],
                                           labels_T, top_k), states_NxTxD)


@partial(jax.jit, static_argnames='top_k')
def _ranked(logits_TxV, labels_T, top_k: int):
  """The most probable ids TxK, their probabilities, and of each label its probability and its rank, T. A label below 0
  is none: its values mean nothing."""
  probability_TxV = jax.nn.softmax(logits_TxV.astype(jnp.float32), axis=-1)
  best_TxK, ids_TxK = jax.lax.top_k(probability_TxV, top_k)
  label_Tx1 = jnp.take_along_axis(logits_TxV, jnp.maximum(labels_T, 0)[:, None], axis=-1)
  rank_T = 1 + jnp.sum(logits_TxV > label_Tx1, axis=-1)
  chance_T = jnp.take_along_axis(probability_TxV, jnp.maximum(labels_T, 0)[:, None], axis=-1)[:, 0]
  return ids_TxK, best_TxK, chance_T, rank_T
