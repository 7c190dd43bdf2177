"""Vectors, classes and guesses of a text do not depend on the texts beside it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tfm.config import TransformerConfig
from tfm.encoder import Encoder, EncoderError
from tfm.models.build import build_model, initialize
from tfm.special_ids import SpecialIds
from tfm.text.tokenizer import Tokenizers

TEXTS = ['abc', 'thequickbrownfox', '', 'z', 'abd']


class Letters:

  mask_id, mask_token = 30, '<mask>'

  def encode_batch(self, texts):
    return [[4 + ord(letter) - 97 for letter in text] for text in texts]

  def decode(self, ids):
    return ''.join(chr(97 + i - 4) for i in ids)

  def tokens(self, ids):
    return [self.decode([i]) for i in ids]


def make(**fields) -> Encoder:
  config = TransformerConfig(**{**dict(encoder_layers=2, decoder_layers=0, d_model=16, d_ff=32, num_heads=2,
                                  num_labels=3),
                                **fields})
  model = build_model(config, 31, 31)
  params = jax.tree.map(lambda leaf: 2 * leaf, initialize(model, jax.random.key(0)))
  return Encoder(model, params, Tokenizers(Letters(), Letters()), SpecialIds(source_prefix=(1,)))


@pytest.mark.parametrize('fields', [{}, dict(pooling='first', pooler=True), dict(norm='pre', token_types=2)], ids=str)
def test_a_text_has_one_vector_whatever_stands_beside_it(fields):
  encoder = make(**fields)
  together, classes = encoder.embed(TEXTS), encoder.classify(TEXTS)
  assert together.shape == (5, 16) and classes.shape == (5, 3)
  np.testing.assert_allclose(classes.sum(1), 1, rtol=1e-6)
  for rows in (1, 2):
    np.testing.assert_allclose(encoder.embed(TEXTS, batch_rows=rows), together, atol=1e-5)
    np.testing.assert_allclose(encoder.classify(TEXTS, batch_rows=rows), classes, atol=1e-5)
  for index, text in enumerate(TEXTS):
    ids = [[1, *Letters().encode_batch([text])[0], 2]]
    alone = encoder.model.apply({'params': encoder.params}, np.array(ids), method='embed')
    np.testing.assert_allclose(together[index], alone[0], atol=1e-5)


def test_masks_are_filled_by_the_models_probabilities():
  encoder = make(tying='none')
  found = encoder.fill_mask('ab<mask>d<mask>', top_k=4)
  ids = np.array([[1, 4, 5, 30, 7, 30, 2]])
  logits = np.asarray(encoder.model.apply({'params': encoder.params}, ids))[0]
  for guesses, place in zip(found, (3, 5)):
    probabilities = np.exp(logits[place] - logits[place].max())
    probabilities /= probabilities.sum()
    assert [guess.token for guess in guesses] == [Letters().decode([i]) for i in np.argsort(-probabilities)[:4]]
    np.testing.assert_allclose([guess.probability for guess in guesses], -np.sort(-probabilities)[:4], rtol=1e-4)
  assert found[0][0].text == f'ab{found[0][0].token}d<mask>' and found[1][0].text == f'ab<mask>d{found[1][0].token}'


def test_what_cannot_be_done_is_refused(monkeypatch):
  encoder = make(num_labels=0, positions='learned', max_positions=8)
  with pytest.raises(EncoderError, match='no classification head'):
    encoder.classify(['a'])
  with pytest.raises(EncoderError, match='a list of texts'):
    encoder.embed('a')
  with pytest.raises(EncoderError, match='batch_rows is 0'):
    encoder.embed(['a'], batch_rows=0)
  with pytest.raises(EncoderError, match='Text 2 has 9 tokens, but the model learned only 8'):
    encoder.embed(['a', 'abcdefg'])
  with pytest.raises(EncoderError, match='has no <mask>'):
    encoder.fill_mask('a')
  with pytest.raises(EncoderError, match='top_k is 0'):
    encoder.fill_mask('<mask>', top_k=0)
  monkeypatch.setattr(Letters, 'mask_id', None)
  with pytest.raises(EncoderError, match='not trained with masks'):
    encoder.fill_mask('<mask>')
