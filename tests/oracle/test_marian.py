"""Logits, greedy search and beam search are those of `transformers.MarianMTModel` with the same weights.

MarianMT is the paper's model (post-norm, scaled and shared embeddings, ReLU) with biases in attention and on the logits,
which are set to zero here, and another sinusoid, whose table is replaced. What corresponds to what in the searches:

  ours                             transformers' `generate`
  stop='full'                      early_stopping=True: over as soon as M hypotheses have ended
  stop='bound'                     early_stopping='never': over when no live hypothesis can reach the M-th ended one, its
                                   penalty taken at the limit (ours asks for the n-th of the n wanted: the same n best).
                                   early_stopping=False judges it at the present length; nothing of ours is so inexact.
  alpha, length_penalty_form=      length_penalty: log-probability / n ** alpha, with n the generated tokens, EOS counted
    'power'                        and the start token not
  limits_B (tokens, with EOS)      max_new_tokens, the same for a whole batch; also the length of the bound
  forbidden=(PAD, BOS)             suppress_tokens=[PAD, BOS], applied after the log-softmax: neither renormalises
  EOS ranked below M: dropped      the same

They part where a hypothesis is cut at the limit. We list all that ended before any that was cut. For `generate` it makes
no difference: at the last step the M best candidates, ended or not, join the list, and the M best scores of all stay. Hence
`agree` below: without cut hypotheses (most sentences here) the lists are identical; with them, what ended is in our order
and so is what was cut.
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
                           norm_epsilon=1e-5, tying='all')  # 1e-5 is fixed in MarianMT
LIMIT = 24
STOP = {'full': True, 'bound': 'never'}


def as_marian(config, params, vocab_size, position_PxD):
  """MarianMT with our weights."""
  marian = transformers.MarianMTModel(transformers.MarianConfig(
      vocab_size=vocab_size, d_model=config.d_model, encoder_layers=config.encoder_layers,
      decoder_layers=config.decoder_layers, encoder_ffn_dim=config.d_ff, decoder_ffn_dim=config.d_ff,
      encoder_attention_heads=config.num_heads, decoder_attention_heads=config.num_heads, activation_function='relu',
      scale_embedding=True, max_position_embeddings=len(position_PxD), dropout=0.0, pad_token_id=PAD, bos_token_id=BOS,
      eos_token_id=EOS, decoder_start_token_id=BOS, forced_eos_token_id=None)).eval()
  ours = {}
  for side in ('encoder', 'decoder'):
    for i in range(len(params[side])):
      layer, name = params[side][f'layers_{i}'], f'model.{side}.layers.{i}'
      for theirs, attention in (('self_attn', 'self_attention'), ('encoder_attn', 'cross_attention')):
        if attention in layer:
          for part in ('query', 'key', 'value'):
            ours[f'{name}.{theirs}.{part[0]}_proj.weight'] = layer[attention][part]['kernel'].reshape(config.d_model, -1).T
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


def towards_eos(params, logit):
  """The same parameters but EOS gets about `logit` more, so that outputs end."""
  direction_D = params['target_embedding']['table'][EOS]
  norm = params['decoder'][f'layers_{CONFIG.decoder_layers - 1}']['mlp_norm']
  norm['bias'] = norm['bias'] + logit * direction_D / (direction_D @ direction_D)
  return params


def generate(marian, source_BxS, limit, num_beams=1, **settings):
  """For each sentence a list of (ids, score, ended), as `generate` orders it; the score of greedy search is None."""
  torch.set_num_threads(1)
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
