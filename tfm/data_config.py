"""The sections of the config that say which texts are learned from, and how they become ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tfm.section import Section, require, require_fraction, require_positive


@dataclass(frozen=True)
class TokenizerConfig(Section):
  """How text becomes ids. Trained on the training corpus when a run starts and stored in the run folder."""

  kind: Literal['bpe', 'unigram', 'byte', 'char', 'word'] = 'bpe'
  """Byte-level BPE, byte-level unigram, raw UTF-8 bytes, characters, or words; what is unseen is spelled in bytes."""
  vocab_size: int | None = 8000
  """Ids in all, the 4 special ones and 256 bytes included; None for kind='byte', which always has 260."""
  joint: bool = True
  """One vocabulary for both languages (needed by tying='all') or one for each."""
  extra_ids: int = 0
  """Ids beyond the vocabulary that stand for no text: the mask of a masked language model (1), sentinels for spans."""

  def check(self):
    require(self.extra_ids >= 0, f'tokenizer.extra_ids is {self.extra_ids}; give 0 or more.')
    require(self.kind != 'byte' or self.vocab_size is None,
            "tokenizer kind='byte' always has 260 ids; set vocab_size to None.")
    require(self.kind == 'byte' or (self.vocab_size or 0) > 260,
            f"tokenizer kind='{self.kind}' needs vocab_size above 260 (special ids and bytes), not {self.vocab_size}.")


@dataclass(frozen=True)
class DataConfig(Section):
  """Which texts, and how they are cut into batches of a few static shapes."""

  corpus: Literal['numbers', 'files', 'text', 'huggingface'] = 'numbers'
  """'numbers': numbers in words, made by num2words, endless. 'files': parallel text files, one sentence a line. 'text':
  text files of one language. 'huggingface': a data set of one language, by the package `datasets`."""
  source: str | None = 'en'
  """Language of the source: a num2words code, or the suffix of the files. None with one language."""
  target: str | None = 'de'
  """Language of the target, likewise."""
  limit: int | None = 1_000_000
  """numbers: draw from 0 ... limit - 1. None with files."""
  held_out: int | None = 1000
  """numbers: size of the validation set and of the test set; never drawn for training. None with files."""
  root: str | None = None
  """files, text: the folder. huggingface: name or folder of the data set. None with numbers."""
  train: str | None = None
  """files: train, for ROOT/train.de and ROOT/train.en, plain or .gz. text: name of the file. huggingface: the split."""
  validation: str | None = None
  """The same for the validation set."""
  validation_fraction: float | None = None
  """text: take this last part of the training file for validation instead."""
  test: str | None = None
  """The same for the test set; None leaves out the final test."""
  column: str | None = None
  """huggingface: the column that holds the text."""
  documents: Literal['line', 'file'] = 'line'
  """text: whether each line is a text of its own, or the whole file is one."""
  packing: Literal['padded', 'packed', 'blocks'] = 'padded'
  """What a row holds. 'padded': one text or pair. 'packed': several that do not see each other, of a decoder-only model
  or as pairs of a Transformer; all batches have one shape, max_length wide. 'blocks', decoder-only: max_length tokens
  of all texts in a row, cut anywhere."""
  mask_rate: float = 0.15
  """Encoder-only on one language: share of the tokens that are hidden (BERT, Devlin et al. 2019). Encoder-decoder on
  one language: share in the spans that are cut out (T5, Raffel et al. 2020)."""
  mean_span: float = 3.0
  """Encoder-decoder on one language: mean length of those spans in tokens."""
  tokens_per_batch: int = 4096
  """Token budget of a batch: rows x width of its bucket, padding included, for the longer of the two sides."""
  rows_multiple: int = 8
  """Rows of every batch are a multiple of this; micro-batches x data x fsdp x expert devices must divide it."""
  width_multiple: int = 2
  """Widths of every batch are a multiple of this; 2 x context devices must divide it."""
  buckets: int = 4
  """Number of static batch shapes (each is compiled once)."""
  max_length: int = 256
  """Longest training sentence in tokens, <s> and </s> included, on either side."""
  over_long: Literal['drop', 'truncate'] = 'drop'
  """What happens to longer training pairs; either way they are counted and reported."""

  def check(self):
    require_positive(self, 'tokens_per_batch', 'buckets', 'max_length', 'rows_multiple', 'width_multiple')
    require_fraction('data.mask_rate', self.mask_rate)
    require(self.mask_rate > 0 and self.mean_span >= 1,
            f'data.mask_rate is {self.mask_rate} and data.mean_span {self.mean_span}; give a rate above 0, a span of '
            '1 or more.')
    self._check_languages()
    self._check_places()
    self._check_texts()
    require(self.max_length <= self.tokens_per_batch,
            f'data.max_length {self.max_length} exceeds data.tokens_per_batch {self.tokens_per_batch}: '
            'the longest sentence would not fit a batch; raise one or lower the other.')

  def _check_languages(self):
    if self.monolingual:
      for name in ('source', 'target'):
        require(getattr(self, name) is None, f"data.{name} needs pairs; with corpus='{self.corpus}' set it to None.")
    else:
      require(self.source is not None and self.target is not None and self.source != self.target,
              f"data.source is '{self.source}' and data.target '{self.target}'; give two languages.")

  def _check_places(self):
    if self.corpus == 'numbers':
      for name in ('root', 'train', 'validation', 'test'):
        require(getattr(self, name) is None, f"data.{name} needs data.corpus='files'; with 'numbers' leave it out.")
      require(self.limit is not None and self.held_out is not None and self.held_out > 0,
              "data.corpus='numbers' needs data.limit and a data.held_out above 0.")
      require(self.limit >= 4 * self.held_out,
              f'data.limit {self.limit} leaves too few numbers to train on beside 2 x data.held_out {self.held_out}; '
              'make limit at least 4 x held_out.')
    else:
      for name in ('root', 'train'):
        require(getattr(self, name) is not None, f"data.corpus='{self.corpus}' needs data.{name}.")
      require((self.validation is None) != (self.validation_fraction is None),
              f"data.corpus='{self.corpus}' needs data.validation (or, for 'text', data.validation_fraction instead).")
      for name in ('limit', 'held_out'):
        require(getattr(self, name) is None,
                f"data.{name} needs data.corpus='numbers'; with '{self.corpus}' set it to None.")

  def _check_texts(self):
    fraction = self.validation_fraction
    require(fraction is None or (self.corpus == 'text' and 0 < fraction < 1),
            f"data.validation_fraction is {fraction} with corpus='{self.corpus}'; it needs 'text' and a number "
            'between 0 and 1.')
    require((self.column is not None) == (self.corpus == 'huggingface'),
            f"data.column is {self.column!r} with corpus='{self.corpus}'; 'huggingface' needs it, the others have "
            'none.')
    require(self.documents == 'line' or (self.corpus == 'text' and self.packing == 'blocks'),
            "data.documents='file' needs data.corpus='text' and data.packing='blocks'; choose 'line'.")
    require(self.monolingual or (self.mask_rate, self.mean_span) == (0.15, 3.0),
            f"data.mask_rate and mean_span have no effect with corpus='{self.corpus}'; leave them out.")
    require(self.monolingual or self.packing != 'blocks',
            f"data.packing='blocks' cuts a stream of one language, but corpus='{self.corpus}' has pairs; choose "
            "'packed' or 'padded'.")
    require(self.corpus != 'numbers' or self.packing == 'padded',
            f"data.packing='{self.packing}' arranges all pairs of a corpus, but corpus='numbers' draws them for ever; "
            "choose 'padded'.")
    for name, default, packings in (('over_long', 'drop', ('padded', 'packed')), ('buckets', 4, ('padded',))):
      require(self.packing in packings or getattr(self, name) == default,
              f"data.{name} has no effect with packing='{self.packing}'; leave it out, or at {default!r}.")

  @property
  def monolingual(self) -> bool:
    return self.corpus in ('text', 'huggingface')
