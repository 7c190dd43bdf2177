"""Tasks that need a token from far back, drawn fresh from a key: there is nothing to learn by heart.

Sequences are as long as one likes and the answer is known, so accuracy can be read off distance by distance. With
sources: first-token recall is the latch problem (Hochreiter & Schmidhuber 1997, section 5), copying that of Jelassi et
al. 2024 at a fixed delay, associative recall MQAR (Arora et al. 2023). Parity and bounded Dyck are the other side:
regular languages, for which a small state is enough (Hahn 2020; Hewitt et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Drawn(NamedTuple):
  """Sequences and what should be said after each token."""

  ids_BxT: jax.Array
  answers_BxT: jax.Array
  """The id that is right at each position; of no meaning where nothing is asked."""
  distance_BxT: jax.Array
  """int32: how many tokens back the answer is given away (parity and Dyck: tokens read so far); 0: nothing is asked."""


@dataclass(frozen=True)
class Task:
  name: str
  draw: Callable[[jax.Array, int], Drawn]
  """(key, rows) -> sequences."""
  vocab_size: int
  length: int
  """T."""
  chance: float
  """Accuracy of the best answer that looks at nothing."""


def first_token_recall(length: int, symbols: int = 8) -> Task:
  """BOS, x_0, noise from the same alphabet: x_0 is asked for after every noise token."""
  _check(length, 3, symbols)

  def draw(key, rows):
    body_BxT = jax.random.randint(key, (rows, length - 1), 0, symbols)
    ids_BxT = jnp.concatenate([jnp.full((rows, 1), symbols), body_BxT], axis=1)
    distance_BxT = jnp.broadcast_to(jnp.maximum(jnp.arange(length) - 1, 0), ids_BxT.shape)
    return Drawn(ids_BxT, jnp.broadcast_to(ids_BxT[:, 1:2], ids_BxT.shape), distance_BxT)

  return Task('first-token recall', draw, symbols + 1, length, 1 / symbols)


def copy(length: int, delays: tuple[int, ...], symbols: int = 8) -> Task:
  """Every token is a symbol and a delay, `delay index * symbols + symbol`: which symbol was there that many tokens ago?

  The state has to hold the last max(delays) symbols at once.
  """
  _check(length, max(delays) + 1, symbols)

  def draw(key, rows):
    symbol_key, delay_key = jax.random.split(key)
    symbol_BxT = jax.random.randint(symbol_key, (rows, length), 0, symbols)
    asked_BxT = jax.random.randint(delay_key, (rows, length), 0, len(delays))
    delay_BxT = jnp.asarray(delays)[asked_BxT]
    source_BxT = jnp.arange(length) - delay_BxT
    answers_BxT = jnp.take_along_axis(symbol_BxT, jnp.maximum(source_BxT, 0), axis=1)
    return Drawn(asked_BxT * symbols + symbol_BxT, answers_BxT, jnp.where(source_BxT >= 0, delay_BxT, 0))

  return Task('copy', draw, len(delays) * symbols, length, 1 / symbols)


def marked_recall(length: int, symbols: int = 8, position: int | None = None) -> Task:
  """One symbol among others is marked (id `symbols + x`); a quarter of the tokens after it, and the last, ask for it.

  Args:
    position: of the marked symbol; None: anywhere before the last token. With a position only the last token asks, and
      the same key gives the same sequence whatever the position, but for the mark and its symbol.
  """
  _check(length, 2, symbols)
  if position is not None and not 0 <= position < length - 1:
    raise ValueError(f'position {position} is not before the last of {length} tokens; give 0 to {length - 2}.')

  def draw(key, rows):
    noise_key, symbol_key, position_key, query_key = jax.random.split(key, 4)
    at_T = jnp.arange(length)
    noise_BxT = jax.random.randint(noise_key, (rows, length), 0, symbols)
    symbol_Bx1 = jax.random.randint(symbol_key, (rows, 1), 0, symbols)
    marked_Bx1 = jax.random.randint(position_key, (rows, 1), 0, length - 1)
    asks_BxT = jax.random.bernoulli(query_key, 0.25, (rows, length))
    if position is not None:
      marked_Bx1, asks_BxT = jnp.full((rows, 1), position), jnp.zeros((rows, length), bool)
    asks_BxT = (asks_BxT | (at_T == length - 1)) & (at_T > marked_Bx1)
    ids_BxT = jnp.where(at_T == marked_Bx1, symbols + symbol_Bx1, jnp.where(asks_BxT, 2 * symbols, noise_BxT))
    return Drawn(ids_BxT, jnp.broadcast_to(symbol_Bx1, ids_BxT.shape), jnp.where(asks_BxT, at_T - marked_Bx1, 0))

  return Task('marked recall', draw, 2 * symbols + 1, length, 1 / symbols)


def associative_recall(length: int, pairs: int, symbols: int = 8, keys: int | None = None) -> Task:
  """Pairs of key and value (ids 0 ..., `keys` ...), then every key once more at a random place, between fillers: its
  value is asked for. The order of keys is drawn anew, so a value is found by its key alone."""
  keys = 2 * pairs if keys is None else keys
  _check(length, 3 * pairs, symbols)
  if keys < pairs:
    raise ValueError(f'{pairs} pairs need as many different keys, but there are {keys}; raise keys.')
  filler = keys + symbols

  def draw(key, rows):
    keys_key, values_key, places_key = jax.random.split(key, 3)
    key_BxP = _distinct(keys_key, rows, keys, pairs)
    value_BxP = jax.random.randint(values_key, (rows, pairs), 0, symbols)
    place_BxP = 2 * pairs + _distinct(places_key, rows, length - 2 * pairs, pairs)
    rows_Bx1 = jnp.arange(rows)[:, None]
    ids_BxT = jnp.full((rows, length), filler)
    ids_BxT = ids_BxT.at[:, 0:2 * pairs:2].set(key_BxP).at[:, 1:2 * pairs:2].set(keys + value_BxP)
    ids_BxT = ids_BxT.at[rows_Bx1, place_BxP].set(key_BxP)
    answers_BxT = jnp.zeros_like(ids_BxT).at[rows_Bx1, place_BxP].set(keys + value_BxP)
    distance_BxT = jnp.zeros_like(ids_BxT).at[rows_Bx1, place_BxP].set(place_BxP - (2 * jnp.arange(pairs) + 1))
    return Drawn(ids_BxT, answers_BxT, distance_BxT)

  return Task('associative recall', draw, filler + 1, length, 1 / symbols)


def parity(length: int) -> Task:
  """Bits; after each one whether the number of ones so far is odd."""
  _check(length, 1, 2)

  def draw(key, rows):
    ids_BxT = jax.random.bernoulli(key, 0.5, (rows, length)).astype(jnp.int32)
    return Drawn(ids_BxT, jnp.cumsum(ids_BxT, axis=1) % 2, jnp.broadcast_to(1 + jnp.arange(length), ids_BxT.shape))

  return Task('parity', draw, 2, length, 0.5)


def bounded_dyck(length: int, depth: int = 4, kinds: int = 2) -> Task:
  """Brackets of several kinds, nested at most `depth` deep; after each closing one: which is the innermost still open
  (0 ... kinds - 1), or none (kinds)? Ids: kind to open it, kinds + kind to close it. An opening bracket answers itself,
  so nothing is asked there."""
  _check(length, 2, kinds)
  if depth < 2:
    raise ValueError(f'depth is {depth}; brackets that do not nest have no inner one: give 2 or more.')

  def draw(key, rows):
    def step(state, key):
      stack_BxN, height_B = state
      open_key, kind_key = jax.random.split(key)
      opens_B = jnp.where(height_B == 0, True,
                          jnp.where(height_B == depth, False, jax.random.bernoulli(open_key, 0.5, (rows,))))
      kind_B = jax.random.randint(kind_key, (rows,), 0, kinds)
      top_B = _read(stack_BxN, height_B - 1)
      stack_BxN = jnp.where(opens_B[:, None] & (jnp.arange(depth) == height_B[:, None]), kind_B[:, None], stack_BxN)
      height_B = height_B + jnp.where(opens_B, 1, -1)
      inner_B = jnp.where(height_B == 0, kinds, _read(stack_BxN, height_B - 1))
      return (stack_BxN, height_B), (jnp.where(opens_B, kind_B, kinds + top_B), inner_B, ~opens_B)

    start = jnp.zeros((rows, depth), jnp.int32), jnp.zeros(rows, jnp.int32)
    _, (ids_TxB, inner_TxB, asked_TxB) = jax.lax.scan(step, start, jax.random.split(key, length))
    distance_BxT = jnp.where(asked_TxB.T, 1 + jnp.arange(length), 0)
    return Drawn(ids_TxB.T, inner_TxB.T, distance_BxT)

  # After a closing bracket the height is 0 to depth - 1, each equally often in the long run. It is even after an even
  # number of brackets, so 'none' is a better guess after those alone.
  return Task('bounded Dyck', draw, 2 * kinds, length, max(1 / depth, (1 - 1 / depth) / kinds))


def _read(stack_BxN, index_B):
  return jnp.take_along_axis(stack_BxN, jnp.maximum(index_B, 0)[:, None], axis=1)[:, 0]


def _distinct(key, rows: int, below: int, count: int) -> jax.Array:
  """rows x count different numbers in [0, below) each row, in random order."""
  return jnp.argsort(jax.random.uniform(key, (rows, below)), axis=1)[:, :count]


def _check(length: int, least: int, symbols: int):
  if length < least:
    raise ValueError(f'length is {length}, but this task needs {least} tokens or more; raise it.')
  if symbols < 2:
    raise ValueError(f'{symbols} symbols leave nothing to remember; give 2 or more.')
