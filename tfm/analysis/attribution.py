"""Direct logit attribution: which head, MLP or embedding wrote how much of a logit (Elhage et al. 2021, section 3).

A pre-norm residual stream is a sum: embedding + what every sub-layer wrote. The final norm divides it by one number per
position; with that number held fixed the logit is a sum too, exactly:

    logit_v = sum over writers o of <u_v, gamma * (o - mean o) / sigma> + <u_v, beta> + bias_v

(RMSNorm has no mean and no beta.) A constant added to all logits changes no probability; to compare writers, subtract
from each its mean over the vocabulary (`centred`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tfm.analysis.engine import read
from tfm.analysis.lens import last_stream


@struct.dataclass
class Attribution:
  """Parts of the logits of chosen tokens; `total` is the logit itself."""

  embedding_BxT: jax.Array
  heads: dict[str, jax.Array]
  """By attention (`self_attention`, `cross_attention`): NxHxBxT."""
  mlps_NxBxT: jax.Array
  biases_NxBxT: jax.Array
  """Of the output projections of attention, which belong to no head."""
  constant_BxT: jax.Array
  """beta of the final norm and the bias of the output: the same whatever is read."""

  @property
  def total_BxT(self) -> jax.Array:
    return (self.embedding_BxT + sum(each.sum((0, 1)) for each in self.heads.values()) + self.mlps_NxBxT.sum(0)
            + self.biases_NxBxT.sum(0) + self.constant_BxT)


def require_sum(config) -> None:
  """ValueError unless the residual stream of this model is a sum of what its sub-layers wrote."""
  reason = None
  if config.kind != 'transformer':
    reason = f'a {config.kind} model'
  elif config.norm != 'pre':
    reason = f"model.norm='{config.norm}', where a norm changes what was written before"
  elif config.convolution != 'none' and config.shape == 'encoder_only':
    reason = f"model.convolution='{config.convolution}', whose blocks write more than attention and MLP do"
  elif config.output_transform or config.logit_softcap is not None:
    reason = 'an output that is no linear map of the stream'
  if reason:
    raise ValueError(f'Attribution needs logits that are a sum; this is {reason}.')


def directions(model, params: Any, final_BxTxD: jax.Array, tokens_BxT: jax.Array,
               centred: bool = False) -> tuple[jax.Array, jax.Array]:
  """Vectors d, BxTxD, and constants c, BxT, with logit of the token = <d, final stream> + c at the same position.

  The mean that a LayerNorm takes away is in d. `centred`: of the logit less the mean of all logits.
  """
  config = model.config
  norm = params['encoder_norm' if config.shape == 'encoder_only' else 'decoder_norm']
  table_VxD = params[model.output_table]['table'].astype(jnp.float32)
  V = model.output_vocab_size
  mean_D = table_VxD[:V].mean(0) if centred else 0.0
  u_BxTxD = table_VxD[tokens_BxT] - mean_D
  if config.scale_output:
    u_BxTxD = u_BxTxD * config.d_model**-0.5
  scaled = u_BxTxD * _gain(config, norm)
  x = final_BxTxD.astype(jnp.float32)
  if config.norm_type == 'rms':
    d = scaled * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon)
  else:
    d = scaled * jax.lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + config.norm_epsilon)
    d = d - d.mean(-1, keepdims=True)
  constant = jnp.einsum('btd,d->bt', u_BxTxD, norm['bias']) if 'bias' in norm else jnp.zeros(tokens_BxT.shape)
  if config.output_bias:
    bias_V = params['output_bias'][:V]
    constant = constant + bias_V[tokens_BxT] - (bias_V.mean() if centred else 0.0)
  return d, constant


def attribution(model, params: Any, inputs: tuple, tokens_BxT: jax.Array, centred: bool = False) -> Attribution:
  """Who wrote the logit of `tokens_BxT[b, t]` at position t.

  Args:
    model: a pre-norm Transformer of any shape.
    tokens_BxT: int32 ids, for example the labels.
    centred: take from every part its mean over the vocabulary.

  Raises:
    ValueError: the logits of this model are no sum.
  """
  require_sum(model.config)
  stream = last_stream(model)
  stack, _, _ = stream.partition('.')
  attentions = ['self_attention', *(['cross_attention'] if model.config.shape == 'encoder_decoder' else [])]
  embedding = 'source_embed' if stack == 'encoder' else 'target_embed'
  where = [stream, embedding, f'{stack}.layers.mlp', *(f'{stack}.layers.{name}.z' for name in attentions)]
  found = read(model, params, inputs, where)
  d_BxTxD, constant_BxT = directions(model, params, found[stream][-1], tokens_BxT, centred)
  heads, biases = {}, jnp.zeros(found[stream].shape[:3])
  for name in attentions:
    output = output_projection(model, params, stack, name)
    # W_O turns the direction instead of every head's output: H times less to hold.
    turned = jnp.einsum('btd,nhcd->nbthc', d_BxTxD, output['kernel'])
    heads[name] = jnp.einsum('nbthc,nbthc->nhbt', found[f'{stack}.layers.{name}.z'].astype(jnp.float32), turned)
    if 'bias' in output:
      biases = biases + jnp.einsum('btd,nd->nbt', d_BxTxD, output['bias'])
  return Attribution(
      embedding_BxT=jnp.einsum('btd,btd->bt', d_BxTxD, found[embedding].astype(jnp.float32)), heads=heads,
      mlps_NxBxT=jnp.einsum('btd,nbtd->nbt', d_BxTxD, found[f'{stack}.layers.mlp'].astype(jnp.float32)),
      biases_NxBxT=biases, constant_BxT=constant_BxT)


def output_projection(model, params: Any, stack: str, attention: str) -> dict[str, jax.Array]:
  """W_O of all layers, NxHxCxD, and its bias NxD where there is one."""
  if model.config.scan_layers:
    return params[stack]['layers'][attention]['output']
  layers = getattr(model.config, f'{stack}_layers')
  return jax.tree.map(lambda *each: jnp.stack(each),
                      *(params[stack][f'layers_{i}'][attention]['output'] for i in range(layers)))


def _gain(config, norm) -> jax.Array:
  return norm['scale'] if 'scale' in norm else jnp.ones(config.d_model)
