"""Matrix products in the form that compilers know best."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm.config import TransformerConfig


def linear(width: int, config: TransformerConfig) -> nn.Dense:
  """x W + b of the feed-forward network and what is built like it."""
  return nn.Dense(width, use_bias=config.biases in ('mlp', 'all'), dtype=config.dtype,
                  kernel_init=nn.initializers.xavier_uniform(), dot_general=flat_dot_general)


def flat_dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers, precision=None,
                     preferred_element_type=None) -> jax.Array:
  """`lax.dot_general` of the last axes of x with the first of a kernel, as a product of two matrices.

  A kernel of heads, DxHxC, is a matrix, and so are the tokens of all rows. With more axes XLA transposes a kernel and
  its gradient on their way into and out of a product, and before every gradient of a kernel that of the output.
  """
  ((x_axes, kernel_axes), batch_axes) = dimension_numbers
  n = len(kernel_axes)
  if tuple(x_axes) != tuple(range(x.ndim - n, x.ndim)) or tuple(kernel_axes) != tuple(range(n)) or any(batch_axes):
    raise ValueError(f'{dimension_numbers} is not the last {n} axes of x with the first of the kernel.')
  lead, width = x.shape[:x.ndim - n], math.prod(kernel.shape[:n])
  x, kernel_matrix = as_rows(x.reshape(*lead, width)), kernel.reshape(width, -1)
  product = _row_by_row if _is_bound_by_reading(x, kernel_matrix) else jax.lax.dot_general
  y = product(x, kernel_matrix, (((x.ndim - 1,), (0,)), ((), ())), precision=precision,
              preferred_element_type=preferred_element_type)
  return y.reshape(*lead, *kernel.shape[n:])


def as_rows(x: jax.Array) -> jax.Array:
  """The states of all tokens one under another, BxTxD as (B T)xD. Where a mesh shares out the tokens of a row, and they
  do not lie beside those of the next, x as it is."""
  if jax.sharding.get_abstract_mesh().shape.get('context', 1) > 1:
    return x
  return x.reshape(-1, x.shape[-1])


MOST_ROWS = 4
"""Twice as many gain a fifth, not a third, for twice as many products to compile."""


def _is_bound_by_reading(x: jax.Array, kernel: jax.Array) -> bool:
  """Whether a product of decoding takes as long as its kernel is read. On a CPU XLA gives that of a single row to one
  thread, and packs the kernel for that of a few rows. (Below 2^17 entries two threads are no faster.)"""
  few = isinstance(x.size, int) and x.size <= MOST_ROWS * kernel.shape[0]  # exported, a size may be a symbol
  return (few and kernel.shape[0] % 2 == 0 and kernel.size >= 2**17 and x.dtype == kernel.dtype == jnp.float32
          and jax.default_backend() == 'cpu' and jax.sharding.get_abstract_mesh().size <= 1)


def _row_by_row(x, kernel, _, **options) -> jax.Array:
  """Each row times the kernel as the sum of two products, which two threads read at twice the rate of one, and for
  later rows from the cache: a sentence takes three quarters of the time, with a beam of 4 two thirds."""
  halves = kernel.reshape(2, -1, kernel.shape[1])
  rows = [jax.lax.dot_general(row, halves, (((2,), (1,)), ((0,), (0,))), **options)
          for row in x.reshape(-1, 2, 1, halves.shape[1])]
  return jnp.concatenate(rows, axis=1).sum(axis=0)
