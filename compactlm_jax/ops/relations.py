"""KL divergence between the relations of two models, head chunk by head chunk, with its gradient in the same pass.

A relation of one head is softmax(X Y^T / sqrt(d) + mask), a T x T matrix of distributions over the keys: X, Y = Q, K
gives the self-attention distributions, V, V the value relation (MiniLM, section 3). All heads of both models
at T = 512 are gigabytes. Here only one chunk of heads exists at a time, forward and backward: the gradient of the KL
with respect to the student's logits is p_student - p_teacher, known as soon as the loss is, so the pass that computes
the loss also contracts it with the student's operands. What the backward pass needs is then the size of the operands.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from compactlm_jax.errors import ConfigError
from compactlm_jax.ops.fusion import materialize

CHUNK_BYTES = 2 << 20
"""Bound on a chunk's B x heads x T x T float32 array (about five of them live at once). On 2 CPU cores, 1 to 4 MiB are
2 to 3 times faster at B = 16, T = 128 than all heads at once."""

# Finite, so that a masked key has probability exactly 0 in both models and 0 * (difference of two logits) is 0, not
# NaN; halved, so that subtracting a row's maximum cannot overflow.
_MASKED = float(jnp.finfo(jnp.float32).min) / 2


def split_heads(x_BTHK: Float[Array, 'B T H K'], relation_heads: int) -> Float[Array, 'B T R J']:
  """Concatenates attention heads and splits them again into relation heads (MiniLMv2).

  Args:
    x_BTHK: queries, keys or values.
    relation_heads: R; 0 keeps the attention heads.

  Returns:
    The same numbers as R heads of size H * K / R.

  Raises:
    ConfigError: H * K is not divisible by R.
  """
  if not relation_heads:
    return x_BTHK
  batch, length, heads, size = x_BTHK.shape
  if heads * size % relation_heads:
    raise ConfigError(
      f'config.distill.relation_heads: {relation_heads} does not divide the width {heads * size} '
      f'({heads} heads of {size}); use a common divisor of both widths'
    )
  return x_BTHK.reshape(batch, length, relation_heads, heads * size // relation_heads)


def heads_per_chunk(batch: int, length: int, heads: int, max_bytes: int = CHUNK_BYTES) -> int:
  """The largest divisor of `heads` whose batch x divisor x length^2 floats fit `max_bytes`; at least 1."""
  fits = max_bytes // (4 * batch * length * length)
  return max(c for c in range(1, heads + 1) if heads % c == 0 and c <= max(1, fits))


def relation_kl(
  teacher_x_BTHK: Float[Array, 'B T H K'],
  teacher_y_BTHK: Float[Array, 'B T H K'],
  student_x_BTHJ: Float[Array, 'B T H J'],
  student_y_BTHJ: Float[Array, 'B T H J'],
  mask_BT: Int[Array, 'B T'],
  weight_BT: Float[Array, 'B T'],
  *,
  chunk: int = 0,
) -> Float[Array, ' B']:
  """Sum over heads and query rows of weight * KL(teacher relation || student relation), per example, in nats.

  Softmax and KL are float32 whatever the dtype of the operands. Each model is scaled by the root of its own head size.
  Differentiable in the student's operands only, in reverse mode; the teacher, the mask and the weights get no gradient.

  Args:
    teacher_x_BTHK: left operand (query rows) of the teacher.
    teacher_y_BTHK: right operand (keys) of the teacher.
    student_x_BTHJ: left operand of the student; same heads, its own head size.
    student_y_BTHJ: right operand of the student; may be the same array as the left one.
    mask_BT: 1 for keys that take part, 0 for padding.
    weight_BT: weight of each query row; 0 drops it.
    chunk: heads computed at a time, a divisor of H; 0 chooses by `heads_per_chunk`.

  Returns:
    One number per example. An example without a single key yields 0.

  Raises:
    ConfigError: head counts differ, or `chunk` does not divide them.

  Source: Wang et al. 2020, MiniLM, equations 1-4.
  """
  (batch, length, heads, _), student_heads = teacher_x_BTHK.shape, student_x_BTHJ.shape[2]
  if heads != student_heads:
    raise ConfigError(
      f'config.distill.relation_heads: the teacher has {heads} heads and the student {student_heads}; '
      'set relation_heads to split both into the same number'
    )
  chunk = chunk or heads_per_chunk(batch, length, heads)
  if heads % chunk:
    raise ConfigError(f'chunk: {chunk} does not divide {heads} heads')
  return _relation_kl(
    chunk, teacher_x_BTHK, teacher_y_BTHK, student_x_BTHJ, student_y_BTHJ, mask_BT, weight_BT.astype(jnp.float32)
  )


def _chunks(x_BTHK: jax.Array, chunk: int) -> jax.Array:
  """[B, T, H, K] -> [H / chunk, P, T, K] with P = B * chunk pairs of example and head, examples outermost."""
  batch, length, heads, size = x_BTHK.shape
  x = x_BTHK.reshape(batch, length, heads // chunk, chunk, size).transpose(2, 0, 3, 1, 4)
  return x.reshape(heads // chunk, batch * chunk, length, size)


def _unchunk(x: jax.Array, batch: int) -> jax.Array:
  """The inverse of `_chunks`."""
  count, pairs, length, size = x.shape
  x = x.reshape(count, batch, pairs // batch, length, size).transpose(1, 3, 0, 2, 4)
  return x.reshape(batch, length, count * (pairs // batch), size)


def _logits(x_PTK: jax.Array, y_PSK: jax.Array, mask_PS: jax.Array) -> jax.Array:
  logits_PTS = jnp.einsum('ptk,psk->pts', x_PTK, y_PSK, preferred_element_type=jnp.float32)
  return jnp.where(mask_PS[:, None, :] > 0, logits_PTS / math.sqrt(x_PTK.shape[-1]), _MASKED)


def _softmax(logits_PTS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Probabilities and log-sum-exp from one exponential."""
  top = logits_PTS.max(-1, keepdims=True)
  e_PTS = materialize(jnp.exp(logits_PTS - top))
  total = e_PTS.sum(-1, keepdims=True)
  return e_PTS / total, top + jnp.log(total)


def _run(chunk: int, arrays: tuple[jax.Array, ...], with_gradient: bool) -> tuple[jax.Array, ...]:
  """Loss per example; with the gradients of its sum over examples with respect to the student's operands if asked."""
  *operands_BTHK, mask_BT, weight_BT = arrays
  batch = mask_BT.shape[0]
  # Example and head are one axis: with one head per chunk XLA's CPU programs are 1.6x slower on a [B, 1, T, T] array.
  mask_PT, weight_PT = jnp.repeat(mask_BT, chunk, axis=0), jnp.repeat(weight_BT, chunk, axis=0)

  def one(operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    tx_PTK, ty_PTK, sx_PTJ, sy_PTJ = operands
    teacher_PTS, student_PTS = _logits(tx_PTK, ty_PTK, mask_PT), _logits(sx_PTJ, sy_PTJ, mask_PT)
    teacher_p, teacher_lse = _softmax(teacher_PTS)
    student_p, student_lse = _softmax(student_PTS)
    kl_PT = (teacher_p * (teacher_PTS - student_PTS)).sum(-1) + (student_lse - teacher_lse)[..., 0]
    loss_P = (kl_PT * weight_PT).sum(-1)
    if not with_gradient:
      return (loss_P,)
    slope_PTS = (student_p - teacher_p) * (weight_PT / math.sqrt(sx_PTJ.shape[-1]))[:, :, None]
    return (
      loss_P,
      jnp.einsum('pts,psj->ptj', slope_PTS, sy_PTJ.astype(jnp.float32)),
      jnp.einsum('pts,ptj->psj', slope_PTS, sx_PTJ.astype(jnp.float32)),
    )

  loss, *grads = jax.lax.map(one, tuple(_chunks(x, chunk) for x in operands_BTHK))
  return (loss.reshape(-1, batch, chunk).sum((0, 2)), *(_unchunk(x, batch) for x in grads))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _relation_kl(chunk: int, *arrays: jax.Array) -> jax.Array:
  return _run(chunk, arrays, with_gradient=False)[0]


def _forward(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  loss_B, grad_x, grad_y = _run(chunk, arrays, with_gradient=True)
  # Empty arrays carry the student's dtypes to the backward pass, where the gradients are cast once, after scaling.
  return loss_B, (grad_x, grad_y, jnp.zeros((0,), arrays[2].dtype), jnp.zeros((0,), arrays[3].dtype))


def _backward(chunk: int, saved: tuple[jax.Array, ...], bar_B: jax.Array) -> tuple[jax.Array | None, ...]:
  del chunk
  grad_x, grad_y, like_x, like_y = saved
  scale = bar_B[:, None, None, None]
  return None, None, (grad_x * scale).astype(like_x.dtype), (grad_y * scale).astype(like_y.dtype), None, None


_relation_kl.defvjp(_forward, _backward)
