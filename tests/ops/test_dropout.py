"""Dropout: what it keeps on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.ops.dropout import dropout, site_words


@pytest.mark.parametrize('rate', [0.05, 0.1, 0.3])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_mean_stays(rate, dtype):
  """Of what is kept, exactly scaled; of all, by the share that is kept. Mutation: round 1 / (1 - rate) to bfloat16."""
  x = jnp.linspace(1, 2, 512 * 512).reshape(512, 512).astype(dtype)
  out = np.asarray(dropout(x, rate, site_words(jax.random.key(0), 3)), np.float64)
  given, kept = np.asarray(x, np.float64), out != 0
  assert abs(kept.mean() - (1 - rate)) < 0.005
  assert (out[kept].sum() / given[kept].sum()) * (1 - rate) == pytest.approx(1, abs=2e-4)
