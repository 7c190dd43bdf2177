"""What is said when training ends: figures on the test set, a few examples, a picture of the attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tfm.config import Config
from tfm.loaded import Loaded
from tfm.scores import bleu, chrf, exact_match
from tfm.text.corpora import Pair, build_corpus
from tfm.text.objectives import build_evaluation_batches
from tfm.training.samples import describe_rows
from tfm.training.validation import validation_figures
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


def text_report(user: Loaded, config: Config, shown: int = 2) -> str:
  """nll, perplexity and accuracy of a model of one language on the test set, or on the validation set where there is
  none; of a causal one also bits a byte, which do not depend on the tokenizer."""
  corpus = build_corpus(config.data)
  texts, name = (corpus.validation(), 'Validation') if corpus.test() is None else (corpus.test(), 'Test')
  batches = build_evaluation_batches(config, texts, user.tokenizers)
  figures = validation_figures(user.model, user.params, batches)
  nll = figures['nll']
  line = f'nll {nll:.4f} nats a token, perplexity {math.exp(nll):.2f}, accuracy {figures["accuracy"]:.1f} %'
  if config.objective == 'causal':
    labels = [np.asarray(batch[0])[:, 1:] for batch in batches]
    tokens = sum(int((ids != user.special.pad).sum()) for ids in labels)
    size = sum(len(user.tokenizers.target.decode(row.tolist()).encode()) for ids in labels for row in ids)
    line += f', {nll * tokens / size / math.log(2):.3f} bits a byte'
  return f'{name} set, {config.objective.replace("_", " ")}:\n  {line}\n{describe_rows(user, batches[0], shown)}'


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
