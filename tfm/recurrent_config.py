"""The section of the config for the ancestors that read a sequence one token after the other."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from tfm.model_section import ModelSection, Shape
from tfm.section import require, require_fraction, require_positive

LOCAL = 'local_monotonic', 'local_predictive'
SAME_WIDTH = 'multiplicative', 'scaled', 'cosine', 'euclidean'
"""Scores without a matrix between query and key."""

NEEDS_ENCODER = 'bidirectional', 'reverse_source', 'bridge', 'context'
NEEDS_ATTENTION = 'query', 'input_feeding', 'score', 'alignment', 'attention_width', 'attention_window'


@dataclass(frozen=True)
class RecurrentConfig(ModelSection):
  """Recurrent networks; defaults are RNNsearch (Bahdanau et al. 2015, appendix A).

  With `encoder_layers=0` it is a language model: latent autoregressive, p(x_t | h_t) with a state h_t = f(h_t-1, x_t-1)
  that sums up the whole past (Mikolov et al. 2010), or with `cell='window'` autoregressive of a fixed order, without a
  state: p(x_t | x_t-order, ..., x_t-1) (Bengio et al. 2003).
  """

  kind = 'recurrent'

  encoder_layers: int = 1
  """Recurrent layers on top of one another in the encoder; 0: there is none, the model is a language model."""
  decoder_layers: int = 1
  """Recurrent layers of the decoder."""
  d_model: int = 620
  """D, width of the embeddings and of what the output projection reads."""
  d_hidden: int = 1000
  """W, width of the state of a layer, in one direction."""
  cell: Literal['lstm', 'gru', 'tanh', 'window'] = 'gru'
  """'tanh': h' = tanh(W x + U h + b) (Elman 1990). 'lstm': with forget gate, without peepholes (Hochreiter &
  Schmidhuber 1997; Gers et al. 2000). 'gru': Cho et al. 2014 with the reset gate after the product, as in cuDNN and
  PyTorch: r * (U h + b). 'window': no state, tanh layers over the last `order` tokens (Bengio et al. 2003)."""
  order: int | None = None
  """Tokens that 'window' sees; None for the others, which see all."""
  forget_bias: float = 1.0
  """First bias of the LSTM's forget gate (Gers et al. 2000; Jozefowicz et al. 2015)."""
  bidirectional: bool = True
  """Every encoder layer reads in both directions (Schuster & Paliwal 1997), W wide each."""
  reverse_source: bool = False
  """The encoder reads from the last word to the first (Sutskever et al. 2014, section 3.3)."""
  bridge: Literal['tanh', 'copy'] = 'tanh'
  """How the decoder starts, from v, the final states of the last encoder layer. 'tanh': every state is tanh(W v + b)
  (Cho et al. 2014; Bahdanau et al. 2015, with both directions). 'copy': layer l takes the final state of the encoder's
  layer l, the LSTM's cell too (Sutskever et al. 2014)."""
  context: Literal['start', 'every_step', 'attention'] = 'attention'
  """What the decoder knows of the source. 'start': its first state, a vector of fixed width (Sutskever et al. 2014).
  'every_step': v enters every step and the readout too (Cho et al. 2014). 'attention': a weighted sum of all encoder
  states, others at each step (Bahdanau et al. 2015)."""
  query: Literal['previous', 'current'] = 'previous'
  """'previous': the state of the first layer before the step asks, and the answer enters that layer (Bahdanau et al.
  2015). 'current': the last layer's state after the step asks, and the answer enters the readout (Luong et al.
  2015)."""
  input_feeding: bool = False
  """With query='current': the readout of the step before enters the first layer (Luong et al. 2015, section 3.3)."""
  score: Literal['additive', 'multiplicative', 'scaled', 'general', 'biased_general', 'activated_general', 'cosine',
                 'euclidean'] = 'additive'
  """Score function (`tfm.attention.score_functions`)."""
  alignment: Literal['soft', 'sparsemax', 'entmax15', 'hard', 'local_monotonic', 'local_predictive'] = 'soft'
  """From scores to weights (`tfm.attention.alignments`). 'hard' has the gradient of 'soft' (straight-through). Not
  here: 'hard_sampled', which learns by a reward and not by this loss, 'soft_per_feature', which has no one pattern, and
  'local_window', whose centre somebody must give."""
  attention_width: int | None = None
  """Hidden units of the additive score and of the predicted centre; None means d_hidden."""
  attention_window: int | None = None
  """D of the local alignments, which see 2 D + 1 source positions (Luong et al. 2015, section 3.2: 10)."""
  readout: Literal['linear', 'tanh', 'maxout'] = 'maxout'
  """From state and context to what the output projection reads. 'linear'; 'tanh' (Luong et al. 2015, equation 5);
  'maxout': the larger one of two linear maps, which read the word before too (Cho et al. 2014; Bahdanau et al. 2015,
  appendix A.2.2)."""

  tying: Literal['none', 'inputs', 'target', 'all'] = 'none'
  """Shared matrices: 'target' target embedding = output projection; 'inputs' source = target embedding; 'all' the
  three. With one stack there is one embedding, and 'target' and 'all' share it with the output."""
  output_bias: bool = False
  """A bias for every token of the vocabulary."""
  dropout: float = 0.0
  """On embeddings, between layers and on the readout, never from state to state (Zaremba et al. 2014)."""
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  """Type of the matrix products; parameters, states, softmax, logits and loss are float32 always."""
  vocab_multiple: int = 1
  """Rows of the embedding tables are rounded up to a multiple of this, so that mesh.tensor divides them; the rows
  beyond the vocabulary are never predicted."""
  pad_id: int | None = 0
  """Id of padding, always on the right; None: the vocabulary has none. tfm's own tokenizers have 0."""

  def check(self):
    require_positive(self, 'decoder_layers', 'd_model', 'd_hidden', 'vocab_multiple')
    require(self.encoder_layers >= 0, f'model.encoder_layers is {self.encoder_layers}; give 0 or more.')
    for name in ('order', 'attention_width', 'attention_window'):
      value = getattr(self, name)
      require(value is None or value > 0, f'{name} is {value}; give a number above 0 or None.')
    require_fraction('dropout', self.dropout)
    self._check_cell()
    self._check_source()
    self._check_attention()

  def _check_cell(self):
    require((self.order is not None) == (self.cell == 'window'),
            f"order is {self.order} with cell='{self.cell}'; 'window' needs to know how many tokens it sees, the "
            'others see all of them.')
    require(self.cell != 'window' or self.encoder_layers == 0,
            "cell='window' has no state that could carry a source sentence; set encoder_layers=0 or choose another "
            'cell.')
    if self.cell != 'lstm':
      self._refuse(f"with cell='{self.cell}', which has no forget gate", 'forget_bias')

  def _check_source(self):
    if self.encoder_layers == 0:
      self._refuse('without an encoder (encoder_layers=0)', *NEEDS_ENCODER, *NEEDS_ATTENTION)
      require(self.tying != 'inputs', "tying='inputs' shares two embeddings, but a model that is decoder-only has one; "
                                      "choose 'none' or 'all'.")
      return
    require(not (self.reverse_source and self.bidirectional),
            'reverse_source has no effect on an encoder that reads in both directions; remove it or set '
            'bidirectional=False.')
    require(self.bridge == 'tanh' or (not self.bidirectional and self.encoder_layers == self.decoder_layers),
            f"bridge='copy' gives each decoder layer the state of an encoder layer; there are {self.decoder_layers} "
            f'and {self.encoder_layers}, with bidirectional={self.bidirectional}; make the numbers equal with '
            "bidirectional=False, or choose 'tanh'.")

  def _check_attention(self):
    if self.cross_attention_shape is None:
      if self.encoder_layers:
        self._refuse(f"with context='{self.context}'", *NEEDS_ATTENTION)
      return
    require(self.query == 'current' or not self.input_feeding,
            "input_feeding has no effect with query='previous', where the context enters the first layer already; "
            "remove it or choose 'current'.")
    require((self.attention_window is not None) == (self.alignment in LOCAL),
            f"attention_window is {self.attention_window} with alignment='{self.alignment}'; {' and '.join(LOCAL)} "
            'need it, the others see the whole source.')
    require(self.attention_width is None or self.score == 'additive' or self.alignment == 'local_predictive',
            f"attention_width has no effect with score='{self.score}' and alignment='{self.alignment}', which have no "
            'hidden layer; remove it.')
    require(self.score not in SAME_WIDTH or not self.bidirectional,
            f"score='{self.score}' compares a query with keys as wide, but the states of a bidirectional encoder are "
            "twice as wide; choose score='general' or bidirectional=False.")

  def _refuse(self, where: str, *names: str):
    for field in fields(self):
      require(field.name not in names or getattr(self, field.name) == field.default,
              f'{field.name} has no effect {where}; remove it.')

  @property
  def shape(self) -> Shape:
    return 'encoder_decoder' if self.encoder_layers else 'decoder_only'

  @property
  def memory_width(self) -> int:
    """Of an encoder state."""
    return 2 * self.d_hidden if self.bidirectional else self.d_hidden

  @property
  def cross_attention_shape(self) -> tuple[int, int] | None:
    return (1, 1) if self.encoder_layers and self.context == 'attention' else None
