"""Losses of language models, one value per token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def token_cross_entropy(logits: Float[Array, '*b V'], ids: Int[Array, '*b']) -> Float[Array, '*b']:
  """-log softmax(logits)[id] in nats, in float32.

  The logit of the id is selected by comparison, not by indexing, so that the gradient is no scatter.

  Args:
    logits: scores of every token.
    ids: the right token, 0 <= id < V.
  """
  logits = logits.astype(jnp.float32)
  vocabulary = jnp.arange(logits.shape[-1]).reshape((1,) * ids.ndim + (-1,))
  right = jnp.where(ids[..., None] == vocabulary, logits, 0.0).sum(-1)
  return jax.nn.logsumexp(logits, axis=-1) - right


def replaced_token_loss(logits_BT: Float[Array, 'B T'], replaced_BT: Bool[Array, 'B T']) -> Float[Array, 'B T']:
  """Binary cross-entropy of "was replaced" in nats, in float32 (ELECTRA)."""
  return optax.sigmoid_binary_cross_entropy(logits_BT.astype(jnp.float32), replaced_BT.astype(jnp.float32))
