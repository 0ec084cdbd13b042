"""Scaled dot-product attention with an additive padding mask and dropout on the probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from compactlm_jax.ops.dropout import dropout


def mask_bias(mask_BS: Int[Array, 'B S']) -> Float[Array, 'B 1 1 S']:
  """0 for real keys and the most negative finite float32 for padded ones (a row of padding stays finite)."""
  return jnp.where(mask_BS > 0, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]


def attention(
  q_BTHK: Float[Array, 'B T H K'],
  k_BSHK: Float[Array, 'B S H K'],
  v_BSHK: Float[Array, 'B S H K'],
  bias_B11S: Float[Array, 'B 1 1 S'],
  *,
  rate: float = 0.0,
  key: jax.Array | None = None,
) -> Float[Array, 'B T H K']:
  """softmax(q k^T / sqrt(K) + bias) v, softmax in float32 (papers.md 0; dropout is not renormalised).

  Args:
    q_BTHK: queries.
    k_BSHK: keys.
    v_BSHK: values.
    bias_B11S: from `mask_bias`.
    rate: dropout rate on the probabilities.
    key: dropout key, None for evaluation.

  Returns:
    The mixed values, in the dtype of `v_BSHK`.
  """
  scale = q_BTHK.shape[-1] ** -0.5
  logits_BHTS = jnp.einsum('BTHK,BSHK->BHTS', q_BTHK * scale, k_BSHK, preferred_element_type=jnp.float32)
  probs_BHTS = jax.nn.softmax(logits_BHTS + bias_B11S, axis=-1).astype(v_BSHK.dtype)
  return jnp.einsum('BHTS,BSHK->BTHK', dropout(probs_BHTS, rate, key), v_BSHK)
