"""A tokenizer of Hugging Face under the interface of ours (tfm/text/tokenizer.py)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tfm.text.tokenizer import TokenizerError, Tokenizers

_OURS = 'tfm_tokenizer.json'
"""Beside their files: what only we know."""


class HuggingFaceTokenizer:
  """Wraps what `transformers.AutoTokenizer` opens; the model frames the ids with its `SpecialIds`, not the tokenizer.

  Args:
    tokenizer: a tokenizer of `transformers`.
    target: encode as a target, where the two languages have a vocabulary each (MarianMT).
  """

  kind = 'huggingface'

  def __init__(self, tokenizer: Any, target: bool = False):
    self._tokenizer, self._target = tokenizer, target
    self.vocab_size = len(tokenizer)

  @property
  def mask_token(self) -> str | None:
    """How a place to be guessed is written; None: there is no such token."""
    return self._tokenizer.mask_token

  @property
  def mask_id(self) -> int | None:
    return self._tokenizer.mask_token_id

  @property
  def framing(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special ids that the tokenizer itself would put before and behind a text."""
    (bare,), framed = self.encode_batch(['a']), self._tokenizer('a')['input_ids']
    places = [i for i in range(len(framed)) if framed[i:i + len(bare)] == bare]
    if not places:
      raise TokenizerError(f"the tokenizer encodes 'a' as {bare} and with special tokens as {framed}, which lacks "
                           'the former; give one that puts special tokens around a text.')
    before = places[0]
    return tuple(framed[:before]), tuple(framed[before + len(bare):])

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without special tokens."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    """`encode` for many texts."""
    texts = list(texts)
    if not texts:
      return []
    argument = 'text_target' if self._target else 'text'
    return self._tokenizer(**{argument: texts}, add_special_tokens=False, verbose=False)['input_ids']

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`; special ids are skipped."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

  def tokens(self, ids: Iterable[int]) -> list[str]:
    """One string per id, as the tokenizer writes it; an id of a row that is no token is '<37>'."""
    ids = [int(i) for i in ids]
    words = self._tokenizer.convert_ids_to_tokens(ids)
    return [f'<{i}>' if word is None else word for i, word in zip(ids, words)]

  def vocabulary(self) -> list[str]:
    """The string of every id; the index is the id."""
    return self.tokens(range(self.vocab_size))

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Write the files that `load` reads into a folder."""
    self._tokenizer.save_pretrained(folder)
    Path(folder, _OURS).write_text(json.dumps({'target': self._target}) + '\n', encoding='utf-8')

  @staticmethod
  def load(folder: str | os.PathLike[str]) -> HuggingFaceTokenizer:
    """Open the tokenizer in a folder; raises `TokenizerError` if there is none."""
    try:
      from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
      raise ModuleNotFoundError("The tokenizer needs transformers: pip install 'tfm[huggingface]'.") from error
    ours = Path(folder, _OURS)
    target = ours.is_file() and json.loads(ours.read_text(encoding='utf-8'))['target']
    try:
      return HuggingFaceTokenizer(AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True), target)
    except (ImportError, OSError, ValueError) as error:
      raise TokenizerError(f'{folder} has no tokenizer that transformers can open ({error}).') from error


def open_tokenizers(folder: str | os.PathLike[str]) -> Tokenizers:
  """What `Tokenizers.save` wrote into a folder, ours or these; a tokenizer of Hugging Face is a folder in it."""
  joint, source, target = (Path(folder, f'tokenizer{name}.json') for name in ('', '.source', '.target'))
  if joint.is_dir():
    tokenizer = HuggingFaceTokenizer.load(joint)
    return Tokenizers(tokenizer, tokenizer)
  if source.is_dir():
    return Tokenizers(HuggingFaceTokenizer.load(source), HuggingFaceTokenizer.load(target))
  return Tokenizers.load(folder)


_FILES = ('tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'vocab.txt', 'source.spm', 'spiece.model',
          'tokenizer.model')


def load_tokenizers(folder: str | os.PathLike[str]) -> Tokenizers | None:
  """Source and target of a model in a folder, two only where transformers has them apart (MarianMT); None: no files."""
  if not any(Path(folder, name).is_file() for name in _FILES):
    return None
  source = HuggingFaceTokenizer.load(folder)
  apart = type(source._tokenizer).__name__.startswith('Marian')
  return Tokenizers(source, HuggingFaceTokenizer(source._tokenizer, target=True) if apart else source)
