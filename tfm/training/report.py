"""What is said when training ends: figures on the test set, a few examples, a picture of the attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tfm.config import Config
from tfm.generator import Generator
from tfm.loaded import Loaded
from tfm.scores import bleu, chrf, exact_match, has_4_grams
from tfm.special_ids import EOS
from tfm.text.corpora import Pair, build_corpus
from tfm.text.masking import CausalBatch
from tfm.text.objectives import build_evaluation_batches
from tfm.training.objectives import inputs_and_labels
from tfm.training.samples import describe_rows
from tfm.training.validation import validation_figures
from tfm.translator import Translator


def test_report(translator: Translator, pairs: Sequence[Pair], shown: int = 5) -> str:
  """Scores over all `pairs`, and the first `shown` of them as translated."""
  sources, references = zip(*pairs)
  hypotheses = [found.text for found in translator.translate(sources)]
  lines = [f'{source}\n  -> {hypothesis}{"" if hypothesis == reference else f"   (reference: {reference})"}'
           for source, hypothesis, reference in list(zip(sources, hypotheses, references))[:shown]]
  return '\n'.join([
      f'Test set, {len(pairs):,} sentences, beam {translator.decoding.beam_size}:',
      f'  exact match {exact_match(hypotheses, references):.1f} %',
      f'  {chrf(hypotheses, references, bootstrap=True)}',
      f'  {bleu(hypotheses, references, bootstrap=True)}' if has_4_grams(references) else
      '  no BLEU: it counts four words in a row, and no reference has four', *lines])


def text_report(user: Loaded, config: Config, shown: int = 2) -> str:
  """nll, perplexity and accuracy of a model of one language on the test set, or on the validation set where there is
  none; of a causal one also bits a byte, which do not depend on the tokenizer."""
  corpus = build_corpus(config.data)
  texts, name = (corpus.validation(), 'Validation') if corpus.test() is None else (corpus.test(), 'Test')
  batches = build_evaluation_batches(config, texts, user.tokenizers)
  figures = validation_figures(user.model, user.params, batches)
  nll = figures['nll']
  line = f'nll {nll:.4f} nats a token, perplexity {math.exp(nll):.2f}, accuracy {100 * figures["accuracy"]:.1f} %'
  if config.objective == 'causal':
    line += f', {bits_a_byte(user, nll, batches):.3f} bits a byte'
  return f'{name} set, {config.objective.replace("_", " ")}:\n  {line}\n{describe_rows(user, batches[0], shown)}'


def bits_a_byte(user: Generator, nll: float, batches: Sequence[CausalBatch]) -> float:
  """`nll`, nats a token, over the bytes of what those tokens say; the end of a text is one, as the end of a line."""
  said = [np.asarray(labels_BxT)[np.asarray(counts_BxT)]
          for _, labels_BxT, counts_BxT in (inputs_and_labels(user.model, batch) for batch in batches)]
  labels = np.concatenate(said)
  ends = np.flatnonzero(labels == EOS)
  texts = np.split(labels, ends + 1)  # whole ones: a letter may be cut where a block is
  size = len(ends) + sum(len(user.tokenizers.target.decode(text.tolist()).encode()) for text in texts)
  return nll * len(labels) / size / math.log(2)


def picture(translator: Translator, sentence: str, path: Path) -> str:
  """Draw the cross-attention of one sentence; says where, or what is missing."""
  try:
    import matplotlib  # noqa: F401
  except ModuleNotFoundError:
    return "No picture of the attention: pip install 'tfm[plot]' brings matplotlib."
  if translator.model.config.cross_attention_shape is None:
    return 'No picture of the attention: this model has none to its source.'
  from tfm.analysis.alignment_plot import plot_alignment
  translation, = translator.translate([sentence], return_attention=True)
  plot_alignment(translation).savefig(path, dpi=150)
  return f'The cross-attention of "{sentence}" is drawn in {path}'
