"""The engine on weights of `transformers`: what is read and edited is what they would show and do themselves."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis.engine import Edit, read, run
from tfm.interop.huggingface import from_huggingface
from tfm.models.build import build_model

EXTRA = 'needs {} to compare with: pip install "tfm[oracle,huggingface]"'
torch = pytest.importorskip('torch', reason=EXTRA.format('PyTorch'))
transformers = pytest.importorskip('transformers', reason=EXTRA.format('transformers'))
torch.set_num_threads(1)

V, LAYERS, HEADS, T = 61, 3, 4, 7
_SMALL = dict(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
              max_position_embeddings=20, initializer_range=0.4)
CASES = {  # the name of a model's class, its config, our stack, their name of a layer's attention output
    'gpt2': ('GPT2LMHeadModel', dict(vocab_size=V, n_embd=16, n_layer=LAYERS, n_head=HEADS, n_positions=20,
                                     initializer_range=0.4, bos_token_id=1, eos_token_id=2),
             'decoder', 'transformer.h.{}.attn.c_proj'),
    'llama': ('LlamaForCausalLM', _SMALL | dict(num_key_value_heads=2, pad_token_id=0), 'decoder',
              'model.layers.{}.self_attn.o_proj'),
    'bert': ('BertForMaskedLM', _SMALL, 'encoder', 'bert.encoder.layer.{}.attention.output.dense'),
    'marian': ('MarianMTModel', dict(vocab_size=V, d_model=16, encoder_layers=LAYERS, decoder_layers=LAYERS,
                                     encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_attention_heads=HEADS,
                                     decoder_attention_heads=HEADS, init_std=0.4, max_position_embeddings=20,
                                     pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
                                     forced_eos_token_id=None),
             'decoder', 'model.decoder.layers.{}.self_attn.out_proj'),
}


@pytest.fixture(scope='module', params=CASES)
def both(request, tmp_path_factory):
  """Their model, their outputs, ours with its parameters and inputs, our name of the stack, their name of a layer."""
  name, settings, stack, output = CASES[request.param]
  torch.manual_seed(3)
  kind = getattr(transformers, name)
  theirs = kind(kind.config_class(**settings, attn_implementation='eager')).eval()
  folder = tmp_path_factory.mktemp('models') / request.param
  theirs.save_pretrained(folder)
  found = from_huggingface(folder)
  ids = np.random.default_rng(0).integers(5, V, (2, 2, T))
  inputs = tuple(ids) if request.param == 'marian' else (ids[0],)
  return theirs, build_model(found.config, V, V), found.params, inputs, stack, output


def their_output(theirs, inputs):
  names = ('input_ids', 'decoder_input_ids')
  with torch.no_grad():
    return theirs(**{name: torch.tensor(ids) for name, ids in zip(names, inputs)}, output_attentions=True,
                  output_hidden_states=True)


def pick(output, *names):
  """The first of these that the output has, layers stacked."""
  return torch.stack(next(output[name] for name in names if output.get(name) is not None)).numpy()


def test_patterns_and_streams_are_theirs(both):
  theirs, model, params, inputs, stack, _ = both
  found = read(model, params, inputs, [f'{stack}.layers.self_attention.pattern', f'{stack}.layers.resid_post'])
  pattern_NxBxHxTxS, stream_NxBxTxD = (np.asarray(each) for each in found.values())
  output = their_output(theirs, inputs)
  np.testing.assert_allclose(pattern_NxBxHxTxS, pick(output, 'decoder_attentions', 'attentions'), atol=1e-5)
  streams = pick(output, 'decoder_hidden_states', 'hidden_states')[1:]  # the first are the embeddings
  # Where the stack ends in a norm, the last that they show is behind it.
  several = slice(None) if model.config.norm == 'post' else slice(LAYERS - 1)
  np.testing.assert_allclose(stream_NxBxTxD[several], streams[several], atol=2e-5 * np.abs(streams).max())


def test_a_head_taken_out_has_the_same_effect(both):
  theirs, model, params, inputs, stack, name = both
  layer, head = 1, 2
  untouched = run(model, params, inputs).output
  edits = Edit(f'{stack}.layers[{layer}].self_attention.z', at=(jnp.arange(HEADS) == head)[:, None][None, None])
  found = np.asarray(run(model, params, inputs, edits=edits).output)
  width = 16 // HEADS

  def without(module, arguments):
    heads = arguments[0].clone()
    heads[..., head * width:(head + 1) * width] = 0
    return (heads,)

  handle = theirs.get_submodule(name.format(layer)).register_forward_pre_hook(without)
  expected = their_output(theirs, inputs).logits.numpy()
  handle.remove()
  assert np.abs(found - untouched).max() > 0.01  # the head does something
  np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
