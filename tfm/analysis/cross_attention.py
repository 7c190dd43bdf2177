"""Who the decoder looked at: the cross-attention patterns of given sentence pairs."""

from __future__ import annotations

from functools import partial

import flax
import jax
import jax.numpy as jnp

from tfm.models.tap import Tap


@partial(jax.jit, static_argnames='model')
def cross_attention(model, params, source_BxS: jax.Array, target_BxT: jax.Array) -> jax.Array:
  """Patterns BxNxHxTxS float32 of a teacher-forced pass; those of step-by-step decoding are the same.

  Row t is the step that *reads* target_BxT[:, t] and predicts the token after it.

  Args:
    model: an encoder-decoder that attends to its source, scanned or unrolled (static).
    params: in the layout of the model.
    source_BxS, target_BxT: int32 ids; targets begin with <s>.
  """

  def is_pattern(module, method):
    return isinstance(module, Tap) and module.path[-2:] == ('cross_attention', 'pattern')

  _, state = model.apply({'params': params}, source_BxS, target_BxT, capture_intermediates=is_pattern,
                         mutable=['intermediates'])
  found = {path: values[0] for path, values in flax.traverse_util.flatten_dict(state['intermediates']).items()}
  if model.config.scan_layers:
    (patterns_NxBxHxTxS,) = found.values()
  else:
    patterns_NxBxHxTxS = jnp.stack([found[path] for path in sorted(found, key=_layer_number)])
  return jnp.moveaxis(patterns_NxBxHxTxS, 0, 1)


def _layer_number(path: tuple[str, ...]) -> int:
  """0 where there is one attention for all layers, as in a recurrent decoder."""
  return next((int(part.removeprefix('layers_')) for part in path if part.startswith('layers_')), 0)
