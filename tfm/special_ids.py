"""The ids that stand for no text: those of every tokenizer made here, and what a search must know of any other's."""

from __future__ import annotations

from dataclasses import dataclass

PAD, BOS, EOS, UNK = 0, 1, 2, 3


@dataclass(frozen=True)
class SpecialIds:
  """How a model wants its sequences framed; the defaults are ours, imported models bring their own."""

  pad: int = PAD
  """Fills rows up on the right."""
  start: int = BOS
  """The first token a decoder reads."""
  ends: tuple[int, ...] = (EOS,)
  """Tokens that end an output; the first is the one that a training target ends with."""
  forbidden: tuple[int, ...] = (PAD, BOS)
  """Never chosen in a search."""
  source_prefix: tuple[int, ...] = ()
  """Stands before the text of a source or of an encoder-only input (BART, BERT)."""
  source_suffix: tuple[int, ...] = (EOS,)
  """Stands behind it."""
  forced: tuple[int, ...] = ()
  """Tokens with which every output begins, behind `start` (BART's <s>)."""


OURS = SpecialIds()
