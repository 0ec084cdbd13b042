"""Dropout as a pure function of its key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dropout(x: Float[Array, '*s'], rate: float, key: jax.Array | None) -> Float[Array, '*s']:
  """Zeroes each element with probability `rate` and scales the others by 1 / (1 - rate).

  Args:
    x: any array.
    rate: static, in [0, 1).
    key: a JAX key, or None for evaluation.

  Returns:
    An array like `x`; `x` itself if `key` is None or `rate` is 0.
  """
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
