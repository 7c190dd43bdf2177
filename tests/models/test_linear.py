from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.models.linear import flat_dot_general

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize('x_shape, kernel_shape, axes', [((2, 5, 6), (6, 3, 4), 1), ((2, 5, 3, 4), (3, 4, 6), 2),
                                                         ((5, 6), (6, 7), 1), ((6,), (6, 7), 1)])
def test_it_is_dot_general_and_so_are_its_gradients(x_shape, kernel_shape, axes):
  x, kernel = (jnp.asarray(RANDOM.normal(size=shape), jnp.float32) for shape in (x_shape, kernel_shape))
  numbers = ((tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))), ((), ()))

  def total(product, x, kernel):
    return jnp.sum(jnp.sin(product(x, kernel, numbers)))

  np.testing.assert_allclose(flat_dot_general(x, kernel, numbers), jax.lax.dot_general(x, kernel, numbers), atol=1e-6)
  found, expected = (jax.grad(total, (1, 2))(product, x, kernel) for product in (flat_dot_general, jax.lax.dot_general))
  for one, other in zip(found, expected):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_gradients_of_heads_are_not_transposed():
  """What it is for: as three axes the gradient of a kernel leaves the product transposed."""

  def transposes(product) -> int:
    def total(kernel, x):
      return jnp.sum(jnp.sin(product(x, kernel, (((2,), (0,)), ((), ())))))

    text = jax.jit(jax.grad(total)).lower(jnp.ones((6, 3, 4)), jnp.ones((2, 5, 6))).as_text()
    return sum('transpose' in line and '3x4' in line for line in text.splitlines())

  assert transposes(jax.lax.dot_general) > 0 and transposes(flat_dot_general) == 0


def test_other_axes_are_refused():
  with pytest.raises(ValueError, match='last 1 axes'):
    flat_dot_general(jnp.ones((2, 3)), jnp.ones((2, 4)), (((0,), (0,)), ((), ())))


def test_compiled_gradients_are_not_transposed():
  """What it is for: otherwise that of a kernel of heads leaves the product transposed, and that of the output is
  transposed before it enters the product for any kernel."""

  def transposed(product, kernel_shape) -> int:
    def total(kernel, x):
      return jnp.sum(jnp.sin(product(x, kernel, (((2,), (0,)), ((), ())))))

    compiled = jax.jit(jax.grad(total)).lower(jnp.ones(kernel_shape), jnp.ones((2, 5, 6))).compile().as_text()
    return sum(' transpose(' in line or ' copy(' in line for line in compiled.splitlines())

  for kernel_shape in ((6, 3, 4), (6, 7)):
    assert transposed(jax.lax.dot_general, kernel_shape) > 0 == transposed(flat_dot_general, kernel_shape)


@pytest.mark.parametrize('x_shape, kernel_shape, axes', [
    ((1, 1, 512), (512, 8, 64), 1), ((1, 8, 64), (8, 64, 256), 2), ((2, 2, 512), (512, 256), 1),
    ((3, 8, 64), (8, 64, 256), 2)])
def test_so_it_is_with_a_few_rows(x_shape, kernel_shape, axes):
  """Longer sums than above, in another order."""
  x, kernel = (jnp.asarray(RANDOM.normal(size=shape), jnp.float32) for shape in (x_shape, kernel_shape))
  numbers = ((tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))), ((), ()))
  np.testing.assert_allclose(flat_dot_general(x, kernel, numbers), jax.lax.dot_general(x, kernel, numbers), atol=2e-4)
  found, expected = (jax.grad(lambda x, kernel, product=product: product(x, kernel, numbers).sum(), (0, 1))(x, kernel)
                     for product in (flat_dot_general, jax.lax.dot_general))
  for one, other in zip(found, expected):
    np.testing.assert_allclose(one, other, atol=2e-4)


@pytest.mark.parametrize('x_shape, kernel_shape, dtype, rows', [
    ((1, 1, 512), (512, 512), 'float32', 1), ((512,), (512, 4, 64), 'float32', 1),
    ((4, 1, 512), (512, 512), 'float32', 4), ((1, 5, 512), (512, 512), 'float32', 0),
    ((1, 1, 256), (256, 256), 'float32', 0), ((1, 1, 513), (513, 512), 'float32', 0),
    ((4, 1, 512), (512, 512), 'bfloat16', 0)])
def test_up_to_four_rows_are_two_products_each_on_a_cpu(x_shape, kernel_shape, dtype, rows):
  def product(x, kernel):
    return flat_dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))

  text = str(jax.make_jaxpr(product)(jnp.ones(x_shape, dtype), jnp.ones(kernel_shape, dtype)))
  assert text.count('([0], [0])') == (rows if jax.default_backend() == 'cpu' else 0), text


def test_a_number_of_rows_yet_unknown_is_exported():
  rows, = jax.export.symbolic_shape('B')
  shapes = jax.ShapeDtypeStruct((rows, 1, 512), jnp.float32), jax.ShapeDtypeStruct((512, 512), jnp.float32)

  def product(x, kernel):
    return flat_dot_general(x, kernel, (((2,), (0,)), ((), ())))

  exported = jax.export.export(jax.jit(product))(*shapes)
  assert exported.out_avals[0].shape == (rows, 1, 512)
