"""The ablation of attention: an unweighted mean in the place of the weighted one (Brauwers & Frasincar 2021, 4.1)."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm.models.tap import Tap


@partial(jax.jit, static_argnames='model')
def unweighted_mean(model, params, source_BxS: jax.Array, target_BxT: jax.Array) -> jax.Array:
  """Logits BxTxV with every cross-attention pattern uniform over the tokens of the source, in all layers and heads.

  Args:
    model: an encoder-decoder that attends to its source (static).
    source_BxS, target_BxT: int32 ids; targets begin with <s>.

  Raises:
    ValueError: the model has no cross-attention.
  """
  real_BxS = model.apply({'params': params}, source_BxS, method='real').astype(jnp.float32)
  uniform_BxS = real_BxS / jnp.maximum(real_BxS.sum(axis=-1, keepdims=True), 1.0)
  replaced = set()

  def replace(call, args, kwargs, context):
    value, module = call(*args, **kwargs), context.module
    if not isinstance(module, Tap) or module.path[-2:] != ('cross_attention', 'pattern'):
      return value
    replaced.add(module.path)
    B, S = uniform_BxS.shape
    return jnp.broadcast_to(uniform_BxS.reshape(B, *[1] * (value.ndim - 2), S), value.shape).astype(value.dtype)

  with nn.intercept_methods(replace):
    # Where intermediates may be read, attention holds its pattern; a kernel that does not has nothing to replace.
    logits_BxTxV, _ = model.apply({'params': params}, source_BxS, target_BxT, mutable=['intermediates'])
  if not replaced:
    raise ValueError(f'This {model.config.kind} model does not look back at its source, so it has no weights to make '
                     'equal; choose one with attention.')
  return logits_BxTxV
