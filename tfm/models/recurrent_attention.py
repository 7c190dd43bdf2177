"""Attention of a recurrent decoder to the states of its encoder (Bahdanau et al. 2015; Luong et al. 2015)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core.scope import DenyList

from tfm.attention.alignments import PredictedCentre, align
from tfm.attention.masks import AttentionMask
from tfm.attention.score_functions import Score
from tfm.models.tap import Tap
from tfm.recurrent_config import LOCAL, RecurrentConfig

WIDE = 'additive', 'euclidean'
"""Scores that hold a vector for every pair of query and key."""


@struct.dataclass
class Keys:
  """The encoder's states as attention uses them, one row per source sentence."""

  prepared_BxSx: jax.Array
  """What the score makes of the keys alone."""
  values_BxSxV: jax.Array


class RecurrentAttention(nn.Module):
  """score, align, combine: the context c_t = sum_s a_ts h_s of a query."""

  config: RecurrentConfig

  def setup(self):
    c = self.config
    hidden = c.attention_width or c.d_hidden
    self.score = Score(kind=c.score, query_width=c.d_hidden, key_width=c.memory_width,
                       width=hidden if c.score == 'additive' else None, dtype=c.dtype)
    if c.alignment == 'local_predictive':
      self.centre = PredictedCentre(query_width=c.d_hidden, width=hidden, dtype=c.dtype)
    self.scores, self.pattern = Tap(), Tap()

  def prepare(self, states_BxSxV) -> Keys:
    return Keys(self.score.prepare(states_BxSxV), states_BxSxV)

  def __call__(self, query_RxTxW, positions_T, keys: Keys, mask: AttentionMask) -> jax.Array:
    """Contexts RxTxV of all queries; R may be several rows for each row of the keys."""
    if self.config.score not in WIDE or query_RxTxW.shape[1] == 1:
      return self._attend(query_RxTxW, positions_T, keys, mask, lambda x_RxTxS: x_RxTxS[:, None])
    one_by_one = nn.scan(lambda module, _, query_RxW, position: (None, module.one(query_RxW, position, keys, mask)),
                         in_axes=(1, 0), out_axes=1, **OVER_TIME)
    return one_by_one(self, None, query_RxTxW, positions_T)[1]

  def one(self, query_RxW, position, keys: Keys, mask: AttentionMask) -> jax.Array:
    """Context RxV of one query, inside a loop over time that has OVER_TIME."""
    attend = nn.remat(lambda module, *args: module._attend(*args, lambda x_Rx1xS: x_Rx1xS), prevent_cse=False)
    return attend(self, query_RxW[:, None], position[None], keys, mask)[:, 0]

  def _attend(self, query_RxTxW, positions_T, keys: Keys, mask: AttentionMask, with_head):
    (R, T, _), (B, S, _) = query_RxTxW.shape, keys.values_BxSxV.shape
    # The hypotheses of a sentence become queries of one row: its keys are stored and read once, not M times.
    query_BxQxW, positions_Q = query_RxTxW.reshape(B, R // B * T, -1), jnp.tile(positions_T, R // B)

    def tapped(tap, x_BxQxS):
      shown = with_head(x_BxQxS.reshape(R, T, S))
      return tap(shown).reshape(x_BxQxS.shape)

    c, real_BxS = self.config, real_keys(mask, B, S)
    scores_BxQxS = tapped(self.scores, self.score(query_BxQxW, keys.prepared_BxSx))
    local = {}
    if c.alignment in LOCAL:
      lengths_B = S if real_BxS is None else jnp.sum(real_BxS, axis=1)
      local = dict(window=c.attention_window, centre_BxT=positions_Q[None] if c.alignment == 'local_monotonic' else
                   self.centre(query_BxQxW, lengths_B))
    pattern_BxQxS = tapped(self.pattern, align(c.alignment, scores_BxQxS,
                                               None if real_BxS is None else real_BxS[:, None], **local))
    context_BxQxV = jnp.einsum('bqs,bsv->bqv', pattern_BxQxS.astype(c.dtype), keys.values_BxSxV)
    return context_BxQxV.reshape(R, T, -1)


def real_keys(mask: AttentionMask, B: int, S: int) -> jax.Array | None:
  """bool BxS; None: all."""
  shown = mask.to_array(1, S)
  return None if shown is None else jnp.broadcast_to(shown[:, 0, 0], (B, S))


OVER_TIME = dict(
    variable_broadcast='params', split_rngs={'params': False},
    # Taps in a loop over time hold one query, RxHxS, and give RxHxTxS together. What was read or is edited outside of
    # it (`tfm.analysis.engine`) has no such axis, and stays outside.
    variable_axes={DenyList(('params', 'readings', 'edits')): 2})
