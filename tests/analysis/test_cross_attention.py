from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.analysis.cross_attention import cross_attention
from tfm.config import TransformerConfig
from tfm.models.build import build_model, initialize, with_layout
from tfm.models.layout import to_layout

SOURCE_BxS = np.array([[5, 6, 7, 8, 2], [9, 4, 2, 0, 0]], np.int32)
TARGET_BxT = np.array([[1, 7, 9, 4], [1, 5, 0, 0]], np.int32)


def make(**changes):
  """A model of 11 decoder layers, so that their order as text is not their order, and random parameters."""
  config = TransformerConfig(**{**dict(encoder_layers=1, decoder_layers=11, d_model=8, d_ff=8, num_heads=2,
                                       dropout=0.0, scan_layers=True), **changes})
  model = build_model(config, 12, 12)
  shapes = jax.eval_shape(partial(initialize, model), jax.random.key(0))
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), shapes)


def test_layouts_agree_and_layers_are_in_order():
  model, params = make()
  scanned = np.asarray(cross_attention(model, params, SOURCE_BxS, TARGET_BxT))
  assert scanned.shape == (2, 11, 2, 4, 5) and scanned.dtype == np.float32
  with jax.disable_jit():  # 11 layers are compiled slowly and run fast
    unrolled = cross_attention(with_layout(model, False), to_layout(params, 'unrolled'), SOURCE_BxS, TARGET_BxT)
  np.testing.assert_allclose(unrolled, scanned, atol=1e-5)
  layers = scanned.swapaxes(0, 1).reshape(11, -1)
  assert min(np.abs(layers[i] - layers[j]).max() for i in range(11) for j in range(i)) > 1e-3, 'layers must differ'


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rows_are_distributions_over_the_tokens_of_the_source(dtype):
  model, params = make(decoder_layers=2, dtype=dtype)
  patterns = np.asarray(cross_attention(model, params, SOURCE_BxS, TARGET_BxT))
  assert patterns.dtype == np.float32
  np.testing.assert_allclose(patterns.sum(-1), 1, rtol=1e-5)
  assert (patterns[1, ..., 3:] == 0).all() and (patterns[1, ..., :3] > 0).all()


def test_patterns_are_those_of_decoding_step_by_step():
  model, params = make(decoder_layers=2, scan_layers=False)
  variables = {'params': params}
  patterns = cross_attention(model, params, SOURCE_BxS, TARGET_BxT)

  @jax.jit
  def steps():
    memory = model.apply(variables, SOURCE_BxS, method='encode')
    cache, rows = model.apply(variables, memory, TARGET_BxT.shape[1], method='init_cache'), []
    for t in range(TARGET_BxT.shape[1]):
      (_, cache), state = model.apply(variables, TARGET_BxT[:, t:t + 1], memory, cache, method='step',
                                      capture_intermediates=True, mutable=['intermediates'])
      layers = state['intermediates']['decoder']
      rows.append(jnp.stack([layers[f'layers_{i}']['cross_attention']['pattern']['__call__'][0] for i in range(2)], 1))
    return jnp.concatenate(rows, axis=3)

  np.testing.assert_allclose(steps(), patterns, atol=1e-5)
  assert np.abs(np.diff(np.asarray(patterns), axis=3)).max() > 1e-3, 'steps must differ'
