"""What is learned from a batch: the four objectives differ in what the model reads and which tokens it must say."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tfm.models.build import Model
from tfm.training.loss import Sums, chunked_token_sums

Batch = tuple[jax.Array | None, ...]
"""int32 ids, padding on the right. For an encoder-decoder source_BxS and target_BxT, which begins with <s> and ends
with </s>, and where a row holds several pairs source_segments_BxS and target_segments_BxT; for a decoder ids_BxT and
segments_BxT or None; for an encoder inputs_BxT and labels_BxT, padding where nothing is asked (`tfm.text.objectives`
makes them)."""


def abstract_batch(shape: str, rows: int, S: int, T: int, packed: bool = False) -> Batch:
  """Shapes of a batch for a model of `shape`, with S tokens a row for an encoder and T labels a row for a decoder.

  Args:
    packed: whether a row holds several texts or pairs.
  """
  sides = {'encoder_decoder': (S, T + 1, *(S, T + 1) * packed), 'decoder_only': (T + 1, T + 1 if packed else None),
           'encoder_only': (S, S)}[shape]
  return tuple(None if width is None else jax.ShapeDtypeStruct((rows, width), jnp.int32) for width in sides)


def inputs_and_labels(model: Model, batch: Batch) -> tuple[tuple, jax.Array, jax.Array]:
  """(what `model.hidden` reads, labels_BxT, bool BxT: which labels count).

  - translation and span corruption (encoder-decoder): the decoder reads the target shifted right, without its last
    token, and says it shifted left; in packed rows a token is not asked of the pair before it.
  - causal language model (decoder-only): likewise with the text itself; in packed rows a token is not asked of the
    text before it.
  - masked language model (encoder-only): the tokens that were masked, at their own place.
  """
  first, second, *more = batch
  if model.config.shape == 'encoder_only':
    return (first,), second, model.real(second)
  both = model.config.shape == 'encoder_decoder'
  said, segments = (second, more[1] if more else None) if both else (first, second)
  before = (first,) if both else ()
  labels_BxT = said[:, 1:]
  counts_BxT = model.real(labels_BxT)
  if segments is None:
    return (*before, said[:, :-1]), labels_BxT, counts_BxT
  inputs = (*before, said[:, :-1], *more[:1], segments[:, :-1])
  return inputs, labels_BxT, counts_BxT & (segments[:, :-1] == segments[:, 1:])


def batch_sums(model: Model, params: Any, batch: Batch, smoothing: float, dropout_key=None) -> Sums:
  """Loss sums of a batch; with experts the loss includes their load balance, `nll` does not."""
  inputs, labels_BxT, counts_BxT = inputs_and_labels(model, batch)
  hidden_BxTxD, sown = model.apply({'params': params}, *inputs, dropout_key=dropout_key, method='hidden',
                                   mutable=['losses'] if model.config.experts else [])
  sums = chunked_token_sums(
      lambda params, hidden_BxTxD: model.apply({'params': params}, hidden_BxTxD, method='unembed'),
      {name: params[name] for name in model.unembed_parameters}, hidden_BxTxD, labels_BxT,
      counts_BxT.astype(jnp.float32), smoothing, model.output_vocab_size)
  balance = sum(jnp.sum(loss) for loss in jax.tree.leaves(sown))
  return sums.replace(loss=sums.loss + model.config.load_balance * balance) if model.config.experts else sums
