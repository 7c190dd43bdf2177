"""How good translations are: BLEU and chrF through sacreBLEU, always with the signature that says how."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
  """A corpus score and the sacreBLEU signature without which it means nothing."""

  name: str
  value: float
  """0 to 100."""
  signature: str
  interval: float | None = None
  """Half-width of the 95 % bootstrap interval over sentences, where it was asked for."""

  def __str__(self) -> str:
    interval = '' if self.interval is None else f' +- {self.interval:.2f}'
    return f'{self.name} {self.value:.2f}{interval}  {self.signature}'


BOOTSTRAP = 1000
"""Resamples of the bootstrap; sacreBLEU draws them with seed 12345."""


def bleu(hypotheses: Sequence[str], references: Sequence[str], bootstrap: bool = False) -> Score:
  """Cased BLEU with the 13a tokenisation: the figure to publish (Post 2018)."""
  from sacrebleu.metrics import BLEU
  return _score('BLEU', BLEU(), hypotheses, references, bootstrap)


def chrf(hypotheses: Sequence[str], references: Sequence[str], bootstrap: bool = False) -> Score:
  """chrF2 (Popovic 2015)."""
  return _score('chrF2', _chrf(), hypotheses, references, bootstrap)


def has_4_grams(references: Sequence[str]) -> bool:
  """Whether BLEU can count: it looks at four words in a row, and is 0 where no reference has as many."""
  return any(len(reference.split()) >= 4 for reference in references)


def _chrf():
  from sacrebleu.metrics import CHRF

  class Chrf(CHRF):

    def _compute_f_score(self, statistics) -> float:
      # 0.0 without a match and a float32 of NumPy with one: `statistics.mean` over resamples of both kinds fails.
      return float(super()._compute_f_score(statistics))

  return Chrf()


def tokenized_bleu(hypotheses: Sequence[str], references: Sequence[str], language: str,
                   bootstrap: bool = False) -> Score:
  """BLEU over lower-cased Moses tokens, as papers on Multi30k report it; only for comparison with them.

  Raises:
    ModuleNotFoundError: sacremoses is missing; it comes with the extra `moses`.
  """
  from sacrebleu.metrics import BLEU
  try:
    from sacremoses import MosesPunctNormalizer, MosesTokenizer
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError("The lower-cased tokenised BLEU needs Moses tokens: pip install 'tfm[moses]'.") from error
  normalizer, tokenizer = MosesPunctNormalizer(lang=language), MosesTokenizer(lang=language)

  def prepare(lines):
    return [tokenizer.tokenize(normalizer.normalize(line.lower()), return_str=True, escape=False) for line in lines]

  return _score('BLEU (lower-cased Moses tokens)', BLEU(tokenize='none', force=True), prepare(hypotheses),
                prepare(references), bootstrap)


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
  """Per cent of sentences that equal their reference."""
  return 100.0 * sum(h == r for h, r in zip(hypotheses, references, strict=True)) / max(len(references), 1)


def paired_bootstrap(systems: dict[str, Sequence[str]], references: Sequence[str]) -> str:
  """sacreBLEU's paired bootstrap (Koehn 2004) of every system against the first, as a table.

  With a single system there is nothing to pair: the interval of `bleu(..., bootstrap=True)` stands alone.
  """
  from sacrebleu.metrics import BLEU, CHRF
  from sacrebleu.significance import PairedTest
  test = PairedTest(list(systems.items()), {'BLEU': BLEU(references=[list(references)]),
                                            'chrF2': CHRF(references=[list(references)])},
                    references=None, test_type='bs', n_samples=BOOTSTRAP)
  signatures, results = test()
  lines, baseline = [], list(next(iter(systems.values())))
  for index, (name, hypotheses) in enumerate(systems.items()):
    # Of equal outputs no resample differs, which sacreBLEU counts as p = 1 / (resamples + 1).
    same = index > 0 and list(hypotheses) == baseline
    cells = ['same output as the first'] if same else []
    for metric in ('BLEU', 'chrF2'):
      result = results[metric][index]
      p = '' if same or result.p_value is None else f' (p = {result.p_value:.4f})'
      cells.append(f'{metric} {result.score:.2f}, mean {result.mean:.2f} +- {result.ci:.2f}{p}')
    lines.append(f'{name}: {"; ".join(cells)}')
  return '\n'.join(lines + [f'{metric}: {signature}' for metric, signature in signatures.items()])


def _score(name, metric, hypotheses, references, bootstrap) -> Score:
  arguments = {'n_bootstrap': BOOTSTRAP} if bootstrap else {}
  result = metric.corpus_score(list(hypotheses), [list(references)], **arguments)
  signature = str(metric.get_signature())
  interval = None
  if bootstrap:
    # The half-width is public only as JSON, and left out of it where all resamples score 0.
    report = json.loads(result.format(width=6, signature=signature, is_json=True))
    interval = report['confidence_var'] if result.score > 0 else 0.0
  return Score(name, result.score, signature, interval)
