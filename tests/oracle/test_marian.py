"""Logits, greedy search and beam search are those of `transformers.MarianMTModel` with the same weights.

MarianMT is the paper's model (post-norm, scaled and shared embeddings, ReLU) with biases in attention and on the
logits, which are set to zero here, and another sinusoid, whose table is replaced. What corresponds to what in the
searches (M the beam size, n the number of hypotheses wanted):

  ours                           `generate`
  stop='full'                    early_stopping=True: over as soon as M hypotheses have ended
  stop='bound'                   early_stopping='never': over when no live hypothesis can reach the M-th that ended, its
                                 penalty taken at the limit. (Ours is over when none can reach the n-th: the same n
                                 best. early_stopping=False judges by the present length; nothing of ours does that.)
  alpha, form='power'            length_penalty: log-probability / length^alpha; the length is that of the generated
                                 tokens, EOS counted and the start token not
  limits_B                       max_new_tokens, EOS counted; one number for the whole batch
  forbidden=(PAD, BOS)           suppress_tokens=[PAD, BOS], after the log-softmax: neither renormalises
  EOS below rank M is dropped    likewise

They part in one place, where a hypothesis is cut at the limit. We list whatever ended before anything cut. For
`generate` it makes no difference: in the last step the M best candidates, ended or not, join the list, of which the M
best scores stay. So a list of theirs without cut hypotheses is ours, and with them (some sentences here) those that
ended are the first of ours that ended, and our cut ones are the first of theirs; see `assert_agree`.
"""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import DecodingConfig, TransformerConfig
from tfm.decoding.beam import beam_search
from tfm.decoding.greedy import greedy_search
from tfm.special_ids import BOS, EOS, PAD
from tfm.text.tokenizer import Tokenizers, UnitTokenizer
from tfm.translator import Translator

EXTRA = 'needs {} to compare with: pip install "tfm[oracle]"'
torch = pytest.importorskip('torch', reason=EXTRA.format('PyTorch'))
transformers = pytest.importorskip('transformers', reason=EXTRA.format('transformers'))

CONFIG = TransformerConfig(encoder_layers=2, decoder_layers=2, d_model=32, d_ff=48, num_heads=4, dropout=0.0,
                           norm_epsilon=1e-5, tying='all')  # MarianMT has no other epsilon
VOCABULARY, LIMIT = 40, 30
EARLY_STOPPING = {'full': True, 'bound': 'never'}


def as_marian(config, params, vocab_size, position_PxD):
  """MarianMT with our weights; every one of ours and of theirs is accounted for."""
  marian = transformers.MarianMTModel(transformers.MarianConfig(
      vocab_size=vocab_size, d_model=config.d_model, encoder_layers=config.encoder_layers,
      decoder_layers=config.decoder_layers, encoder_ffn_dim=config.d_ff, decoder_ffn_dim=config.d_ff,
      encoder_attention_heads=config.num_heads, decoder_attention_heads=config.num_heads, activation_function='relu',
      scale_embedding=True, max_position_embeddings=len(position_PxD), dropout=0.0, pad_token_id=PAD, bos_token_id=BOS,
      eos_token_id=EOS, decoder_start_token_id=BOS, forced_eos_token_id=None, attn_implementation='eager')).eval()
  ours = {}
  for side in ('encoder', 'decoder'):
    for i in range(len(params[side])):
      layer, name = params[side][f'layers_{i}'], f'model.{side}.layers.{i}'
      for theirs, attention in (('self_attn', 'self_attention'), ('encoder_attn', 'cross_attention')):
        if attention in layer:
          for part in ('query', 'key', 'value'):
            into_heads_DxHxC = layer[attention][part]['kernel']
            ours[f'{name}.{theirs}.{part[0]}_proj.weight'] = into_heads_DxHxC.reshape(config.d_model, -1).T
          ours[f'{name}.{theirs}.out_proj.weight'] = layer[attention]['output']['kernel'].reshape(-1, config.d_model).T
          ours[f'{name}.{theirs}_layer_norm.weight'] = layer[f'{attention}_norm']['scale']
          ours[f'{name}.{theirs}_layer_norm.bias'] = layer[f'{attention}_norm']['bias']
      for theirs, dense in (('fc1', layer['mlp']['inner']), ('fc2', layer['mlp']['outer'])):
        ours[f'{name}.{theirs}.weight'], ours[f'{name}.{theirs}.bias'] = dense['kernel'].T, dense['bias']
      ours[f'{name}.final_layer_norm.weight'] = layer['mlp_norm']['scale']
      ours[f'{name}.final_layer_norm.bias'] = layer['mlp_norm']['bias']

  def weight(name, old):
    if name.endswith('embed_positions.weight'):
      return position_PxD
    if name.endswith(('shared.weight', 'embed_tokens.weight', 'lm_head.weight')):
      return params['target_embedding']['table']
    if name == 'final_logits_bias' or name.endswith('_proj.bias'):
      return np.zeros(old.shape, np.float32)
    return ours.pop(name)

  marian.load_state_dict({name: torch.tensor(weight(name, old)) for name, old in marian.state_dict().items()})
  assert not ours, ours.keys()
  return marian


def eloquent(params, seed):
  """The same parameters changed so that outputs vary and most of them end, which random ones do not.

  With a tied table a state resembles its own token's row, so the model repeats it: random signs in the last norm break
  that. And the logit of EOS rises with sin(t / 10) - cos(t / 10), dimensions 8 and 9 of the position at this width.
  """
  norm = params['decoder'][f'layers_{CONFIG.decoder_layers - 1}']['mlp_norm']
  norm['scale'] = np.random.default_rng(seed).standard_normal(CONFIG.d_model).astype(np.float32)
  norm['bias'] = np.zeros_like(norm['bias'])
  params['target_embedding']['table'][EOS, 8:10] = np.sign(norm['scale'][8:10]) * [4.5, -4.5]
  return params


@pytest.fixture(scope='module')
def both(new_model, sinusoid):
  """`both(vocab_size, seed, tempting)`: our model, its parameters, and MarianMT with the same.

  PAD and BOS get 1.1 times the rows of the two `tempting` ids, so they would be chosen wherever these are.
  """
  torch.set_num_threads(1)

  def make(vocab_size, seed, tempting=None):
    model, params = new_model(CONFIG, vocab_size, vocab_size, seed=seed)
    params = eloquent(params, seed)
    if tempting is not None:
      table_VxD = params['target_embedding']['table']
      table_VxD[[PAD, BOS]] = np.float32(1.1) * table_VxD[list(tempting)]
    return model, jax.tree.map(jnp.asarray, params), as_marian(CONFIG, params, vocab_size, sinusoid(64, CONFIG.d_model))

  return make


@pytest.fixture(scope='module')
def small(both, sentences):
  """A small vocabulary: our model, its parameters, MarianMT, a batch of sources and our memory of it."""
  model, params, marian = both(VOCABULARY, seed=1, tempting=(37, 4))
  source_BxS = sentences([3, 9, 5, 12, 7, 4, 10, 6, 8, 11, 2, 5], VOCABULARY, seed=5)
  memory = jax.jit(lambda params: model.apply({'params': params}, source_BxS, method='encode'))(params)
  return model, params, marian, source_BxS, memory


def generate(marian, source_BxS, limit, num_beams=1, **settings):
  """For each sentence a list of (ids, score, ended), as `generate` orders it; greedy search scores None."""
  source_BxS = torch.tensor(source_BxS).long()
  found = marian.generate(
      input_ids=source_BxS, attention_mask=(source_BxS != PAD).long(), do_sample=False, max_new_tokens=limit,
      num_beams=num_beams, num_return_sequences=num_beams, suppress_tokens=[PAD, BOS], return_dict_in_generate=True,
      output_scores=True, **settings)
  scores = found.sequences_scores.tolist() if num_beams > 1 else [None] * len(source_BxS)
  hypotheses = []
  for ids, score in zip(found.sequences[:, 1:].tolist(), scores):
    ended = EOS in ids
    hypotheses.append((ids[:ids.index(EOS) + 1] if ended else ids, score, ended))
  return [hypotheses[start:start + num_beams] for start in range(0, len(hypotheses), num_beams)]


def teacher_forced(marian, source_S, ids):
  """MarianMT's log-probability of each of `ids` after those before it, and its cross-attention, NxHxTxS."""
  with torch.no_grad():
    out = marian(input_ids=torch.tensor(source_S)[None].long(), decoder_input_ids=torch.tensor([[BOS, *ids[:-1]]]),
                 output_attentions=True)
  log_probs_TxV = out.logits[0].log_softmax(-1)
  attention_NxHxTxS = torch.cat(out.cross_attentions).numpy()
  return log_probs_TxV[range(len(ids)), ids].numpy(), attention_NxHxTxS


def assert_same(ours, theirs):
  """The same (ids, score, ended), one after another."""
  assert [(ids, ended) for ids, _, ended in ours] == [(ids, ended) for ids, _, ended in theirs]
  np.testing.assert_allclose([score for _, score, _ in ours], [score for _, score, _ in theirs], rtol=1e-5)


def assert_agree(ours, theirs):
  """The n-best lists of one sentence are the same, but for the difference at the limit that the module states."""
  if all(ended for _, _, ended in theirs):
    assert_same(ours, theirs[:len(ours)])
  else:
    (our_ended, our_cut), (their_ended, their_cut) = [
        [[hypothesis for hypothesis in some if hypothesis[2] is ended] for ended in (True, False)]
        for some in (ours, theirs)]
    assert_same(our_ended[:len(their_ended)], their_ended[:len(ours)])
    assert_same(our_cut, their_cut[:len(our_cut)])


def as_lists(found):
  """Our `Hypotheses` in the form of `generate` above."""
  found = jax.device_get(found)
  B, M, _ = found.tokens_BxMxL.shape
  return [[(found.tokens_BxMxL[b, m, :found.lengths_BxM[b, m]].tolist(), found.scores_BxM[b, m],
            bool(found.finished_BxM[b, m])) for m in range(M)] for b in range(B)]


def test_logits(small, sentences):
  model, params, marian, source_BxS, memory = small
  target_BxT = sentences([10, 4, 8, 6, 3, 7, 9, 5, 2, 12, 11, 7], VOCABULARY, seed=6, begin=[BOS])
  ours_BxTxV = jax.jit(lambda params: model.apply({'params': params}, target_BxT, memory, method='decode'))(params)
  source_BxS, target_BxT = torch.tensor(source_BxS).long(), torch.tensor(target_BxT).long()
  with torch.no_grad():
    theirs_BxTxV = marian(input_ids=source_BxS, attention_mask=(source_BxS != PAD).long(), decoder_input_ids=target_BxT,
                          decoder_attention_mask=(target_BxT != PAD).long()).logits.numpy()
  real_BxT = target_BxT.numpy() != PAD
  np.testing.assert_allclose(np.asarray(ours_BxTxV)[real_BxT], theirs_BxTxV[real_BxT], rtol=0,
                             atol=1e-5 * np.abs(theirs_BxTxV).max())


def test_greedy_search(small):
  model, params, marian, source_BxS, memory = small
  B = len(source_BxS)

  @jax.jit
  def search(params):
    def step(tokens_RxT, cache):
      return model.apply({'params': params}, tokens_RxT, memory, cache, method='step')

    cache = model.apply({'params': params}, memory, LIMIT, method='init_cache')
    return greedy_search(step, cache, jnp.full(B, LIMIT), LIMIT)

  found = jax.device_get(search(params))
  theirs = [hypotheses[0] for hypotheses in generate(marian, source_BxS, LIMIT)]
  assert len({len(ids) for ids, _, _ in theirs}) > 3 and len({tuple(ids) for ids, _, _ in theirs}) > B // 2
  for b, (ids, _, ended) in enumerate(theirs):
    assert found.tokens_BxL[b, :found.lengths_B[b]].tolist() == ids
    assert found.finished_B[b] == ended
    expected_T, _ = teacher_forced(marian, source_BxS[b][source_BxS[b] != PAD], ids)
    np.testing.assert_allclose(found.token_log_probs_BxL[b, :len(ids)], expected_T, atol=1e-4)
    np.testing.assert_allclose(found.log_prob_B[b], expected_T.sum(), rtol=1e-5)


@pytest.mark.parametrize('stop', ['full', 'bound'])
@pytest.mark.parametrize('beam_size, num_hypotheses', [(2, 2), (4, 4), (5, 3)])
def test_beam_search(small, beam_size, num_hypotheses, stop):
  model, params, marian, source_BxS, memory = small

  @jax.jit
  def search(params, alpha):
    def step(tokens_RxT, cache):
      return model.apply({'params': params}, tokens_RxT, memory, cache, method='step')

    cache = model.apply({'params': params}, memory, LIMIT, beam_size, method='init_cache')
    limits_B = jnp.full(len(source_BxS), LIMIT)
    return beam_search(step, cache, limits_B, LIMIT, beam_size, num_hypotheses, alpha, 'power', stop)

  identical = cut = 0
  for alpha in (0.0, 0.6, 1.0):
    theirs = generate(marian, source_BxS, LIMIT, beam_size, length_penalty=alpha, early_stopping=EARLY_STOPPING[stop])
    ours = as_lists(search(params, alpha))
    for our, their in zip(ours, theirs, strict=True):
      assert_agree(our, their)
      all_ended = all(ended for _, _, ended in their)
      identical, cut = identical + all_ended, cut + (not all_ended)
  assert identical > cut > 0  # both kinds of sentences were compared


def test_translator(both):
  """The whole path: text in, bytes as ids, a limit for each sentence, text and cross-attention out."""
  tokenizer = UnitTokenizer('byte', [])
  model, params, marian = both(tokenizer.vocab_size, seed=10)
  decoding = DecodingConfig(beam_size=4, length_penalty=0.6, length_penalty_form='power', stop='bound', extra_length=14)
  translator = Translator(model, params, Tokenizers(tokenizer, tokenizer), decoding)
  texts = ['a blue house', 'two dogs run', 'snow on hills', 'the red ball', 'who is there?', 'good morning']
  best_few = translator.translate(texts, num_hypotheses=4)
  greedy = translator.translate(texts, beam_size=1, return_attention=True)
  ended_lengths = set()
  for text, few, one in zip(texts, best_few, greedy, strict=True):
    source_S = [*tokenizer.encode(text), EOS]
    limit = len(source_S) + decoding.extra_length
    theirs = generate(marian, [source_S], limit, 4, length_penalty=0.6, early_stopping='never')[0]
    assert_agree([(hypothesis.tokens, hypothesis.score, hypothesis.finished) for hypothesis in few.hypotheses],
                 [(tokenizer.tokens(ids), score, ended) for ids, score, ended in theirs])
    ended_lengths |= {len(ids) for ids, _, ended in theirs if ended}

    (ids, _, ended), = generate(marian, [source_S], limit)[0]
    log_probs_T, attention_NxHxTxS = teacher_forced(marian, source_S, ids)
    (hypothesis,) = one.hypotheses
    assert (hypothesis.tokens, hypothesis.finished) == (tokenizer.tokens(ids), ended)
    assert hypothesis.text == tokenizer.decode(ids)
    assert hypothesis.log_prob == pytest.approx(log_probs_T.sum(), rel=1e-5)
    np.testing.assert_allclose(hypothesis.attention, attention_NxHxTxS, atol=1e-5)
  assert len(ended_lengths) > 3  # something was compared
