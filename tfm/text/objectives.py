"""The one door to batches: which kind an objective needs, for training and for evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from tfm.config import Config, DataConfig, require
from tfm.errors import DataError
from tfm.special_ids import BOS, EOS
from tfm.text.batches import Batches, Examples, encode_pairs, evaluation_batches, fitting_pairs
from tfm.text.buckets import Shape
from tfm.text.corpora import Corpus, Pair
from tfm.text.language_batches import Blocks, FullBatches, Packed, block_batches, pack, packed_rows
from tfm.text.masking import Masked, Plain, Spans
from tfm.text.packed_pairs import PackedPairs, packed_evaluation
from tfm.text.ragged import Ragged, encode_texts, made_of
from tfm.text.text_files import Texts
from tfm.text.tokenizer import Tokenizers

log = logging.getLogger('tfm')


def build_batches(config: Config, corpus: Corpus, tokenizers: Tokenizers, process_index: int = 0,
                  process_count: int = 1) -> Batches | FullBatches:
  """The training batches of a run; `batch_at(step)` gives arrays as `tfm.training.objectives` reads them.

  Raises:
    ConfigError: the token budget is too small for one row per device and micro-batch.
    DataError: there is no text of a length that can be used.
  """
  data, seed = config.data, config.training.seed
  share = config.data.rows_multiple, process_index, process_count
  if config.packs_pairs:
    return PackedPairs(*fitting_pairs(tokenizers, corpus.train(), data), data, seed, *share)
  if config.objective == 'translation':
    return Batches(corpus, tokenizers, data, seed, *share)
  if config.objective == 'causal' and data.packing != 'padded':
    texts = _framed(config, tokenizers, corpus.train())
    if data.packing == 'blocks':
      return Blocks(texts, data, seed, *share)
    return Packed(*_fitting(texts, data.max_length, data.over_long), data, seed, *share)
  return Batches(corpus, tokenizers, data, seed, *share, examples=_examples(config, tokenizers, corpus.train()))


def build_evaluation_batches(config: Config, texts: Sequence[Pair] | Texts, tokenizers: Tokenizers,
                             shapes: Sequence[Shape] = ()) -> list[tuple]:
  """All of a validation or test set once; of one language in the same way at every call, whatever the seed.

  Args:
    shapes: those of training, so that nothing new is compiled; texts that do not fit any get one more, but are
      truncated to `data.max_length` where they are packed, have spans or the model's positions end.
  """
  data = config.data
  if config.packs_pairs:
    return packed_evaluation(encode_pairs(tokenizers, texts), data, shapes[0] if shapes else _full_shape(data))
  if config.objective == 'translation':
    return evaluation_batches(encode_pairs(tokenizers, texts), data, shapes)
  if config.objective == 'causal' and data.packing != 'padded':
    framed = _framed(config, tokenizers, texts)
    shape = shapes[0] if shapes else _full_shape(data)
    if data.packing == 'blocks':
      return block_batches(framed, shape)
    fitting, truncated = _fitting(framed, data.max_length, 'truncate')
    _warn(truncated, data.max_length)
    packs = pack(fitting.lengths, shape.target)
    return [packed_rows(fitting, packs[begin:begin + shape.rows], shape.rows, shape.target)
            for begin in range(0, len(packs), shape.rows)]
  limited = config.model.longest is not None or config.objective == 'span_corruption'
  examples, truncated = _examples(config, tokenizers, texts, cut=limited)
  _warn(truncated, data.max_length)
  return evaluation_batches(examples, data, shapes)


def _full_shape(data: DataConfig) -> Shape:
  rows = max(data.tokens_per_batch // data.max_length // data.rows_multiple, 1) * data.rows_multiple
  return Shape(rows, data.max_length, data.max_length + 1)


def _warn(truncated: int, most: int) -> None:
  if truncated:
    log.warning('%d texts of the evaluation are too long for data.max_length %d and are truncated.', truncated, most)


def _framed(config: Config, tokenizers: Tokenizers, texts: Texts) -> Ragged:
  """<s> text </s>; a whole file is a stream that has neither beginning nor end."""
  if config.data.documents == 'file':
    return encode_texts(tokenizers.target, texts)
  return encode_texts(tokenizers.target, texts, [BOS], [EOS])


def _examples(config: Config, tokenizers: Tokenizers, texts: Texts, cut: bool | None = None) -> tuple[Examples, int]:
  """What one row each is learned from, and how many texts were too long; `cut` overrides data.over_long."""
  data, tokenizer = config.data, tokenizers.source
  over_long = data.over_long if cut is None else 'truncate' if cut else None
  if config.objective == 'span_corruption':
    require(data.max_length > 4, f'data.max_length {data.max_length} has no room for a span, its sentinels, <s> and '
                                 '</s>; raise it to 5 or more.')
    # A target has at most as many tokens more than its text: a sentinel, <s> and </s>.
    words, left_out = _fitting(encode_texts(tokenizer, texts), data.max_length - 3, over_long, end=None)
    examples = Spans(words, data.mask_rate, data.mean_span, tokenizer.first_extra)
    spans = int(max(examples.counts(words.lengths)[1], default=0))
    require(spans < tokenizer.extra_ids,
            f'A text of {int(words.lengths.max(initial=0))} tokens has {spans} spans and needs {spans + 1} sentinels, '
            f'but tokenizer.extra_ids is {tokenizer.extra_ids}; raise it, or lower data.max_length.')
    return examples, left_out
  framed, left_out = _fitting(encode_texts(tokenizer, texts, [BOS], [EOS]), data.max_length, over_long)
  if config.objective == 'causal':
    return Plain(framed), left_out
  return Masked(framed, data.mask_rate, tokenizer.mask_id), left_out


def _fitting(texts: Ragged, most: int, over_long: str | None, end: int | None = EOS) -> tuple[Ragged, int]:
  """The texts of at most `most` tokens, the others dropped or truncated, and how many those were."""
  lengths = texts.lengths
  too_long = int((lengths > most).sum())
  if over_long is None or not too_long:
    return texts, 0
  if over_long == 'drop' and (lengths > most).all():
    raise DataError(f'no text has at most {most} tokens (data.max_length); raise it or set data.over_long.')
  return made_of(texts, _cut(texts, most, over_long, end), f'{over_long}-{most}-{end}'), too_long


def _cut(texts: Ragged, most: int, over_long: str, end: int | None) -> Iterator[np.ndarray]:
  for start, stop in zip(texts.starts, texts.starts[1:]):
    if stop - start <= most:
      yield texts.ids[start:stop]
    elif over_long == 'truncate':
      part = np.array(texts.ids[start:start + most])
      if end is not None:
        part[-1] = end
      yield part
