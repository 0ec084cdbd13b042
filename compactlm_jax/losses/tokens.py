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
  return jax.nn.logsumexp(logits, axis=-1) - _logit_of(logits, ids)


def token_hits(logits: Float[Array, '*b V'], ids: Int[Array, '*b']) -> Float[Array, '*b']:
  """1 where no token is likelier than the right one; no argmax, which is slow on a CPU."""
  return (_logit_of(logits, ids) >= logits.max(-1)).astype(jnp.float32)


def _logit_of(logits: Array, ids: Array) -> Array:
  vocabulary = jnp.arange(logits.shape[-1]).reshape((1,) * ids.ndim + (-1,))
  return jnp.where(ids[..., None] == vocabulary, logits, 0).sum(-1)


def replaced_token_loss(logits_BT: Float[Array, 'B T'], replaced_BT: Bool[Array, 'B T']) -> Float[Array, 'B T']:
  """Binary cross-entropy of "was replaced" in nats, in float32 (ELECTRA)."""
  return optax.sigmoid_binary_cross_entropy(logits_BT.astype(jnp.float32), replaced_BT.astype(jnp.float32))
