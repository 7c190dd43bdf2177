"""Decoders equal loops written with NumPy from the papers' equations, one sentence and one word at a time."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis.cross_attention import cross_attention
from tfm.models.build import build_model, initialize
from tfm.recurrent_config import RecurrentConfig

D, W = 6, 5
SIZES = dict(d_model=D, d_hidden=W)
LUONG = dict(query='current', score='general', readout='tanh')
CASES = {
    'Bahdanau': dict(),
    'Bahdanau, two layers': dict(decoder_layers=2, cell='lstm', readout='linear'),
    'Luong': dict(encoder_layers=2, decoder_layers=2, cell='lstm', **LUONG),
    'Luong, additive': dict(LUONG, cell='gru', score='additive', attention_width=7),
    'Luong, input feeding': dict(decoder_layers=2, cell='gru', input_feeding=True, **LUONG),
    'Luong, feeding, maxout': dict(LUONG, input_feeding=True, readout='maxout'),
    'Luong, local-m': dict(cell='tanh', alignment='local_monotonic', attention_window=1, **LUONG),
    'Luong, local-p': dict(cell='lstm', alignment='local_predictive', attention_window=2, attention_width=4,
                           input_feeding=True, **LUONG),
    'Cho': dict(context='every_step'),
    'Sutskever': dict(context='start', cell='lstm', bidirectional=False, bridge='copy', encoder_layers=2,
                      decoder_layers=2, readout='linear'),
}


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def cell(kind, weights, inputs, state):
  """One step; `inputs` are pairs of a vector and the name of its matrices."""
  x = sum(vector @ weights[name] for vector, name in inputs) + weights['bias']  # GxW
  u = state[0] @ weights['recurrent']
  if kind == 'tanh':
    return (np.tanh(x + u)[0],)
  if kind == 'lstm':
    i, f, g, o = x + u
    c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c
  r, z = sigmoid(x[:2] + u[:2])
  return ((1 - z) * np.tanh(x[2] + r * (u[2] + weights['candidate_bias'])) + z * state[0],)


def attend(config, params, query, t, states_SxV):
  """(context V, weights S) of one query."""
  p, S = params['score'], len(states_SxV)
  if config.score == 'additive':
    scores_S = np.tanh(query @ p['query_kernel'] + states_SxV @ p['key_kernel'] + p['bias']) @ p['output']
  else:
    scores_S = np.array([state @ p['weight'] @ query for state in states_SxV])
  centre = t
  if config.alignment == 'local_predictive':
    centre = S * sigmoid(np.tanh(query @ params['centre']['kernel']) @ params['centre']['output'])
  weights_S = np.exp(scores_S - scores_S.max())
  if config.alignment != 'soft':
    weights_S = weights_S * (np.abs(np.arange(S) - centre) <= config.attention_window)
  weights_S = weights_S / weights_S.sum() if weights_S.sum() else weights_S
  if config.alignment == 'local_predictive':
    weights_S = weights_S * np.exp(-(np.arange(S) - centre)**2 / (2 * (config.attention_window / 2)**2))
  return weights_S @ states_SxV, weights_S


def decode(config, params, finals, states_SxV, target_T):
  """Logits TxV and patterns TxS of one sentence; its encoder gave states and last states of every layer."""
  c, decoder, patterns, logits = config, params['decoder'], [], []
  vector = finals[-1][0]

  def readout(h, context, word):
    p = decoder['readout']['maps']
    inputs = np.concatenate([h, *([] if context is None else [context]), *([word] if c.readout == 'maxout' else [])])
    pieces = inputs @ p['kernel'] + p['bias']
    return {'linear': pieces[0], 'tanh': np.tanh(pieces[0]), 'maxout': pieces.max(0)}[c.readout]

  states = list(finals)
  if c.bridge == 'tanh':
    bridges = [decoder[f'bridge_{i}'] for i in range(c.decoder_layers)]
    inputs = np.concatenate(finals[-1])
    states = [tuple(np.tanh(inputs @ bridge['kernel'] + bridge['bias'])) for bridge in bridges]
  fed = np.zeros(D)
  for t, token in enumerate(target_T):
    word = params['target_embedding']['table'][token] * D**0.5
    context, more = None, []
    if c.context == 'every_step':
      context, more = vector, [(vector, 'context')]
    elif c.context == 'attention' and c.query == 'previous':
      context, weights_S = attend(c, decoder['cross_attention'], states[0][0], t, states_SxV)
      more = [(context, 'context')]
    elif c.input_feeding:
      more = [(fed, 'context')]
    for i in range(c.decoder_layers):
      inputs = [(states[i - 1][0] if i else word, 'kernel'), *([] if i else more)]
      states[i] = cell(c.cell, decoder[f'layers_{i}'], inputs, states[i])
    h = states[-1][0]
    if c.context == 'attention' and c.query == 'current':
      context, weights_S = attend(c, decoder['cross_attention'], h, t, states_SxV)
    if c.context == 'attention':
      patterns.append(weights_S)
    fed = readout(h, context, word)
    logits.append(params['output']['table'] @ fed)
  return np.array(logits), np.array(patterns)


@pytest.fixture(params=CASES)
def case(request):
  return RecurrentConfig(**SIZES, **CASES[request.param])


def test_decoder(case, ids, random_params):
  source_BxS, target_BxT = ids
  model = build_model(case, 19, 17)
  variables = random_params(model, source_BxS, target_BxT)
  logits_BxTxV, memory = jax.jit(lambda: (model.apply(variables, source_BxS, target_BxT),
                                        model.apply(variables, source_BxS, method='encode')))()
  exact = jax.tree.map(partial(np.asarray, dtype=np.float64), (variables['params'], memory.finals, memory.states_BxSxV))
  params, finals, states_BxSxV = exact
  pattern_BxTxS = None
  if case.cross_attention_shape:
    pattern_BxNxHxTxS = cross_attention(model, variables['params'], source_BxS, target_BxT)
    assert pattern_BxNxHxTxS.shape == (3, 1, 1, 5, 6)
    pattern_BxTxS = pattern_BxNxHxTxS[:, 0, 0]
  for b, length in enumerate([6, 3, 4]):
    of_row = jax.tree.map(lambda leaf, b=b: leaf[b], finals)
    expected_TxV, expected_TxS = decode(case, params, of_row, states_BxSxV[b, :length], target_BxT[b])
    np.testing.assert_allclose(logits_BxTxV[b], expected_TxV, atol=5e-6)
    if pattern_BxTxS is not None:
      np.testing.assert_allclose(pattern_BxTxS[b, :, :length], expected_TxS, atol=2e-6)
      assert (pattern_BxTxS[b, :, length:] == 0).all()


def test_taps_in_a_loop_over_time_can_be_replaced(ids, random_params):
  """Sliced from a collection, as in a loop over layers: a pattern that looks at the last word alone."""
  from flax import linen as nn

  from tfm.models.tap import Tap
  source_BxS, target_BxT = ids
  model = build_model(RecurrentConfig(**SIZES), 19, 17)
  variables = random_params(model, source_BxS, target_BxT)
  last_Bx1xTxS = jnp.broadcast_to(jax.nn.one_hot(jnp.array([5, 2, 3]), 6)[:, None, None], (3, 1, 5, 6))
  taps = {'decoder': {'cross_attention': {'pattern': {'value': last_Bx1xTxS}}}}

  def replace(call, args, kwargs, context):
    module = context.module
    if isinstance(module, Tap) and context.method_name == '__call__' and module.has_variable('taps', 'value'):
      return module.get_variable('taps', 'value')
    return call(*args, **kwargs)

  def run():
    with nn.intercept_methods(replace):
      return model.apply({**variables, 'taps': taps}, source_BxS, target_BxT)

  logits_BxTxV = jax.jit(run)()
  hard = np.asarray(jax.jit(lambda: model.apply(variables, source_BxS, target_BxT))())
  assert np.abs(logits_BxTxV - hard).max() > 1e-2
  # With one key, the last one, softmax has no choice either.
  memory = model.apply(variables, source_BxS, method='encode')
  only = memory.replace(states_BxSxV=memory.states_BxSxV[jnp.arange(3), jnp.array([5, 2, 3])][:, None],
                        mask=memory.mask.replace(lengths_B=jnp.ones(3, int)))
  np.testing.assert_allclose(logits_BxTxV, model.apply(variables, target_BxT, only, method='decode'), atol=2e-6)


def test_first_weights_have_no_mean_and_fit_the_shapes(ids):
  params = initialize(build_model(RecurrentConfig(**SIZES), 19, 17), jax.random.key(0))
  assert params['decoder']['cross_attention']['score']['query_kernel'].shape == (W, W)
  assert params['decoder']['layers_0']['context'].shape == (3, 2 * W, W)
  assert params['decoder']['bridge_0']['kernel'].shape == (1, 2 * W, W)
  assert params['decoder']['readout']['maps']['kernel'].shape == (2, W + 2 * W + D, D)
