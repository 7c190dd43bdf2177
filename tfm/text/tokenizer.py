"""Tokenizers: text to ids and back, without loss, for every kind and any text.

All kinds share one layout of meaning: ids 0 ... 3 are special and stand for no text; every other id stands for a
fixed string of bytes, the 256 single bytes among them, so nothing is ever unknown. `bpe` (Sennrich et al. 2016) and
`unigram` (Kudo 2018) run on the `tokenizers` library, whose ids are ours minus 4; the library is told of no special
token, so a text that contains '</s>' is just text. `byte`, `char` and `word` are spelled out here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import tokenizers

from tfm.config import TokenizerConfig
from tfm.errors import UserError
from tfm.text.unigram import train_unigram

SPECIAL_NAMES = ('<pad>', '<s>', '</s>', '<unk>')
FORMAT = 2
"""1 has no extra ids, and is still written where there are none."""

LONGEST_REMEMBERED = 64
"""Parts of a text of at most so many characters are looked up where they were seen before."""

_WORD_SPACE = re.compile(r' (?=[\w!-~])')
_WORDS = re.compile(r' ?\w+| ?[^\w\s]|\s')
_EXTRA = re.compile(r'<extra_\d+>')
_ESCAPES = {'\\': '\\\\', '▁': '\\u2581', ' ': '▁'}


class TokenizerError(UserError):
  """A tokenizer file that cannot be used, or a text that has no ids."""


class Tokenizer:
  """What all kinds have in common: `pieces` holds the bytes of every id (none for the special ones).

  With `prefix`, a space is put before the text and one space is taken off again after decoding, so that the first
  word of a sentence has the same tokens as inside it. The last `extra_ids` ids are special too.
  """

  mask_token = '<mask>'
  """How a text writes the token that hides another."""

  def __init__(self, kind: str, pieces: Sequence[bytes], prefix: bool, extra_ids: int = 0):
    self.kind, self.extra_ids = kind, extra_ids
    self.vocab_size = len(pieces) + extra_ids
    self._pieces = [*pieces, *[b''] * extra_ids]
    self._prefix = ' ' if prefix else ''
    self._names = [*SPECIAL_NAMES, *map(_readable, pieces[len(SPECIAL_NAMES):]),
                   *(f'<extra_{i}>' for i in range(extra_ids))]

  @property
  def first_extra(self) -> int:
    """The first of the extra ids."""
    return self.vocab_size - self.extra_ids

  @property
  def mask_id(self) -> int | None:
    """The id that hides another: the first extra one."""
    return self.first_extra if self.extra_ids else None

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without <s> and </s>; raises `TokenizerError` for a lone surrogate, which UTF-8 cannot write."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    """`encode` for many texts."""
    checked = []
    for text in texts:
      try:
        text.encode()
      except UnicodeEncodeError as error:
        raise TokenizerError(f'character {error.start + 1} of {text!r} is half of a surrogate pair and cannot be '
                             'written in UTF-8; repair the text where it was decoded.') from None
      checked.append(self._prefix + text if text else '')
    return self._encode(checked)

  def encode_pieces(self, pieces: Iterable[str]) -> Iterator[list[int]]:
    """Ids of one text that comes in pieces; where they are cut a token may be cut too."""
    for number, piece in enumerate(pieces):
      yield self.encode(piece) if number == 0 else self._encode([piece])[0]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`; special ids are skipped, and bytes that are not UTF-8 become U+FFFD."""
    text = b''.join([self._pieces[i] for i in ids]).decode('utf-8', errors='replace')
    return text.removeprefix(self._prefix)

  def tokens(self, ids: Iterable[int]) -> list[str]:
    """One readable string per id: '▁' is a space, `\\xc3` a lone byte, '<s>' and its like the special ids."""
    return [self._names[i] for i in ids]

  def vocabulary(self) -> list[str]:
    """The readable string of every id, all different; the index is the id."""
    return list(self._names)

  def to_json(self) -> str:
    """All that a tokenizer is."""
    extra = {'extra_ids': self.extra_ids} if self.extra_ids else {}
    content = {'format': FORMAT if extra else 1, 'kind': self.kind, **extra, **self._content()}
    return json.dumps(content, ensure_ascii=False, indent=1) + '\n'

  def save(self, path: str | os.PathLike) -> None:
    """Write one JSON file that `load` reads."""
    Path(path).write_text(self.to_json(), encoding='utf-8')

  @staticmethod
  def load(path: str | os.PathLike) -> Tokenizer:
    """Read what `save` wrote; raises `TokenizerError` for a missing, damaged or newer file."""
    try:
      content = json.loads(Path(path).read_text(encoding='utf-8'))
      if content['format'] > FORMAT:
        raise TokenizerError(f'{path} has tokenizer format {content["format"]}, this tfm reads up to {FORMAT}; '
                             'use a newer tfm.')
      if content['kind'] in ('bpe', 'unigram'):
        return SubwordTokenizer(content['kind'], _library_model(content['model']), content.get('extra_ids', 0))
      return UnitTokenizer(content['kind'], content['units'], content.get('extra_ids', 0))
    except FileNotFoundError:
      raise TokenizerError(f'there is no tokenizer file {path}; is the folder a run?') from None
    except (ValueError, KeyError, TypeError) as error:
      if isinstance(error, TokenizerError):
        raise
      raise TokenizerError(f'{path} is not an intact tokenizer file ({error!r}); restore it from a copy.') from error

  def _encode(self, texts: list[str]) -> list[list[int]]:
    raise NotImplementedError

  def _content(self) -> dict:
    raise NotImplementedError


class SubwordTokenizer(Tokenizer):
  """Byte-level BPE or unigram; `model` is a tokenizer of the `tokenizers` library."""

  def __init__(self, kind: str, model: tokenizers.Tokenizer, extra_ids: int = 0):
    self._model = model
    pieces = [_bytes_of(symbols) for symbols, _ in sorted(model.get_vocab().items(), key=lambda item: item[1])]
    super().__init__(kind, [b''] * len(SPECIAL_NAMES) + pieces, True, extra_ids)
    self._remembered = lru_cache(maxsize=1 << 16)(self._encode_part)

  def _encode(self, texts):
    # The library always cuts before such a space, so the parts can be encoded alone; most are words seen before.
    # (Its thread pool is slower than this memory, and makes every later fork print a warning.)
    known, ids = self._ids_of_part, []
    for text in texts:
      first, *others = _WORD_SPACE.split(text)
      row = list(known(first))
      for part in others:
        row += known(' ' + part)
      ids.append(row)
    return ids

  def _ids_of_part(self, text: str) -> list[int]:
    # Where a language has no spaces a part may be a whole file.
    return (self._remembered if len(text) <= LONGEST_REMEMBERED else self._encode_part)(text)

  def _encode_part(self, text: str) -> list[int]:
    return [i + len(SPECIAL_NAMES) for i in self._model.encode(text).ids]

  def _content(self):
    return {'model': json.loads(self._model.to_str())}


class UnitTokenizer(Tokenizer):
  """Bytes, characters or words: ids 4 ... 259 are the bytes, then come `units`; what is no unit is spelled in bytes."""

  def __init__(self, kind: str, units: Sequence[str], extra_ids: int = 0):
    if kind not in _SPLIT:
      raise TokenizerError(f'tokenizer kind {kind!r} is unknown; this tfm has bpe, unigram, byte, char and word.')
    self._units = list(units)
    pieces = [b''] * len(SPECIAL_NAMES) + [bytes([b]) for b in range(256)] + [unit.encode() for unit in units]
    super().__init__(kind, pieces, kind == 'word', extra_ids)
    self._ids = {unit: [len(SPECIAL_NAMES) + 256 + i] for i, unit in enumerate(units)}

  def _encode(self, texts):
    split, known = _SPLIT[self.kind], self._ids
    return [[i for unit in split(text) for i in known.get(unit) or _spell(unit)] for text in texts]

  def _content(self):
    return {'units': self._units}


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
  """The tokenizer of `config` learned from `texts`; the same texts give the same tokenizer, in any process."""
  room = (config.vocab_size or 0) - len(SPECIAL_NAMES)
  if config.kind == 'byte':
    return UnitTokenizer('byte', [], config.extra_ids)
  if config.kind in ('char', 'word'):
    prefix = ' ' if config.kind == 'word' else ''
    counts = Counter(unit for text in texts if text for unit in _SPLIT[config.kind](prefix + text))
    new = [unit for unit in counts if len(unit.encode()) > 1]  # single bytes have their ids already
    units = sorted(new, key=lambda unit: (-counts[unit], unit))[:room - 256]
    return UnitTokenizer(config.kind, units, config.extra_ids)

  splitter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  texts = (' ' + text for text in texts if text)
  if config.kind == 'bpe':
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = splitter
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=room, min_frequency=2, special_tokens=[],
                                             initial_alphabet=alphabet, show_progress=False)
    with _one_thread():
      model.train_from_iterator(texts, trainer)
  else:
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    model = tokenizers.Tokenizer(train_unigram(words, alphabet, room))
    model.pre_tokenizer = splitter
  return SubwordTokenizer(config.kind, model, config.extra_ids)


@dataclass(frozen=True)
class Tokenizers:
  """The tokenizers of a run; joint when `source` and `target` are one object."""

  source: Tokenizer
  target: Tokenizer

  @property
  def joint(self) -> bool:
    return self.source is self.target

  def save(self, folder: str | os.PathLike) -> None:
    """Write `tokenizer.json`, or `tokenizer.source.json` and `tokenizer.target.json` when they are two."""
    for name, tokenizer in (('', self.source),) if self.joint else (('.source', self.source), ('.target', self.target)):
      tokenizer.save(Path(folder, f'tokenizer{name}.json'))

  @staticmethod
  def load(folder: str | os.PathLike) -> Tokenizers:
    """Read what `save` wrote; raises `TokenizerError`."""
    joint, source, target = (Path(folder, f'tokenizer{name}.json') for name in ('', '.source', '.target'))
    if joint.exists() and (source.exists() or target.exists()):
      raise TokenizerError(f'{folder} has {joint.name} and separate tokenizers too; remove those that are not in use.')
    if source.exists() or target.exists():
      return Tokenizers(Tokenizer.load(source), Tokenizer.load(target))
    tokenizer = Tokenizer.load(joint)
    return Tokenizers(tokenizer, tokenizer)


def train_tokenizers(config: TokenizerConfig, pairs: Iterable[tuple[str, ...]]) -> Tokenizers:
  """Tokenizers learned from sentence pairs, or from texts as tuples of one: one from all, or one from each side."""
  if config.joint:
    tokenizer = train_tokenizer(config, itertools.chain.from_iterable(pairs))
    return Tokenizers(tokenizer, tokenizer)
  pairs = list(pairs)
  return Tokenizers(*(train_tokenizer(config, (pair[side] for pair in pairs)) for side in (0, 1)))


def _library_model(content: dict) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(content))
  except Exception as error:  # the library raises no narrower one
    raise ValueError(str(error)) from error


def _spell(text: str) -> list[int]:
  return [len(SPECIAL_NAMES) + byte for byte in text.encode()]


def _readable(piece: bytes) -> str:
  # Different bytes must give different strings: \xNN for the bytes of what is not UTF-8, \uNNNN for a character that
  # cannot be seen, and a real backslash is doubled.
  try:
    name = ''.join(_ESCAPES.get(c) or (c if c.isprintable() else f'\\u{ord(c):04x}') for c in piece.decode())
  except UnicodeDecodeError:
    return ''.join(_ESCAPES.get(chr(b)) or (chr(b) if 32 < b < 127 else f'\\x{b:02x}') for b in piece)
  return '\\x3c' + name[1:] if name in SPECIAL_NAMES or _EXTRA.fullmatch(name) else name


def _byte_symbols() -> dict[str, int]:
  # The library writes byte b as one printable character: itself where it is one in Latin-1, else chr(256 + k) for
  # the k-th of the others (Radford et al. 2019, the byte-level BPE of GPT-2).
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = [b for b in range(256) if b not in printable]
  return {**{chr(b): b for b in printable}, **{chr(256 + k): b for k, b in enumerate(others)}}


_SYMBOLS = _byte_symbols()
_SPLIT: dict[str, Callable[[str], list[str]]] = {'byte': list, 'char': list, 'word': _WORDS.findall}


def _bytes_of(symbols: str) -> bytes:
  return bytes(_SYMBOLS[symbol] for symbol in symbols)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
  # Training with the library's thread pool would make every later fork print a warning (see SubwordTokenizer).
  name = 'TOKENIZERS_PARALLELISM'
  before = os.environ.get(name)
  os.environ[name] = before or 'false'
  try:
    yield
  finally:
    if before is None:
      del os.environ[name]
