"""Dropout: what it keeps on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.ops.dropout import dropout, site_words


@pytest.mark.parametrize('rate', [0.05, 0.1])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_mean_stays(rate, dtype):
  """Of ones; all that is kept is scaled alike. Mutation: the given rate in bfloat16, whose scale is .2 % too small."""
  out = np.asarray(dropout(jnp.ones((2048, 2048), dtype), rate, site_words(jax.random.key(0), 3)), np.float64)
  assert len(np.unique(out)) == 2
  assert abs((out != 0).mean() - (1 - rate)) < 0.003
  assert out.mean() == pytest.approx(1, abs=8e-4)
