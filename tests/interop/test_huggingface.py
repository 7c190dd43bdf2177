"""Small random models of `transformers`: the same logits and searches here, the same bytes there and back."""

from __future__ import annotations

import dataclasses
import json
import logging
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tfm.config import TransformerConfig
from tfm.decoding.greedy import greedy_search
from tfm.interop.huggingface import from_huggingface, load_release, to_huggingface
from tfm.interop.huggingface_config import Fields, HuggingFaceError
from tfm.interop.huggingface_families import FAMILIES
from tfm.models.build import build_model, initialize
from tfm.models.layout import to_layout
from tfm.special_ids import OURS, SpecialIds

EXTRA = 'needs {} to compare with: pip install "tfm[oracle,huggingface]"'
torch = pytest.importorskip('torch', reason=EXTRA.format('PyTorch'))
transformers = pytest.importorskip('transformers', reason=EXTRA.format('transformers'))
torch.set_num_threads(1)

V = 97
LIMIT = 12

_DECODER = dict(vocab_size=V, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, initializer_range=0.2, bos_token_id=1, eos_token_id=[2, 7], pad_token_id=0,
                max_position_embeddings=64)
_BOTH = dict(vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=44, decoder_ffn_dim=44,
             encoder_attention_heads=4, decoder_attention_heads=4, init_std=0.2, max_position_embeddings=40,
             forced_eos_token_id=None)
_BERT = dict(vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=44,
             max_position_embeddings=40, initializer_range=0.2)
_ROBERTA = _BERT | dict(type_vocab_size=1, layer_norm_eps=1e-5)
_T5 = dict(vocab_size=V, d_model=32, d_kv=6, d_ff=44, num_layers=2, num_decoder_layers=3, num_heads=4,
           relative_attention_max_distance=14, relative_attention_num_buckets=8, decoder_start_token_id=0)
_LLAMA3 = dict(rope_type='llama3', rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=16)
_YARN = dict(rope_type='yarn', rope_theta=500.0, factor=4.0, original_max_position_embeddings=16)
_LINEAR = dict(rope_type='linear', rope_theta=500.0, factor=3.0)

CASES = {  # the name of a model's class, and its config
    'marian': ('MarianMTModel', dict(_BOTH, pad_token_id=96, decoder_start_token_id=96, eos_token_id=0,
                                     scale_embedding=True, activation_function='swish')),
    'bart': ('BartForConditionalGeneration', dict(_BOTH, decoder_start_token_id=2)),
    't5': ('T5ForConditionalGeneration', _T5),
    't5_v1_1': ('T5ForConditionalGeneration', dict(_T5, feed_forward_proj='gated-gelu', tie_word_embeddings=False)),
    'bert': ('BertForMaskedLM', _BERT),
    'bert_pretraining': ('BertForPreTraining', _BERT),
    'bert_classifier': ('BertForSequenceClassification', dict(_BERT, num_labels=3)),
    'bert_bare': ('BertModel', _BERT),
    'roberta': ('RobertaForMaskedLM', _ROBERTA),
    'roberta_classifier': ('RobertaForSequenceClassification', dict(_ROBERTA, num_labels=3)),
    'gpt2': ('GPT2LMHeadModel', dict(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_inner=44, n_positions=40,
                                     initializer_range=0.2, bos_token_id=96, eos_token_id=96)),
    'llama': ('LlamaForCausalLM', dict(_DECODER, head_dim=6, tie_word_embeddings=True)),
    'llama3': ('LlamaForCausalLM', dict(_DECODER, attention_bias=True, mlp_bias=True, rope_parameters=_LLAMA3)),
    'llama_yarn': ('LlamaForCausalLM', dict(_DECODER, mlp_bias=True, rope_parameters=_YARN)),
    'mistral': ('MistralForCausalLM', dict(_DECODER, sliding_window=5, rope_parameters=_LINEAR)),
    'qwen2': ('Qwen2ForCausalLM', _DECODER),
    'qwen2_window': ('Qwen2ForCausalLM', dict(_DECODER, use_sliding_window=True, sliding_window=4,
                                              max_window_layers=0)),
    'qwen3': ('Qwen3ForCausalLM', dict(_DECODER, head_dim=10)),
}
LAST_NORMS = ('decoder.layers.2.final_layer_norm.weight', 'decoder.final_layer_norm.weight', 'ln_f.weight',
              'model.norm.weight')
WRITING = [case for case, (name, _) in CASES.items() if not name.startswith(('Bert', 'Roberta'))]


def new_model(case):
  name, settings = CASES[case]
  torch.manual_seed(5)
  model = getattr(transformers, name)(getattr(transformers, name).config_class(**settings)).eval()
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      if key.endswith(LAST_NORMS):
        parameter.normal_(std=3)  # of both signs: with a shared table and an ordinary one a model repeats itself
      elif parameter.ndim == 1:  # biases and norms begin as 0 and 1, which hides what is done to them
        parameter.add_(0.2 * torch.randn_like(parameter))
      elif name.startswith('T5'):
        parameter.mul_(1.5)
    for key, buffer in model.named_buffers():
      if key == 'final_logits_bias':
        buffer.copy_(0.2 * torch.randn_like(buffer))
    if case == 't5_v1_1':
      model.lm_head.weight = torch.nn.Parameter(torch.randn(V, 32) * 0.3)
  return model


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """`made(case)`: the model of transformers, its folder, and what we read from it."""
  @cache
  def make(case):
    folder, model = tmp_path_factory.mktemp('models') / case, new_model(case)
    model.save_pretrained(folder)
    return model, folder, from_huggingface(folder)

  return make


def random_params(config, vocab_size):
  shapes = jax.eval_shape(lambda key: initialize(build_model(config, vocab_size, vocab_size), key), jax.random.key(0))
  random = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)


def sentences(lengths, pad, seed=0):
  random = np.random.default_rng(seed)
  ids_BxT = np.full((len(lengths), max(lengths)), pad, np.int32)
  for row, length in enumerate(lengths):
    ids_BxT[row, :length] = random.integers(8, V - 1, length)
  return ids_BxT, np.arange(max(lengths)) < np.array(lengths)[:, None]


def as_torch(array):
  return torch.tensor(np.asarray(array)).long()


def their_logits(model, ids_BxS, is_real_BxS, target_BxT=None):
  more = {} if target_BxT is None else {'decoder_input_ids': as_torch(target_BxT)}
  with torch.no_grad():
    out = model(input_ids=as_torch(ids_BxS), attention_mask=as_torch(is_real_BxS), **more)
  for name in ('logits', 'prediction_logits', 'pooler_output'):
    if name in out:
      return out[name].numpy()


@pytest.mark.parametrize('case', CASES)
def test_logits(case, made):
  model, _, found = made(case)
  ids_BxS, is_real_BxS = sentences([9, 3, 21, 6], found.special.pad)
  ours, variables = build_model(found.config, V, V), {'params': found.params}
  method = {'BertModel': 'embed'}.get(type(model).__name__, 'classify' if found.config.num_labels else '__call__')
  inputs, kept = (ids_BxS,), slice(None) if method != '__call__' else is_real_BxS
  if found.config.shape == 'encoder_decoder':
    target_BxT, kept = sentences([5, 17, 2, 7], found.special.pad, seed=1)
    inputs = ids_BxS, target_BxT
  apply = jax.jit(lambda variables, *inputs: ours.apply(variables, *inputs, method=method))
  our = np.asarray(apply(variables, *inputs))[kept]
  their = their_logits(model, ids_BxS, is_real_BxS, *inputs[1:])[kept]
  print(f'largest difference {np.abs(our - their).max():.1e} of {np.abs(their).max():.1f}')
  assert their.std() > 0.1  # something was compared
  np.testing.assert_allclose(our, their, rtol=0, atol=1e-5 * np.abs(their).max())


@pytest.mark.parametrize('case', WRITING)
def test_greedy_search(case, made):
  model, _, found = made(case)
  special = dataclasses.replace(found.special, forbidden=(11,), forced=(13,))
  ours, variables = build_model(found.config, V, V), {'params': found.params}
  lengths = [9, 3, 5, 6]
  ids_BxS, is_real_BxS = sentences(lengths, special.pad)
  both = found.config.shape == 'encoder_decoder'
  length = LIMIT if both else LIMIT + max(lengths) - 1
  limits_B = jnp.full(4, LIMIT) if both else jnp.array(lengths) - 1 + LIMIT
  # A prompt is what the decoder writes first, by force.
  forced_BxP, forced_B, first_B = (jnp.full((4, 1), 13), jnp.ones(4, jnp.int32), None) if both else (
      jnp.array(ids_BxS[:, 1:]), jnp.array(lengths) - 1, jnp.array(ids_BxS[:, 0]))

  def search(variables):
    memory = (ours.apply(variables, ids_BxS, method='encode'),) if both else ()
    cache = ours.apply(variables, *(memory or (4,)), length, method='init_cache')

    def step(tokens_RxT, cache):
      return ours.apply(variables, tokens_RxT, *memory, cache, method='step')

    return greedy_search(step, cache, limits_B, length, forced_BxP, forced_B, special, first_B)

  found = jax.device_get(jax.jit(search)(variables))
  written = set()
  for b, prompt in enumerate(lengths):  # one by one: transformers would want its padding on the left
    theirs = model.generate(
        input_ids=as_torch(ids_BxS[b:b + 1, :prompt]), attention_mask=torch.ones(1, prompt).long(), num_beams=1,
        do_sample=False, max_new_tokens=LIMIT, bad_words_ids=[[11]], pad_token_id=special.pad, use_cache=False,
        **({'forced_bos_token_id': 13} if both else {}))[0, 1 if both else prompt:].tolist()
    own = slice(0 if both else prompt - 1, found.lengths_B[b])
    assert found.tokens_BxL[b, own].tolist() == theirs
    written |= set(theirs)
  assert len(written) > 3


@pytest.mark.parametrize('case', CASES)
def test_there_and_back(case, made, tmp_path):
  _, folder, found = made(case)
  to_huggingface(tmp_path / 'back', found.config, found.params, found.special, extra=found.extra)
  assert_same_folder(folder, tmp_path / 'back')


def assert_same_folder(one, other):
  ours, theirs = (load_file(folder / 'model.safetensors') for folder in (one, other))
  assert ours.keys() == theirs.keys()
  for name, array in theirs.items():
    assert (array.dtype, array.shape, array.tobytes()) == (ours[name].dtype, ours[name].shape, ours[name].tobytes())
  files = [name for name in ('config.json', 'generation_config.json') if (one / name).exists()]
  assert {file.name for file in other.iterdir()} == {'model.safetensors', *files}
  assert [read(one / name) for name in files] == [read(other / name) for name in files]


def read(path):
  return json.loads(path.read_text())


@pytest.mark.parametrize('case', CASES)
def test_a_model_of_ours(case, made, tmp_path):
  """Without what was imported with it: transformers opens it without a complaint, and it comes back."""
  model, _, found = made(case)
  to_huggingface(tmp_path / 'out', found.config, to_layout(found.params, 'scanned'), found.special)
  again = from_huggingface(tmp_path / 'out')
  jax.tree.map(np.testing.assert_array_equal, found.params, again.params)
  assert (again.config, again.special, again.family) == (found.config, found.special, found.family)
  opened, report = type(model).from_pretrained(tmp_path / 'out', output_loading_info=True)
  missing = {'cls.seq_relationship.weight', 'cls.seq_relationship.bias'} if case == 'bert_pretraining' else set()
  assert {name: set(found) for name, found in report.items() if found} == ({'missing_keys': missing} if missing else {})
  for (name, one), (_, other) in zip(model.state_dict().items(), opened.state_dict().items(), strict=True):
    if name not in missing:
      if 'embed_positions' in name and found.config.positions == 'sinusoidal_halves':
        other = other[:len(one)]
      torch.testing.assert_close(one, other, rtol=0, atol=0)


def changed(folder, out, names=lambda name: name, more=(), settings=(), to=None):
  """A copy of a folder of transformers with other names, more tensors, other fields."""
  out.mkdir()
  arrays = {names(name): array for name, array in load_file(folder / 'model.safetensors').items()} | dict(more)
  save_file(jax.tree.map(lambda array: array.astype(to), arrays) if to else
            {name: array for name, array in arrays.items() if array is not None}, out / 'model.safetensors')
  (out / 'config.json').write_text(json.dumps(read(folder / 'config.json') | dict(settings)))
  return out


def table(folder, name):
  return load_file(folder / 'model.safetensors')[name]


def test_other_spellings(made, tmp_path):
  """Old files: no prefix, gamma and beta, second names, buffers; all written again as they were."""
  tril = np.tril(np.ones((1, 1, 40, 40), np.uint8))
  _, gpt2, _ = made('gpt2')
  old = changed(gpt2, tmp_path / 'gpt2', lambda name: name.removeprefix('transformer.'), {
      **{f'h.{i}.attn.bias': tril for i in range(3)}, 'h.0.attn.masked_bias': np.array(-1e4, np.float32),
      'lm_head.weight': table(gpt2, 'transformer.wte.weight')})
  _, bert, _ = made('bert_pretraining')
  word = 'bert.embeddings.word_embeddings.weight'
  old_bert = changed(bert, tmp_path / 'bert', lambda name: name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
      'LayerNorm.bias', 'LayerNorm.beta').replace(word, 'cls.predictions.decoder.weight'), {
      'cls.predictions.decoder.bias': table(bert, 'cls.predictions.bias'),
      'bert.embeddings.position_ids': np.arange(40)[None]})
  _, llama, _ = made('llama')
  old_llama = changed(llama, tmp_path / 'llama', more={
      'model.layers.0.self_attn.rotary_emb.inv_freq': (10000.0 ** (-np.arange(0, 6, 2) / 6)).astype(np.float32)})
  marian, folder, _ = made('marian')
  position_PxD = marian.model.encoder.embed_positions.weight.detach().numpy()
  old_marian = changed(folder, tmp_path / 'marian', more={'model.encoder.embed_positions.weight': position_PxD})
  for case, path in (('gpt2', old), ('bert_pretraining', old_bert), ('llama', old_llama), ('marian', old_marian)):
    found = from_huggingface(path)
    jax.tree.map(np.testing.assert_array_equal, found.params, made(case)[2].params)
    to_huggingface(tmp_path / f'{case}_back', found.config, found.params, found.special, extra=found.extra)
    assert_same_folder(path, tmp_path / f'{case}_back')


def test_buffers_are_checked(made, tmp_path):
  _, gpt2, _ = made('gpt2')
  full = np.ones((1, 1, 40, 40), np.uint8)
  with pytest.raises(HuggingFaceError, match='attn.bias is not what this model computes'):
    from_huggingface(changed(gpt2, tmp_path / 'gpt2', more={'transformer.h.0.attn.bias': full}))
  _, folder, _ = made('marian')
  with pytest.raises(HuggingFaceError, match='embed_positions.weight is not what this model computes'):
    from_huggingface(changed(folder, tmp_path / 'marian', more={
        'model.encoder.embed_positions.weight': np.ones((40, 32), np.float32)}))


@pytest.mark.parametrize('to', ['bfloat16', 'float16'])
def test_short_types(to, made, tmp_path):
  _, folder, whole = made('qwen2')
  folder = changed(folder, tmp_path / 'short', to=jnp.dtype(to), settings={'dtype': to})
  found = from_huggingface(folder)
  jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other.astype(jnp.dtype(to)).astype(np.float32)),
               found.params, whole.params)
  to_huggingface(tmp_path / 'back', found.config, found.params, found.special, extra=found.extra)
  assert_same_folder(folder, tmp_path / 'back')
  found.params['decoder_norm']['scale'][0] += np.float32(1e-5)  # too little for the short type
  to_huggingface(tmp_path / 'trained', found.config, found.params, found.special, extra=found.extra)
  assert {str(array.dtype) for array in load_file(tmp_path / 'trained' / 'model.safetensors').values()} == {'float32'}
  assert read(tmp_path / 'trained' / 'config.json')['dtype'] == 'float32'


def test_files(made, tmp_path, monkeypatch):
  """Several files with an index; PyTorch's own format; a name on the hub."""
  model, folder, found = made('bart')
  model.save_pretrained(tmp_path / 'many', max_shard_size='40KB')
  assert len(list((tmp_path / 'many').glob('*.safetensors'))) > 2
  (tmp_path / 'torch').mkdir()
  torch.save(model.state_dict(), tmp_path / 'torch' / 'pytorch_model.bin')
  (tmp_path / 'torch' / 'config.json').write_text((folder / 'config.json').read_text())
  import huggingface_hub
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, allow_patterns: {'owner/model': folder}[name])
  for name in (tmp_path / 'many', tmp_path / 'torch', 'owner/model'):
    again = from_huggingface(name)
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
  next((tmp_path / 'many').glob('*.safetensors')).unlink()
  with pytest.raises(HuggingFaceError, match='index.json lists model-'):
    from_huggingface(tmp_path / 'many')
  with pytest.raises(HuggingFaceError, match='no folder'):
    from_huggingface(tmp_path / 'nothing')

  def offline(name, allow_patterns):
    raise OSError('no connection')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
  with pytest.raises(HuggingFaceError, match='no connection'):
    from_huggingface('owner/model')


def test_one_error_lists_everything(made, tmp_path):
  _, folder, _ = made('t5')
  broken = changed(folder, tmp_path / 'broken', more={
      'encoder.final_layer_norm.weight': None, 'lm_head.bias': np.zeros(V, np.float32),
      'decoder.final_layer_norm.weight': np.ones(31, np.float32),
      'encoder.embed_tokens.weight': np.ones((V, 32), np.float32),
      'decoder.block.0.layer.0.layer_norm.weight': np.ones(32)})
  with pytest.raises(HuggingFaceError) as error:
    from_huggingface(broken)
  for part in ('encoder.final_layer_norm.weight is missing', 'lm_head.bias is not of this model',
               'decoder.final_layer_norm.weight has shape (31,), not (32,)',
               'encoder.embed_tokens.weight differs from shared.weight', 'layer_norm.weight is float64'):
    assert part in str(error.value)


REFUSED = [
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True)), ('gpt2', dict(activation_function='tanh')),
    ('bert', dict(position_embedding_type='relative_key')), ('bert', dict(is_decoder=True)),
    ('bart', dict(decoder_ffn_dim=45)), ('bart', dict(encoder_attention_heads=8)),
    ('marian', dict(normalize_before=True)), ('marian', dict(share_encoder_decoder_embeddings=False)),
    ('t5', dict(feed_forward_proj='gated-relu')),
    ('llama', dict(attention_bias=True)), ('llama', dict(rope_parameters=dict(rope_type='dynamic', factor=2.0))),
    ('llama3', dict(rope_parameters=_LLAMA3 | dict(high_freq_factor=8.0))),
    ('llama_yarn', dict(rope_parameters=_YARN | dict(beta_fast=16))),
    ('llama_yarn', dict(rope_parameters=_YARN | dict(attention_factor=1.0))),
    ('llama', dict(rope_parameters=dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=0.5))),
    ('qwen2', dict(layer_types=['full_attention', 'sliding_attention', 'full_attention'])),
    ('qwen2', dict(use_mrope=True)), ('qwen3', dict(attention_bias=True)), ('llama', dict(model_type='mamba')),
    ('llama', dict(quantization_config={'bits': 4}))]


@pytest.mark.parametrize('case, fields', REFUSED)
def test_what_we_have_not_is_refused(case, fields, made, tmp_path):
  with pytest.raises(HuggingFaceError, match='|'.join([*fields, *fields.get('rope_parameters', {})])):
    from_huggingface(changed(made(case)[1], tmp_path / 'odd', settings=fields))


def test_unknown_fields_are_told(made, tmp_path, caplog):
  with caplog.at_level(logging.WARNING, 'tfm'):
    for case in CASES:
      from_huggingface(made(case)[1])
    assert not caplog.records
    from_huggingface(changed(made('llama')[1], tmp_path / 'odd', settings={'clip_qkv': 8}))
  assert 'clip_qkv=8' in caplog.text


@pytest.mark.parametrize('fields, named', [
    (dict(positions='alibi', norm='pre'), 'positions'), (dict(norm_epsilon=1e-6), 'norm_epsilon'),
    (dict(encoder_layers=0, norm='pre', attention_softcap=5.0, positions='rope'), 'attention_softcap'),
    (dict(decoder_layers=0, pooler=True, pooling='mean'), 'pooling'),
    (dict(decoder_layers=0, num_labels=2, pooling='first'), 'pooler'), (dict(decoder_layers=0), 'token_types')])
def test_what_they_have_not_is_refused(fields, named, tmp_path):
  config = TransformerConfig(**{**dict(encoder_layers=1, decoder_layers=1, d_model=8, d_ff=12, num_heads=2), **fields})
  params = random_params(config, 11)
  with pytest.raises(HuggingFaceError, match=f'{named}='):
    to_huggingface(tmp_path / 'out', config, params, OURS)
  with pytest.raises(HuggingFaceError, match=f'{named}='):
    to_huggingface(tmp_path / 'out', config, params, OURS, {'encoder_decoder': 'marian', 'decoder_only': 'llama',
                                                            'encoder_only': 'bert'}[config.shape])
  assert not list(tmp_path.iterdir())


def test_models_of_ours_that_were_no_import(tmp_path):
  """Special ids of our tokenizers, rows that are no tokens, no bias on the logits."""
  config = TransformerConfig(encoder_layers=1, decoder_layers=2, d_model=8, d_ff=12, num_heads=2, biases='all',
                             norm_epsilon=1e-5, positions='sinusoidal_halves', vocab_multiple=8)
  params = random_params(config, 11)
  with pytest.raises(HuggingFaceError, match='vocab_size is missing'):
    to_huggingface(tmp_path / 'out', config, params, OURS)
  to_huggingface(tmp_path / 'out', config, params, OURS, vocab_size=11)
  found = from_huggingface(tmp_path / 'out')
  assert (found.config, found.special, found.family) == (
      dataclasses.replace(config, vocab_multiple=1), OURS, 'marian')
  table_VxD = params['target_embedding']['table']
  np.testing.assert_array_equal(found.params['target_embedding']['table'], table_VxD[:11])
  opened, report = transformers.MarianMTModel.from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not any(report.values()) and not opened.final_logits_bias.any()
  del params['target_embedding']
  params['other'] = {'kernel': np.zeros(3)}
  with pytest.raises(HuggingFaceError, match='other/kernel is not of this model; target_embedding/table is missing'):
    to_huggingface(tmp_path / 'more', config, params, OURS, vocab_size=11)


def test_what_changed_after_the_import_is_written(made, tmp_path):
  _, folder, found = made('mistral')
  config, special = dataclasses.replace(found.config, window=7, rope_factor=2.0), dataclasses.replace(
      found.special, ends=(5,), forbidden=(9,))
  to_huggingface(tmp_path / 'out', config, found.params, special, extra=found.extra)
  old, new = read(folder / 'config.json'), read(tmp_path / 'out' / 'config.json')
  assert {name for name in new if new[name] != old.get(name)} <= {
      'sliding_window', 'rope_parameters', 'eos_token_id', 'max_position_embeddings'}
  again = from_huggingface(tmp_path / 'out')
  assert (again.config, again.special) == (config, special)
  with pytest.raises(HuggingFaceError, match="family is 'llama', but extra is of 'mistral'"):
    to_huggingface(tmp_path / 'more', config, found.params, special, 'llama', extra=found.extra)


def test_special_ids(made, tmp_path):
  _, folder, _ = made('bart')
  folder = changed(folder, tmp_path / 'bart')
  (folder / 'generation_config.json').write_text(json.dumps({
      'eos_token_id': [2, 5], 'forced_bos_token_id': 0, 'bad_words_ids': [[1], [3, 4]], 'suppress_tokens': [6],
      'decoder_start_token_id': 8}))
  assert from_huggingface(folder).special == SpecialIds(
      pad=1, start=8, ends=(2, 5), forbidden=(1, 6), source_prefix=(0,), source_suffix=(2,), forced=(0,))
  ids = 'pad_token_id', 'bos_token_id', 'eos_token_id', 'decoder_start_token_id', 'forced_eos_token_id'
  bare = changed(made('bart')[1], tmp_path / 'bare')
  (bare / 'config.json').write_text(json.dumps(
      {name: value for name, value in read(bare / 'config.json').items() if name not in ids}))
  assert from_huggingface(bare).special == made('bart')[2].special  # these are what transformers takes then
  assert from_huggingface(bare).config == made('bart')[2].config
  _, _, gpt2 = made('gpt2')
  assert (gpt2.config.pad_id, gpt2.special) == (None, SpecialIds(
      pad=0, start=96, ends=(96,), forbidden=(), source_suffix=()))
  _, _, llama = made('llama')
  assert llama.special == SpecialIds(
      pad=0, start=1, ends=(2, 7), forbidden=(), source_prefix=(1,), source_suffix=())
  _, _, marian = made('marian')
  assert marian.special == SpecialIds(pad=96, start=96, ends=(0,), forbidden=(), source_suffix=(0,))
  folder = changed(made('bert')[1], tmp_path / 'bert')
  assert from_huggingface(folder).special.source_prefix == ()
  (folder / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', *'abc']))
  special = from_huggingface(folder).special
  assert (special.source_prefix, special.source_suffix) == ((2,), (3,))


@pytest.mark.parametrize('case', ['marian', 't5_v1_1', 'roberta', 'gpt2', 'llama'])
def test_release(case, made):
  """A `Config` has room for every shape."""
  release, found = load_release(made(case)[1]), made(case)[2]
  assert (release.config.model, release.special, release.vocab_sizes) == (found.config, found.special, (V, V))
  assert release.tokenizers is None and release.named()


def test_every_family_is_tried_here():
  tried = {getattr(transformers, name).config_class.model_type for name, _ in CASES.values()}
  assert tried == set(FAMILIES)


def test_fields():
  fields = Fields({'a': 1, 'b': 2, 'c': None, 'vocab_size': 3})
  assert (fields('a'), fields('d', 4), fields('c', 5), fields.unread()) == (1, 4, None, ['b'])
  with pytest.raises(HuggingFaceError, match="no 'd'"):
    fields('d')
  with pytest.raises(HuggingFaceError, match="a=1, b=2"):
    fields.same('a', 'b')
