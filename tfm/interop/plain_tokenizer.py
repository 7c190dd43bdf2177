"""Our tokenizers as the `tokenizers` library can run them alone, for servers without tfm.

`Tokenizer.from_file(file).encode(text).ids` are then our ids, and `.decode(ids)` is our text.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import tokenizers

from tfm.special_ids import UNK
from tfm.text.tokenizer import SPECIAL_NAMES, SubwordTokenizer, Tokenizer, Tokenizers

NEVER = -1e6
"""Log-probability of a special piece in a unigram model: any other way to write a text is better."""


def vocabulary(tokenizer: Tokenizer) -> list[str]:
  """A string for every id, all different: the library's own for `bpe` and `unigram`, ours for the others."""
  if not isinstance(tokenizer, SubwordTokenizer):
    return tokenizer.vocabulary()
  return _special_names(tokenizer) + [name for name, _ in _pieces(tokenizer)]


def plain_tokenizer(tokenizer: SubwordTokenizer) -> tokenizers.Tokenizer:
  """The same tokenizer with our ids, and with the space that we put before a text."""
  content, names = tokenizer._content()['model'], vocabulary(tokenizer)
  model = content['model']
  if tokenizer.kind == 'bpe':
    model['vocab'] = {name: i for i, name in enumerate(names)}
  else:
    model['vocab'] = [[name, NEVER] for name in names[:len(SPECIAL_NAMES)]] + model['vocab']
    model['unk_id'] = UNK
  plain = tokenizers.Tokenizer.from_str(json.dumps(content))
  plain.normalizer = tokenizers.normalizers.Prepend(' ')
  plain.decoder = tokenizers.decoders.Sequence([
      tokenizers.decoders.ByteLevel(), tokenizers.decoders.Strip(' ', 1, 0)])
  return plain


def write_plain_tokenizers(pair: Tokenizers, folder: str | os.PathLike[str]) -> list[Path]:
  """Write tokenizer.json, or tokenizer.source.json and tokenizer.target.json; none for a kind that is ours alone."""
  sides = {'': pair.source} if pair.joint else {'.source': pair.source, '.target': pair.target}
  written = []
  for name, tokenizer in sides.items():
    if isinstance(tokenizer, SubwordTokenizer):
      written.append(Path(folder, f'tokenizer{name}.json'))
      plain_tokenizer(tokenizer).save(str(written[-1]))
  return written


def _pieces(tokenizer: SubwordTokenizer) -> list[tuple[str, int]]:
  return sorted(tokenizer._model.get_vocab().items(), key=lambda item: item[1])


def _special_names(tokenizer: SubwordTokenizer) -> list[str]:
  """Those of `SPECIAL_NAMES`, longer where a text taught the tokenizer a piece of that name."""
  taken = tokenizer._model.get_vocab()
  return [next(longer for k in itertools.count() if (longer := name + '_' * k) not in taken) for name in SPECIAL_NAMES]
