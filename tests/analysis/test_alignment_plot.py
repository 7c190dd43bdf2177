from __future__ import annotations

import numpy as np
import pytest

from tfm.analysis.alignment_plot import plot_alignment
from tfm.translator import Hypothesis, Translation

pytest.importorskip('matplotlib', reason="needs the extra 'plot'")

SOURCE = ['a_b', '▁$x', '^{\\', '5$', '</s>']
TARGET = ['\\frac{', '_$_', '</s>']


@pytest.fixture
def translation() -> Translation:
  pattern = np.random.default_rng(0).dirichlet(np.ones(5), size=(2, 3, 3)).astype(np.float32)
  return Translation('a_b $x ^{\\5$', SOURCE, [Hypothesis('', TARGET, -1.0, -1.0, True, pattern)])


def labels(axis) -> list[str]:
  return [label.get_text() for label in axis.get_ticklabels()]


def test_every_token_labels_its_row_or_column(translation, tmp_path):
  figure = plot_alignment(translation)
  figure.savefig(tmp_path / 'attention.png', dpi=50)
  assert (tmp_path / 'attention.png').read_bytes().startswith(b'\x89PNG')
  axes = figure.axes[0]
  assert labels(axes.xaxis) == SOURCE and labels(axes.yaxis) == TARGET
  assert translation.source in figure.get_supxlabel()
  shown = [*axes.get_xticklabels(), *axes.get_yticklabels(), *figure.texts]
  assert not any('$' in text.get_text() and text.get_parse_math() for text in shown), 'never a formula'


def test_rows_are_target_tokens_and_columns_source_tokens(translation):
  pattern_NxHxTxS = translation.attention

  def drawn(**choice):
    return np.asarray(plot_alignment(translation, **choice).axes[0].images[0].get_array())

  np.testing.assert_allclose(drawn(), pattern_NxHxTxS[1].mean(0), rtol=1e-6)
  np.testing.assert_array_equal(drawn(layer=0, head=2), pattern_NxHxTxS[0, 2])
  assert 'layer 1 of 2, head 2' in plot_alignment(translation, layer=0, head=2).get_suptitle()
  assert 'layer 2 of 2, mean of the heads' in plot_alignment(translation).get_suptitle()
  with pytest.raises(IndexError):
    plot_alignment(translation, layer=2)


def test_what_cannot_be_drawn(translation):
  without = Translation('', [], [Hypothesis('', [], 0.0, 0.0, True)])
  with pytest.raises(ValueError, match='return_attention=True'):
    plot_alignment(without)
  empty = Translation('', [], [Hypothesis('', [], 0.0, 0.0, True, np.zeros((2, 3, 0, 0), np.float32))])
  with pytest.raises(ValueError, match='empty'):
    plot_alignment(empty)


@pytest.mark.parametrize('tokens', [['▁a'], ['Donaudampfschifffahrt', 'b'], ['▁a'] * 30])
def test_titles_and_labels_stay_inside_the_picture(tokens):
  pattern = np.ones((1, 1, len(tokens), len(tokens))) / len(tokens)
  source = ' '.join(tokens) + 12 * ' and more'
  figure = plot_alignment(Translation(source, tokens, [Hypothesis('', tokens, -1.0, -1.0, True, pattern)]))
  figure.draw_without_rendering()
  axes = figure.axes[0]
  assert len(figure.texts) == 2
  for text in (*figure.texts, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
    box = text.get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
