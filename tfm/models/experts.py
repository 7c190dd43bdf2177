"""Mixture of experts: several feed-forward networks, of which a router chooses some for each token.

Top-k routing with the softmax over the chosen (Jiang et al. 2024, section 2.2; of one, over all: Fedus et al. 2022,
equation 2), without a capacity: no token is dropped, so what a token becomes depends on itself alone, not on its batch.

On a mesh the experts are shared out along the axis `expert`, whose devices have rows of the batch of their own: they
gather the tokens of all, send each through those of its experts that they have, and add up.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tfm.config import TransformerConfig
from tfm.models.dropout import keep_mask
from tfm.models.feed_forward import ACTIVATIONS
from tfm.models.grouped import grouped_matmul
from tfm.models.tap import Tap
from tfm.parallel.mesh import BATCH_AXES


class Experts(nn.Module):
  """sum over the chosen experts e of weight_e * FeedForward_e(x).

  The load-balance loss is sown as `losses/balance`: summed over rows, each weighted by its tokens, so that it is a sum
  over tokens like every other loss and does not depend on how rows are batched.

  The rows of the tap `act` are those of `chosen`, one after another, in the order of their experts (a stable sort). It
  is there on one device only.
  """

  config: TransformerConfig

  def setup(self):
    c = self.config
    xavier = nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform', batch_axis=0)
    self.router = self.param('router', nn.initializers.xavier_uniform(), (c.d_model, c.experts))
    self.inner = self.param('inner', xavier, (c.experts, c.d_model, c.d_ff))
    self.outer = self.param('outer', xavier, (c.experts, c.d_ff, c.d_model))
    if c.gated:
      self.gate = self.param('gate', xavier, (c.experts, c.d_model, c.d_ff))
    self.chosen, self.act = Tap(), Tap()

  def __call__(self, x_BxTxD, dropout_key=None, real_BxT=None):
    c, (B, T, _) = self.config, x_BxTxD.shape
    logits_BxTxE = jnp.einsum('btd,de->bte', x_BxTxD, self.router, preferred_element_type=jnp.float32)
    # Not `jax.lax.top_k`, for which the partitioner gathers the logits of the whole batch.
    chosen_BxTxk = jnp.argsort(logits_BxTxE, axis=-1, descending=True)[..., :c.experts_per_token]
    chosen_BxTxk = self.chosen(chosen_BxTxk)
    scores_BxTxk = jnp.take_along_axis(logits_BxTxE, chosen_BxTxk, axis=-1)
    if real_BxT is not None:
      self.sow('losses', 'balance', balance_loss(logits_BxTxE, chosen_BxTxk, real_BxT))
    # Over one alone it would be 1, and the router would learn nothing of the task: there it is over all (Switch).
    total = jax.nn.logsumexp(logits_BxTxE if c.experts_per_token == 1 else scores_BxTxk, axis=-1, keepdims=True)
    weights_BxTxk = jnp.exp(scores_BxTxk - total).astype(c.dtype)
    kernels = {name: getattr(self, name).astype(c.dtype) for name in ('inner', 'outer', *(('gate',) * c.gated))}
    tokens = (x_BxTxD.astype(c.dtype), chosen_BxTxk, weights_BxTxk, jnp.arange(B * T).reshape(B, T))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
      return mix(c, kernels, *_in_a_row(tokens), dropout_key, act_tap=self.act).reshape(x_BxTxD.shape)
    rows, whole = PartitionSpec(BATCH_AXES, 'context'), PartitionSpec()
    cut = {name: PartitionSpec('expert', *(('tensor', 'fsdp') if name == 'outer' else ('fsdp', 'tensor')))
           for name in kernels}
    return jax.shard_map(partial(_mix_on_mesh, c), in_specs=(cut, rows, whole), out_specs=rows,
                         check_vma=False)(kernels, tokens, dropout_key)


def mix(c: TransformerConfig, kernels, x_nxD, chosen_nxk, weights_nxk, number_n, dropout_key=None, first=0,
        first_unit=0, act_tap=lambda act: act) -> jax.Array:
  """What the experts in `kernels` add to n tokens, nxD.

  Args:
    kernels: 'inner', 'outer' and perhaps 'gate', of some experts and some of their units.
    number_n: of each token in the batch, for its dropout.
    first: number of the first of these experts.
    first_unit: number of the first of these units.
  """
  k, (E, _, F) = c.experts_per_token, kernels['inner'].shape
  own_nxk = (chosen_nxk >= first) & (chosen_nxk < first + E)
  expert_m = jnp.where(own_nxk, chosen_nxk - first, E).reshape(-1)  # m = n k; E: it is elsewhere
  order_m = jnp.argsort(expert_m)
  place_m = jnp.argsort(order_m)
  sizes_E = jnp.sum(expert_m[:, None] == jnp.arange(E), axis=0)
  own_mx1 = (jnp.arange(len(order_m)) < jnp.sum(sizes_E))[:, None]
  x_mxD = jnp.where(own_mx1, _permute(jnp.repeat(x_nxD, k, axis=0), order_m, place_m), 0)
  act_mxF = grouped_matmul(x_mxD, kernels['inner'], sizes_E)
  if c.gated:
    act_mxF = ACTIVATIONS[c.feed_forward](grouped_matmul(x_mxD, kernels['gate'], sizes_E)) * act_mxF
  else:
    act_mxF = ACTIVATIONS[c.feed_forward](act_mxF)
  act_mxF = act_tap(act_mxF)
  if dropout_key is not None and c.activation_dropout:
    # A token's units drop by its number, wherever it was sorted to and whichever device has it.
    number_m = (number_n[:, None] * k + jnp.arange(k)).reshape(-1)[order_m]
    keys_m = jax.vmap(partial(jax.random.fold_in, dropout_key))(number_m)
    keep_mxF = jax.vmap(lambda key: jax.lax.dynamic_slice_in_dim(
        keep_mask(key, (c.d_ff,), c.activation_dropout), first_unit, F))(keys_m)
    act_mxF = jnp.where(keep_mxF, act_mxF / (1.0 - c.activation_dropout), 0)
  y_mxD = jnp.where(own_mx1, grouped_matmul(act_mxF, kernels['outer'], sizes_E), 0)
  y_nxkxD = _permute(y_mxD, place_m, order_m).reshape(-1, k, y_mxD.shape[1])
  return jnp.einsum('nkd,nk->nd', y_nxkxD, weights_nxk)


def _mix_on_mesh(c: TransformerConfig, kernels, tokens, dropout_key):
  """`mix` of a device's rows by the experts of all devices; every array is the device's own part."""
  kernels = {name: jax.lax.all_gather(kernel, 'fsdp', axis=2 if name == 'outer' else 1, tiled=True)
             for name, kernel in kernels.items()}
  E, _, F = kernels['inner'].shape
  gathered = [jax.lax.all_gather(array, 'expert', tiled=True) for array in _in_a_row(tokens)]
  y_nxD = mix(c, kernels, *gathered, dropout_key, jax.lax.axis_index('expert') * E, jax.lax.axis_index('tensor') * F)
  y_nxD = jax.lax.psum(jax.lax.psum_scatter(y_nxD, 'expert', tiled=True), 'tensor')
  return y_nxD.reshape(tokens[0].shape)


def _in_a_row(tokens):
  """BxT... to n..., n = B T."""
  return [array.reshape(-1, *array.shape[2:]) for array in tokens]


@jax.custom_vjp
def _permute(x_mxD, there_m, back_m):
  """x[there]; `back` is the inverse, so that the gradient is gathered too, not scattered."""
  return x_mxD[there_m]


_permute.defvjp(lambda x_mxD, there_m, back_m: (x_mxD[there_m], back_m),
                lambda back_m, dy_mxD: (dy_mxD[back_m], None, None))


def balance_loss(logits_BxTxE, chosen_BxTxk, real_BxT) -> jax.Array:
  """Sum over rows of (tokens of the row) * E * sum_e f_e P_e, float32 scalar (Fedus et al. 2022, equation 4).

  f_e is the share of the row's choices that fell on expert e, P_e the mean probability that the router gave it. It is
  1 for each token where the load is even.
  """
  E, k = logits_BxTxE.shape[-1], chosen_BxTxk.shape[-1]
  real_BxTx1 = real_BxT[..., None].astype(jnp.float32)
  tokens_Bx1 = jnp.maximum(jnp.sum(real_BxTx1, axis=1), 1.0)
  share_BxE = jnp.sum(jax.nn.one_hot(chosen_BxTxk, E).sum(2) * real_BxTx1, axis=1) / (k * tokens_Bx1)
  probability_BxE = jnp.sum(jax.nn.softmax(logits_BxTxE) * real_BxTx1, axis=1) / tokens_Bx1
  return jnp.sum(jnp.sum(real_BxT, axis=1) * E * jnp.sum(share_BxE * probability_BxE, axis=1))
