"""Rows in groups, each multiplied by a matrix of its own: what a mixture of experts computes.

`jax.lax.ragged_dot` is that where the compiler has a kernel for it. XLA's CPU compiler makes of it a product of all
rows for every group, E times the work; there, blocks of rows are multiplied one after another.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 256
"""Most rows multiplied at a time on a CPU: so many that fetching their matrix takes little of the time."""


@jax.custom_vjp
def grouped_matmul(x_nxD, kernel_ExDxF, sizes_E) -> jax.Array:
  """nxF: the first sizes[0] rows of `x` times kernel[0], the next sizes[1] rows times kernel[1], and so on.

  Where the sizes add up to less than n, the rows beyond become anything.
  """
  return jax.lax.platform_dependent(x_nxD, kernel_ExDxF, sizes_E, cpu=_product, default=jax.lax.ragged_dot)


def _forward(x_nxD, kernel_ExDxF, sizes_E):
  return grouped_matmul(x_nxD, kernel_ExDxF, sizes_E), (x_nxD, kernel_ExDxF, sizes_E)


def _backward(residuals, dy_nxF):
  return *jax.lax.platform_dependent(*residuals, dy_nxF, cpu=_gradients, default=_ragged_gradients), None


grouped_matmul.defvjp(_forward, _backward)


def _ragged_gradients(x_nxD, kernel_ExDxF, sizes_E, dy_nxF):
  return jax.vjp(lambda x, kernel: jax.lax.ragged_dot(x, kernel, sizes_E), x_nxD, kernel_ExDxF)[1](dy_nxF)


def _product(x_nxD, kernel_ExDxF, sizes_E):
  count, block = _blocks(sizes_E, len(x_nxD))

  def multiply(b, y_nxF):
    e, own, read, write = block(b)
    return write(y_nxF, jnp.where(own, read(x_nxD) @ kernel_ExDxF[e], read(y_nxF)))

  return jax.lax.fori_loop(0, count, multiply, jnp.zeros((len(x_nxD), kernel_ExDxF.shape[2]), x_nxD.dtype))


def _gradients(x_nxD, kernel_ExDxF, sizes_E, dy_nxF):
  count, block = _blocks(sizes_E, len(x_nxD))

  def multiply(b, gradients):
    dx_nxD, dkernel_ExDxF = gradients
    e, own, read, write = block(b)
    x_MxD, dy_MxF = read(x_nxD), jnp.where(own, read(dy_nxF), 0)
    dx_nxD = write(dx_nxD, jnp.where(own, dy_MxF @ kernel_ExDxF[e].T, read(dx_nxD)))
    add_DxF = jnp.einsum('md,mf->df', x_MxD, dy_MxF, preferred_element_type=jnp.float32)
    return dx_nxD, jax.lax.dynamic_update_index_in_dim(dkernel_ExDxF, dkernel_ExDxF[e] + add_DxF, e, 0)

  zeros = jnp.zeros_like(x_nxD), jnp.zeros(kernel_ExDxF.shape, jnp.float32)
  dx_nxD, dkernel_ExDxF = jax.lax.fori_loop(0, count, multiply, zeros)
  return dx_nxD, dkernel_ExDxF.astype(kernel_ExDxF.dtype)


def _blocks(sizes_E, n: int):
  """How many blocks of rows there are, and of a block: its group, which of its rows belong there, and how to read and
  write it. A block that would reach beyond the last row begins earlier and owns only its last rows."""
  size = min(BLOCK, -(-n // len(sizes_E)))
  blocks_E = -(-sizes_E // size)
  ends_E, last_E = jnp.cumsum(sizes_E), jnp.cumsum(blocks_E)

  def block(b):
    e = jnp.sum(b >= last_E)
    first = ends_E[e] - sizes_E[e] + (b - last_E[e] + blocks_E[e]) * size
    start = jnp.minimum(first, n - size)
    row_M = start + jnp.arange(size)
    return (e, ((row_M >= first) & (row_M < ends_E[e]))[:, None],
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, size),
            lambda x, rows: jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0))

  return last_E[-1], block
