from __future__ import annotations

import pytest

import tfm
from tfm.interop.huggingface import load_release
from tfm.interop.huggingface_tokenizer import HuggingFaceTokenizer
from tfm.text.tokenizer import TokenizerError

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


def test_release(folder):
  release = load_release(folder)
  assert (release.vocab_sizes, release.special.source_prefix, release.special.source_suffix) == ((V, V), (2,), (3,))
  assert release.tokenizers.joint and release.tokenizers.source.encode('a') == [5]
  assert release.named()  # the parameters are those of its config
  assert len(tfm.load(f'hf:{folder}').fill_mask('a [MASK] b', top_k=3)[0]) == 3
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
