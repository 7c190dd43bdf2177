"""The training step and the decoding search lower for TPU and CUDA on a machine that has neither."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from tfm import translator
from tfm.attention.attend import for_platform
from tfm.config import Config, DataConfig, MeshConfig, TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.parallel.compile import jit_step
from tfm.parallel.mesh import build_mesh
from tfm.special_ids import SpecialIds
from tfm.training.step import new_state

V, WIDTH = 300, 512
PLATFORMS = {'tpu': 'tpu', 'cuda': 'gpu'}


def config_of(dtype: str, **model) -> Config:
  sizes = dict(encoder_layers=1, decoder_layers=1, d_model=128, d_ff=128, num_heads=2)
  model = TransformerConfig(**sizes, dtype=dtype, **model)
  return Config(model=model, data=DataConfig(width_multiple=128, max_length=WIDTH), mesh=MeshConfig())


def lowered_step(config: Config, platform: str) -> str:
  model, mesh = build_model(config.model, V, V), build_mesh(config.mesh, jax.devices()[:1])
  state = jax.eval_shape(lambda: new_state(config, model, initialize(model, jax.random.key(0))))
  batch = tuple(jax.ShapeDtypeStruct((8, width), jnp.int32) for width in (WIDTH, WIDTH + 1))
  with jax.set_mesh(mesh), for_platform(PLATFORMS[platform]):
    return jit_step(config, model, mesh, state).trace(state, batch).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('platform', PLATFORMS)
def test_the_training_step_lowers_for_an_accelerator(platform, dtype):
  text = lowered_step(config_of(dtype, remat='full', scan_layers=True), platform)
  # On a TPU attention is the Pallas kernel, forward and backward; for CUDA, XLA's own where cuDNN's is not installed.
  assert ('tpu_custom_call' in text) == (platform == 'tpu')


def test_the_training_step_lowers_for_cuda_with_the_kernels_of_pallas():
  text = lowered_step(config_of('bfloat16', attention_backend='pallas'), 'cuda')
  # Forward and twice backward, of causal attention and of the other two (which share one function).
  assert text.count('@__gpu$xla.gpu.triton') >= 6


@pytest.mark.parametrize('search', ['beam', 'sample'])
@pytest.mark.parametrize('platform', PLATFORMS)
def test_decoding_lowers_for_an_accelerator(platform, search):
  config = config_of('bfloat16')
  model = build_model(config.model, V, V)
  params = jax.eval_shape(partial(initialize, model), jax.eval_shape(lambda: jax.random.key(0)))
  asked = translator._Search(4, 1, 0.6, 'gnmt', 'bound', None if search == 'beam' else 0.7, 0, 1.0)
  ids, rows = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  with for_platform(PLATFORMS[platform]):
    prefix = (jax.ShapeDtypeStruct((2, 3), jnp.int32), rows)
    reading = translator._read_source.trace(model, params, ids)
    reading.lower(lowering_platforms=(platform,))
    traced = translator._run_search.trace(model, asked, 16, SpecialIds(), params, *reading.out_info, rows, prefix, key,
                                          rows)
    assert 'stablehlo.while' in traced.lower(lowering_platforms=(platform,)).as_text()
