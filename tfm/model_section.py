"""What the library asks of a model's section of the config, whichever family the model is of."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from tfm.section import Section

Shape = Literal['encoder_decoder', 'decoder_only', 'encoder_only']


class ModelSection(Section):
  """Base of the sections of all families. Besides what is below every one has the fields `d_model`, `dtype`, `pad_id`,
  `vocab_multiple`, `tying` and `dropout`, which mean the same in all (see `tfm.model_config.TransformerConfig`)."""

  kind: ClassVar[str]
  """The family's name, by which a stored config says whose fields it has."""

  # What only some families have; a field of the same name takes the place of each.
  attention_backend = 'auto'
  experts = 0
  logit_softcap = None
  max_positions = None
  output_bias = False
  position_offset = 0
  scale_output = False
  scan_layers = False

  @property
  def shape(self) -> Shape:
    raise NotImplementedError

  @property
  def uses_dropout(self) -> bool:
    """Whether training draws random numbers in the model."""
    return self.dropout > 0

  @property
  def cross_attention_shape(self) -> tuple[int, int] | None:
    """(N, H) of the patterns NxHxTxS that a translation can show; None: the model does not look back at its source."""
    return None

  @property
  def longest(self) -> int | None:
    """Most positions of a sequence; None: no limit."""
    return None if self.max_positions is None else self.max_positions - self.position_offset

  def with_layout(self, scan_layers: bool) -> Self:
    """The same model with its layers scanned or unrolled, where the family knows both."""
    return self
