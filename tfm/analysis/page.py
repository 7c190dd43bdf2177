"""One HTML page that shows who looks at whom, which words belong together, and what every layer would say.

Arrays in, one string out: the page needs no network, no library and no server, and opens from a file as well as in a
notebook. Weights travel as bytes (0 to 255), so that a page of 6 layers and 8 heads over 64 + 64 tokens has below 1 MB.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

PAYLOAD = '__PAYLOAD__'
"""Where the template wants its data."""

LARGEST = 48 * 2**20
"""Most bytes of weights; a browser that is to draw more of them hangs."""

ROUNDING = 0.01
"""So far weights may be outside of 0 to 1: bfloat16 rounds 1 by half of this."""

NOTEBOOK_HEIGHT = 820
"""Pixels of the frame in a notebook."""


@dataclass(frozen=True)
class Attention:
  """The patterns of one attention in all layers."""

  name: str
  """'Encoder', 'Decoder', 'Cross'; each once."""
  pattern_NxHxTxS: np.ndarray
  """Weights from 0 to 1."""
  queries: Sequence[str]
  """The T tokens that look."""
  keys: Sequence[str]
  """The S tokens that are looked at."""
  same: bool = False
  """Self-attention: both are one text."""
  predicted: Sequence[str | None] | None = None
  """The token that each query is there to predict, where the model writes from left to right."""


@dataclass(frozen=True)
class Alignment:
  """Which parts of an attention from target to source are words."""

  attention: str
  """Its name."""
  keys: tuple[int, int]
  """Begin and end of the source text among the keys: without special tokens."""
  queries: tuple[int, int]
  """Begin and end, among the queries, of the rows that predict the target text (indexing by output). Those that read it
  are one further on, so there is one row more."""
  key_starts: Sequence[int]
  """Where words begin in the source text, counted from its begin; the first is 0."""
  query_starts: Sequence[int]
  """Where they begin in the target text."""


@dataclass(frozen=True)
class Lens:
  """The most probable tokens that the output matrix finds in the states between layers (nostalgebraist 2020)."""

  read: Sequence[str]
  """The token at each of T positions."""
  rows: Sequence[str]
  """A name for each of N states, the first layer first."""
  tokens: Sequence[Sequence[Sequence[str]]]
  """NxTxK, most probable first."""
  probability_NxTxK: np.ndarray
  expected: Sequence[str | None]
  """The token to be predicted at each position; None: nobody knows."""
  expected_probability_NxT: np.ndarray
  expected_rank_NxT: np.ndarray
  """From 1."""
  goal: str = 'comes next'
  """What is predicted, after 'what': 'comes next', 'stands here'."""


@dataclass(frozen=True, repr=False)
class Page:
  """A page, to write into a file or to look at in a notebook, where it shows itself."""

  html: str

  def write(self, path: str | os.PathLike[str]) -> Path:
    """Write the page into a file; what was there is replaced."""
    Path(path).write_text(self.html, encoding='utf-8')
    return Path(path)

  def _repr_html_(self) -> str:
    # A frame of its own: its names meet neither those of the notebook nor those of another page.
    return (f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" title="attention" '
            f'style="width: 100%; height: {NOTEBOOK_HEIGHT}px; border: 0"></iframe>')

  def __repr__(self) -> str:
    return f'Page({len(self.html):,} characters)'


def attention_page(attentions: Sequence[Attention] = (), *, title: str, about: str = '',
                   alignment: Alignment | None = None, lens: Lens | None = None) -> Page:
  """A page of the views that there are data for.

  Args:
    attentions: each becomes a view, by layer and head.
    title: what stands above all: the sentence.
    about: a line below it: of which model.
    alignment: adds the view of source and target words.
    lens: adds the view of predictions by layer.

  Raises:
    ValueError: there is nothing to show, arrays and tokens do not fit each other, weights are outside of 0 to 1, or
      they are more than a browser can draw.
  """
  if not attentions and lens is None:
    raise ValueError('There is neither attention nor a lens to show; give one of them.')
  names = [each.name for each in attentions]
  if len(set(names)) < len(names):
    raise ValueError(f'Attentions are called {names}; give each a name of its own.')
  size = sum(np.size(each.pattern_NxHxTxS) for each in attentions)
  if size > LARGEST:
    raise ValueError(f'The patterns hold {size:,} weights, above the {LARGEST:,} that a browser can draw; shorten the '
                     'text.')
  return Page(_filled({
      'title': title,
      'about': about,
      'attentions': [_attention(each) for each in attentions],
      'alignment': None if alignment is None else _alignment(alignment, attentions),
      'lens': None if lens is None else _lens(lens),
  }))


def _filled(payload: dict[str, Any]) -> str:
  # ASCII alone, so U+2028 is escaped like all else; what remains could end or open an element.
  data = json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(',', ':'))
  for character in '<>&':
    data = data.replace(character, f'\\u{ord(character):04x}')
  before, _, after = resources.files('tfm.analysis').joinpath('page.html').read_text('utf-8').partition(PAYLOAD)
  return before + data + after


def _attention(each: Attention) -> dict[str, Any]:
  pattern = np.asarray(each.pattern_NxHxTxS, np.float32)
  what = f"The pattern of '{each.name}'"
  if pattern.ndim != 4 or not pattern.size:
    raise ValueError(f'{what} has shape {pattern.shape}; give NxHxTxS, with at least one token on both sides.')
  for side, tokens, count in (('queries', each.queries, pattern.shape[2]), ('keys', each.keys, pattern.shape[3]),
                              ('predicted tokens', each.predicted, pattern.shape[2])):
    if tokens is not None and len(tokens) != count:
      raise ValueError(f'{what} has shape {pattern.shape} and {len(tokens)} {side}; give {count}.')
  if each.same and list(each.queries) != list(each.keys):
    raise ValueError(f"'{each.name}' is self-attention, but queries and keys differ; give the same tokens twice.")
  if not (pattern.min() >= -ROUNDING and pattern.max() <= 1 + ROUNDING):  # false for NaN too
    raise ValueError(f'{what} has weights from {pattern.min()} to {pattern.max()}; give some from 0 to 1.')
  levels = np.rint(pattern.clip(0, 1) * 255).astype(np.uint8)
  return {'name': each.name, 'layers': pattern.shape[0], 'heads': pattern.shape[1], 'same': each.same,
          'queries': list(each.queries), 'keys': list(each.keys),
          'predicted': None if each.predicted is None else list(each.predicted),
          'weights': base64.b64encode(levels.tobytes()).decode()}


def _alignment(alignment: Alignment, attentions: Sequence[Attention]) -> dict[str, Any]:
  found = [each for each in attentions if each.name == alignment.attention]
  if not found:
    raise ValueError(f"The alignment is of '{alignment.attention}', which is not among the attentions "
                     f'{[each.name for each in attentions]}.')
  keys, queries = found[0].keys, found[0].queries
  (source_begin, source_end), (begin, end) = alignment.keys, alignment.queries
  if not 0 <= source_begin < source_end <= len(keys) or not 0 <= begin < end < len(queries):
    raise ValueError(f'The alignment has source tokens {alignment.keys} of {len(keys)} and target rows '
                     f'{alignment.queries} of {len(queries)}; give a begin below its end, and leave one row behind the '
                     'last.')
  for starts, count in ((alignment.key_starts, source_end - source_begin), (alignment.query_starts, end - begin)):
    if not len(starts) or starts[0] != 0 or starts[-1] >= count or any(a >= b for a, b in zip(starts, starts[1:])):
      raise ValueError(f'Words begin at {list(starts)} of {count} tokens; give numbers that grow from 0.')
  return {'attention': alignment.attention,
          'source': {'begin': source_begin, 'tokens': list(keys[source_begin:source_end]),
                     'starts': [int(i) for i in alignment.key_starts]},
          'target': {'begin': begin, 'tokens': list(queries[begin + 1:end + 1]),
                     'starts': [int(i) for i in alignment.query_starts]}}


def _lens(lens: Lens) -> dict[str, Any]:
  N, T = len(lens.rows), len(lens.read)
  probability = np.asarray(lens.probability_NxTxK, np.float64)
  K = probability.shape[-1] if probability.ndim == 3 else 0
  sizes = {(len(row), len(cell)) for row in lens.tokens for cell in row}
  if (not K or probability.shape != (N, T, K) or len(lens.tokens) != N or sizes != {(T, K)} or len(lens.expected) != T
      or np.shape(lens.expected_probability_NxT) != (N, T) or np.shape(lens.expected_rank_NxT) != (N, T)):
    raise ValueError(f'The lens has {N} rows, {T} tokens, probabilities of shape {probability.shape}, '
                     f'{len(lens.expected)} expected tokens and their probabilities and ranks of shapes '
                     f'{np.shape(lens.expected_probability_NxT)} and {np.shape(lens.expected_rank_NxT)}; give NxTxK '
                     'tokens and probabilities, T expected ones, and NxT of the last two.')
  vocabulary = sorted({token for row in lens.tokens for cell in row for token in cell})
  number = {token: i for i, token in enumerate(vocabulary)}
  return {'read': list(lens.read), 'goal': lens.goal, 'rows': list(lens.rows), 'vocabulary': vocabulary,
          'tokens': [[[number[token] for token in cell] for cell in row] for row in lens.tokens],
          'probability': _rounded(probability), 'expected': list(lens.expected),
          'chance': _rounded(lens.expected_probability_NxT), 'rank': np.asarray(lens.expected_rank_NxT).tolist()}


def _rounded(probability: np.ndarray) -> list:
  """In ten thousandths, which need few letters."""
  return np.rint(np.asarray(probability, np.float64) * 10_000).astype(int).tolist()
