"""Weight masks from scores, and the straight-through estimator (Sanh et al. 2020, movement pruning)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def masked_weight(
  weight: Float[Array, '*s'], scores: Float[Array, '*s'], mask: Float[Array, '*s']
) -> Float[Array, '*s']:
  """weight * mask, with the mask treated as the identity of the scores in the backward pass.

  With W' = W * M: dL/dW = dL/dW' * M and dL/dS = dL/dW' * W exactly, masked entries included, whatever function of
  the scores the mask is (no derivative of a sigmoid). The mask itself gets no gradient.

  Args:
    weight: W.
    scores: S, of W's shape; read by the backward pass only.
    mask: M(S), of W's shape.

  Returns:
    W'.
  """
  del scores
  return weight * mask


def _masked_weight_fwd(weight, scores, mask):
  return masked_weight(weight, scores, mask), (weight, mask)


def _masked_weight_bwd(saved, g):
  weight, mask = saved
  return g * mask, g * weight, jnp.zeros_like(mask)


masked_weight.defvjp(_masked_weight_fwd, _masked_weight_bwd)


def top_fraction_mask(scores: Float[Array, '*s'], density: float | Array) -> Float[Array, '*s']:
  """1 for the floor(density * size) highest scores, 0 for the others; the count is exact, ties go to lower indices.

  Args:
    scores: any shape; no absolute value is taken.
    density: fraction to keep, static or traced.
  """
  flat = scores.reshape(-1)
  order = jnp.argsort(-flat, stable=True)
  rank = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size))
  keep = jnp.floor(density * flat.size).astype(rank.dtype)
  return (rank < keep).astype(scores.dtype).reshape(scores.shape)
