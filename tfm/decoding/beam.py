"""Beam search: the M best hypotheses live side by side, and those that end compete for the n-best list.

One turn of the loop, per sentence:

  1. The 2M most probable one-token continuations of the M live hypotheses are the candidates. (At most M of them end,
     one per hypothesis, so at least M can go on; with several ids that end it is as many M more.)
  2. A candidate that ends with EOS and ranks among the first M joins the ended hypotheses, scored by log-probability /
     length penalty; the best M of these are kept. One that ranks lower is dropped, as in fairseq and Hugging Face: a
     beam of M would not have reached it.
  3. The best M candidates that do not end live on.

A sentence stops at its own limit, when nothing lives, or by rule: 'bound' when no live hypothesis can still enter the
n-best list, 'full' as soon as M hypotheses have ended. Beam size 1 is greedy search: its one hypothesis ends, and
nothing is left to search, so there both rules are 'full'.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from tfm.decoding.cache import Cache, Step
from tfm.decoding.length_penalty import LengthPenalty, length_penalty
from tfm.decoding.loop import IMPOSSIBLE, check_arguments, forced_tokens, highest_k, is_end, is_one_of, token_log_probs
from tfm.special_ids import OURS, SpecialIds

StopRule = Literal['bound', 'full']

DEAD = IMPOSSIBLE / 10
"""A hypothesis with a log-probability below this does not exist; every real one lies far above."""


@struct.dataclass
class Hypotheses:
  """The n best hypotheses of every sentence, best first (here M = num_hypotheses).

  First those that ended with EOS, by score; then, only where fewer than n ended, those cut at the sentence's limit, by
  score. A place that no hypothesis fills has length 0 and score `IMPOSSIBLE`.
  """

  tokens_BxMxL: jax.Array
  """int32: ids without BOS, EOS included, PAD after the end."""
  lengths_BxM: jax.Array
  """int32: generated tokens, EOS included."""
  log_prob_BxM: jax.Array
  """float32, nats: sum over the tokens, forced ones included."""
  scores_BxM: jax.Array
  """float32: log-probability / length penalty."""
  finished_BxM: jax.Array
  """bool: ended with EOS; False: cut at the limit, or an empty place."""


@struct.dataclass
class BeamState:
  """What one turn of the loop hands to the next. Rows of `done_B` sentences no longer change, the cache excepted."""

  t: jax.Array                       # int32    []         tokens written so far
  cache: Cache                       #          R rows     has read BOS and all live tokens but the last
  live_tokens_BxMxL: jax.Array       # int32    [B, M, L]  PAD from t on
  live_log_prob_BxM: jax.Array       # float32  [B, M]     falling; IMPOSSIBLE: no hypothesis there
  ended_tokens_BxMxL: jax.Array      # int32    [B, M, L]  with EOS, then PAD
  ended_lengths_BxM: jax.Array       # int32    [B, M]     EOS included
  ended_log_prob_BxM: jax.Array      # float32  [B, M]
  ended_scores_BxM: jax.Array        # float32  [B, M]     falling; IMPOSSIBLE: still empty
  done_B: jax.Array                  # bool     [B]


def beam_search(step: Step, cache: Cache, max_lengths_B: jax.Array, length: int, beam_size: int = 4,
                num_hypotheses: int = 1, alpha: float = 0.6, form: LengthPenalty = 'gnmt', stop: StopRule = 'bound',
                prefix_BxP: jax.Array | None = None, prefix_lengths_B: jax.Array | None = None,
                special: SpecialIds = OURS) -> Hypotheses:
  """The `num_hypotheses` best outputs that a beam of `beam_size` finds for every sentence.

  Equal log-probabilities are ranked by hypothesis, then by token id, lowest first, so the result is deterministic. A
  sentence's result does not depend on the others in the batch. Log-probabilities are the model's own, see
  `tfm.decoding.loop`.

  Args:
    step: the model, see `tfm.decoding.cache`.
    cache: fresh from `init_cache` with rows_per_source = beam_size: R = B x M rows.
    max_lengths_B: int32, most tokens of each output, EOS included; 0: an empty output. More than `length` is `length`.
    length: L, static: width of the output and most turns of the loop.
    beam_size: M, static.
    num_hypotheses: how many to return, at most beam_size, static.
    alpha, form: see `tfm.decoding.length_penalty`; alpha >= 0.
    stop: 'bound' gives what searching to the limit would, since a live hypothesis only loses log-probability and its
      penalty is most favourable at the limit. 'full' is faster and inexact; Hugging Face's early_stopping=True.
    prefix_BxP: int32, forced first tokens (no BOS). While they last, a sentence has a single hypothesis.
    prefix_lengths_B: int32, how many of them count for each sentence; 0 for none.
    special: which ids begin, end and fill up, and which are never chosen (forcing them is allowed).

  Raises:
    ValueError: an argument out of range.
  """
  check_arguments(length, prefix_BxP, prefix_lengths_B)
  _check(beam_size, num_hypotheses, alpha, form, stop)
  B, M = max_lengths_B.shape[0], beam_size
  K = M * (1 + len(special.ends))  # so many candidates that M of them go on
  limits_B = jnp.minimum(max_lengths_B, length)

  def unfinished(state: BeamState) -> jax.Array:
    return (state.t < length) & ~jnp.all(state.done_B)

  def extend(state: BeamState) -> BeamState:
    last_BxM = jnp.where(state.t == 0, special.start, state.live_tokens_BxMxL[:, :, state.t - 1])   # B x M
    logits_RxTxV, cache = step(last_BxM.reshape(B * M, 1), state.cache)                   # R x 1 x V
    log_probs_BxMxV = token_log_probs(logits_RxTxV[:, -1]).reshape(B, M, -1)              # B x M x V
    forced_B, forced_token_B = forced_tokens(prefix_BxP, prefix_lengths_B, state.t, B)
    V = log_probs_BxMxV.shape[-1]
    free_V = ~is_one_of(special.forbidden, V)
    allowed_BxV = jnp.where(forced_B[:, None], jnp.arange(V) == forced_token_B[:, None], free_V)
    log_probs_BxMxV = jnp.where(allowed_BxV[:, None], log_probs_BxMxV, IMPOSSIBLE)

    totals_BxMxV = jnp.maximum(state.live_log_prob_BxM[:, :, None] + log_probs_BxMxV, IMPOSSIBLE)
    log_prob_BxK, flat_BxK = highest_k(totals_BxMxV.reshape(B, M * V), K)             # B x K
    parent_BxK, token_BxK = flat_BxK // V, flat_BxK % V                                   # equal: lowest first
    tokens_BxKxL = _pick(state.live_tokens_BxMxL, parent_BxK).at[:, :, state.t].set(token_BxK)

    is_eos_BxK = is_end(token_BxK, special)
    ends_BxK = is_eos_BxK & (log_prob_BxK > DEAD) & (jnp.arange(K) < M)
    penalty = length_penalty(state.t + 1, alpha, form)
    scores_BxE = jnp.concatenate(                                                         # B x (M + K)
        [state.ended_scores_BxM, jnp.where(ends_BxK, log_prob_BxK / penalty, IMPOSSIBLE)], axis=1)
    ended_scores_BxM, ended_BxM = jax.lax.top_k(scores_BxE, M)                            # old before new if equal

    def of_ended(old: jax.Array, new: jax.Array) -> jax.Array:
      return _pick(jnp.concatenate([old, new], axis=1), ended_BxM)

    live_log_prob_BxM, live_BxM = jax.lax.top_k(jnp.where(is_eos_BxK, IMPOSSIBLE, log_prob_BxK), M)
    parent_BxM = _pick(parent_BxK, live_BxM)
    rows_R = (jnp.arange(B)[:, None] * M + parent_BxM).reshape(B * M)                     # row = b * M + m

    done_B = state.t + 1 >= limits_B
    done_B |= live_log_prob_BxM[:, 0] <= DEAD
    if stop == 'full' or M == 1:
      done_B |= ended_scores_BxM[:, M - 1] > IMPOSSIBLE
    else:
      within_reach_B = live_log_prob_BxM[:, 0] / length_penalty(limits_B, alpha, form)
      done_B |= ended_scores_BxM[:, num_hypotheses - 1] >= within_reach_B

    new = BeamState(
        t=state.t + 1,
        cache=cache if M == 1 else cache.reorder(rows_R),
        live_tokens_BxMxL=_pick(tokens_BxKxL, live_BxM),
        live_log_prob_BxM=live_log_prob_BxM,
        ended_tokens_BxMxL=of_ended(state.ended_tokens_BxMxL, tokens_BxKxL),
        ended_lengths_BxM=of_ended(state.ended_lengths_BxM, jnp.full_like(token_BxK, state.t + 1)),
        ended_log_prob_BxM=of_ended(state.ended_log_prob_BxM, log_prob_BxK),
        ended_scores_BxM=ended_scores_BxM,
        done_B=done_B)
    return _freeze(state, new)

  start = BeamState(
      t=jnp.int32(0),
      cache=cache,
      live_tokens_BxMxL=jnp.full((B, M, length), special.pad, jnp.int32),
      # Only one empty hypothesis: M equal ones would grow M times the same continuations.
      live_log_prob_BxM=jnp.full((B, M), IMPOSSIBLE, jnp.float32).at[:, 0].set(0.0),
      ended_tokens_BxMxL=jnp.full((B, M, length), special.pad, jnp.int32),
      ended_lengths_BxM=jnp.zeros((B, M), jnp.int32),
      ended_log_prob_BxM=jnp.full((B, M), IMPOSSIBLE, jnp.float32),
      ended_scores_BxM=jnp.full((B, M), IMPOSSIBLE, jnp.float32),
      done_B=limits_B <= 0)
  return _n_best(jax.lax.while_loop(unfinished, extend, start), limits_B, num_hypotheses, alpha, form,
                 special.pad)


def _pick(values: jax.Array, index_BxK: jax.Array) -> jax.Array:
  """values [B, N, ...] -> [B, K, ...], the entries of axis 1 that `index_BxK` names."""
  return jax.vmap(lambda entries, index: entries[index])(values, index_BxK)


def _freeze(old: BeamState, new: BeamState) -> BeamState:
  """`new`, but with the sentences that were done before this turn as they were."""
  def keep(before: jax.Array, after: jax.Array) -> jax.Array:
    return jnp.where(old.done_B.reshape(-1, *[1] * (after.ndim - 1)), before, after)

  # The cache of a done sentence may go on: nothing reads what comes out of it.
  kept = jax.tree.map(keep, old.replace(t=None, cache=None), new.replace(t=None, cache=None))
  return kept.replace(t=new.t, cache=new.cache)


def _n_best(state: BeamState, limits_B: jax.Array, num_hypotheses: int, alpha: float,
            form: LengthPenalty, pad: int) -> Hypotheses:
  """Ended hypotheses first, then those cut at the limit, each best first; empty places last."""
  ended_BxM = state.ended_scores_BxM > IMPOSSIBLE
  # Where a sentence stopped before its limit, either n have ended or nothing lives: only cut ones are ever used here.
  cut_BxM = state.live_log_prob_BxM > DEAD
  cut_scores_BxM = state.live_log_prob_BxM / length_penalty(limits_B, alpha, form)[:, None]
  class_BxE = jnp.concatenate([jnp.where(ended_BxM, 0, 2), jnp.where(cut_BxM, 1, 2)], axis=1)
  best_BxM = jnp.argsort(class_BxE, axis=1, stable=True)[:, :num_hypotheses]  # both halves are sorted by score already

  def best(ended: jax.Array, cut: jax.Array) -> jax.Array:
    return _pick(jnp.concatenate([ended, cut], axis=1), best_BxM)

  filled_BxM = _pick(class_BxE, best_BxM) < 2
  lengths_BxM = best(state.ended_lengths_BxM, jnp.broadcast_to(limits_B[:, None], cut_BxM.shape))
  return Hypotheses(
      tokens_BxMxL=jnp.where(filled_BxM[..., None], best(state.ended_tokens_BxMxL, state.live_tokens_BxMxL), pad),
      lengths_BxM=jnp.where(filled_BxM, lengths_BxM, 0),
      log_prob_BxM=jnp.where(filled_BxM, best(state.ended_log_prob_BxM, state.live_log_prob_BxM), IMPOSSIBLE),
      scores_BxM=jnp.where(filled_BxM, best(state.ended_scores_BxM, cut_scores_BxM), IMPOSSIBLE),
      finished_BxM=best(ended_BxM, jnp.zeros_like(cut_BxM)))


def _check(beam_size: int, num_hypotheses: int, alpha: float, form: str, stop: str) -> None:
  if not 1 <= num_hypotheses <= beam_size:
    raise ValueError(f'num_hypotheses is {num_hypotheses} and beam_size {beam_size}; '
                     'give 1 <= num_hypotheses <= beam_size.')
  if isinstance(alpha, (int, float)) and not alpha >= 0:
    raise ValueError(f'the length penalty alpha is {alpha}; give 0 or more.')
  if form not in ('gnmt', 'power'):
    raise ValueError(f"length penalty form is {form!r}; choose 'gnmt' or 'power'.")
  if stop not in ('bound', 'full'):
    raise ValueError(f"stop is {stop!r}; choose 'bound' or 'full'.")
