"""Every hyper-parameter of a run: one tree of frozen dataclasses, checked when it is built.

A recipe in `configs/` is a Python file that defines `config = Config(...)`; every leaf can be overridden on the
command line (`--model.num-heads 4`) and the tree is stored as JSON in the run folder. The string under a field is
its documentation and its `--help` text. A bad combination raises `ConfigError` with one sentence that names the
fields and the fix.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from tfm.model_config import TransformerConfig as TransformerConfig
from tfm.section import ConfigError as ConfigError
from tfm.section import Section, build, require, require_fraction, require_positive
from tfm.section import nearest as nearest


@dataclass(frozen=True)
class TokenizerConfig(Section):
  """How text becomes ids. Trained on the training corpus when a run starts and stored in the run folder."""

  kind: Literal['bpe', 'unigram', 'byte', 'char', 'word'] = 'bpe'
  """Byte-level BPE, byte-level unigram, raw UTF-8 bytes, characters, or words; what is unseen is spelled in bytes."""
  vocab_size: int | None = 8000
  """Ids in all, the 4 special ones and 256 bytes included; None for kind='byte', which always has 260."""
  joint: bool = True
  """One vocabulary for both languages (needed by tying='all') or one for each."""

  def check(self):
    require(self.kind != 'byte' or self.vocab_size is None,
            "tokenizer kind='byte' always has 260 ids; set vocab_size to None.")
    require(self.kind == 'byte' or (self.vocab_size or 0) > 260,
            f"tokenizer kind='{self.kind}' needs vocab_size above 260 (special ids and bytes), not {self.vocab_size}.")


@dataclass(frozen=True)
class DataConfig(Section):
  """Which sentence pairs, and how they are cut into batches of a few static shapes."""

  corpus: Literal['numbers', 'files'] = 'numbers'
  """'numbers': numbers in words, made by num2words, endless. 'files': parallel text files, one sentence a line."""
  source: str = 'en'
  """Language of the source: a num2words code, or the suffix of the files."""
  target: str = 'de'
  """Language of the target, likewise."""
  limit: int | None = 1_000_000
  """numbers: draw from 0 ... limit - 1. None with files."""
  held_out: int | None = 1000
  """numbers: size of the validation set and of the test set; never drawn for training. None with files."""
  root: str | None = None
  """files: the folder. None with numbers."""
  train: str | None = None
  """files: train, for ROOT/train.de and ROOT/train.en, plain or .gz."""
  validation: str | None = None
  """files: the same for the validation set."""
  test: str | None = None
  """files: the same for the test set; None leaves out the final test."""
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
    require(self.source != self.target, f"data.source and data.target are both '{self.source}'; give two languages.")
    if self.corpus == 'numbers':
      for name in ('root', 'train', 'validation', 'test'):
        require(getattr(self, name) is None, f"data.{name} needs data.corpus='files'; with 'numbers' leave it out.")
      require(self.limit is not None and self.held_out is not None and self.held_out > 0,
              "data.corpus='numbers' needs data.limit and a data.held_out above 0.")
      require(self.limit >= 4 * self.held_out,
              f'data.limit {self.limit} leaves too few numbers to train on beside 2 x data.held_out {self.held_out}; '
              'make limit at least 4 x held_out.')
    else:
      for name in ('root', 'train', 'validation'):
        require(getattr(self, name) is not None, f"data.corpus='files' needs data.{name}.")
      for name in ('limit', 'held_out'):
        require(getattr(self, name) is None, f"data.{name} needs data.corpus='numbers'; with 'files' set it to None.")
    require(self.max_length <= self.tokens_per_batch,
            f'data.max_length {self.max_length} exceeds data.tokens_per_batch {self.tokens_per_batch}: '
            'the longest sentence would not fit a batch; raise one or lower the other.')


@dataclass(frozen=True)
class MeshConfig(Section):
  """How the devices are arranged; -1 on one axis means all that the others leave."""

  data: int = -1
  """Copies of the model, each with its own rows of the batch."""
  fsdp: int = 1
  """Likewise rows of the batch, and the parameters and their moments are sharded too (ZeRO-3)."""
  expert: int = 1
  """Likewise rows of the batch, and the experts of every layer are shared out (GShard)."""
  tensor: int = 1
  """Heads, feed-forward units and vocabulary are shared out (Megatron-LM)."""
  context: int = 1
  """Every sequence is cut into so many parts (ring attention)."""
  compiler: Literal['jit', 'pmap'] = 'jit'
  """'jit' over the mesh; 'pmap': the classic front for data parallelism, of one process, over the same step."""

  def check(self):
    sizes = {name: getattr(self, name) for name in ('data', 'fsdp', 'expert', 'tensor', 'context')}
    for name, size in sizes.items():
      require(size > 0 or size == -1, f'mesh.{name} is {size}; give a number of devices, or -1 for the rest.')
    rest = [f'mesh.{name}' for name, size in sizes.items() if size == -1]
    require(len(rest) < 2, f'{" and ".join(rest)} are both -1; only one axis can take the rest of the devices.')
    require(self.compiler == 'jit' or self.fsdp == self.expert == self.tensor == self.context == 1,
            "mesh.compiler='pmap' knows the data axis alone; set the others to 1 or use 'jit'.")


@dataclass(frozen=True)
class OptimizerConfig(Section):
  """Adam and its learning-rate schedule (section 5.3)."""

  schedule: Literal['noam', 'constant', 'linear', 'cosine', 'rsqrt'] = 'noam'
  """'noam': equation 3. The others warm up to `learning_rate`; 'rsqrt' then falls as 1/sqrt(step), the rest to 0."""
  learning_rate: float = 1.0
  """Peak rate; for 'noam' the factor in front of equation 3."""
  warmup_steps: int = 4000
  """Steps of linear warm-up."""
  b1: float = 0.9
  """Adam's beta 1."""
  b2: float = 0.98
  """Adam's beta 2."""
  epsilon: float = 1e-9
  """Adam's epsilon."""
  clip_norm: float | None = None
  """Scale gradients down to this global norm; None: no clipping (as in the paper)."""
  label_smoothing: float = 0.1
  """Epsilon_ls (section 5.4): target distribution (1 - e) one-hot + e / V uniform over the whole vocabulary."""

  def check(self):
    require_positive(self, 'learning_rate', 'epsilon')
    require(self.warmup_steps >= 0, f'optimizer.warmup_steps is {self.warmup_steps}; give 0 or more.')
    require(self.schedule not in ('noam', 'rsqrt') or self.warmup_steps > 0,
            f"optimizer.schedule='{self.schedule}' divides by warmup_steps; give warmup_steps above 0.")
    for name in ('b1', 'b2', 'label_smoothing'):
      require_fraction(name, getattr(self, name))
    require(self.clip_norm is None or self.clip_norm > 0, f'optimizer.clip_norm is {self.clip_norm}; give > 0 or None.')


@dataclass(frozen=True)
class TrainingConfig(Section):
  """The loop: how long, how often it looks up, what it keeps."""

  steps: int = 100_000
  """Optimizer updates in all (a resumed run goes on to this number, not by it)."""
  seed: int = 0
  """Orders the data, initialises the weights and draws dropout."""
  accumulate: int = 1
  """Cut every batch into this many micro-batches, one after another: less memory, same update."""
  log_every: int = 50
  """Steps between lines of metrics."""
  validate_every: int = 1000
  """Steps between validations."""
  validation_sentences: int = 200
  """Sentences of the validation set that are decoded for BLEU and chrF (the loss uses all of them)."""
  patience: int | None = None
  """Stop after this many validations without a better `keep_best_by`; None: never."""
  checkpoint_every: int = 1000
  """Steps between checkpoints."""
  keep_last: int = 5
  """Newest checkpoints to keep."""
  keep_best: int = 1
  """Best checkpoints to keep beside them; only steps that were validated count."""
  keep_best_by: Literal['nll', 'bleu', 'chrf'] = 'nll'
  """The validation figure that 'best' means."""
  samples: int = 5
  """Validation translations written to samples/ each time."""
  reuse_memory: bool = True
  """On Linux CPUs keep freed buffers mapped instead of returning them each step: faster, more resident memory."""

  def check(self):
    require_positive(self, 'steps', 'accumulate', 'log_every', 'validate_every', 'checkpoint_every', 'keep_last',
                     'validation_sentences')
    for name in ('keep_best', 'samples'):
      require(getattr(self, name) >= 0, f'training.{name} is {getattr(self, name)}; give 0 or more.')
    require(self.patience is None or self.patience > 0, f'training.patience is {self.patience}; give > 0 or None.')
    require(self.keep_best == 0 or self.validate_every % self.checkpoint_every == 0,
            f'training.validate_every {self.validate_every} is not a multiple of checkpoint_every '
            f'{self.checkpoint_every}, so validated steps would not be saved; change one or set keep_best to 0.')
    require(self.samples <= self.validation_sentences,
            f'training.samples {self.samples} exceeds validation_sentences {self.validation_sentences}; lower it.')


@dataclass(frozen=True)
class DecodingConfig(Section):
  """How a trained model writes a translation; the defaults of `translate`, used in validation too."""

  beam_size: int = 4
  """M, hypotheses kept per sentence; 1 is greedy."""
  length_penalty: float = 0.6
  """Alpha; 0 ranks by plain log-probability."""
  length_penalty_form: Literal['gnmt', 'power'] = 'gnmt'
  """'gnmt': ((5 + n) / 6)^alpha (Wu et al. 2016, the paper's). 'power': n^alpha (fairseq, Marian, CTranslate2)."""
  stop: Literal['bound', 'full'] = 'bound'
  """'bound': until no live hypothesis can still win (exact). 'full': as soon as M hypotheses have ended."""
  extra_length: int = 50
  """Longest output in tokens: source length + this (section 6.1)."""
  max_source_length: int | None = None
  """Refuse longer source sentences (in tokens) with an error; None: translate whatever the positions allow."""
  batch_tokens: int = 8192
  """Sentences decoded together: rows x beam_size x source width."""

  def check(self):
    require_positive(self, 'beam_size', 'extra_length', 'batch_tokens')
    require(self.length_penalty >= 0, f'decoding.length_penalty is {self.length_penalty}; give 0 or more.')
    require(self.max_source_length is None or self.max_source_length > 0,
            f'decoding.max_source_length is {self.max_source_length}; give > 0 or None.')


@dataclass(frozen=True)
class Config(Section):
  """One run."""

  model: TransformerConfig = field(default_factory=TransformerConfig)
  tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
  data: DataConfig = field(default_factory=DataConfig)
  optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)
  training: TrainingConfig = field(default_factory=TrainingConfig)
  decoding: DecodingConfig = field(default_factory=DecodingConfig)

  def check(self):
    require(self.model.tying != 'all' or self.tokenizer.joint,
            "model.tying='all' shares one matrix between the languages, but tokenizer.joint is False; "
            "set tokenizer.joint=True or model.tying='target'.")
    require(self.mesh.context < 2 or self.data.width_multiple % (2 * self.mesh.context) == 0,
            f'mesh.context={self.mesh.context} cuts every sequence into {2 * self.mesh.context} equal parts; set '
            f'data.width_multiple to a multiple of that, not {self.data.width_multiple}.')
    require(self.mesh.context < 2 or self.data.max_length % self.data.width_multiple == 0,
            f'data.max_length {self.data.max_length} is not a multiple of data.width_multiple '
            f'{self.data.width_multiple}, so the widest batches could not be cut by mesh.context; raise it.')
    require(self.mesh.expert == 1 or self.model.experts > 0,
            f'mesh.expert={self.mesh.expert} shares out experts, but model.experts is 0; set it, or leave mesh.expert '
            'at 1.')
    require(self.data.rows_multiple % self.training.accumulate == 0,
            f'training.accumulate {self.training.accumulate} does not divide data.rows_multiple '
            f'{self.data.rows_multiple}; change one.')
    if self.model.max_positions is not None:
      require(self.model.max_positions >= self.data.max_length,
              f'model.max_positions {self.model.max_positions} is below data.max_length {self.data.max_length}; '
              'raise max_positions or lower max_length.')


# -- as JSON ----------------------------------------------------------------------------------------------------------


def to_json(config: Config) -> str:
  return json.dumps(dataclasses.asdict(config), indent=2) + '\n'


def from_json(text: str) -> Config:
  """The config written by `to_json`; an unknown or ill-typed key raises `ConfigError`."""
  return build(Config, json.loads(text), 'config')
