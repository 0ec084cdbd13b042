"""Convolutions of ConvBERT's span-based dynamic convolution.

Both are sums of W shifted products: the unfolded [B, T, C, W] tensor of the original is never built, neither forward
nor backward.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compactlm_jax.ops.fusion import materialize


@jax.custom_vjp
def depthwise_conv(x_BTD: Float[Array, 'B T D'], kernel_WD: Float[Array, 'W D']) -> Float[Array, 'B T D']:
  """Depthwise 1-D convolution (cross-correlation) with zero 'same' padding and no bias; W odd."""
  taps, length = kernel_WD.shape[0], x_BTD.shape[1]
  padded = materialize(_pad_time(x_BTD, taps))
  return _add(padded[:, j : j + length] * kernel_WD[None, None, j] for j in range(taps))


def _depthwise_bwd(saved: tuple[Array, Array], g_BTD: Array) -> tuple[Array, Array]:
  x_BTD, kernel_WD = saved
  taps, length = kernel_WD.shape[0], x_BTD.shape[1]
  padded, g_BTD = materialize((_pad_time(x_BTD, taps), g_BTD))
  dkernel = jnp.stack([(padded[:, j : j + length] * g_BTD).sum((0, 1)) for j in range(taps)])
  return depthwise_conv(g_BTD, kernel_WD[::-1]), dkernel


depthwise_conv.defvjp(lambda x, kernel: (depthwise_conv(x, kernel), (x, kernel)), _depthwise_bwd)


@jax.custom_vjp
def dynamic_conv(v_BTHK: Float[Array, 'B T H K'], taps_WBTH: Float[Array, 'W B T H']) -> Float[Array, 'B T H K']:
  """out[t] = sum_j taps[j, t] * v[t + j - (W - 1) / 2], zero outside the row; W odd.

  One kernel per position and head, shared by the K channels of the head (lightweight convolution).
  """
  taps, length = taps_WBTH.shape[0], v_BTHK.shape[1]
  padded = materialize(_pad_time(v_BTHK, taps))
  return _add(padded[:, j : j + length] * taps_WBTH[j][..., None] for j in range(taps))


def _dynamic_bwd(saved: tuple[Array, Array], g_BTHK: Array) -> tuple[Array, Array]:
  v_BTHK, taps_WBTH = saved
  taps, length = taps_WBTH.shape[0], v_BTHK.shape[1]
  padded, g_BTHK = materialize((_pad_time(v_BTHK, taps), g_BTHK))
  dtaps = jnp.stack([(padded[:, j : j + length] * g_BTHK).sum(-1) for j in range(taps)])
  # v[t] was read by position t - (j - (W - 1) / 2) through tap j.
  g_padded, taps_padded = materialize((_pad_time(g_BTHK, taps), jax.vmap(lambda t: _pad_time(t, taps))(taps_WBTH)))
  starts = [taps - 1 - j for j in range(taps)]
  terms = (g_padded[:, i : i + length] * taps_padded[j, :, i : i + length][..., None] for j, i in enumerate(starts))
  return _add(terms), dtaps


dynamic_conv.defvjp(lambda v, taps: (dynamic_conv(v, taps), (v, taps)), _dynamic_bwd)


def _add(terms: Iterable[Array]) -> Array:
  return functools.reduce(operator.add, terms)


def _pad_time(x: Array, taps: int) -> Array:
  """Zeros before and behind the second axis."""
  return jnp.pad(x, ((0, 0), (taps // 2, taps // 2)) + ((0, 0),) * (x.ndim - 2))
