"""Classification losses, one value per row."""

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
