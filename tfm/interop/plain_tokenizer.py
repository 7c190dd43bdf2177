"""Our tokenizers as the `tokenizers` library can run them alone, for servers without tfm.

`Tokenizer.from_file(file).encode(text).ids` are then our ids, and `.decode(ids)` is our text.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import tokenizers

from tfm.special_ids import UNK
from tfm.text.tokenizer import SPECIAL_NAMES, SubwordTokenizer, Tokenizer, Tokenizers


def vocabulary(tokenizer: Tokenizer) -> list[str]:
  """A string for every id, all different: the library's own for `bpe` and `unigram`, ours for the others."""
  if not isinstance(tokenizer, SubwordTokenizer):
    return tokenizer.vocabulary()
  # No piece has the name of a special one: the library cuts between signs and letters.
  pieces = tokenizer._model.get_vocab()
  return [*SPECIAL_NAMES, *sorted(pieces, key=pieces.get)]


def plain_tokenizer(tokenizer: SubwordTokenizer) -> tokenizers.Tokenizer:
  """The same tokenizer with our ids, and with the space that we put before a text."""
  content, names = tokenizer._content()['model'], vocabulary(tokenizer)
  model = content['model']
  if tokenizer.kind == 'bpe':
    model['vocab'] = {name: i for i, name in enumerate(names)}
  else:
    model['vocab'] = [[name, 0.0] for name in SPECIAL_NAMES] + model['vocab']
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
