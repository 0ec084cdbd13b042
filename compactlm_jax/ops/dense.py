"""Matrix products, bias, GELU and LayerNorm, with backward passes that stay quick on a CPU.

Each is the textbook formula. The backward passes are written out because the automatic ones transpose large arrays or
recompute reductions inside element-wise loops; values and gradients are equal up to rounding.

On a CPU all leading axes of a product are rows of one matrix. Elsewhere they stay: folding them would fix the layout
of what attention reads, and the compiler would transpose it (a tenth of a self-attention block by XLA's estimate for a
TPU v3).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compactlm_jax.ops.fusion import materialize


def dense(x: Float[Array, '*b i'], kernel: Float[Array, 'i o'], bias: Float[Array, ' o']) -> Float[Array, '*b o']:
  """x @ kernel + bias, in x's dtype."""
  return add_bias(_matmul(x, kernel.astype(x.dtype)), bias.astype(x.dtype))


@jax.custom_vjp
def _matmul(x: Array, kernel: Array) -> Array:
  return jax.lax.platform_dependent(x, kernel, cpu=_matmul_rows, default=jnp.matmul)


def _matmul_rows(x: Array, kernel: Array) -> Array:
  return (_rows(x) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def _matmul_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
  return _matmul(x, kernel), (x, kernel)


def _matmul_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
  return jax.lax.platform_dependent(*saved, g, cpu=_matmul_bwd_rows, default=_matmul_bwd_axes)


def _matmul_bwd_rows(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
  dx = jax.lax.dot_general(_rows(g), kernel, (((1,), (1,)), ((), ())))
  # Directly [in, out]: no transposed copy of the gradient.
  dkernel = jax.lax.dot_general(_rows(x), _rows(g), (((0,), (0,)), ((), ())))
  return dx.reshape(x.shape), dkernel


def _matmul_bwd_axes(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
  return jnp.einsum('...o,io->...i', g, kernel), jnp.einsum('...i,...o->io', x, g)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@jax.custom_vjp
def tied_logits(x: Float[Array, '*b E'], table: Float[Array, 'V E']) -> Float[Array, '*b V']:
  """x @ table^T in x's dtype, added up in float32.

  The gradient of the table is float32 whatever the dtype of x: it is added to that of the look-ups before devices
  exchange it, so that a shared table travels once.
  """
  return jnp.einsum('...e,ve->...v', x, table.astype(x.dtype), preferred_element_type=jnp.float32)


def _tied_logits_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
  x, table = saved
  g = g.astype(x.dtype)
  dtable = jnp.einsum('...v,...e->ve', g, x, preferred_element_type=jnp.float32)
  return jnp.einsum('...v,ve->...e', g, table.astype(x.dtype)), dtable.astype(table.dtype)


tied_logits.defvjp(lambda x, table: (tied_logits(x, table), (x, table)), _tied_logits_bwd)


@jax.custom_vjp
def grouped_matmul(x: Float[Array, '*b i'], kernel: Float[Array, 'G p q']) -> Float[Array, '*b o']:
  """Each of G contiguous slices of x times its own matrix, side by side; no shuffle (ConvBERT).

  On a CPU one batched product; elsewhere a product for each group, because a TPU would transpose x and the result to
  bring the group to the front.
  """
  return jax.lax.platform_dependent(x, kernel, cpu=_grouped_batched, default=_grouped_each)


def _grouped_batched(x: Array, kernel: Array) -> Array:
  return jnp.einsum('...gp,gpq->...gq', _groups(x, kernel), kernel).reshape(*x.shape[:-1], -1)


def _grouped_each(x: Array, kernel: Array) -> Array:
  return jnp.concatenate([part @ k for part, k in zip(jnp.split(x, len(kernel), -1), kernel, strict=True)], -1)


def _grouped_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
  return jax.lax.platform_dependent(*saved, g, cpu=_grouped_batched_bwd, default=_grouped_each_bwd)


def _grouped_batched_bwd(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
  g = _groups(g, kernel)
  dx = jnp.einsum('...gq,gpq->...gp', g, kernel).reshape(x.shape)
  return dx, jnp.einsum('...gp,...gq->gpq', _groups(x, kernel), g)


def _grouped_each_bwd(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
  parts = [jnp.split(a, len(kernel), -1) for a in (x, g)]
  dx = [jnp.einsum('...q,pq->...p', part, k) for part, k in zip(parts[1], kernel, strict=True)]
  dkernel = [jnp.einsum('...p,...q->pq', a, b) for a, b in zip(*parts, strict=True)]
  return jnp.concatenate(dx, -1), jnp.stack(dkernel)


grouped_matmul.defvjp(lambda x, kernel: (grouped_matmul(x, kernel), (x, kernel)), _grouped_bwd)


def _groups(x: Array, kernel: Array) -> Array:
  return x.reshape(*x.shape[:-1], len(kernel), -1)


@jax.custom_vjp
def add_bias(x: Float[Array, '*b o'], bias: Float[Array, ' o']) -> Float[Array, '*b o']:
  """x + bias over all but the last axis."""
  return x + as_row(bias, x)


def _add_bias_bwd(_: None, g: Array) -> tuple[Array, Array]:
  def leading(g: Array) -> Array:
    return g.sum(tuple(range(g.ndim - 1)))

  return g, jax.lax.platform_dependent(g, cpu=lambda g: _rows(g).sum(0), default=leading)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), _add_bias_bwd)


@jax.custom_vjp
def gelu(x: Float[Array, '*s']) -> Float[Array, '*s']:
  """x * Phi(x), with the error function (not the tanh approximation)."""
  return jax.nn.gelu(x, approximate=False)


def _gelu_bwd(x: Array, g: Array) -> tuple[Array]:
  x32 = x.astype(jnp.float32)
  phi = 0.5 * (1 + jax.lax.erf(x32 * np.float32(0.5**0.5)))
  slope = phi + x32 * jnp.exp(-0.5 * x32 * x32) * np.float32((2 * np.pi) ** -0.5)
  return ((g * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
  x: Float[Array, '*b d'], scale: Float[Array, ' d'], bias: Float[Array, ' d'], epsilon: float
) -> Float[Array, '*b d']:
  """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis.

  Statistics in float32 and in two passes, so that nothing cancels; the result has x's dtype.
  """
  centred, inverse = _statistics(x, epsilon)
  return _scaled(centred, inverse, scale, bias, x)


def _statistics(x: Array, epsilon: float) -> tuple[Array, Array]:
  x = x.astype(jnp.float32)
  centred = x - x.mean(-1, keepdims=True)
  return materialize(centred), materialize(jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon))


def _scaled(centred: Array, inverse: Array, scale: Array, bias: Array, like: Array) -> Array:
  return (centred * inverse * as_row(scale, centred) + as_row(bias, centred)).astype(like.dtype)


def _layer_norm_fwd(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
  centred, inverse = _statistics(x, epsilon)
  return _scaled(centred, inverse, scale, bias, x), (centred.astype(x.dtype), inverse, scale)


def _layer_norm_bwd(epsilon: float, saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
  centred, inverse, scale = saved
  g32, inverse = _rows(g).astype(jnp.float32), inverse.reshape(-1, 1)
  normal = _rows(centred) * inverse
  scaled = g32 * scale[None]
  mean, along = materialize((scaled.mean(-1, keepdims=True), (scaled * normal).mean(-1, keepdims=True)))
  dx = inverse * (scaled - mean - normal * along)
  return dx.reshape(g.shape).astype(g.dtype), (g32 * normal).sum(0), g32.sum(0)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def as_row(vector: Float[Array, ' d'], x: Float[Array, '*b d']) -> Float[Array, '...']:
  """`vector` with x's rank, to be broadcast over all but the last axis."""
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def _rows(x: Array) -> Array:
  return x.reshape(-1, x.shape[-1])
