from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tfm.config import DecodingConfig, TokenizerConfig
from tfm.interop.ctranslate2 import CTranslate2Error, write_ctranslate2
from tfm.interop.plain_tokenizer import vocabulary
from tfm.models.layout import to_layout
from tfm.special_ids import BOS, EOS, PAD
from tfm.text.tokenizer import train_tokenizers
from tfm.translator import Translator

ctranslate2 = pytest.importorskip('ctranslate2')

SOURCES = ['a man sees two dogs', 'two', 'his dog is walking and walking and walking']
TARGETS = ['ein Mann sieht zwei Hunde', 'zwei', 'sein Hund']
WIDTH = 48

BOTH = {
    'post': {},
    'pre': dict(norm='pre'),
    'sandwich': dict(norm='sandwich'),
    'rms': dict(norm='pre', norm_type='rms', biases='none', norm_epsilon=1e-2),
    'no_bias': dict(biases='none'),
    'qkv': dict(norm='pre', biases='qkv'),
    'all_biases': dict(biases='all', output_bias=True, embedding_norm=True, norm_epsilon=1e-2),
    'halves': dict(positions='sinusoidal_halves', feed_forward='gelu'),
    'learned': dict(positions='learned', max_positions=90, position_offset=2, scale_embeddings=False),
    'no_positions': dict(positions='none', feed_forward='gelu_tanh'),
    'rope': dict(positions='rope', rope_base=100.0, num_kv_heads=2),
    'rope_linear': dict(positions='rope', rope_scaling='linear', rope_factor=2.0),
    'relative': dict(positions='relative', relative_buckets=8, relative_max_distance=20, norm='pre', norm_type='rms',
                     biases='none', attention_scale=1.0, scale_output=True, feed_forward='geglu_tanh'),
    'one_kv_head': dict(num_kv_heads=1, feed_forward='silu'),
    'wide_heads': dict(d_k=6, d_v=6, feed_forward='swiglu', biases='all'),
    'untied': dict(tying='none', vocab_multiple=16, feed_forward='geglu'),
    'inputs': dict(tying='inputs'),
    'target': dict(tying='target', attention_scale=0.2),
    'softcap': dict(logit_softcap=2.0),
    'layers': dict(encoder_layers=1, decoder_layers=3, scan_layers=True),
}
ALONE = {
    'gpt': dict(norm='pre', biases='all', positions='learned', max_positions=90, feed_forward='gelu_tanh'),
    'llama': dict(norm='pre', norm_type='rms', biases='none', positions='rope', feed_forward='swiglu', num_kv_heads=2,
                  tying='none'),
    'qwen': dict(norm='pre', norm_type='rms', biases='qkv', positions='rope', qk_norm=True, num_kv_heads=2),
    'layer_qk_norm': dict(norm='pre', qk_norm=True),
    'alibi': dict(norm='pre', positions='alibi', num_heads=8, d_k=2, d_v=2),
    'alibi_6': dict(norm='pre', positions='alibi', num_heads=6, d_k=2, d_v=2),
    'gemma': dict(norm='sandwich', norm_type='rms', biases='none', positions='rope', feed_forward='geglu_tanh',
                  logit_softcap=3.0),
}


def log_probs(release, targets, sources=()) -> list[np.ndarray]:
  """Teacher forcing: of every id of every target (</s> at the end); <pad> and <s> are out, unless a softcap holds."""
  inputs = padded([[BOS, *ids[:-1]] for ids in targets])
  more = (padded([[*ids, EOS] for ids in sources]),) if sources else ()
  logits = jax.jit(release.model.apply)({'params': to_layout(release.params, 'unrolled')}, *more, inputs)
  logits = np.array(logits[..., :release.vocab_sizes[1]], np.float64)
  if release.config.model.logit_softcap is None:
    logits[..., [PAD, BOS]] = -np.inf
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  return [row[np.arange(len(ids)), ids] for row, ids in zip(logits, targets)]


def padded(rows) -> np.ndarray:
  return np.array([row + [PAD] * (WIDTH - len(row)) for row in rows], np.int32)


def words(tokenizer, text: str) -> list[str]:
  return [vocabulary(tokenizer)[i] for i in tokenizer.encode(text)]


@pytest.mark.parametrize('variant', BOTH)
def test_an_encoder_decoder_gives_the_same_probabilities(variant, make_release, tmp_path):
  """Of a given target, and of its own, which it wrote step by step with a cache, in a batch with padding."""
  release = make_release(**BOTH[variant])
  source, target = release.tokenizers.source, release.tokenizers.target
  engine = ctranslate2.Translator(str(write_ctranslate2(release, tmp_path / 'out')), compute_type='float32')
  tokens = [words(source, text) for text in SOURCES]
  given = engine.score_batch(tokens, [words(target, text) for text in TARGETS])
  written = engine.translate_batch(tokens, beam_size=3, length_penalty=0, min_decoding_length=0, max_decoding_length=10,
                                   return_scores=True, return_end_token=True)
  targets = [[*target.encode(text), EOS] for text in TARGETS]
  targets += [[vocabulary(target).index(token) for token in found.hypotheses[0]] for found in written]
  expected = log_probs(release, targets, 2 * [source.encode(text) for text in SOURCES])
  for found, values in zip(given, expected):
    np.testing.assert_allclose(found.log_probs, values, atol=2e-4)
  for found, values in zip(written, expected[3:]):
    np.testing.assert_allclose(found.scores[0], sum(values), atol=1e-3)


@pytest.mark.parametrize('variant', ALONE)
def test_a_decoder_alone_gives_the_same_probabilities(variant, make_release, tmp_path):
  release = make_release(encoder_layers=0, **ALONE[variant])
  target = release.tokenizers.target
  engine = ctranslate2.Generator(str(write_ctranslate2(release, tmp_path / 'out')), compute_type='float32')
  prompts = [['<s>', *words(target, text)] for text in TARGETS]
  given = engine.score_batch([[*prompt, '</s>'] for prompt in prompts])
  written = engine.generate_batch(prompts, max_length=8, beam_size=1, return_scores=True, end_token=[],
                                  include_prompt_in_result=False)
  texts = [target.encode(text) for text in TARGETS]
  expected = log_probs(release, [[*text, EOS] for text in texts]
                       + [text + found.sequences_ids[0] for text, found in zip(texts, written)])
  for found, values in zip(given, expected):
    np.testing.assert_allclose(found.log_probs, values, atol=2e-4)
  for found, text, values in zip(written, texts, expected[3:]):
    assert len(found.sequences_ids[0]) > 2
    np.testing.assert_allclose(found.scores[0], values[len(text):].mean(), atol=2e-4)


def test_the_same_search_finds_the_same(make_release, tmp_path):
  release = make_release(norm='pre', num_kv_heads=2)
  search = DecodingConfig(beam_size=3, length_penalty=0.6, length_penalty_form='power', stop='full', extra_length=12)
  ours = Translator(release.model, release.params, release.tokenizers, search).translate(SOURCES)
  engine = ctranslate2.Translator(str(write_ctranslate2(release, tmp_path / 'out')), compute_type='float32')
  names = release.tokenizers.target.vocabulary()
  for text, mine in zip(SOURCES, ours):
    tokens = words(release.tokenizers.source, text)
    found, = engine.translate_batch([tokens], beam_size=3, length_penalty=0.6, min_decoding_length=0,
                                    max_decoding_length=len(tokens) + 13, return_end_token=True, return_scores=True)
    assert [names[vocabulary(release.tokenizers.target).index(token)] for token in found.hypotheses[0]] == mine.tokens
    assert found.scores[0] > mine.score, '<pad> and <s> share in our probabilities, and not in theirs'


def test_pad_and_start_are_never_written(make_release, tmp_path):
  release = make_release(output_bias=True)
  release.params['output_bias'][[PAD, BOS]] = 50
  engine = ctranslate2.Translator(str(write_ctranslate2(release, tmp_path / 'out')), compute_type='float32')
  for found in engine.translate_batch([words(release.tokenizers.source, text) for text in SOURCES], beam_size=4,
                                      num_hypotheses=4, max_decoding_length=12):
    assert not {'<pad>', '<s>'} & {token for tokens in found.hypotheses for token in tokens}


def test_int8_is_smaller_and_close(make_release, tmp_path):
  release = make_release(positions='rope', d_model=64, d_ff=64)
  sizes, scores = {}, {}
  for quantization, compute_type in ((None, 'float32'), ('int8', 'float32'), ('int8', 'int8'), ('float16', 'float32')):
    folder = write_ctranslate2(release, tmp_path / f'{quantization}-{compute_type}', quantization)
    engine = ctranslate2.Translator(str(folder), compute_type=compute_type)
    sizes[quantization] = (folder / 'model.bin').stat().st_size
    result, = engine.score_batch([words(release.tokenizers.source, SOURCES[0])],
                                 [words(release.tokenizers.target, TARGETS[0])])
    scores[quantization, compute_type] = np.mean(result.log_probs)
  exact, multiplied = scores.pop((None, 'float32')), scores.pop(('int8', 'int8'))
  assert sizes['int8'] < 0.65 * sizes[None] and sizes['float16'] < 0.51 * sizes[None]
  np.testing.assert_allclose(list(scores.values()), exact, atol=0.1)
  # Without VNNI (AVX2) pairs of its 8-bit products are added in 16 bits, and saturate.
  cpu = Path('/proc/cpuinfo')
  np.testing.assert_allclose(multiplied, exact, atol=0.1 if cpu.exists() and 'vnni' in cpu.read_text() else 0.4)
  assert multiplied != exact


def test_every_kind_of_tokenizer_goes_with_it(make_release, tmp_path):
  pairs = [('a dog', 'ein Hund'), ('two dogs', 'zwei Hunde </s>')] * 4
  for kind, joint in (('unigram', False), ('char', True), ('byte', True), ('word', False)):
    tokenizers = train_tokenizers(TokenizerConfig(kind=kind, vocab_size=None if kind == 'byte' else 275, joint=joint),
                                  pairs)
    release = make_release(pair=tokenizers, tying='target')
    folder = write_ctranslate2(release, tmp_path / kind)
    names = ['shared'] if joint else ['source', 'target']
    assert [json.loads((folder / f'{name}_vocabulary.json').read_text()) for name in names] == [
        vocabulary(getattr(tokenizers, name, tokenizers.source)) for name in names]
    assert {file.name for file in (folder / 'tokenizer').iterdir()} == (
        {'tokenizer.json'} if joint else {'tokenizer.source.json', 'tokenizer.target.json'})
    assert ctranslate2.Translator(str(folder)).translate_batch([words(tokenizers.source, 'a dog')])


@pytest.mark.parametrize(('changes', 'fields'), [
    (dict(experts=2, biases='none', window=3), ['window=3', 'experts=2']),
    (dict(convolution='after'), ["convolution='after'"]),
    (dict(attention_sinks=True, attention_softcap=2.0), ['attention_softcap=2.0', 'attention_sinks=True']),
    (dict(qk_norm=True), ['qk_norm=True with an encoder']),
    (dict(positions='alibi'), ["positions='alibi' with an encoder"]),
    (dict(positions='relative', encoder_layers=0), ["positions='relative' without an encoder"]),
    (dict(d_k=2), ['d_k 2 beside d_v 4']),
    (dict(positions='rope', rope_scaling='yarn', rope_factor=2.0, rope_original_length=8), ["rope_scaling='yarn'"]),
    (dict(decoder_layers=0), [r'encoder-only \(decoder_layers=0\)']),
])
def test_what_it_cannot_run_is_refused_by_name(changes, fields, make_release, tmp_path):
  with pytest.raises(CTranslate2Error, match=f'cannot run a model with {", ".join(fields)}; export it to'):
    write_ctranslate2(make_release(**changes), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
