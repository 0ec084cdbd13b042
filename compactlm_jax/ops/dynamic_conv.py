"""Convolutions of ConvBERT's span-based dynamic convolution.

Both are sums of W shifted products: the unfolded [B, T, C, W] tensor of the original is never built, neither forward
nor backward. Tap j of position t reads position t + j - back, where `back` is (W - 1) / 2, or W - 1 if causal.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compactlm_jax.ops.fusion import materialize


def depthwise_conv(
  x_BTD: Float[Array, 'B T D'], kernel_WD: Float[Array, 'W D'], *, causal: bool = False
) -> Float[Array, 'B T D']:
  """Depthwise 1-D convolution (cross-correlation) with zero padding and no bias.

  Args:
    x_BTD: the row of vectors.
    kernel_WD: one kernel per channel, W odd.
    causal: the last tap, not the middle one, stands on its own position.
  """
  return _depthwise(x_BTD, kernel_WD, _back(kernel_WD.shape[0], causal))


def dynamic_conv(
  v_BTHK: Float[Array, 'B T H K'], taps_WBTH: Float[Array, 'W B T H'], *, causal: bool = False
) -> Float[Array, 'B T H K']:
  """out[t] = sum_j taps[j, t] * v[t + j - back], zero outside the row.

  One kernel per position and head, shared by the K channels of the head (lightweight convolution).

  Args:
    v_BTHK: values.
    taps_WBTH: kernels, W odd.
    causal: the last tap, not the middle one, stands on its own position.
  """
  return _dynamic(v_BTHK, taps_WBTH, _back(taps_WBTH.shape[0], causal))


def _back(taps: int, causal: bool) -> int:
  return taps - 1 if causal else taps // 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x_BTD: Array, kernel_WD: Array, back: int) -> Array:
  taps, length = kernel_WD.shape[0], x_BTD.shape[1]
  padded = materialize(_pad_time(x_BTD, taps, back))
  return _add(padded[:, j : j + length] * kernel_WD[None, None, j] for j in range(taps))


def _depthwise_bwd(back: int, saved: tuple[Array, Array], g_BTD: Array) -> tuple[Array, Array]:
  x_BTD, kernel_WD = saved
  taps, length = kernel_WD.shape[0], x_BTD.shape[1]
  padded, g_BTD = materialize((_pad_time(x_BTD, taps, back), g_BTD))
  dkernel = jnp.stack([(padded[:, j : j + length] * g_BTD).sum((0, 1)) for j in range(taps)])
  return _depthwise(g_BTD, kernel_WD[::-1], taps - 1 - back), dkernel


_depthwise.defvjp(lambda x, kernel, back: (_depthwise(x, kernel, back), (x, kernel)), _depthwise_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dynamic(v_BTHK: Array, taps_WBTH: Array, back: int) -> Array:
  taps, length = taps_WBTH.shape[0], v_BTHK.shape[1]
  padded = materialize(_pad_time(v_BTHK, taps, back))
  return _add(padded[:, j : j + length] * taps_WBTH[j][..., None] for j in range(taps))


def _dynamic_bwd(back: int, saved: tuple[Array, Array], g_BTHK: Array) -> tuple[Array, Array]:
  v_BTHK, taps_WBTH = saved
  taps, length = taps_WBTH.shape[0], v_BTHK.shape[1]
  padded, g_BTHK = materialize((_pad_time(v_BTHK, taps, back), g_BTHK))
  dtaps = jnp.stack([(padded[:, j : j + length] * g_BTHK).sum(-1) for j in range(taps)])
  # v[t] was read by position t + back - j through tap j.
  pad = functools.partial(_pad_time, taps=taps, back=taps - 1 - back)
  g_padded, taps_padded = materialize((pad(g_BTHK), jax.vmap(pad)(taps_WBTH)))
  starts = [taps - 1 - j for j in range(taps)]
  terms = (g_padded[:, i : i + length] * taps_padded[j, :, i : i + length][..., None] for j, i in enumerate(starts))
  return _add(terms), dtaps


_dynamic.defvjp(lambda v, taps, back: (_dynamic(v, taps, back), (v, taps)), _dynamic_bwd)


def _add(terms: Iterable[Array]) -> Array:
  return functools.reduce(operator.add, terms)


def _pad_time(x: Array, taps: int, back: int) -> Array:
  """`back` zeros before the second axis and taps - 1 - back behind it."""
  return jnp.pad(x, ((0, 0), (back, taps - 1 - back)) + ((0, 0),) * (x.ndim - 2))
