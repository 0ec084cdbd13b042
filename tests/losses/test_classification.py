"""Losses of classifiers and regressions against NumPy and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.losses.classification import cross_entropy, soft_kl, squared_error

RNG = np.random.default_rng(0)
TEACHER, STUDENT = (RNG.normal(size=(5, 7)).astype(np.float32) * 3 for _ in range(2))


def numpy_kl(teacher, student, t):
  """One row, in float64, written out."""
  p, q = np.exp(teacher / t - (teacher / t).max()), np.exp(student / t - (student / t).max())
  p, q = p / p.sum(), q / q.sum()
  return t * t * sum(a * np.log(a / b) for a, b in zip(p.astype(np.float64), q.astype(np.float64), strict=True))


@pytest.mark.parametrize('temperature', [1.0, 2.0, 10.0])
def test_soft_kl_is_that_of_a_loop(temperature):
  """Mutation: leave out T^2, or put the student first."""
  wanted = [numpy_kl(a, b, temperature) for a, b in zip(TEACHER, STUDENT, strict=True)]
  np.testing.assert_allclose(soft_kl(TEACHER, STUDENT, temperature), wanted, rtol=2e-5)
  np.testing.assert_allclose(soft_kl(TEACHER, TEACHER, temperature), 0, atol=1e-6)


def test_masked_entries_take_no_part():
  """Mutation: mask the student alone."""
  mask = np.ones((5, 7), np.float32)
  mask[:, 4:] = 0
  found = soft_kl(TEACHER, STUDENT, 2.0, jnp.asarray(mask))
  np.testing.assert_allclose(found, [numpy_kl(a[:4], b[:4], 2.0) for a, b in zip(TEACHER, STUDENT)], rtol=2e-5)
  grads = jax.grad(lambda s: soft_kl(TEACHER, s, 2.0, jnp.asarray(mask)).sum())(STUDENT)
  assert not np.asarray(grads)[:, 4:].any() and np.asarray(grads)[:, :4].all()
  assert not np.asarray(soft_kl(TEACHER, STUDENT, 2.0, jnp.zeros((5, 7)))).any()


@pytest.mark.torch
def test_against_torch():
  torch = pytest.importorskip('torch')
  f, t, s = torch.nn.functional, torch.tensor(TEACHER), torch.tensor(STUDENT)
  wanted = f.kl_div(f.log_softmax(s / 2, -1), f.softmax(t / 2, -1), reduction='batchmean') * 4
  np.testing.assert_allclose(soft_kl(TEACHER, STUDENT, 2.0).mean(), wanted.item(), rtol=1e-5)
  labels = np.array([0, 6, 3, 2, 2])
  wanted = f.cross_entropy(s, torch.tensor(labels), reduction='none')
  np.testing.assert_allclose(cross_entropy(jnp.asarray(STUDENT), jnp.asarray(labels)), wanted, rtol=1e-5)
  wanted = f.mse_loss(s[:, 0], t[:, 0], reduction='none')
  np.testing.assert_allclose(squared_error(STUDENT[:, 0], TEACHER[:, 0]), wanted, rtol=1e-5)


def test_a_label_outside_the_classes_gives_nan():
  """Mutation: clip the index."""
  assert np.isnan(cross_entropy(jnp.asarray(STUDENT[:2]), jnp.array([7, -1]))).all()
