"""A picture of which source tokens the decoder looked at while it wrote each target token."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from matplotlib.figure import Figure

  from tfm.translator import Translation


def plot_alignment(translation: Translation, layer: int = -1, head: int | None = None) -> Figure:
  """The cross-attention of a translation: a target token a row, a source token a column, dark is much.

  Args:
    translation: made with `return_attention=True`.
    layer: decoder layer, from the end if negative.
    head: a head, or None for the mean over heads.

  Raises:
    ValueError: the translation carries no attention, or has no text.
    ModuleNotFoundError: matplotlib is missing; it comes with the extra `plot`.
  """
  import matplotlib.ticker
  from matplotlib.figure import Figure
  if translation.attention is None:
    raise ValueError('This translation has no attention; translate with return_attention=True.')
  if not translation.attention.size:
    raise ValueError('This translation is empty, so there is nothing to draw; give a sentence with text.')
  pattern_HxTxS = translation.attention[layer]
  pattern_TxS = pattern_HxTxS.mean(axis=0) if head is None else pattern_HxTxS[head]
  rows, columns = pattern_TxS.shape
  # Inches: a cell each and room for labels; never narrower than the title.
  width = max(5.0, 2 + 0.42 * columns)
  figure = Figure(figsize=(width, 1.6 + 0.36 * rows), layout='constrained')
  axes = figure.subplots()
  image = axes.imshow(pattern_TxS, cmap='Blues', vmin=0.0, vmax=max(float(np.max(pattern_TxS)), 1e-6), aspect='auto')
  # Tokens are shown as they are: two dollar signs would make a formula of what stands between them.
  axes.set_xticks(range(columns), translation.source_tokens, rotation=45, ha='left', parse_math=False)
  axes.set_yticks(range(rows), translation.tokens, parse_math=False)
  axes.xaxis.tick_top()
  axes.tick_params(length=0)
  # Ten characters an inch. (Matplotlib's own wrapping would parse formulas.)
  figure.supxlabel(textwrap.fill(f'source: {translation.source}', int(10 * width)), fontsize=10, parse_math=False)
  axes.set_ylabel('written token')
  which = 'mean of the heads' if head is None else f'head {head}'
  figure.suptitle(f'cross-attention, layer {range(len(translation.attention))[layer] + 1} of '
                  f'{len(translation.attention)}, {which}', fontsize=10)
  figure.colorbar(image, ax=axes, shrink=0.8, format=matplotlib.ticker.PercentFormatter(1.0, decimals=0))
  return figure
