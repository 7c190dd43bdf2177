from __future__ import annotations

import numpy as np
import pytest

import tfm
from tfm.interop.huggingface import load_release
from tfm.interop.release import write_release
from tfm.text.huggingface_tokenizer import HuggingFaceTokenizer, open_tokenizers
from tfm.text.tokenizer import TokenizerError, Tokenizers

EXTRA = 'needs {} to compare with: pip install "tfm[oracle,huggingface]"'
pytest.importorskip('torch', reason=EXTRA.format('PyTorch'))
transformers = pytest.importorskip('transformers', reason=EXTRA.format('transformers'))

V = 19


@pytest.fixture
def folder(tmp_path):
  """A small BERT with a tokenizer of a few letters."""
  folder = tmp_path / 'bert'
  transformers.BertForMaskedLM(transformers.BertConfig(
      vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
      max_position_embeddings=20)).save_pretrained(folder)
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdef', '##a', '##b']
  transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
  return folder


def test_tokenizer(folder, tmp_path):
  tokenizer = HuggingFaceTokenizer.load(folder)
  assert tokenizer.encode_batch(['a cab', '', 'fz']) == [[5, 7, 11, 12], [], [1]]
  assert tokenizer.encode('bad') == tokenizer.encode_batch(['bad'])[0]
  assert tokenizer.decode([2, 5, 7, 11, 12, 3, 0]) == 'a cab'
  assert tokenizer.tokens([2, 7, 11, 99]) == ['[CLS]', 'c', '##a', '<99>']
  assert (tokenizer.vocab_size, tokenizer.framing) == (13, ((2,), (3,)))
  assert (tokenizer.mask_token, tokenizer.mask_id) == ('[MASK]', 4)
  assert tokenizer.vocabulary()[5:8] == ['a', 'b', 'c']
  tokenizer.save(tmp_path / 'saved')
  assert HuggingFaceTokenizer.load(tmp_path / 'saved').vocabulary() == tokenizer.vocabulary()


class Two:
  """A tokenizer of two languages, like MarianMT's: the target is in capitals."""

  def __len__(self):
    return 300

  def __call__(self, text=None, text_target=None, **_):
    texts = text or [target.upper() for target in text_target]
    return {'input_ids': [list(text.encode()) for text in texts]}

  def save_pretrained(self, folder):
    folder.mkdir()


def test_target(tmp_path, monkeypatch):
  """Which side it is for is kept."""
  monkeypatch.setattr(transformers.AutoTokenizer, 'from_pretrained', lambda folder, local_files_only: Two())
  for side, ids in ((False, [97]), (True, [65])):
    HuggingFaceTokenizer(Two(), target=side).save(tmp_path / str(side))
    assert HuggingFaceTokenizer.load(tmp_path / str(side)).encode('a') == ids


def test_release(folder, monkeypatch):
  release = load_release(folder)
  assert (release.vocab_sizes, release.special.source_prefix, release.special.source_suffix) == ((V, V), (2,), (3,))
  assert release.tokenizers.joint and release.tokenizers.source.encode('a') == [5]
  assert release.named()  # the parameters are those of its config
  assert len(tfm.load(f'hf:{folder}').fill_mask('a [MASK] b', top_k=3)[0]) == 3
  monkeypatch.setattr(HuggingFaceTokenizer, 'framing', ((7,), ()))  # the tokenizer knows better than config.json
  special = load_release(folder).special
  assert (special.source_prefix, special.source_suffix) == ((7,), ())
  for file in ('tokenizer.json', 'tokenizer_config.json'):
    (folder / file).unlink()
  release = load_release(folder)
  assert release.tokenizers is None
  assert (release.config.decoding.beam_size, release.config.decoding.length_penalty) == (1, 1.0)
  (folder / 'generation_config.json').write_text('{"num_beams": 3, "length_penalty": 0.5}')
  decoding = load_release(folder).config.decoding
  assert (decoding.beam_size, decoding.length_penalty, decoding.length_penalty_form) == (3, 0.5, 'power')


def test_no_tokenizer(tmp_path):
  with pytest.raises(TokenizerError, match='no tokenizer that transformers can open'):
    HuggingFaceTokenizer.load(tmp_path)


def test_a_folder_of_tokenizers_opens_again(folder, tmp_path):
  tokenizer = HuggingFaceTokenizer.load(folder)
  capitals = HuggingFaceTokenizer(tokenizer._tokenizer, True)
  joint, apart = Tokenizers(tokenizer, tokenizer), Tokenizers(tokenizer, capitals)
  for name, both in (('joint', joint), ('apart', apart)):
    (tmp_path / name).mkdir()
    both.save(tmp_path / name)
    again = open_tokenizers(tmp_path / name)
    assert again.joint == both.joint and again.target._target == both.target._target
    assert again.source.encode('bad') == tokenizer.encode('bad')


def test_a_release_of_an_imported_model_is_used_like_the_model(folder, tmp_path):
  there = tfm.load(f'hf:{folder}')
  here = tfm.load(write_release(load_release(folder), tmp_path / 'release'))
  np.testing.assert_array_equal(there.embed(['a cab', 'bad']), here.embed(['a cab', 'bad']))
  assert there.fill_mask('a [MASK]') == here.fill_mask('a [MASK]')
