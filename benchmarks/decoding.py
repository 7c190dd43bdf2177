"""Decoding with tfm, CTranslate2 and transformers: the same weights and sources, in turn; exactly 20 tokens each.

    pip install -e '.[bench]'
    python benchmarks/decoding.py [--batches 1 64] [--beams 1 4] [--engines ...] [--rounds 8] [--output FILE.json]

Transformer-base (6 + 6 layers, width 512, 8,000 words) with random weights and sources of 16 tokens. A bias keeps </s>
and single bytes from every output, so all have 20 words; how many sentences come out the same as tfm's is printed.

- tfm: `Translator.translate`, from text to text, so its figures include the tokenizer.
- ct2_1x2, ct2_2x1: CTranslate2, float32, exported by tfm: 1 worker of 2 threads, 2 workers of 1, each with its share of
  the batch; the faster one is the baseline. ct2_int8_...: for information, their outputs differ.
- transformers: `generate` of MarianMTModel in PyTorch.

The limit of batch 1 greedy is reading: the encoder's weights once and the decoder's 20 times, at the rate of `read` in
the same run (`limits.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path

import limits
import numpy as np
from side_by_side import RESULTS, alternate, each, percentiles, ratio, running, serve, summary, write

from tfm.config import Config, DecodingConfig, TokenizerConfig, TransformerConfig

SOURCE, TOKENS = 16, 20
MODEL = TransformerConfig(6, 6, 512, 2048, 8, biases='all', positions='sinusoidal_halves', norm_epsilon=1e-5,
                          output_bias=True)
SMALL = dataclasses.replace(MODEL, encoder_layers=1, decoder_layers=1, d_model=32, d_ff=64, num_heads=2)
VOCABULARY, SMALL_VOCABULARY = 8000, 400
FIRST_WORD, NEVER = 260, -1e4
"""Before it are special ids and bytes; the bias that keeps them from every output."""

CT2 = {f'ct2{"_int8" * (kind == "int8")}_{workers}x{threads}': (kind, workers, threads)
       for kind in ('float32', 'int8') for workers, threads in ((1, 2), (2, 1))}
ENGINES = ('tfm', *CT2, 'transformers')


def write_models(folder: Path, small: bool) -> dict:
  """Random weights as a release of tfm, for CTranslate2 and for transformers; gives bytes of float32 by part."""
  import jax

  from tfm.interop.ctranslate2 import write_ctranslate2
  from tfm.interop.huggingface import to_huggingface
  from tfm.interop.release import Release, write_release
  from tfm.models.build import build_model, count_parameters, initialize
  from tfm.special_ids import OURS
  from tfm.text.tokenizer import train_tokenizers
  model, size = (SMALL, SMALL_VOCABULARY) if small else (MODEL, VOCABULARY)
  words = [f'w{number}' for number in range(size - FIRST_WORD)]
  tokenizers = train_tokenizers(TokenizerConfig(kind='word', vocab_size=size), [(' '.join(words),)])
  params = initialize(build_model(model, size, size), jax.random.key(0))
  params['output_bias'] = params['output_bias'].at[:FIRST_WORD].set(NEVER)
  decoding = DecodingConfig(extra_length=TOKENS - SOURCE, length_penalty_form='power', length_penalty=1.0)
  config = Config(model=model, tokenizer=TokenizerConfig(kind='word', vocab_size=size), decoding=decoding)
  release = Release(config, params, tokenizers, (size, size))
  write_release(release, folder / 'tfm')
  write_ctranslate2(release, folder / 'ct2')
  to_huggingface(folder / 'marian', model, params, OURS, 'marian')
  rng = np.random.default_rng(0)
  sources = [' '.join(rng.choice(words, SOURCE - 1)) for _ in range(256)]
  (folder / 'sources.json').write_text(json.dumps(sources))
  cross = [layer['cross_attention'][name] for layer in params['decoder'].values() for name in ('key', 'value')]
  once = count_parameters(params['encoder']) + count_parameters(cross)
  table = count_parameters(params['target_embedding'])  # as the output projection
  return {'once': 4 * once, 'each_token': 4 * (count_parameters(params['decoder']) - count_parameters(cross) + table)}


class Sources:
  """Batch after batch of the sentences, round and round."""

  def __init__(self, folder: Path, batch: int):
    self.sentences, self.batch, self.place = json.loads((folder / 'sources.json').read_text()), batch, 0

  def next(self) -> list[str]:
    begin = self.place % len(self.sentences)
    self.place += self.batch
    return (self.sentences * 2)[begin:begin + self.batch]


def prepare(engine: str, folder: Path, batch: int, beam: int):
  """Translations of the first batch, and what times the next ones."""
  from tfm.text.tokenizer import Tokenizers
  tokenizer = Tokenizers.load(folder / 'ct2' / 'tokenizer').source
  sources = Sources(folder, batch)
  first = sources.next()
  make = {'tfm': ours, 'transformers': transformers_generate}.get(engine, ct2)
  translate = make(engine, folder, tokenizer, beam, first)
  outputs = translate(first)
  if any(len(tokens) != TOKENS for tokens in outputs):
    raise RuntimeError(f'{engine} wrote {sorted({len(tokens) for tokens in outputs})} tokens, not {TOKENS}.')
  return {'outputs': outputs, 'work': {'tokens': batch * TOKENS}}, each(lambda: translate(sources.next()))


def ours(engine, folder: Path, tokenizer, beam: int, first: list[str]):
  import tfm
  translator = tfm.load(folder / 'tfm')
  return lambda sentences: [found.tokens for found in translator.translate(sentences, beam_size=beam)]


def ct2(engine: str, folder: Path, tokenizer, beam: int, first: list[str]):
  import ctranslate2
  kind, workers, threads = CT2[engine]
  translator = ctranslate2.Translator(str(folder / 'ct2'), compute_type=kind, inter_threads=workers,
                                      intra_threads=threads)
  names = tokenizer.vocabulary()
  share = max(1, len(first) // workers)
  tokens = {sentence: [names[i] for i in tokenizer.encode(sentence)]
            for sentence in json.loads((folder / 'sources.json').read_text())}
  return lambda sentences: [found.hypotheses[0] for found in translator.translate_batch(
      [tokens[sentence] for sentence in sentences], beam_size=beam, max_batch_size=share, max_decoding_length=TOKENS)]


def transformers_generate(engine, folder: Path, tokenizer, beam: int, first: list[str]):
  import torch
  from transformers import GenerationConfig, MarianMTModel

  from tfm.special_ids import BOS, EOS, PAD
  model = MarianMTModel.from_pretrained(folder / 'marian').eval()
  names = tokenizer.vocabulary()
  settings = GenerationConfig(max_new_tokens=TOKENS, num_beams=beam, do_sample=False, decoder_start_token_id=BOS,
                              eos_token_id=EOS, pad_token_id=PAD)
  ids = {sentence: [*tokenizer.encode(sentence), EOS]
         for sentence in json.loads((folder / 'sources.json').read_text())}

  @torch.inference_mode()
  def translate(sentences):
    source = torch.tensor([ids[sentence] for sentence in sentences])
    found = model.generate(source, attention_mask=torch.ones_like(source), generation_config=settings)
    return [[names[i] for i in row[1:]] for row in found.tolist()]

  return translate


def measure(folder: Path, bytes_: dict, batch: int, beam: int, arguments) -> list[dict]:
  command = [str(Path(__file__).resolve()), '--folder', str(folder), '--batches', str(batch), '--beams', str(beam)]
  commands = {engine: [*command, '--engine', engine] for engine in arguments.engines}
  with running(commands | limits.commands('read')) as engines:
    found = alternate(engines, arguments.rounds, arguments.turn)
  reading = summary(found.pop('read'), engines['read'].facts['work'])['bytes_per_second']
  rows = [{'batch': batch, 'beam': beam, 'engine': name, **summary(rounds, engines[name].facts['work'])}
          for name, rounds in found.items()]
  exact = [row for row in rows if row['engine'] in CT2 and CT2[row['engine']][0] == 'float32']
  baseline = min(exact, key=lambda row: row['seconds'])['engine'] if exact else arguments.engines[0]
  written = {name: engines[name].facts['outputs'] for name in found}
  for row in rows:
    name = row['engine']
    row |= {'baseline': baseline, **ratio(found[name], found[baseline]),
            'same_as_tfm': sum(a == b for a, b in zip(written[name], written['tfm'])) / batch,
            'limit_read_bytes_per_second': reading}
    text = ''
    if batch == 1:
      row['latency_seconds'] = percentiles(found[name])
      text = ', '.join(f'{p} {1e3 * value:.1f}' for p, value in row['latency_seconds'].items()) + ' ms'
    if batch == 1 and beam == 1 and 'int8' not in name:
      row['share_of_limit'] = (bytes_['once'] + TOKENS * bytes_['each_token']) / reading / row['seconds']
      text += f', {row["share_of_limit"]:.0%} of the limit'
    print(f'batch {batch:2} beam {beam} {name:13} {row["tokens_per_second"]:8.0f} tokens/s, x{row["ratio"]:.2f} '
          f'[{row["ratio_range"][0]:.2f}, {row["ratio_range"][1]:.2f}] of {baseline}, {row["same_as_tfm"]:.0%} the '
          f'same {text}', flush=True)
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 64])
  parser.add_argument('--beams', type=int, nargs='+', default=[1, 4])
  parser.add_argument('--engines', nargs='+', choices=ENGINES, default=list(ENGINES), help='tfm is always one')
  parser.add_argument('--rounds', type=int, default=8)
  parser.add_argument('--turn', type=float, default=2.0, help='seconds of a turn')
  parser.add_argument('--small', action='store_true', help='one layer, two cells, to see that it runs')
  parser.add_argument('--output', type=Path, default=RESULTS / 'decoding.json')
  parser.add_argument('--engine', choices=ENGINES, help=argparse.SUPPRESS)
  parser.add_argument('--folder', type=Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.engine:
    return serve(lambda: prepare(arguments.engine, arguments.folder, arguments.batches[0], arguments.beams[0]))
  if arguments.small:
    arguments.rounds, arguments.turn = 2, 0.02
  arguments.engines = list(dict.fromkeys(['tfm', *arguments.engines]))
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    bytes_ = write_models(Path(folder), arguments.small)
    cells = [(1, 1), (4, 2)] if arguments.small else itertools.product(arguments.batches, arguments.beams)
    for batch, beam in cells:
      rows += measure(Path(folder), bytes_, batch, beam, arguments)
  write(arguments.output, source_tokens=SOURCE, output_tokens=TOKENS, weight_bytes=bytes_, rows=rows)


if __name__ == '__main__':
  main()
