"""The special ids of Hugging Face: those that config.json and generation_config.json name, and ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfm.config import TransformerConfig
from tfm.interop.huggingface_config import HuggingFaceError
from tfm.special_ids import SpecialIds

Values = Mapping[str, Any]


def read_special(values: Values, generation: Values, shape: str, framing: tuple[str, str],
                 tokens: Mapping[str, tuple[int, ...]]) -> SpecialIds:
  """The special ids of a model.

  Args:
    values, generation: config.json and generation_config.json, which has the last word.
    shape: `TransformerConfig.shape`.
    framing: which token stands before and behind a source.
    tokens: ids of the tokens that only a tokenizer knows, 'cls' and 'sep'.
  """
  def ids(name):
    value = values.get(name) if generation.get(name) is None else generation[name]
    value = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(value)

  bos, ends = ids('bos_token_id'), ids('eos_token_id')
  pad = tuple(i for i in ids('pad_token_id') if i >= 0)
  bad_words = [tuple(words) for words in ids('bad_words_ids')]
  if any(len(words) > 1 for words in bad_words):
    logging.getLogger('tfm').warning('bad_words_ids forbids sequences of several tokens, which tfm cannot; they may '
                                     'appear in outputs.')
  known = {'': (), 'bos': bos[:1], 'eos': ends[:1], **tokens}
  before, behind = known.get(framing[0], ()), known.get(framing[1], ())
  start = (*(ids('decoder_start_token_id') if shape == 'encoder_decoder' else ()), *bos, *before)
  if shape == 'decoder_only':
    start = (*start, *ends)
  return SpecialIds(
      pad=(*pad, 0)[0], start=(*start, *pad, 0)[0], ends=ends or behind, forced=ids('forced_bos_token_id'),
      forbidden=(*(words[0] for words in bad_words if len(words) == 1), *ids('suppress_tokens')),
      source_prefix=before, source_suffix=behind)


def write_special(special: SpecialIds, config: TransformerConfig,
                  framing: tuple[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
  """The fields for config.json and the whole of generation_config.json; raises `HuggingFaceError`."""
  if len(special.forced) > 1:
    raise HuggingFaceError(f'special.forced is {special.forced}; Hugging Face can force one first token only.')
  bos = (special.start,) if config.shape == 'decoder_only' else special.source_prefix if framing[0] == 'bos' else ()
  fields = {'pad_token_id': config.pad_id, 'bos_token_id': (*bos, None)[0],
            'eos_token_id': list(special.ends) if len(special.ends) > 1 else (*special.ends, None)[0]}
  if config.shape == 'encoder_decoder':
    fields['decoder_start_token_id'] = special.start
  generation = dict(fields)
  if special.pad:
    generation['pad_token_id'] = special.pad
  if special.forced:
    generation['forced_bos_token_id'] = special.forced[0]
  if special.forbidden:
    generation['bad_words_ids'] = [[i] for i in special.forbidden]
  return fields, generation


def tokenizer_tokens(folder: Path) -> dict[str, tuple[int, ...]]:
  """Ids of the tokens 'cls' and 'sep', from the files of a tokenizer if there are any."""
  settings = _json(folder / 'tokenizer_config.json') | _json(folder / 'special_tokens_map.json')
  whole = _json(folder / 'tokenizer.json')
  vocabulary = whole.get('model', {}).get('vocab', {})
  ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
  if not ids and (folder / 'vocab.txt').is_file():
    ids = {word: i for i, word in enumerate((folder / 'vocab.txt').read_text(encoding='utf-8').splitlines())}
  ids |= {token['content']: token['id'] for token in whole.get('added_tokens', [])}
  found = {}
  for name in ('cls', 'sep'):
    token = settings.get(f'{name}_token')
    token = token['content'] if isinstance(token, dict) else token
    token = token or f'[{name.upper()}]'
    found[name] = (ids[token],) if token in ids else ()
  return found


def _json(path: Path) -> dict[str, Any]:
  return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
