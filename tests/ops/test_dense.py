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
