"""Losses of classifiers and regressions, one value per row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(logits_BC: Float[Array, 'B C'], labels_B: Int[Array, ' B']) -> Float[Array, ' B']:
  """-log softmax(logits)[label], in float32. A label outside [0, C) gives NaN.

  Args:
    logits_BC: unnormalised scores.
    labels_B: class indices.
  """
  log_probs_BC = jax.nn.log_softmax(logits_BC.astype(jnp.float32))
  return -log_probs_BC.at[jnp.arange(labels_B.shape[0]), labels_B.astype(jnp.uint32)].get(
    mode='fill', fill_value=jnp.nan
  )


def squared_error(scores_B: Float[Array, ' B'], labels_B: Float[Array, ' B']) -> Float[Array, ' B']:
  """(score - label)^2, in float32."""
  return jnp.square(scores_B.astype(jnp.float32) - labels_B)


def soft_kl(
  teacher_BC: Float[Array, 'B C'],
  student_BC: Float[Array, 'B C'],
  temperature: float | Float[Array, ''],
  mask_BC: Float[Array, 'B C'] | None = None,
) -> Float[Array, ' B']:
  """T^2 KL(softmax(teacher / T) || softmax(student / T)), in float32 (Hinton et al. 2015; papers of all four systems).

  Args:
    teacher_BC: logits of the fixed teacher.
    student_BC: logits of the student.
    temperature: T > 0; T^2 keeps the gradient's size.
    mask_BC: 1 where an entry takes part; None takes all. A row without any gives 0.
  """

  def log_probs(logits_BC: jax.Array) -> jax.Array:
    scaled_BC = logits_BC.astype(jnp.float32) / temperature
    # Finite, so that an entry left out has probability 0 in both and adds 0 and not NaN.
    return jax.nn.log_softmax(scaled_BC if mask_BC is None else jnp.where(mask_BC > 0, scaled_BC, -1e9))

  teacher_log_BC = log_probs(teacher_BC)
  terms_BC = jnp.exp(teacher_log_BC) * (teacher_log_BC - log_probs(student_BC))
  return temperature**2 * terms_BC.sum(-1)
