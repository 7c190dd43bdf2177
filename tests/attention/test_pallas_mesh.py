"""The kernels over a mesh: each device its rows and heads."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from tfm.attention import masks, pallas, pallas_gpu
from tfm.attention.attend import for_platform
from tfm.config import Config, DataConfig, MeshConfig, TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.parallel.compile import jit_step
from tfm.parallel.mesh import build_mesh
from tfm.training.step import new_state

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason='needs 8 devices: tests/test_multi_device.py has them')

WIDTH = 512
LENGTHS = masks.lengths(jnp.array([5, 0, 128, 100]))


@pytest.mark.parametrize('kernel', [pallas.attend, partial(pallas_gpu.attend, partitioned=True)], ids=['tpu', 'gpu'])
@pytest.mark.parametrize('mask', [masks.causal() & LENGTHS, masks.causal(3) & masks.window(7, offset=3)],
                         ids=['causal, lengths', 'window further on'])
def test_it_is_the_reference_forward_and_backward(mask, kernel, law):
  """By Pallas' interpreter, on two by two by two devices."""
  arrays = law.draw(T=128, S=256, H=4, K=2, C=64, value_width=64, batch=4)
  with jax.set_mesh(build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
    law.agree(partial(kernel, interpret=True), arrays, mask)


def test_a_sharded_training_step_lowers_for_a_tpu_pod_with_its_kernel():
  model = TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=128, d_ff=128, num_heads=2, dtype='bfloat16')
  config = Config(model=model, data=DataConfig(max_length=WIDTH), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
  built, mesh = build_model(config.model, 300, 300), build_mesh(config.mesh)
  state = jax.eval_shape(lambda: new_state(config, built, initialize(built, jax.random.key(0))))
  batch = tuple(jax.ShapeDtypeStruct((8, width), jnp.int32) for width in (WIDTH, WIDTH + 1))
  with jax.set_mesh(mesh), for_platform('tpu'):
    text = jit_step(config, built, mesh, state).trace(state, batch).lower(lowering_platforms=('tpu',)).as_text()
  # Forward and twice backward, of the causal and of the other two attentions (which share one function).
  assert text.count('tpu_custom_call') >= 6
