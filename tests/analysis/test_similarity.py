"""CKA and pairwise KL against their definitions in float64 NumPy, and their invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compactlm_jax.analysis.similarity import entropy, linear_cka, moments, pairwise_kl

POINTS, D, E = 40, 5, 7


def by_gram(x, y):
  """CKA from centred Gram matrices of examples (Kornblith et al. 2019, equation 4), float64."""
  center = np.eye(len(x)) - 1 / len(x)
  grams = [center @ (a.astype(np.float64) @ a.T.astype(np.float64)) @ center for a in (x, y)]
  own, other = grams
  return (own * other).sum() / np.sqrt((own**2).sum() * (other**2).sum())


@jax.jit
def cka(x_NPD, y_MPE, weight_P, shifts):
  return linear_cka(moments(x_NPD, y_MPE, weight_P, *shifts))


def no_shift(x, y):
  return jnp.zeros((len(x), x.shape[-1])), jnp.zeros((len(y), y.shape[-1]))


def states(seed, layers, width):
  return np.random.default_rng(seed).normal(size=(layers, POINTS, width)).astype(np.float32)


def test_cka_is_that_of_gram_matrices():
  """Related and unrelated layers; tokens of weight 0 hold rubbish. Mutations: forget to centre; ignore the weight."""
  x, y = states(0, 2, D), states(1, 3, E)
  y[1, :, :D] += 2 * x[0]
  x, y = x + 3, y - 1
  weight = (np.arange(POINTS) % 4 > 0).astype(np.float32)
  keep = weight > 0
  want = [[by_gram(a[keep], b[keep]) for b in y] for a in x]
  x[:, ~keep], y[:, ~keep] = 77.0, -55.0
  np.testing.assert_allclose(cka(x, y, weight, no_shift(x, y)), want, rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.floats(0.1, 30.0), st.floats(-5.0, 5.0))
def test_cka_knows_no_rotation_scale_or_offset(seed, scale, offset):
  """Mutation: divide by the traces instead of the norms."""
  x, y = states(seed, 1, D), states(seed + 1, 1, D)
  turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0].astype(np.float32)
  y = y + x
  ones = np.ones(POINTS, np.float32)
  moved = scale * (x @ turn) + np.float32(offset)
  shifts = no_shift(x, y)
  np.testing.assert_allclose(cka(moved, y, ones, shifts), cka(x, y, ones, shifts), rtol=1e-3)
  np.testing.assert_allclose(cka(x, moved, ones, shifts), [[1.0]], rtol=1e-3)


def test_a_layer_is_like_itself_even_with_huge_constant_features():
  """One feature of a Transformer may be a thousand times its deviation. Mutation: leave the shift out."""
  x = states(3, 2, D)
  y = x.copy()
  x[..., 0] = x[..., 0] * 1e-2 + 3000
  ones, shifts = np.ones(POINTS, np.float32), (x[:, 0], no_shift(x, y)[1])
  np.testing.assert_allclose(np.diag(cka(x, x, ones, (x[:, 0], x[:, 0]))), 1.0, rtol=1e-5)
  want = [[by_gram(a - a.mean(0), b) for b in y] for a in x.astype(np.float64)]
  np.testing.assert_allclose(cka(x, y, ones, shifts), want, rtol=1e-3)


def test_moments_of_batches_add_up():
  x, y, ones = states(4, 2, D), states(5, 1, E), np.ones(POINTS, np.float32)
  shifts = (x.mean(1), y[:, 0])
  parts = [moments(x[:, i : i + 13], y[:, i : i + 13], ones[i : i + 13], *shifts) for i in range(0, POINTS, 13)]
  total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
  np.testing.assert_allclose(linear_cka(total), cka(x, y, ones, shifts), rtol=1e-4)


def distributions(seed, layers, length):
  """[layers, 2, 6, 6] over the first `length` keys, zero at the others."""
  p = np.random.default_rng(seed).dirichlet(np.full(6, 0.5), size=(layers, 2, 6)) + 1e-6
  p[..., length:] = 0
  return (p / p.sum(-1, keepdims=True)).astype(np.float32)


def test_pairwise_kl_is_the_double_loop():
  """Mutations: KL of (q, p); the mean instead of the weighted sum over queries."""
  p, q = distributions(0, 3, 5), distributions(1, 2, 5)
  weight = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], np.float32)
  want = np.zeros((3, 2))
  for n, m, b, t, s in np.ndindex(3, 2, 2, 6, 5):
    own, other = float(p[n, b, t, s]), float(q[m, b, t, s])
    want[n, m] += weight[b, t] * own * np.log(own / other)
  np.testing.assert_allclose(jax.jit(pairwise_kl)(p, q, weight), want, rtol=1e-4)
  assert (want > 0.1).all()


def test_kl_with_itself_is_zero_and_never_infinite():
  """A probability may be lost in float32. Mutation: no floor under the logarithm."""
  p = distributions(2, 2, 4)
  p[0, 0, 0] = [1, 0, 0, 0, 0, 0]
  kl = np.asarray(pairwise_kl(p, p, jnp.ones((2, 6))))
  np.testing.assert_allclose(np.diag(kl), 0.0, atol=1e-4)
  q = np.zeros_like(p)
  q[..., 1] = 1
  assert np.isfinite(np.asarray(pairwise_kl(p, q, jnp.ones((2, 6))))).all()


@pytest.mark.parametrize('keys', [1, 3, 6])
def test_entropy_of_equal_keys(keys):
  """Mutation: count queries of weight 0."""
  p = np.zeros((1, 2, 4, 6), np.float32)
  p[..., :keys] = 1 / keys
  weight = np.array([[1, 1, 1, 0]], np.float32)
  np.testing.assert_allclose(entropy(p, weight), [3 * np.log(keys)] * 2, atol=1e-5)
