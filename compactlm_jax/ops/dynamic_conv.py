"""Convolutions of ConvBERT's span-based dynamic convolution (papers.md 2.1).

Both are sums of W shifted products: the unfolded [B, T, C, W] tensor of the original is never built.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def depthwise_conv(x_BTD: Float[Array, 'B T D'], kernel_WD: Float[Array, 'W D']) -> Float[Array, 'B T D']:
  """Depthwise 1-D convolution (cross-correlation) with zero 'same' padding and no bias; W odd."""
  taps, length = kernel_WD.shape[0], x_BTD.shape[1]
  padded = jnp.pad(x_BTD, ((0, 0), (taps // 2, taps // 2), (0, 0)))
  return sum(padded[:, j : j + length] * kernel_WD[None, None, j] for j in range(taps))


def dynamic_conv(v_BTHK: Float[Array, 'B T H K'], taps_BTHW: Float[Array, 'B T H W']) -> Float[Array, 'B T H K']:
  """out[t] = sum_j taps[t, j] * v[t + j - (W - 1) / 2], zero outside the row; W odd.

  One kernel per position and head, shared by the K channels of the head (lightweight convolution).
  """
  taps, length = taps_BTHW.shape[-1], v_BTHK.shape[1]
  padded = jnp.pad(v_BTHK, ((0, 0), (taps // 2, taps // 2), (0, 0), (0, 0)))
  return sum(padded[:, j : j + length] * taps_BTHW[..., j, None] for j in range(taps))
