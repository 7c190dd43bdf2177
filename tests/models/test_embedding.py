from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.models.embedding import Embedding

V, D = 400, 64


@pytest.fixture(scope='module')
def table_VxD():
  return Embedding(V, D, 'float32').init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']['table']


def test_the_table_is_normal_with_variance_one_over_d(table_VxD):
  assert table_VxD.shape == (V, D) and table_VxD.dtype == jnp.float32
  n = V * D
  assert abs(table_VxD.mean()) < 4 * D**-0.5 / n**0.5
  assert abs(table_VxD.std() * D**0.5 - 1) < 4 / (2 * n)**0.5
  # Not uniform and not cut off: a normal variable exceeds 3 deviations 27 times in 10,000.
  assert 0.0015 < (jnp.abs(table_VxD) * D**0.5 > 3).mean() < 0.0045


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-6), ('bfloat16', 0.02)])
def test_ids_become_rows_and_vectors_become_inner_products_with_all_rows(table_VxD, dtype, tolerance):
  embedding, variables = Embedding(V, D, dtype), {'params': {'table': table_VxD}}
  ids_BxT = jnp.array([[0, 1, V - 1], [7, 7, 3]])
  x_BxTxD = embedding.apply(variables, ids_BxT)
  assert x_BxTxD.dtype == dtype
  np.testing.assert_array_equal(x_BxTxD, table_VxD[ids_BxT].astype(dtype))
  logits_BxTxV = embedding.apply(variables, x_BxTxD, method='logits')
  assert logits_BxTxV.dtype == jnp.float32
  np.testing.assert_allclose(logits_BxTxV, np.einsum('btd,vd->btv', table_VxD[ids_BxT], table_VxD), atol=tolerance)


def test_logits_of_bfloat16_are_not_rounded_to_bfloat16(table_VxD):
  """Accumulated in float32: more than bfloat16's 8 bits of the sum survive."""
  embedding, variables = Embedding(V, D, 'bfloat16'), {'params': {'table': table_VxD}}
  x_BxTxD = jnp.ones((1, 1, D), jnp.bfloat16)
  exact_V = np.asarray(table_VxD.astype(jnp.bfloat16), np.float64).sum(1)
  np.testing.assert_allclose(embedding.apply(variables, x_BxTxD, method='logits')[0, 0], exact_V, rtol=1e-5, atol=1e-6)
