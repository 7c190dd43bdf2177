"""Validation: the loss over the whole validation set, and of translations also BLEU and chrF."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax

from tfm.scores import bleu, chrf, exact_match
from tfm.text.batches import Batch
from tfm.text.corpora import Pair
from tfm.training.loss import Sums
from tfm.training.objectives import batch_sums
from tfm.translator import Translator

BETTER_IS_LOWER = {'nll': True, 'bleu': False, 'chrf': False}


@partial(jax.jit, static_argnames='model')
def _sums(model, params, batch) -> Sums:
  return batch_sums(model, params, batch, smoothing=0.0)


def validation_figures(model, params, batches: Sequence[Batch]) -> dict[str, float]:
  """Over all batches, without smoothing or dropout: nll, -log p per label in nats, and accuracy, from 0 to 1."""
  sums = [jax.device_get(_sums(model, params, jax.device_put(tuple(batch)))) for batch in batches]
  nll, correct, tokens = (sum(float(getattr(s, name)) for s in sums) for name in ('nll', 'correct', 'tokens'))
  return {'nll': nll / tokens, 'accuracy': correct / tokens}


def validation_nll(model, params, batches: Sequence[Batch]) -> float:
  return validation_figures(model, params, batches)['nll']


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


def out_of_patience(history: Sequence[dict], by: str, patience: int | None) -> bool:
  """Whether the last `patience` validations brought nothing better: a function of the records alone."""
  if patience is None or len(history) <= patience:
    return False
  figures = [record[by] if BETTER_IS_LOWER[by] else -record[by] for record in history]
  return min(figures[-patience:]) >= min(figures[:-patience])
