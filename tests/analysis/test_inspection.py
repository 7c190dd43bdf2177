"""What the page of a sentence says is what the model does, in every family."""

from __future__ import annotations

import base64
import json
import re
from functools import cache, partial

import jax
import numpy as np
import pytest

from tfm.analysis import inspection
from tfm.analysis.alignment_error import word_starts
from tfm.analysis.inspection import InspectionError, inspect_page
from tfm.config import ConvolutionalConfig, DecodingConfig, RecurrentConfig, TransformerConfig
from tfm.encoder import Encoder
from tfm.generator import Generator
from tfm.models.build import build_model, initialize
from tfm.special_ids import BOS, EOS, SpecialIds
from tfm.text.tokenizer import Tokenizers, UnitTokenizer
from tfm.translator import Translator

TOKENIZER = UnitTokenizer('byte', [], extra_ids=1)
V, N = TOKENIZER.vocab_size, 2
transformer = partial(TransformerConfig, d_model=16, d_ff=24, num_heads=2, dropout=0.0)
recurrent = partial(RecurrentConfig, d_model=16, d_hidden=12, dropout=0.0)
CONFIGS = {
    'pre': transformer(encoder_layers=N, decoder_layers=N, norm='pre'),
    'post': transformer(encoder_layers=N, decoder_layers=N, norm='post', tying='none'),
    'decoder_only': transformer(encoder_layers=0, decoder_layers=N, norm='pre', positions='learned', max_positions=13),
    'encoder_only_pre': transformer(encoder_layers=N, decoder_layers=0, norm='pre'),
    'encoder_only_post': transformer(encoder_layers=N, decoder_layers=0, norm='post', output_transform=True),
    'bahdanau': recurrent(),
    'fixed_vector': recurrent(context='every_step'),
    'rnn_lm': recurrent(encoder_layers=0),
    'conv_s2s': ConvolutionalConfig(d_model=16, d_hidden=12, encoder_layers=N, decoder_layers=N, dropout=0.0,
                                    max_positions=32),
}
TEXT, TARGET = 'a bc de', 'fg h'


@cache
def loaded(family: str):
  model = build_model(CONFIGS[family], V, V)
  params = initialize(model, jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)  # none where it began, so that no norm is the identity
  keys = jax.random.split(jax.random.key(1), len(leaves))
  params = jax.tree.unflatten(tree, [x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)])
  tokenizers = Tokenizers(TOKENIZER, TOKENIZER)
  if CONFIGS[family].shape == 'encoder_decoder':
    return Translator(model, params, tokenizers, DecodingConfig(beam_size=2, extra_length=3))
  if CONFIGS[family].shape == 'decoder_only':
    return Generator(model, params, tokenizers, SpecialIds(source_prefix=(BOS,), source_suffix=()))
  return Encoder(model, params, tokenizers, SpecialIds(source_prefix=(BOS,)))


def payload(page) -> dict:
  return json.loads(re.search(r'id="payload">(.*?)</script>', page.html, re.DOTALL)[1])


def pattern(attention: dict) -> np.ndarray:
  levels = np.frombuffer(base64.b64decode(attention['weights']), np.uint8)
  shape = attention['layers'], attention['heads'], len(attention['queries']), len(attention['keys'])
  return levels.reshape(shape) / 255


def ids_of(family: str) -> tuple[list[int], ...]:
  """What the model reads."""
  shape, bare = CONFIGS[family].shape, TOKENIZER.encode
  if shape == 'encoder_decoder':
    return [*bare(TEXT), EOS], [BOS, *bare(TARGET)]
  return ([BOS, *bare(TEXT)] if shape == 'decoder_only' else [BOS, *bare(TEXT), EOS],)


def page_of(family: str):
  return inspect_page(loaded(family), TEXT, TARGET if CONFIGS[family].shape == 'encoder_decoder' else None)


VIEWS = {'pre': 'Encoder Decoder Cross', 'post': 'Encoder Decoder Cross', 'decoder_only': 'Decoder',
         'encoder_only_pre': 'Encoder', 'encoder_only_post': 'Encoder', 'bahdanau': 'Cross', 'fixed_vector': '',
         'rnn_lm': '', 'conv_s2s': 'Cross'}


@pytest.mark.parametrize('family', CONFIGS)
def test_the_page_is_of_what_the_model_does(family):
  found, ids = payload(page_of(family)), ids_of(family)
  lens, shape = found['lens'], CONFIGS[family].shape
  assert [each['name'] for each in found['attentions']] == VIEWS[family].split()
  for each in found['attentions']:
    weights = pattern(each)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=0.02)
    if each['name'] == 'Decoder':
      assert not np.triu(weights, 1).any()
    sides = {'Encoder': (ids[0], ids[0]), 'Decoder': (ids[-1], ids[-1]), 'Cross': (ids[-1], ids[0])}[each['name']]
    assert [each['queries'], each['keys']] == [TOKENIZER.tokens(side) for side in sides]

  owner = loaded(family)
  inputs = [np.array([side]) for side in ids]
  logits_TxV = np.asarray(jax.jit(owner.model.apply)({'params': owner.params}, *inputs))[0]
  probability_TxV = np.asarray(jax.nn.softmax(logits_TxV))
  best_TxK = np.argsort(-probability_TxV, axis=-1)[:, :5]
  np.testing.assert_allclose(np.array(lens['probability'][-1]) / 1e4, np.take_along_axis(probability_TxV, best_TxK, 1),
                             atol=2e-4)
  assert [[lens['vocabulary'][i] for i in cell] for cell in lens['tokens'][-1]] == [
      TOKENIZER.tokens(row) for row in best_TxK]
  layers = 1 if isinstance(CONFIGS[family], RecurrentConfig) else N
  assert len(lens['rows']) == layers and lens['read'] == TOKENIZER.tokens(ids[-1])
  if layers > 1:
    assert lens['probability'][0] != lens['probability'][-1]

  expected = {'encoder_decoder': [*ids[-1][1:], EOS], 'decoder_only': [*ids[-1][1:], None],
              'encoder_only': ids[-1]}[shape]
  assert lens['expected'] == [None if i is None else TOKENIZER.tokens([i])[0] for i in expected]
  for t, label in enumerate(expected):
    if label is not None:
      assert lens['rank'][-1][t] == 1 + (logits_TxV[t] > logits_TxV[t, label]).sum()
      assert abs(lens['chance'][-1][t] / 1e4 - probability_TxV[t, label]) < 2e-4
  assert (found['alignment'] is not None) == ('Cross' in VIEWS[family])


def test_the_alignment_has_the_words_without_special_tokens():
  alignment = payload(page_of('bahdanau'))['alignment']
  for side, text in (('source', TEXT), ('target', TARGET)):
    tokens = TOKENIZER.tokens(TOKENIZER.encode(text))
    assert alignment[side] == {'begin': 0, 'tokens': tokens, 'starts': word_starts(tokens).tolist()}


def test_a_translation_is_the_models_own_where_none_is_given():
  translator = loaded('pre')
  found = payload(inspect_page(translator, TEXT))
  translation, = translator.translate([TEXT], return_attention=True)
  cross = found['attentions'][2]
  assert cross['predicted'][:len(translation.tokens)] == translation.tokens
  assert found['title'] == f'{TEXT} → {translation.text}'
  np.testing.assert_allclose(pattern(cross)[:, :, :len(translation.tokens)], translation.attention, atol=0.003)


def test_a_translation_that_is_cut_at_the_last_position_is_shown_up_to_there():
  translator = loaded('conv_s2s').with_decoding(extra_length=30)
  translation, = translator.translate([TEXT])
  assert not translation.hypotheses[0].finished and len(translation.tokens) == 32
  lens = payload(inspect_page(translator, TEXT))['lens']
  assert lens['read'] == ['<s>', *translation.tokens[:-1]] and lens['expected'] == translation.tokens


def test_what_stands_behind_a_mask_is_not_known():
  encoder = loaded('encoder_only_pre')
  lens = payload(inspect_page(encoder, 'a<mask>c'))['lens']
  assert lens['read'] == ['<s>', 'a', TOKENIZER.tokens([TOKENIZER.mask_id])[0], 'c', '</s>']
  assert lens['expected'] == ['<s>', 'a', None, 'c', '</s>']
  guesses = [filling.token for filling in encoder.fill_mask('a<mask>c')[0]]
  assert [lens['vocabulary'][i] for i in lens['tokens'][-1][2]] == guesses


@pytest.mark.parametrize('family, arguments, message', [
    ('pre', dict(text=' \n'), 'The text is empty'),
    ('pre', dict(text=TEXT, target=''), 'The target is empty'),
    ('pre', dict(text=TEXT, target=TARGET, top_k=0), 'top_k is 0'),
    ('decoder_only', dict(text=TEXT, target=TARGET), 'leave it out'),
    ('encoder_only_pre', dict(text=TEXT, target=TARGET), 'leave it out'),
    ('decoder_only', dict(text=2 * TEXT), 'The text has 15 tokens with special ones, but the model learned only 13'),
    ('conv_s2s', dict(text=TEXT, target=40 * 'a'), 'The target has 41 tokens'),
])
def test_what_cannot_be_shown_is_one_sentence(family, arguments, message):
  with pytest.raises(InspectionError, match=message):
    inspect_page(loaded(family), **arguments)


def test_a_page_too_large_to_draw_is_refused_before_it_is_computed(monkeypatch):
  monkeypatch.setattr(inspection, 'LARGEST', 100)
  monkeypatch.setattr(inspection, 'run', None)
  with pytest.raises(InspectionError, match='a browser draws 100 at most; shorten it'):
    inspect_page(loaded('decoder_only'), TEXT)
