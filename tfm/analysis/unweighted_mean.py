"""The ablation of attention: an unweighted mean in the place of the weighted one (Brauwers & Frasincar 2021, 4.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tfm.analysis.engine import Edit, edit
from tfm.analysis.sites import sites


def unweighted_mean(model, params, source_BxS: jax.Array, target_BxT: jax.Array) -> jax.Array:
  """Logits BxTxV with every cross-attention pattern uniform over the tokens of the source, in all layers and heads.

  Args:
    model: an encoder-decoder that attends to its source.
    source_BxS, target_BxT: int32 ids; targets begin with <s>.

  Raises:
    ValueError: the model has no cross-attention.
  """
  real_BxS = model.apply({'params': params}, source_BxS, method='real').astype(jnp.float32)
  uniform_Bx1x1xS = (real_BxS / jnp.maximum(real_BxS.sum(axis=-1, keepdims=True), 1.0))[:, None, None]
  inputs = source_BxS, target_BxT
  edits = [Edit(name, value=uniform_Bx1x1xS if site.layers is None else uniform_Bx1x1xS[None])
           for name, site in sites(model, params, inputs).items() if name.endswith('cross_attention.pattern')]
  if not edits:
    raise ValueError(f'This {model.config.kind} model does not look back at its source, so it has no weights to make '
                     'equal; choose one with attention.')
  return edit(model, params, inputs, edits)
