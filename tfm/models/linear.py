"""Matrix products in the form that compilers know best."""

from __future__ import annotations

import math

import jax


def flat_dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers, precision=None,
                     preferred_element_type=None) -> jax.Array:
  """`lax.dot_general` of the last axes of x with the first of a kernel, whose axes are made two before.

  A kernel of heads, DxHxC, is a matrix. As three axes it and its gradient are transposed by XLA on their way into and
  out of a product, at each of their uses; as a matrix neither is.
  """
  ((x_axes, kernel_axes), batch_axes) = dimension_numbers
  n = len(kernel_axes)
  if tuple(x_axes) != tuple(range(x.ndim - n, x.ndim)) or tuple(kernel_axes) != tuple(range(n)) or any(batch_axes):
    raise ValueError(f'{dimension_numbers} is not the last {n} axes of x with the first of the kernel.')
  width = math.prod(kernel.shape[:n])
  y = jax.lax.dot_general(x.reshape(*x.shape[:-n], width), kernel.reshape(width, -1), (((x.ndim - n,), (0,)), ((), ())),
                          precision=precision, preferred_element_type=preferred_element_type)
  return y.reshape(*x.shape[:-n], *kernel.shape[n:])
