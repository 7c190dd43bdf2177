"""Matrix products in the form that compilers know best."""

from __future__ import annotations

import math

import flax.linen as nn
import jax

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
  # Where a mesh shares out the tokens of a row they do not lie beside those of the next, and axes stay as they are.
  cut = jax.sharding.get_abstract_mesh().shape.get('context', 1) > 1
  x = x.reshape(*(lead if cut else (-1,)), width)
  y = jax.lax.dot_general(x, kernel.reshape(width, -1), (((x.ndim - 1,), (0,)), ((), ())), precision=precision,
                          preferred_element_type=preferred_element_type)
  return y.reshape(*lead, *kernel.shape[n:])
