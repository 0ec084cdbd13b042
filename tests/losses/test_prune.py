"""Penalties on scores, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.losses.prune import l0_penalty, soft_penalty

RNG = np.random.default_rng(0)
SCORES = {
  name: RNG.normal(size=shape).astype(np.float32)
  for name, shape in {'a': (3, 4, 5), 'b': (3, 8, 2), 'heads': (2, 6)}.items()
}


def sigma(x):
  return 1 / (1 + np.exp(-x.astype(np.float64)))


PENALTIES = {
  soft_penalty: sigma,
  l0_penalty: lambda s: sigma(s - 2 / 3 * np.log(0.1 / 1.1)),
}


@pytest.mark.parametrize('penalty', PENALTIES, ids=lambda p: p.__name__)
def test_each_matrix_weighs_the_same_in_the_mean(penalty):
  """Mean of means, as the original loops over modules; sum over entries. Mutation: divide all by one size."""
  matrices = [layer for leaf in SCORES.values() for layer in PENALTIES[penalty](leaf)]
  np.testing.assert_allclose(penalty(SCORES), np.mean([layer.mean() for layer in matrices]), rtol=1e-6)
  np.testing.assert_allclose(penalty(SCORES, 'sum'), sum(layer.sum() for layer in matrices), rtol=1e-6)


@pytest.mark.parametrize('penalty', PENALTIES, ids=lambda p: p.__name__)
def test_gradients_are_those_of_the_sigmoid(penalty):
  """Mutation: stop the gradient of one leaf."""
  for reduction in ('mean', 'sum'):
    got = jax.grad(penalty)(SCORES, reduction)
    for name, leaf in SCORES.items():
      s = PENALTIES[penalty](leaf)
      weight = 1 / (8 * leaf[0].size) if reduction == 'mean' else 1
      np.testing.assert_allclose(got[name], s * (1 - s) * weight, rtol=1e-4, atol=1e-8)


def test_l0_counts_gates_that_may_open():
  """At the published first score logit(.9) the odds are 9 * 11^(2/3). Mutation: log S, as in the paper's formula."""
  odds = 9 * 11 ** (2 / 3)
  np.testing.assert_allclose(l0_penalty({'a': jnp.full((1, 2, 2), 2.1972246)}), odds / (1 + odds), rtol=1e-6)
