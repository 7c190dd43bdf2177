"""The lenses end at the model's own logits; the tuned one is nearer to them than the plain one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis.lens import fit_tuned_lens, logit_lens


def plain(model, params, inputs):
  return jax.jit(lambda params, *inputs: model.apply({'params': params}, *inputs))(params, *inputs)


@pytest.mark.parametrize('family, norm', [('encoder_decoder', 'pre'), ('decoder_only', 'post'), ('encoder_only', 'pre'),
                                          ('encoder_only', 'post'), ('conv_s2s', None)])
def test_the_last_row_is_the_model(case, family, norm):
  model, params, inputs = case(family, **({} if norm is None else dict(norm=norm)))
  found = logit_lens(model, params, inputs)
  expected = plain(model, params, inputs)
  assert found.shape[1:] == expected.shape
  np.testing.assert_allclose(found[-1], expected, atol=1e-5)
  assert not np.allclose(found[-2], expected, atol=1e-2)


def kl(lens_logits, logits):
  target, found = jax.nn.log_softmax(logits), jax.nn.log_softmax(lens_logits)
  return np.asarray(jnp.sum(jnp.exp(target) * (target - found), axis=-1).mean((1, 2)))


def test_the_tuned_lens_is_nearer_and_descent_brings_it_nearer_still(case):
  model, params, _ = case('decoder_only', 'scanned')
  batches = [(jax.random.randint(jax.random.key(i), (16, 6), 3, 11),) for i in range(4)]
  fresh = (jax.random.randint(jax.random.key(9), (16, 6), 3, 11),)
  lens = fit_tuned_lens(model, params, batches)
  expected = plain(model, params, fresh)
  before, after = kl(logit_lens(model, params, fresh), expected), kl(lens(model, params, fresh), expected)
  assert (after[:-1] < before[:-1]).all() and after[-1] < 1e-6
  descended = fit_tuned_lens(model, params, batches, steps=30, learning_rate=3e-3)
  assert kl(descended(model, params, fresh), expected)[:-1].mean() < after[:-1].mean()


def test_a_strong_penalty_leaves_the_plain_lens_but_for_the_mean(case):
  model, params, inputs = case('decoder_only')
  lens = fit_tuned_lens(model, params, [inputs], ridge=1e9)
  np.testing.assert_allclose(lens.maps_NxDxD, np.broadcast_to(np.eye(16), (3, 16, 16)), atol=1e-4)


def test_padding_has_no_say(case):
  model, params, (source, target) = case('encoder_decoder')
  real = jnp.asarray(target != 0)
  other = jnp.where(real, target, 7)  # a causal model's padding changes nothing before it
  model = model.clone(config=dataclasses.replace(model.config, pad_id=None))
  one, two = (fit_tuned_lens(model, params, [(source, each)], [real]) for each in (target, other))
  np.testing.assert_allclose(one.maps_NxDxD, two.maps_NxDxD, atol=1e-3)


def test_recurrent_models_have_no_stream(case):
  with pytest.raises(ValueError, match='no residual stream'):
    logit_lens(*case('rnn_lm'))
