"""Does CTranslate2 translate like tfm? A trained run, its test set, both engines with the same beam search.

    python benchmarks/ctranslate2_agreement.py RUN [--sentences 1000] [--length-penalty 1.0] [--output FILE.json]

Both search with beam 5, stop when 5 hypotheses have ended, divide by n^alpha (n with </s>), and end at source length +
50. Where the outputs differ, both are scored by tfm's own log-probabilities (teacher forcing): a tie is a difference
below 1e-4. Then BLEU of tfm, CTranslate2 float32 and CTranslate2 int8.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path

import ctranslate2
import jax
import jax.numpy as jnp
import numpy as np

import tfm
from tfm.interop.ctranslate2 import write_ctranslate2
from tfm.interop.plain_tokenizer import vocabulary
from tfm.pipeline import read
from tfm.scores import bleu
from tfm.special_ids import BOS, EOS
from tfm.text.corpora import build_corpus

BEAM, EXTRA, TIE = 5, 50, 1e-4


def ours(translator: tfm.Translator, sources: list[str], alpha: float) -> tuple[list[list[int]], list[float]]:
  """Ids with </s>, and scores, of tfm's search."""
  same_search = translator.with_decoding(length_penalty_form='power', stop='full', extra_length=EXTRA)
  found = same_search.translate(sources, beam_size=BEAM, length_penalty=alpha)
  ids = {name: i for i, name in enumerate(translator.tokenizers.target.vocabulary())}
  return [[ids[token] for token in translation.tokens] for translation in found], [t.score for t in found]


def theirs(folder: Path, translator: tfm.Translator, sources: list[str], alpha: float, compute: str):
  """The same of CTranslate2's; sentences of one length share a limit."""
  engine = ctranslate2.Translator(str(folder), device='cpu', compute_type=compute)
  names, targets = vocabulary(translator.tokenizers.source), vocabulary(translator.tokenizers.target)
  ids = {name: i for i, name in enumerate(targets)}
  groups = collections.defaultdict(list)
  for index, source in enumerate(translator.tokenizers.source.encode_batch(sources)):
    groups[len(source)].append((index, [names[i] for i in source]))
  found: dict[int, tuple[list[int], float]] = {}
  for length, group in groups.items():
    results = engine.translate_batch(
        [tokens for _, tokens in group], beam_size=BEAM, length_penalty=alpha, max_decoding_length=length + 1 + EXTRA,
        min_decoding_length=0, return_end_token=True, return_scores=True, max_batch_size=64)
    for (index, _), result in zip(group, results):
      found[index] = [ids[token] for token in result.hypotheses[0]], result.scores[0]
  return [found[i][0] for i in range(len(sources))], [found[i][1] for i in range(len(sources))]


def score(translator: tfm.Translator, source: str, target: list[int], alpha: float) -> float:
  """tfm's log-probability of all tokens, over n^alpha."""
  source_1xS = jnp.array([translator.tokenizers.source.encode(source) + [EOS]])
  logits_1xTxV = translator.model.apply({'params': translator.params}, source_1xS, jnp.array([[BOS, *target[:-1]]]))
  log_probs_TxV = jax.nn.log_softmax(logits_1xTxV[0].astype(jnp.float32))
  return float(log_probs_TxV[jnp.arange(len(target)), jnp.array(target)].sum()) / len(target)**alpha


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('run')
  parser.add_argument('--sentences', type=int, default=1000)
  parser.add_argument('--length-penalty', type=float, default=1.0)
  parser.add_argument('--output', type=Path, default=Path(__file__).parent / 'results' / 'ctranslate2_agreement.json')
  arguments = parser.parse_args()
  alpha = arguments.length_penalty
  release, translator = read(arguments.run), tfm.load(arguments.run)
  pairs = build_corpus(release.config.data).test()[:arguments.sentences]
  sources, references = map(list, zip(*pairs))
  tokenizers = translator.tokenizers
  with tempfile.TemporaryDirectory() as folder:
    plain, int8 = (write_ctranslate2(release, Path(folder, name), quantization)
                   for name, quantization in (('float32', None), ('int8', 'int8')))
    bytes_ = {path.name: (path / 'model.bin').stat().st_size for path in (plain, int8)}
    mine, my_scores = ours(translator, sources, alpha)
    other, other_scores = theirs(plain, translator, sources, alpha, 'float32')
    small, _ = theirs(int8, translator, sources, alpha, 'int8')
  rows = []
  for i in (i for i in range(len(sources)) if mine[i] != other[i]):
    tfm_score, ct2_score = (score(translator, sources[i], target, alpha) for target in (mine[i], other[i]))
    rows.append({'sentence': i + 1, 'tfm': tokenizers.target.decode(mine[i]), 'ctranslate2':
                 tokenizers.target.decode(other[i]), 'score_tfm': tfm_score, 'score_ctranslate2': ct2_score,
                 'tie': abs(tfm_score - ct2_score) < TIE})
  same = len(sources) - len(rows)
  apart = max(abs(a - b) for a, b, x, y in zip(my_scores, other_scores, mine, other) if x == y)
  scores = {name: bleu([tokenizers.target.decode(ids) for ids in found], references)
            for name, found in (('tfm', mine), ('ctranslate2 float32', other), ('ctranslate2 int8', small))}
  print(f'identical: {same} of {len(sources)} ({100 * same / len(sources):.1f} %); their scores differ by at most '
        f'{apart:.1e}')
  for row in rows:
    print(f'  sentence {row["sentence"]}: {row["score_tfm"]:.6f} {row["score_ctranslate2"]:.6f}'
          f'{" (tie)" if row["tie"] else ""}\n    tfm  {row["tfm"]}\n    CT2  {row["ctranslate2"]}')
  for name, value in scores.items():
    print(f'{name:20} {value}')
  print(f'int8: {sum(a == b for a, b in zip(mine, small))} of {len(sources)} as tfm; model.bin {bytes_}')
  arguments.output.parent.mkdir(parents=True, exist_ok=True)
  arguments.output.write_text(json.dumps({
      'command': ' '.join(['python', sys.argv[0], 'RUN', *sys.argv[2:]]), 'date': datetime.date.today().isoformat(),
      'device': str(jax.devices()[0].device_kind), 'machine': f'{platform.machine()}, {jax.devices()[0].platform}',
      'versions': {'jax': jax.__version__, 'ctranslate2': ctranslate2.__version__, 'python': platform.python_version()},
      'beam_size': BEAM, 'length_penalty': alpha, 'sentences': len(sources), 'identical': same,
      'largest_score_difference_of_identical': float(np.float32(apart)),
      'bleu': {name: round(value.value, 2) for name, value in scores.items()},
      'signature': scores['tfm'].signature, 'model_bytes': bytes_, 'differing': rows}, indent=2) + '\n')


if __name__ == '__main__':
  main()
