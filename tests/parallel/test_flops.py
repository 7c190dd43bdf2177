from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from tfm.config import TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.parallel.flops import model_flops

CONFIG = TransformerConfig(encoder_layers=1, decoder_layers=2, d_model=128, d_ff=320, num_heads=4, dropout=0.0,
                           tying='none')


def abstract(config, vocab_size):
  model = build_model(config, vocab_size, vocab_size)
  return model, jax.eval_shape(functools.partial(initialize, model), jax.eval_shape(lambda: jax.random.key(0)))


@pytest.mark.parametrize('change, V, S, T', [
    (dict(), 500, 48, 32),
    (dict(encoder_layers=2, decoder_layers=1, d_k=16, d_v=48, norm='pre', tying='all'), 300, 16, 80),
    (dict(norm='pre', convolution='conformer', feed_forward='silu'), 500, 48, 32),
    (dict(encoder_layers=0, num_kv_heads=2, feed_forward='swiglu', norm_type='rms', biases='none'), 500, 0, 48),
    (dict(decoder_layers=0, output_transform=True, feed_forward='gelu_tanh'), 500, 48, 0),
])
def test_what_xla_counts_is_what_we_count(change, V, S, T):
  # XLA counts one trip of a loop, hence no scan; it knows nothing of causality, hence the full T x T. It also counts
  # what is not a matrix product (softmax, LayerNorm, masks): 2 to 5 % at this width, less at a real one.
  config, rows = dataclasses.replace(CONFIG, **change), 3
  model, params = abstract(config, V)
  ids = [jax.ShapeDtypeStruct((rows, width), jnp.int32) for width in (S, T) if width]
  compiled = jax.jit(lambda params, *ids: model.apply({'params': params}, *ids)).lower(params, *ids).compile()
  ours = model_flops(config, V, rows, S, T, halve_causal=False).forward
  assert ours < compiled.cost_analysis()['flops'] < 1.06 * ours


def test_halving_leaves_the_keys_that_a_causal_query_sees():
  T = 10
  full, half = (model_flops(CONFIG, 500, 3, 20, T, halve_causal=halve) for halve in (False, True))
  seen = sum(t + 1 for t in range(T))
  assert half.decoder_attention == full.decoder_attention * seen / T**2
  assert full.forward - half.forward == full.decoder_attention - half.decoder_attention


def test_about_six_flops_a_parameter_and_token():
  # Where scores are few, a step is 6 for each weight and token; look-ups of the two embedding tables are free.
  rows, S, V = 4, 8, 500
  _, params = abstract(CONFIG, V)
  matrices = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
  used = matrices - params['source_embedding']['table'].size - params['target_embedding']['table'].size
  assert model_flops(CONFIG, V, rows, S, S).step == pytest.approx(6 * used * rows * S, rel=0.02)


def test_every_part_grows_with_what_it_is_made_of():
  base, longer = model_flops(CONFIG, 500, 2, 16, 16), model_flops(CONFIG, 500, 2, 32, 16)
  assert longer.encoder_attention == 4 * base.encoder_attention
  assert longer.encoder_mlp == 2 * base.encoder_mlp
  assert longer.cross_attention == 2 * base.cross_attention
  assert longer.decoder_projections == base.decoder_projections * 5 / 4  # keys and values of cross-attention
  assert (longer.decoder_attention, longer.logits) == (base.decoder_attention, base.logits)


def test_a_window_and_experts_are_charged_for_what_is_used():
  T, window = 12, 4
  wide, narrow = (model_flops(dataclasses.replace(CONFIG, window=size), 500, 3, T, T) for size in (None, window))
  at = range(T)
  causal = sum(sum(s <= t and t - s < window for s in at) for t in at)
  both = sum(sum(abs(t - s) < window for s in at) for t in at)
  assert narrow.decoder_attention / wide.decoder_attention == pytest.approx(causal / (T * (T + 1) / 2))
  assert narrow.encoder_attention / wide.encoder_attention == pytest.approx(both / T**2)
  one = model_flops(dataclasses.replace(CONFIG, biases='none'), 500, 2, 16, 16)
  many = model_flops(dataclasses.replace(CONFIG, biases='none', experts=8, experts_per_token=3), 500, 2, 16, 16)
  router = 2 * 2 * 2 * 16 * CONFIG.d_model * 8
  assert many.decoder_mlp == 3 * one.decoder_mlp + router
