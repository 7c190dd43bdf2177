from __future__ import annotations

import jax
import numpy as np
import pytest

from tfm.config import Config, DataConfig, DecodingConfig, TokenizerConfig, TransformerConfig
from tfm.loaded import assemble
from tfm.models.build import build_model, initialize
from tfm.text.corpora import build_corpus
from tfm.text.objectives import build_evaluation_batches
from tfm.text.tokenizer import Tokenizers, train_tokenizer
from tfm.training import samples
from tfm.training.samples import describe_rows, write_samples

TEXTS = ['the dog jumps', 'over', 'a lazy fox']


@pytest.fixture
def make(tmp_path, monkeypatch):
  """`make(0, 1, ...)`: a user of a model of so many encoder and decoder layers, and a batch of `TEXTS`."""
  monkeypatch.setattr(samples, 'CONTINUED', 6)
  (tmp_path / 't').write_text('\n'.join(TEXTS))

  def make(encoder_layers: int, decoder_layers: int, extra_ids: int):
    config = Config(
        model=TransformerConfig(encoder_layers, decoder_layers, d_model=8, d_ff=8, num_heads=2),
        tokenizer=TokenizerConfig(kind='char', vocab_size=300, extra_ids=extra_ids),
        data=DataConfig(corpus='text', source=None, target=None, limit=None, held_out=None, root=str(tmp_path),
                        train='t', validation='t', max_length=32, tokens_per_batch=128, rows_multiple=1),
        decoding=DecodingConfig(extra_length=4))
    tokenizer = train_tokenizer(config.tokenizer, TEXTS)
    model = build_model(config.model, tokenizer.vocab_size, tokenizer.vocab_size)
    both = Tokenizers(tokenizer, tokenizer)
    batch, = build_evaluation_batches(config, build_corpus(config.data).validation(), both)
    return assemble(config, model, initialize(model, jax.random.key(0)), both), batch

  return make


def test_translations_stand_below_their_sources(tmp_path):
  write_samples(tmp_path / 'a.txt', [('two', 'zwei')], ['zwölf', 'not among the samples'])
  assert (tmp_path / 'a.txt').read_text(encoding='utf-8') == (
      'source       two\nreference    zwei\ntranslation  zwölf\n')


def test_a_language_model_goes_on_from_the_beginning_of_a_text(make):
  user, batch = make(0, 1, 0)
  blocks = describe_rows(user, batch, 2).split('\n\n')
  assert len(blocks) == 2
  for block, text, quarter in zip(blocks, TEXTS, (2, 0)):
    shown, continuation = block.splitlines()[:2]
    expected = text[:quarter] or ' '
    assert shown == f'text          {expected}' and continuation.startswith('continuation  ')
  found, = user.generate([TEXTS[0][:2]], max_new_tokens=6, sampling_temperature=0.8)
  assert blocks[0].split('continuation  ')[1] == found.text


def test_a_masked_model_fills_what_was_hidden(make):
  user, batch = make(1, 0, 1)
  blocks = describe_rows(user, batch, 9).split('\n\n')
  assert len(blocks) == 3
  logits = user.model.apply({'params': user.params}, batch.inputs_BxT)
  for block, text, chosen, best in zip(blocks, TEXTS, batch.labels_BxT != 0, np.asarray(logits.argmax(-1))):
    lines = [line.split() for line in block.strip().splitlines()]
    assert [line[0] for line in lines] == ['input', 'reference', 'filled'] and len({*map(len, lines)}) == 1
    read, reference, filled = (line[1:] for line in lines)
    tokens = ['<s>', *user.tokenizers.source.tokens(user.tokenizers.source.encode(text)), '</s>']
    assert reference == tokens
    for place, token in enumerate(tokens):
      if chosen[place]:
        assert filled[place] == user.tokenizers.source.tokens([best[place]])[0]
      else:
        assert read[place] == filled[place] == token


def test_a_span_model_writes_the_spans(make):
  user, batch = make(1, 1, 9)
  blocks = describe_rows(user, batch, 2).split('\n\n')
  assert len(blocks) == 2
  tokens = user.tokenizers.source.tokens
  for block, source, target in zip(blocks, *batch):
    lines = block.strip('\n').split('\n')
    assert lines[0] == 'source     ' + ' '.join(tokens(source[source != 0].tolist()))
    assert lines[1] == 'reference  ' + ' '.join(tokens(target[target != 0].tolist()))
    assert lines[2] == 'written    ' + ' '.join(tokens(user.write([source[source != 0].tolist()])[0]))
