"""Validation: the loss over the whole validation set, and BLEU and chrF of its translations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from tfm.scores import bleu, chrf, exact_match
from tfm.text.batches import Batch
from tfm.text.corpora import Pair
from tfm.training.loss import Sums
from tfm.training.objectives import batch_sums
from tfm.training.run_folder import write_whole
from tfm.translator import Translator

BETTER_IS_LOWER = {'nll': True, 'bleu': False, 'chrf': False}


@partial(jax.jit, static_argnames='model')
def _sums(model, params, batch) -> Sums:
  return batch_sums(model, params, batch, smoothing=0.0)


def validation_nll(model, params, batches: Sequence[Batch]) -> float:
  """-log p per target token, nats, without smoothing or dropout, over all batches."""
  sums = [jax.device_get(_sums(model, params, jax.device_put(tuple(batch)))) for batch in batches]
  return float(sum(float(s.nll) for s in sums) / sum(float(s.tokens) for s in sums))


def validate(model, params, batches: Sequence[Batch], translator: Translator,
             pairs: Sequence[Pair]) -> tuple[dict[str, float], list[str]]:
  """Figures of the current weights: nll over `batches`; bleu, chrf, exact (per cent) over the translated `pairs`.

  Returns:
    The figures, and the translations of `pairs`.
  """
  sources, references = zip(*pairs)
  hypotheses = [found.text for found in translator.with_params(params).translate(sources)]
  figures = {'nll': validation_nll(model, params, batches), 'bleu': bleu(hypotheses, references).value,
             'chrf': chrf(hypotheses, references).value, 'exact': exact_match(hypotheses, references)}
  return figures, hypotheses


def write_samples(path: Path, pairs: Sequence[Pair], hypotheses: Sequence[str]) -> None:
  """One file for people: source, reference and translation of each pair."""
  blocks = [f'source       {source}\nreference    {reference}\ntranslation  {hypothesis}\n'
            for (source, reference), hypothesis in zip(pairs, hypotheses)]
  write_whole(path, '\n'.join(blocks))


def out_of_patience(history: Sequence[dict], by: str, patience: int | None) -> bool:
  """Whether the last `patience` validations brought nothing better: a function of the records alone."""
  if patience is None or len(history) <= patience:
    return False
  figures = [record[by] if BETTER_IS_LOWER[by] else -record[by] for record in history]
  return min(figures[-patience:]) >= min(figures[:-patience])
