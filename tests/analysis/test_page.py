from __future__ import annotations

import base64
import html
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tfm.analysis.page import LARGEST, Alignment, Attention, Lens, attention_page

N, H, T, S, K = 2, 3, 4, 5, 2
SOURCE = ['▁a', 'b', '▁c', 'd', '</s>']
TARGET = ['<s>', '▁x', 'y', '▁z']
HOSTILE = ['<script>', '</script>', '<!--', ']]>', '&lt;', '\u2028\u2029', '"\'\\', '\U0001f600', '__PAYLOAD__', '']


def weights(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).dirichlet(np.ones(shape[-1]), shape[:-1])


def cross(**changes) -> Attention:
  return Attention(**({'name': 'Cross', 'pattern_NxHxTxS': weights(N, H, T, S), 'queries': TARGET, 'keys': SOURCE,
                       'predicted': [*TARGET[1:], None]} | changes))


def lens(**changes) -> Lens:
  return Lens(**({'read': TARGET, 'rows': ['layer 1', 'layer 2'], 'tokens': [[['p', 'q']] * T] * N,
                  'probability_NxTxK': np.full((N, T, K), 0.25), 'expected': [*TARGET[1:], None],
                  'expected_probability_NxT': np.full((N, T), 0.125),
                  'expected_rank_NxT': np.full((N, T), 3)} | changes))


def alignment(**changes) -> Alignment:
  return Alignment(**({'attention': 'Cross', 'keys': (0, 4), 'queries': (0, 3), 'key_starts': [0, 2],
                       'query_starts': [0, 2]} | changes))


def payload(page) -> dict:
  text, = re.findall(r'<script type="application/json" id="payload">(.*?)</script>', page.html, re.DOTALL)
  return json.loads(text)


def test_weights_come_back_to_within_half_a_level():
  one = cross()
  found = payload(attention_page([one], title='t', about='a'))
  shown, = found['attentions']
  levels = np.frombuffer(base64.b64decode(shown['weights']), np.uint8).reshape(N, H, T, S)
  np.testing.assert_allclose(levels / 255, one.pattern_NxHxTxS, atol=0.5 / 255 + 1e-6)
  assert (shown['layers'], shown['heads'], shown['queries'], shown['keys']) == (N, H, TARGET, SOURCE)
  assert shown['predicted'] == ['▁x', 'y', '▁z', None]
  assert (found['title'], found['about'], found['alignment'], found['lens']) == ('t', 'a', None, None)


def test_the_words_of_an_alignment_are_those_that_its_rows_predict_and_read():
  found = payload(attention_page([cross()], title='', alignment=alignment()))['alignment']
  assert found == {'attention': 'Cross', 'source': {'begin': 0, 'tokens': SOURCE[:4], 'starts': [0, 2]},
                   'target': {'begin': 0, 'tokens': TARGET[1:], 'starts': [0, 2]}}


def test_a_lens_keeps_tokens_and_probabilities():
  probability = np.random.default_rng(0).random((N, T, K))
  found = payload(attention_page(title='', lens=lens(probability_NxTxK=probability)))['lens']
  np.testing.assert_allclose(np.array(found['probability']) / 1e4, probability, atol=1e-4)
  assert [found['vocabulary'][i] for i in found['tokens'][1][3]] == ['p', 'q']
  assert found['chance'][0][0] == 1250 and found['rank'][1][2] == 3 and found['expected'][-1] is None


def test_tokens_that_look_like_html_stay_text():
  for tokens in (HOSTILE[:5], HOSTILE[5:]):
    page = attention_page([cross(keys=tokens)], title='</script><b>')
    found = payload(page)
    assert found['attentions'][0]['keys'] == tokens and found['title'] == '</script><b>'
    data = page.html.split('id="payload">')[1].split('</script>')[0]
    assert not set('<>&\u2028\u2029') & set(data) and data.isascii()
  assert page.html.count('</script>') == 2, 'the payload and the program'


def test_the_page_asks_for_nothing():
  page = attention_page([cross()], title='t').html
  assert "default-src 'none'" in page
  assert not re.search(r'https?:|//\w+\.|@import|<link|\bsrc=|fetch\(|XMLHttpRequest|WebSocket|innerHTML|eval\(', page)


def test_a_page_of_the_base_size_is_small():
  words, base = [f'▁word{i}' for i in range(69)], weights(6, 8, 64, 64)
  read, guesses = words[:64], [[words[t:t + 5] for t in range(64)]] * 6
  page = attention_page(
      [Attention(name, base, read, read) for name in ('Encoder', 'Decoder', 'Cross')], title='base',
      lens=Lens(read, [f'layer {i}' for i in range(6)], guesses, weights(6, 64, 5), read, weights(6, 64),
                np.ones((6, 64), int)))
  print(f'{len(page.html):,} bytes')
  assert len(page.html.encode()) < 1.5e6


def test_a_notebook_shows_it_in_a_frame(tmp_path):
  page = attention_page([cross(keys=HOSTILE[:S])], title='<t> & "t"')
  frame = page._repr_html_()
  srcdoc, = re.findall(r'srcdoc="([^"]*)"', frame)
  assert html.unescape(srcdoc) == page.html
  assert frame.startswith('<iframe ') and frame.endswith('></iframe>') and 'sandbox="allow-scripts"' in frame
  assert page.write(tmp_path / 'page.html').read_text(encoding='utf-8') == page.html
  assert len(repr(page)) < 100


@pytest.mark.parametrize('arguments, message', [
    (dict(), 'neither attention nor a lens'),
    (dict(attentions=[cross(), cross()]), 'a name of its own'),
    (dict(attentions=[cross(pattern_NxHxTxS=weights(H, T, S))]), 'give NxHxTxS'),
    (dict(attentions=[cross(keys=[], pattern_NxHxTxS=np.zeros((N, H, T, 0)))]), 'at least one token'),
    (dict(attentions=[cross(keys=SOURCE[1:])]), '4 keys; give 5'),
    (dict(attentions=[cross(predicted=TARGET[1:])]), '3 predicted tokens; give 4'),
    (dict(attentions=[cross(same=True)]), 'queries and keys differ'),
    (dict(attentions=[cross(pattern_NxHxTxS=np.full((N, H, T, S), np.nan))]), 'from 0 to 1'),
    (dict(attentions=[cross(pattern_NxHxTxS=np.full((N, H, T, S), 1.5))]), 'from 0 to 1'),
    (dict(attentions=[cross(pattern_NxHxTxS=np.broadcast_to(np.zeros(1), (1, 1, LARGEST, 2)))]), 'shorten the text'),
    (dict(attentions=[cross()], alignment=alignment(attention='X')), 'not among the attentions'),
    (dict(attentions=[cross()], alignment=alignment(queries=(0, 4))), 'leave one row behind'),
    (dict(attentions=[cross()], alignment=alignment(keys=(3, 3))), 'a begin below its end'),
    (dict(attentions=[cross()], alignment=alignment(key_starts=[0, 2, 2])), 'numbers that grow'),
    (dict(attentions=[cross()], alignment=alignment(query_starts=[1])), 'numbers that grow from 0'),
    (dict(lens=lens(rows=['layer 1'])), 'The lens has 1 rows'),
    (dict(lens=lens(expected=TARGET[1:])), '3 expected tokens'),
    (dict(lens=lens(tokens=[[['p']] * T] * N)), 'The lens has'),
])
def test_what_does_not_fit_is_one_sentence(arguments, message):
  with pytest.raises(ValueError, match=message):
    attention_page(title='', **arguments)


def test_it_needs_no_jax():
  code = "import sys, tfm.analysis.page; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0
