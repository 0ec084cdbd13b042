"""Losses of spans against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.losses.span import impossible_loss, span_cross_entropy, span_soft_kl

RNG = np.random.default_rng(0)
START, END, TAUGHT_START, TAUGHT_END = RNG.normal(size=(4, 3, 6)).astype(np.float32) * 2
LABELS = np.array([[0, 0, 1], [2, 5, 0], [4, 4, 0]], np.int32)


def log_softmax(x):
  x = x.astype(np.float64)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_cross_entropy_of_both_ends():
  """Mutation: add them up; use one label for both."""
  wanted = [-(log_softmax(s)[a] + log_softmax(e)[b]) / 2 for s, e, (a, b, _) in zip(START, END, LABELS)]
  np.testing.assert_allclose(span_cross_entropy(START, END, LABELS), wanted, rtol=1e-5)
  assert np.isnan(span_cross_entropy(START, END, jnp.array([[6, 0, 0]] * 3))).all()


def test_impossible():
  """Mutation: swap the classes."""
  logits, impossible = np.array([2.0, -3.0, 0.0], np.float32), np.array([1, 1, 0])
  wanted = np.log1p(np.exp(np.where(impossible, -logits, logits)))
  np.testing.assert_allclose(impossible_loss(jnp.asarray(logits), jnp.asarray(impossible)), wanted, rtol=1e-6)


@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_soft_kl_is_the_mean_of_both_ends(temperature):
  """Over the first four places. Mutation: leave the end out; leave the mask out."""
  mask = np.ones((3, 6), np.float32)
  mask[:, 4:] = 0

  def kl(teacher, student):
    p, q = (log_softmax(x[:, :4] / temperature) for x in (teacher, student))
    return temperature**2 * (np.exp(p) * (p - q)).sum(-1)

  wanted = (kl(TAUGHT_START, START) + kl(TAUGHT_END, END)) / 2
  found = span_soft_kl((TAUGHT_START, TAUGHT_END), (START, END), temperature, jnp.asarray(mask))
  np.testing.assert_allclose(found, wanted, rtol=2e-5)
