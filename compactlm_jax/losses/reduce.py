"""The one way from per-row or per-token values to a scalar."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def masked_sum(values: Float[Array, '*s'], weights: Float[Array, '*s'] | None) -> tuple[Array, Array]:
  """(sum of weights * values, sum of weights); weights None means ones."""
  weights = jnp.ones_like(values) if weights is None else weights.astype(values.dtype)
  return jnp.sum(weights * values), jnp.sum(weights)


def masked_mean(values: Float[Array, '*s'], weights: Float[Array, '*s'] | None = None) -> Array:
  """Weighted mean; 0 where all weights are 0."""
  total, weight = masked_sum(values, weights)
  return total / jnp.maximum(weight, 1e-9)
