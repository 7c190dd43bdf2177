"""Who the decoder looked at: the cross-attention patterns of given sentence pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tfm.analysis.engine import read


def cross_attention(model, params, source_BxS: jax.Array, target_BxT: jax.Array) -> jax.Array:
  """Patterns BxNxHxTxS float32 of a teacher-forced pass; those of step-by-step decoding are the same.

  Row t is the step that *reads* target_BxT[:, t] and predicts the token after it.

  Args:
    model: an encoder-decoder that attends to its source, scanned or unrolled.
    params: in the layout of the model.
    source_BxS, target_BxT: int32 ids; targets begin with <s>.
  """
  (patterns,) = read(model, params, (source_BxS, target_BxT), where='*.cross_attention.pattern').values()
  # A recurrent decoder has one attention for all its layers.
  return jnp.moveaxis(patterns, 0, 1) if patterns.ndim == 5 else patterns[:, None]
