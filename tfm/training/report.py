"""What is said when training ends: scores on the test set, a few translations, a picture of the attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tfm.scores import bleu, chrf, exact_match
from tfm.text.corpora import Pair
from tfm.translator import Translator


def test_report(translator: Translator, pairs: Sequence[Pair], shown: int = 5) -> str:
  """Scores over all `pairs`, and the first `shown` of them as translated."""
  sources, references = zip(*pairs)
  hypotheses = [found.text for found in translator.translate(sources)]
  lines = [f'{source}\n  -> {hypothesis}{"" if hypothesis == reference else f"   (reference: {reference})"}'
           for source, hypothesis, reference in list(zip(sources, hypotheses, references))[:shown]]
  has_4_grams = any(len(reference.split()) >= 4 for reference in references)
  return '\n'.join([
      f'Test set, {len(pairs):,} sentences, beam {translator.decoding.beam_size}:',
      f'  exact match {exact_match(hypotheses, references):.1f} %',
      f'  {chrf(hypotheses, references, bootstrap=True)}',
      f'  {bleu(hypotheses, references, bootstrap=True)}' if has_4_grams else
      '  no BLEU: it counts four words in a row, and no reference has four', *lines])


def picture(translator: Translator, sentence: str, path: Path) -> str:
  """Draw the cross-attention of one sentence; says where, or what is missing."""
  try:
    import matplotlib  # noqa: F401
  except ModuleNotFoundError:
    return "No picture of the attention: pip install 'tfm[plot]' brings matplotlib."
  from tfm.analysis.alignment_plot import plot_alignment
  translation, = translator.translate([sentence], return_attention=True)
  plot_alignment(translation).savefig(path, dpi=150)
  return f'The cross-attention of "{sentence}" is drawn in {path}'
