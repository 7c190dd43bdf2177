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
from typing import Literal

from tfm.convolutional_config import ConvolutionalConfig as ConvolutionalConfig
from tfm.data_config import DataConfig as DataConfig
from tfm.data_config import TokenizerConfig as TokenizerConfig
from tfm.model_config import TransformerConfig as TransformerConfig
from tfm.recurrent_config import RecurrentConfig as RecurrentConfig
from tfm.section import ConfigError as ConfigError
from tfm.section import Section, build, require, require_fraction, require_positive
from tfm.section import nearest as nearest


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
  """The optimizer and its learning-rate schedule (section 5.3)."""

  name: Literal['adam', 'adamw', 'adafactor', 'lion', 'muon'] = 'adam'
  """'adam' (the paper's), 'adamw' (Loshchilov & Hutter 2019), 'adafactor' (Shazeer & Stern 2018; its rate is relative
  to the size of the weights), 'lion' (Chen et al. 2023), 'muon' (Jordan 2024) for attention and feed-forward matrices
  with AdamW for the rest."""
  schedule: Literal['noam', 'constant', 'linear', 'cosine', 'rsqrt', 'wsd'] = 'noam'
  """'noam': equation 3. The others warm up to `learning_rate`; 'constant' then stays, 'rsqrt' falls as 1/sqrt(step),
  'linear' and 'cosine' to `final_fraction`, 'wsd' (MiniCPM, Hu et al. 2024) stays and falls linearly at the end."""
  learning_rate: float = 1.0
  """Peak rate; for 'noam' the factor in front of equation 3."""
  warmup_steps: int = 4000
  """Steps of linear warm-up."""
  final_fraction: float = 0.0
  """Rate at the last step, as a fraction of the peak, for 'linear', 'cosine' and 'wsd'."""
  decay_fraction: float | None = None
  """'wsd': the part of all steps, at the end, in which the rate falls (MiniCPM: 0.1). None with others."""
  b1: float = 0.9
  """Beta 1 of Adam, AdamW and Lion; 'muon': of its AdamW, the matrices have momentum 0.95."""
  b2: float = 0.98
  """Beta 2, likewise (Lion's authors: 0.99)."""
  epsilon: float = 1e-9
  """Epsilon of Adam and AdamW."""
  weight_decay: float = 0.0
  """'adamw', 'lion', 'muon': rate x this x weight is taken off every matrix, embeddings included; not off biases,
  norms and tables of positions or token types."""
  clip_norm: float | None = None
  """Scale gradients down to this global norm; None: no clipping (as in the paper)."""
  label_smoothing: float = 0.1
  """Epsilon_ls (section 5.4): target distribution (1 - e) one-hot + e / V uniform over the whole vocabulary."""
  ema_decay: float | None = None
  """Keep a moving average of the weights with this decay, for validation and for use; None: none."""

  def check(self):
    require_positive(self, 'learning_rate', 'epsilon')
    require(self.warmup_steps >= 0, f'optimizer.warmup_steps is {self.warmup_steps}; give 0 or more.')
    require(self.schedule not in ('noam', 'rsqrt') or self.warmup_steps > 0,
            f"optimizer.schedule='{self.schedule}' divides by warmup_steps; give warmup_steps above 0.")
    require(0 <= self.final_fraction <= 1, f'optimizer.final_fraction is {self.final_fraction}; give 0 to 1.')
    require(self.final_fraction == 0 or self.schedule in ('linear', 'cosine', 'wsd'),
            f"optimizer.final_fraction has no effect with schedule='{self.schedule}'; set it to 0.")
    require((self.decay_fraction is not None) == (self.schedule == 'wsd'),
            f"optimizer.decay_fraction is {self.decay_fraction} with schedule='{self.schedule}'; give a number such as "
            "0.1 with 'wsd' and None with others.")
    require(self.decay_fraction is None or 0 < self.decay_fraction <= 1,
            f'optimizer.decay_fraction is {self.decay_fraction}; give a number above 0 and at most 1.')
    require(self.weight_decay >= 0, f'optimizer.weight_decay is {self.weight_decay}; give 0 or more.')
    idle = {'adam': ('weight_decay',), 'adafactor': ('b1', 'b2', 'epsilon', 'weight_decay'), 'lion': ('epsilon',)}
    for name in idle.get(self.name, ()):
      default = getattr(OptimizerConfig, name)
      require(getattr(self, name) == default,
              f"optimizer.{name} has no effect with name='{self.name}'; leave it at {default}, or choose another name.")
    require(self.ema_decay is None or 0 < self.ema_decay < 1,
            f'optimizer.ema_decay is {self.ema_decay}; give a number between 0 and 1, or None.')
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

  model: TransformerConfig | RecurrentConfig | ConvolutionalConfig = field(default_factory=TransformerConfig)
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
    for axis in ('tensor', 'context'):
      require(getattr(self.mesh, axis) == 1 or isinstance(self.model, TransformerConfig),
              f'mesh.{axis}={getattr(self.mesh, axis)} cuts a Transformer, but the model is {self.model.kind}; leave '
              'it at 1 and share out the batch by mesh.data or mesh.fsdp.')
    self._check_objective()
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
    require(self.model.longest is None or self.model.longest >= self.data.max_length,
            f'model.max_positions {self.model.max_positions} is below data.max_length {self.data.max_length} + '
            f'model.position_offset {self.model.position_offset}; raise max_positions or lower max_length.')

  def _check_objective(self):
    data, shape = self.data, self.model.shape
    require(data.monolingual or shape == 'encoder_decoder',
            f"data.corpus='{data.corpus}' has pairs, which a model that is {shape.replace('_', '-')} cannot translate; "
            "choose 'text' or give it both stacks.")
    require(not data.monolingual or self.tokenizer.joint,
            f"data.corpus='{data.corpus}' is one language and has one vocabulary; set tokenizer.joint=True.")
    for name, default, objectives in (
        ('packing', 'padded', ('causal', 'translation')), ('mask_rate', 0.15, ('masked', 'span_corruption')),
        ('mean_span', 3.0, ('span_corruption',))):
      require(getattr(data, name) == default or self.objective in objectives,
              f'data.{name} has no effect on a {self.objective.replace("_", " ")} objective; leave it out.')
    mixes = isinstance(self.model, TransformerConfig) and self.model.convolution != 'none'
    require(not self.packs_pairs or (isinstance(self.model, TransformerConfig) and not mixes),
            "data.packing='packed' puts several pairs in a row, which "
            + (f"model.convolution='{self.model.convolution}' would mix; remove it" if mixes else
               f'a {self.model.kind} model with two stacks cannot tell apart; choose a Transformer')
            + " or data.packing='padded'.")
    needed = {'masked': 1, 'span_corruption': 2}.get(self.objective, 0)
    require(self.tokenizer.extra_ids >= needed,
            f'tokenizer.extra_ids is {self.tokenizer.extra_ids}; the {self.objective.replace("_", " ")} objective '
            f'needs {needed} (and as many as there are spans in a text, plus one); raise it.')
    require(needed > 0 or self.tokenizer.extra_ids == 0,
            f'tokenizer.extra_ids has no use in a {self.objective} objective; set it to 0.')
    require(self.objective == 'translation' or
            (self.training.keep_best_by, self.training.validation_sentences) == ('nll', 200),
            'training.keep_best_by and validation_sentences are about translations, of which there are none here; '
            'leave them out.')

  @property
  def objective(self) -> Literal['translation', 'causal', 'masked', 'span_corruption']:
    """What is learned: it follows from the corpus and the shape of the model."""
    if not self.data.monolingual:
      return 'translation'
    return {'decoder_only': 'causal', 'encoder_only': 'masked', 'encoder_decoder': 'span_corruption'}[self.model.shape]

  @property
  def packs_pairs(self) -> bool:
    """Whether a row of a batch holds several sentence pairs."""
    return self.objective == 'translation' and self.data.packing == 'packed'


# -- as JSON ----------------------------------------------------------------------------------------------------------


def to_json(config: Config) -> str:
  tree = dataclasses.asdict(config)
  tree['model'] = {'kind': config.model.kind, **tree['model']}
  return json.dumps(tree, indent=2) + '\n'


def from_json(text: str) -> Config:
  """The config written by `to_json`; an unknown or ill-typed key raises `ConfigError`."""
  return build(Config, json.loads(text), 'config')
