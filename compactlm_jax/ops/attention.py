"""Scaled dot-product attention with an additive padding mask and dropout on the probabilities."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from compactlm_jax.ops.dropout import apply_mask, site_words
from compactlm_jax.ops.fusion import materialize


def mask_bias(mask_BS: Int[Array, 'B S']) -> Float[Array, 'B 1 1 S']:
  """0 for real keys and the most negative finite float32 for padded ones (a row of padding stays finite)."""
  return jnp.where(mask_BS > 0, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]


def attention(
  q_BTHK: Float[Array, 'B T H K'],
  k_BSHK: Float[Array, 'B S H K'],
  v_BSHK: Float[Array, 'B S H K'],
  bias_B11S: Float[Array, 'B 1 1 S'],
  *,
  causal: bool = False,
  rate: float = 0.0,
  key: jax.Array | None = None,
  site: int | Array = 0,
) -> Float[Array, 'B T H K']:
  """softmax(q k^T / sqrt(K) + bias) v, softmax in float32 (BERT; dropout is not renormalised).

  The backward pass is written out: it keeps one T x S array per head (unnormalised probabilities), draws the dropout
  mask again, and never transposes a T x S array.

  Args:
    q_BTHK: queries.
    k_BSHK: keys.
    v_BSHK: values.
    bias_B11S: from `mask_bias`; it gets no gradient.
    causal: position t reads positions <= t only, whatever the bias says of them (then S = T).
    rate: dropout rate on the probabilities.
    key: dropout key, None for evaluation.
    site: number of the place in the model, see `dropout`.

  Returns:
    The mixed values, in the dtype of `v_BSHK`.
  """
  rate = 0.0 if key is None else rate
  words = site_words(key, site) if key is not None and rate else None
  return _attention(q_BTHK, k_BSHK, v_BSHK, bias_B11S, causal, rate, words)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q: Array, k: Array, v: Array, bias: Array, causal: bool, rate: float, words: Array | None) -> Array:
  return _forward(q, k, v, bias, causal, rate, words)[0]


def _forward(
  q: Array, k: Array, v: Array, bias: Array, causal: bool, rate: float, words: Array | None
) -> tuple[Array, Any]:
  """(output, what the backward pass needs)."""
  cpu, default = (functools.partial(f, causal, rate) for f in (_forward_rows, _forward_einsum))
  out, *saved = jax.lax.platform_dependent(q, k, v, bias, words, cpu=cpu, default=default)
  return out, (*saved, out, words)


def _backward(causal: bool, rate: float, saved: Any, g: Array) -> tuple[Any, ...]:
  del causal  # the saved probabilities of later positions are exact zeros, and so is what they pass on
  cpu, default = (functools.partial(f, rate) for f in (_backward_rows, _backward_einsum))
  words = saved[-1]
  dq, dk, dv = jax.lax.platform_dependent(g, *saved, cpu=cpu, default=default)
  return dq, dk, dv, None, None if words is None else np.zeros(words.shape, jax.dtypes.float0)


_attention.defvjp(_forward, _backward)

# Elsewhere than on a CPU the compiler lays arrays out by itself and transposes fewer. By XLA's estimates for a TPU v3
# core, forward + backward of a block 768 wide, this and the products of `dense` save 9 % of the time (roofline) and
# 15 % of the cycles of the rows below, at T = 128 and at 512. Not measured on GPUs.


def _forward_einsum(causal: bool, rate: float, q: Array, k: Array, v: Array, bias: Array, words: Array | None) -> Any:
  q = q * np.asarray(q.shape[-1] ** -0.5, q.dtype)
  logits = _einsum('bthk,bshk->bhts', q, k) + bias
  logits = hide_later(logits) if causal else logits
  exps = jnp.exp(logits - logits.max(-1, keepdims=True))
  inverse = 1 / exps.sum(-1, keepdims=True)
  dropped = _drop((exps * inverse).astype(v.dtype), rate, words)
  return jnp.einsum('bhts,bshk->bthk', dropped, v), q, k, v, exps.astype(v.dtype), inverse


def _backward_einsum(
  rate: float, g: Array, q: Array, k: Array, v: Array, exps: Array, inverse: Array, out: Array, words: Array | None
) -> Any:
  probs = exps * inverse
  # sum over s of p * dp, without another pass over T x S: it equals the sum over the head of g * out.
  delta = jnp.einsum('bthk,bthk->bht', g.astype(jnp.float32), out.astype(jnp.float32))[..., None]
  dv = jnp.einsum('bhts,bthk->bshk', _drop(probs.astype(g.dtype), rate, words), g)
  dlogits = (probs * (_drop(_einsum('bthk,bshk->bhts', g, v), rate, words) - delta)).astype(g.dtype)
  dq = jnp.einsum('bhts,bshk->bthk', dlogits, k) * np.asarray(q.shape[-1] ** -0.5, q.dtype)
  return dq, jnp.einsum('bhts,bthk->bshk', dlogits, q), dv


# On a CPU arrays lie as [B * H, T, K] and [B * H, T, S], and products contract rows.


def _forward_rows(causal: bool, rate: float, q: Array, k: Array, v: Array, bias: Array, words: Array | None) -> Any:
  batch, length, heads, size = q.shape
  q_, k_, v_ = _split(q * np.asarray(size**-0.5, q.dtype)), _split(k), _split(v)
  logits = _dot(q_, k_, 2, 2).reshape(batch, heads, length, -1) + bias
  logits = (hide_later(logits) if causal else logits).reshape(batch * heads, length, -1)
  exps = materialize(jnp.exp(logits - logits.max(-1, keepdims=True)))
  inverse = materialize(1 / exps.sum(-1, keepdims=True))
  dropped = materialize(_drop((exps * inverse).astype(v.dtype), rate, words))
  out = _merge(_dot(dropped, v_, 2, 1).astype(v.dtype), batch)
  saved = (x.reshape(batch, heads, length, -1) for x in (exps.astype(v.dtype), inverse))
  # The same bytes under the shape that the other branch saves; only `_backward_rows` reads them.
  return out, q_.reshape(q.shape), k_.reshape(k.shape), v_.reshape(v.shape), *saved


def _backward_rows(
  rate: float, g: Array, q: Array, k: Array, v: Array, exps: Array, inverse: Array, out: Array, words: Array | None
) -> Any:
  batch, length, heads, size = g.shape
  q_, k_, v_ = (x.reshape(batch * heads, -1, size) for x in (q, k, v))
  exps, inverse = (x.reshape(batch * heads, length, -1) for x in (exps, inverse))
  scale = np.asarray(size**-0.5, g.dtype)
  delta = jnp.sum(g.astype(jnp.float32) * out, -1).swapaxes(1, 2).reshape(batch * heads, length, 1)
  g_, delta = _split(g), materialize(delta)
  probs = exps * inverse
  dv = _merge_transposed(_dot(g_, materialize(_drop(probs.astype(g.dtype), rate, words)), 1, 1), batch)
  dprobs = _drop(_dot(g_, v_, 2, 2), rate, words)
  dlogits = materialize((probs * (dprobs - delta)).astype(g.dtype))
  dq = _merge(_dot(dlogits, k_, 2, 1), batch).astype(g.dtype) * scale
  dk = _merge_transposed(_dot(q_, dlogits, 1, 1), batch)
  return dq, dk.astype(g.dtype), dv.astype(g.dtype)


def hide_later(logits: Float[Array, 'B H T S']) -> Float[Array, 'B H T S']:
  """Minus infinity where the key (last axis) stands behind the query; a position always reads itself, so rows stay
  finite, padded ones too."""
  query, key = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (2, 3))
  return jnp.where(key <= query, logits, -jnp.inf)


def _drop(x: Array, rate: float, words: Array | None) -> Array:
  return x if words is None else apply_mask(x, rate, words)


def _einsum(spec: str, a: Array, b: Array) -> Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
  """Batched product over the first axis, contracting the given axes, accumulated in float32."""
  return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _split(x_BTHK: Array) -> Array:
  """[B, T, H, K] -> [B * H, T, K]."""
  batch, length, heads, size = x_BTHK.shape
  return materialize(x_BTHK.swapaxes(1, 2).reshape(batch * heads, length, size))


def _merge(x: Array, batch: int) -> Array:
  """[B * H, T, K] -> [B, T, H, K]."""
  return materialize(x.reshape(batch, -1, *x.shape[1:]).swapaxes(1, 2))


def _merge_transposed(x: Array, batch: int) -> Array:
  """[B * H, K, T] -> [B, T, H, K]."""
  return materialize(x.reshape(batch, -1, *x.shape[1:]).transpose(0, 3, 1, 2))
