"""Attribution is exact: parts sum to the logit, heads to the output of attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis.attribution import attribution, output_projection
from tfm.analysis.engine import read


@pytest.mark.parametrize('family, layout, changes', [
    ('encoder_decoder', 'scanned', {}), ('encoder_decoder', 'unrolled', dict(biases='all', output_bias=True)),
    ('decoder_only', 'unrolled', dict(norm_type='rms', scale_output=True)),
    ('encoder_only', 'scanned', dict(norm='pre', output_bias=True))])
def test_the_parts_sum_to_the_logit(case, family, layout, changes):
  model, params, inputs = case(family, layout, **changes)
  logits = jax.jit(lambda params, *inputs: model.apply({'params': params}, *inputs))(params, *inputs)
  tokens = jax.random.randint(jax.random.key(0), inputs[-1].shape, 0, 11)
  expected = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  found = attribution(model, params, inputs, tokens)
  np.testing.assert_allclose(found.total_BxT, expected, atol=2e-5)
  assert found.heads['self_attention'].shape == (4, 4, *tokens.shape)
  centred = attribution(model, params, inputs, tokens, centred=True)
  np.testing.assert_allclose(centred.total_BxT, expected - logits.mean(-1), atol=2e-5)


def test_the_heads_sum_to_the_output_of_attention(case):
  model, params, inputs = case('encoder_decoder', 'scanned', biases='all')
  where = 'decoder.layers.cross_attention.z', 'decoder.layers.cross_attention'
  z, output = read(model, params, inputs, where).values()
  weights = output_projection(model, params, 'decoder', 'cross_attention')
  heads = jnp.einsum('nbthc,nhcd->nhbtd', z, weights['kernel'])
  np.testing.assert_allclose(heads.sum(1) + weights['bias'][:, None, None], output, atol=1e-5)


@pytest.mark.parametrize('family, changes, message', [
    ('decoder_only', dict(norm='post'), 'norm'), ('decoder_only', dict(norm='sandwich'), 'norm'),
    ('decoder_only', dict(logit_softcap=5.0), 'no linear map'), ('rnn_lm', {}, 'a recurrent model'),
    ('conv_s2s', {}, 'a convolutional model')])
def test_what_is_no_sum_is_refused(case, family, changes, message):
  model, params, inputs = case(family, **changes)
  with pytest.raises(ValueError, match=message):
    attribution(model, params, inputs, inputs[-1])
