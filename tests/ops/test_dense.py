"""Matrix products with bias: the form for a CPU against the one for other backends, and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.ops import dense as module
from compactlm_jax.ops.dense import dense


@pytest.mark.parametrize('leading', [(), (3,), (2, 3), (2, 3, 4)])
def test_dense_and_its_gradients_equal_numpy(leading):
  """Mutation: sum the gradient of the bias over the first axis only."""
  rng = np.random.default_rng(0)
  x, kernel, bias, g = (rng.normal(size=s).astype('f4') for s in ((*leading, 5), (5, 6), (6,), (*leading, 6)))
  out, pull = jax.vjp(dense, *map(jnp.asarray, (x, kernel, bias)))
  dx, dkernel, dbias = pull(jnp.asarray(g))
  rows, rows_g = x.reshape(-1, 5), g.reshape(-1, 6)
  np.testing.assert_allclose(out, x @ kernel + bias, atol=1e-5)
  np.testing.assert_allclose(dx, g @ kernel.T, atol=1e-5)
  np.testing.assert_allclose(dkernel, rows.T @ rows_g, atol=1e-5)
  np.testing.assert_allclose(dbias, rows_g.sum(0), atol=1e-5)
  for got, want in zip(module._matmul_bwd_axes(x, kernel, g), (dx, dkernel), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_grouped_products_and_their_gradients_equal_a_loop():
  """In both forms. Mutation: interleave the groups."""
  rng = np.random.default_rng(1)
  x, kernel, g = (rng.normal(size=s).astype('f4') for s in ((2, 3, 8), (2, 4, 5), (2, 3, 10)))
  out = np.concatenate([x[..., :4] @ kernel[0], x[..., 4:] @ kernel[1]], -1)
  dx = np.concatenate([g[..., :5] @ kernel[0].T, g[..., 5:] @ kernel[1].T], -1)
  halves = zip((x[..., :4], x[..., 4:]), (g[..., :5], g[..., 5:]), strict=True)
  dkernel = np.stack([a.reshape(-1, 4).T @ b.reshape(-1, 5) for a, b in halves])
  found, pull = jax.vjp(module.grouped_matmul, jnp.asarray(x), jnp.asarray(kernel))
  for forward, backward in (
    (found, pull(jnp.asarray(g))),
    (module._grouped_each(x, kernel), module._grouped_each_bwd(x, jnp.asarray(kernel), g)),
  ):
    np.testing.assert_allclose(forward, out, atol=1e-5)
    for got, want in zip(backward, (dx, dkernel), strict=True):
      np.testing.assert_allclose(got, want, atol=1e-5)


def test_logits_of_a_tied_table_and_their_gradients():
  """In bfloat16 the table's gradient is added up and stays in float32. Mutation: leave it to automatic derivation."""
  rng = np.random.default_rng(2)
  x, table, g = (rng.normal(size=s).astype('f4') for s in ((2, 3, 4), (9, 4), (2, 3, 9)))
  out, pull = jax.vjp(module.tied_logits, jnp.asarray(x), jnp.asarray(table))
  dx, dtable = pull(jnp.asarray(g))
  np.testing.assert_allclose(out, x @ table.T, atol=1e-5)
  np.testing.assert_allclose(dx, g @ table, atol=1e-5)
  np.testing.assert_allclose(dtable, g.reshape(-1, 9).T @ x.reshape(-1, 4), atol=1e-5)
  ones = jnp.ones((1, 601, 4), jnp.bfloat16)
  out, pull = jax.vjp(module.tied_logits, ones, jnp.ones((9, 4)))
  assert out.dtype == jnp.float32
  dx, dtable = pull(jnp.ones_like(out))
  assert dx.dtype == jnp.bfloat16 and dtable.dtype == jnp.float32
  np.testing.assert_array_equal(dtable, 601)  # bfloat16 would round it to 600
