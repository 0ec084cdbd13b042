"""Token losses against float64 NumPy, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from compactlm_jax.losses.tokens import replaced_token_loss, token_cross_entropy, token_hits


def test_cross_entropy_against_numpy():
  """Mutation: forget the maximum, or take the logit of another id."""
  rng = np.random.default_rng(0)
  logits, ids = rng.normal(scale=30, size=(2, 3, 11)), rng.integers(0, 11, (2, 3))
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  right = np.take_along_axis(probs, ids[..., None], -1)[..., 0]
  x = jnp.asarray(logits, jnp.float32)
  np.testing.assert_allclose(token_cross_entropy(x, jnp.asarray(ids)), -np.log(right), rtol=2e-6, atol=2e-6)
  grad = jax.grad(lambda x: token_cross_entropy(x, jnp.asarray(ids)).sum())(x)
  np.testing.assert_allclose(grad, probs - np.eye(11)[ids], atol=3e-6)


def test_the_gradient_of_cross_entropy_is_no_scatter():
  """Mutation: index the logits."""
  text = str(
    jax.make_jaxpr(jax.grad(lambda x: token_cross_entropy(x, jnp.zeros((2, 3), jnp.int32)).sum()))(jnp.ones((2, 3, 5)))
  )
  assert 'scatter' not in text and 'gather' not in text


def test_bfloat16_logits_are_summed_in_float32():
  logits = jnp.zeros((1, 1, 4096), jnp.bfloat16)
  np.testing.assert_allclose(token_cross_entropy(logits, jnp.zeros((1, 1), jnp.int32)), np.log(4096), rtol=1e-6)


def test_replaced_token_loss_against_numpy():
  """Mutation: swap the classes."""
  rng = np.random.default_rng(1)
  logits, replaced = rng.normal(scale=5, size=(2, 6)), rng.random((2, 6)) < 0.3
  p = 1 / (1 + np.exp(-logits))
  expected = -np.where(replaced, np.log(p), np.log1p(-p))
  np.testing.assert_allclose(
    replaced_token_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(replaced)), expected, rtol=1e-5, atol=1e-6
  )


def test_hits_are_those_of_argmax():
  """Mutation: compare with the smallest logit."""
  rng = np.random.default_rng(2)
  logits, ids = rng.normal(size=(2, 50, 4)), rng.integers(0, 4, (2, 50))
  found = token_hits(jnp.asarray(logits, jnp.float32), jnp.asarray(ids))
  np.testing.assert_array_equal(found, logits.argmax(-1) == ids)
  assert 0 < found.mean() < 1
