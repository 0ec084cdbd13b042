"""DynaBERT's losses against loops and PyTorch."""

import jax
import numpy as np
import pytest

from compactlm_jax.losses.adapt import hidden_mse, soft_cross_entropy

RNG = np.random.default_rng(0)
TEACHER, STUDENT = (RNG.normal(size=(5, 3)).astype(np.float32) * 3 for _ in range(2))
TAUGHT, HIDDEN = (RNG.normal(size=(4, 3, 6, 8)).astype(np.float32) for _ in range(2))
MASK = np.array([[1] * 6, [1] * 4 + [0] * 2, [0] * 6])


def test_soft_cross_entropy_is_that_of_a_loop():
  """Mutation: put the student first, or take the mean over classes."""
  wanted = []
  for teacher, student in zip(TEACHER.astype(np.float64), STUDENT.astype(np.float64)):
    p, q = np.exp(teacher) / np.exp(teacher).sum(), np.exp(student) / np.exp(student).sum()
    wanted.append(-sum(a * np.log(b) for a, b in zip(p, q)))
  np.testing.assert_allclose(soft_cross_entropy(TEACHER, STUDENT), wanted, rtol=1e-5)


def test_hidden_states_are_compared_at_all_positions_or_at_real_ones():
  """A row without real positions counts nothing. Mutation: divide by the padded length, or average over states."""
  every, real = np.zeros(3), np.zeros(3)
  for b in range(3):
    for n in range(4):
      errors = [((TAUGHT[n, b, t].astype(np.float64) - HIDDEN[n, b, t]) ** 2).mean() for t in range(6)]
      every[b] += np.mean(errors)
      kept = [error for error, counted in zip(errors, MASK[b]) if counted]
      real[b] += np.mean(kept) if kept else 0.0
  np.testing.assert_allclose(hidden_mse(TAUGHT, HIDDEN), every, rtol=1e-5)
  np.testing.assert_allclose(hidden_mse(TAUGHT, HIDDEN, MASK), real, rtol=1e-5)


def test_nothing_flows_into_the_teacher():
  """Mutation: drop a stop_gradient."""
  for loss, teacher, student in ((soft_cross_entropy, TEACHER, STUDENT), (hidden_mse, TAUGHT, HIDDEN)):
    taught, own = jax.grad(lambda t, s, loss=loss: loss(t, s).sum(), argnums=(0, 1))(teacher, student)
    assert not np.asarray(taught).any() and np.asarray(own).all()


@pytest.mark.torch
def test_against_torch():
  """The original's two functions, on the whole batch."""
  torch = pytest.importorskip('torch')
  f, (t, s) = torch.nn.functional, (torch.tensor(x) for x in (TEACHER, STUDENT))
  wanted = (-f.softmax(t, -1) * f.log_softmax(s, -1)).sum(-1).mean()
  np.testing.assert_allclose(soft_cross_entropy(TEACHER, STUDENT).mean(), wanted.item(), rtol=1e-5)
  wanted = sum(f.mse_loss(torch.tensor(a), torch.tensor(b)) for a, b in zip(TAUGHT, HIDDEN))
  np.testing.assert_allclose(hidden_mse(TAUGHT, HIDDEN).mean(), wanted.item(), rtol=1e-5)
