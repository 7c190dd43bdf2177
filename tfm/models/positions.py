"""Where a token stands: added to the embeddings, turned into queries and keys, or a bias on their scores."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

BETA_FAST, BETA_SLOW = 32, 1
"""YaRN keeps the pairs that turn more often than the first in the length trained on, and stretches those that turn
less often than the second (Peng et al. 2023, section 3.2, their alpha and beta for Llama)."""
LLAMA3_FAST, LLAMA3_SLOW = 4, 1
"""The same two limits in Llama 3.1 (`high_freq_factor`, `low_freq_factor`)."""


def positions_in_segments(segments_BxT: jax.Array) -> jax.Array:
  """int32 BxT: how far each position is from the beginning of its segment."""
  at_T = jnp.arange(segments_BxT.shape[1])
  begins_BxT = jnp.diff(segments_BxT, axis=1, prepend=segments_BxT[:, :1]) != 0
  return at_T - jax.lax.cummax(jnp.where(begins_BxT, at_T, 0), axis=1)


# -- added to the embeddings --


def sinusoidal(positions: jax.Array, d_model: int, halves: bool = False) -> jax.Array:
  """PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos of the same (Vaswani et al. 2017, section 3.5).

  Args:
    positions: int32, T or BxT.
    halves: the same columns in another order, all sines first (MarianMT). Tensor2tensor and fairseq have that order
      too, but other frequencies.

  Returns:
    float32, TxD or BxTxD.
  """
  frequency = 10000.0 ** (-jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model)
  angles = positions.astype(jnp.float32)[..., None] * frequency
  sines_and_cosines = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-2 if halves else -1)
  return sines_and_cosines.reshape(*positions.shape, d_model)


class LearnedPositions(nn.Module):
  """One trained vector per position (Table 3, row E)."""

  max_positions: int
  d_model: int

  @nn.compact
  def __call__(self, positions: jax.Array) -> jax.Array:
    """TxD or BxTxD for positions T or BxT."""
    table = self.param('table', nn.initializers.normal(self.d_model**-0.5), (self.max_positions, self.d_model))
    return jnp.take(table, positions, axis=0, mode='clip')


# -- turned into queries and keys --


def rope(x_BxTxHxC: jax.Array, positions: jax.Array, *, base: float = 10000.0, scaling: str = 'none',
         factor: float = 1.0, original_length: int | None = None) -> jax.Array:
  """Queries or keys with each pair of columns turned by an angle that grows with the position (Su et al. 2021, eq. 34).

  Scores then depend on the distance of two tokens and not on where they stand. Pair i is columns i and i + C/2, as in
  GPT-NeoX and Hugging Face; Su et al. pair neighbours, which is the same but for a permutation of the columns.

  Args:
    positions: int32, T or BxT.
    base, scaling, factor, original_length: see `rope_frequencies`.

  Returns:
    The shape and type of x; angles and products are float32.
  """
  frequency_C2, amplitude = rope_frequencies(x_BxTxHxC.shape[-1], base, scaling, factor, original_length)
  angles_BxTx1xC2 = positions.astype(jnp.float32)[..., None, None] * frequency_C2
  cos, sin = amplitude * jnp.cos(angles_BxTx1xC2), amplitude * jnp.sin(angles_BxTx1xC2)
  first, second = jnp.split(x_BxTxHxC.astype(jnp.float32), 2, axis=-1)
  turned_BxTxHxC = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned_BxTxHxC.astype(x_BxTxHxC.dtype)


def rope_frequencies(width: int, base: float = 10000.0, scaling: str = 'none', factor: float = 1.0,
                     original_length: int | None = None) -> tuple[np.ndarray, float]:
  """Angle per position of each of the C/2 pairs, float32, and the factor on sines and cosines.

  Args:
    width: C.
    base: pair i turns by base^(-2i/C) a position.
    scaling: which pairs turn `factor` times slower, for texts that much longer than those trained on. 'linear': all
      (Chen et al. 2023). 'llama3': the slow ones, whole or in part (Llama 3.1). 'yarn': the slow ones, by another rule,
      and scores grow (Peng et al. 2023, equations 18 to 22).
    original_length: tokens of the texts trained on, for 'llama3' and 'yarn'.

  Raises:
    ValueError: if there is no such scaling.
  """
  frequency_C2 = float(base) ** (-np.arange(0, width, 2) / width)
  amplitude = 1.0
  if scaling in ('none', 'linear'):
    kept_C2 = float(scaling == 'none')
  elif scaling == 'llama3':
    turns_C2 = original_length * frequency_C2 / (2 * math.pi)
    kept_C2 = np.clip((turns_C2 - LLAMA3_SLOW) / (LLAMA3_FAST - LLAMA3_SLOW), 0, 1)
  elif scaling == 'yarn':
    # In whole pairs, as in the paper's code; its text has the ramp over the number of turns.
    first, last = (width * math.log(original_length / (2 * math.pi * turns)) / (2 * math.log(base))
                   for turns in (BETA_FAST, BETA_SLOW))
    first, last = max(math.floor(first), 0), min(math.ceil(last), width - 1)
    kept_C2 = 1 - np.clip((np.arange(width // 2) - first) / max(last - first, 1e-3), 0, 1)
    amplitude = 0.1 * math.log(factor) + 1
  else:
    raise ValueError(f"There is no rope scaling '{scaling}'; choose 'none', 'linear', 'llama3' or 'yarn'.")
  return (frequency_C2 * (kept_C2 + (1 - kept_C2) / factor)).astype(np.float32), amplitude


# -- a bias on the scores --


def alibi_slopes(num_heads: int) -> jax.Array:
  """2^(-8/H), 2^(-16/H), ... (Press et al. 2022, section 3); float32, H.

  Where H is no power of two, the slopes of the next one below and every second of those of the next above, as in the
  authors' code.
  """
  def slopes(count):
    return [2.0 ** (-8 * i / count) for i in range(1, count + 1)]

  below = 1 << (num_heads.bit_length() - 1)
  return jnp.array(slopes(below) + slopes(2 * below)[::2][:num_heads - below], jnp.float32)


def alibi(slopes_H: jax.Array, T: int, S: int, offset: jax.Array | int = 0) -> jax.Array:
  """-slope * |query position - key position|, 1xHxTxS; `offset` is the position of query 0 on the key axis.

  Under a causal mask that is the bias of Press et al. (2022); without one it is its symmetric form.
  """
  distance_TxS = jnp.arange(S) - jnp.arange(T)[:, None] - offset
  return -slopes_H[None, :, None, None] * jnp.abs(distance_TxS).astype(jnp.float32)


def relative_bucket(distance: jax.Array, buckets: int, max_distance: int, bidirectional: bool) -> jax.Array:
  """T5's bucket of a distance (Raffel et al. 2020, section 2.1): each has one up to a half, longer ones share.

  Shared buckets grow by a constant factor, up to `max_distance`, from which on all distances are in the last one.

  Args:
    distance: int32, position of the key minus position of the query.
    bidirectional: half of the buckets are for keys after the query; else those are in bucket 0.

  Returns:
    int32 below `buckets`, in the shape of `distance`.
  """
  half = buckets // 2 if bidirectional else buckets
  single = half // 2
  # Limits and not logarithms of distances: every platform must agree on them, to the last bit.
  limits = np.ceil(single * (max_distance / single) ** (np.arange(1, half - single) / (half - single)) - 1e-9)
  far = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
  shared = single + jnp.sum(far[..., None] >= limits.astype(np.int32), axis=-1)
  bucket = jnp.where(far < single, far, shared)
  return (bucket + half * (distance > 0) if bidirectional else bucket).astype(jnp.int32)


class RelativeBias(nn.Module):
  """A trained bias for each bucket of distances and each head (T5, Raffel et al. 2020, section 2.1)."""

  buckets: int
  max_distance: int
  num_heads: int

  @nn.compact
  def __call__(self, T: int, S: int, offset: jax.Array | int = 0, bidirectional: bool = True) -> jax.Array:
    """1xHxTxS float32; `offset` is the position of query 0 on the key axis."""
    # T5's own, 512**-0.5 at its smallest: beside scores of about 1 nearly nothing, so that at first words decide.
    table = self.param('table', nn.initializers.normal(0.04), (self.buckets, self.num_heads))
    # There are T + S - 1 distances, which are looked up once and not for every pair: a gradient would be a scatter.
    distance_Z = jnp.concatenate([jnp.arange(S), jnp.arange(-T, 0)]) - offset
    bias_ZxH = table[relative_bucket(distance_Z, self.buckets, self.max_distance, bidirectional)]
    # Pair (t, s) wants row s - t, counted from the end if negative. In rows of T + S - 1, every row begins one earlier.
    line_HxTxZ = jnp.broadcast_to(bias_ZxH.T[:, None], (self.num_heads, T, T + S))
    flat_HxTZ = line_HxTxZ.reshape(self.num_heads, -1)[:, :T * (T + S - 1)]
    return flat_HxTZ.reshape(1, self.num_heads, T, T + S - 1)[..., :S]
