"""Convolutions of ConvBERT's span-based dynamic convolution, each in the forms that suit its backend and length.

Tap j of position t reads position t + j - back, where `back` is (W - 1) / 2, or W - 1 if causal. The unfolded
[B, T, C, W] tensor of the original is never built, neither forward nor backward.

Which form runs is decided by `benchmarks/kernel.py`, a whole block forward + backward, 768 wide, 9 taps, bfloat16, by
XLA's estimates for a TPU v3 core (roofline time | sum of the cycles of its scheduler, which also counts vector work):

- Depthwise: XLA's own grouped convolution takes 80 us where nine shifted slices take 193 us of cycles, and the
  gradient of its kernel 57 us against 198 us. On a CPU that convolution is slow; slices are added in one loop.
- Dynamic: in short rows the taps are added into a T x T band that the matrix unit multiplies: 134 us of cycles
  forward + backward at 128 positions where shifted slices take 308 us, and still 5 % less for the block at 256. The
  band grows with T x T: at 512 positions slices win (354 us against 440 us), and splitting the row into blocks of 128
  with a halo pays its gain in copies. On a CPU slices win at every length.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from compactlm_jax.ops.fusion import materialize

BAND_LENGTH = 256
"""Longest row whose dynamic convolution is a product with a T x T band on a TPU."""


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


def tap_reads(mask_BT: Num[Array, 'B T'], taps: int, *, causal: bool = False) -> Num[Array, 'W B T']:
  """The mask at the position that each tap of each position reads; 0 outside the row.

  Taps times this are the taps of masked values: W numbers a position instead of a whole vector.

  Args:
    mask_BT: 1 for real tokens.
    taps: W.
    causal: as in `dynamic_conv`.
  """
  padded, length = _pad_time(mask_BT, taps, _back(taps, causal)), mask_BT.shape[1]
  return jnp.stack([padded[:, j : j + length] for j in range(taps)])


def _back(taps: int, causal: bool) -> int:
  return taps - 1 if causal else taps // 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x_BTD: Array, kernel_WD: Array, back: int) -> Array:
  grouped, slices = (functools.partial(f, back=back) for f in (depthwise_grouped, depthwise_slices))
  return jax.lax.platform_dependent(x_BTD, kernel_WD, tpu=grouped, default=slices)


def _depthwise_bwd(back: int, saved: tuple[Array, Array], g_BTD: Array) -> tuple[Array, Array]:
  x_BTD, kernel_WD = saved
  kernel_gradients = (_depthwise_grouped_kernel, _depthwise_slices_kernel)
  grouped, slices = (functools.partial(f, taps=kernel_WD.shape[0], back=back) for f in kernel_gradients)
  dkernel = jax.lax.platform_dependent(x_BTD, g_BTD, tpu=grouped, default=slices)
  return _depthwise(g_BTD, kernel_WD[::-1], kernel_WD.shape[0] - 1 - back), dkernel


_depthwise.defvjp(lambda x, kernel, back: (_depthwise(x, kernel, back), (x, kernel)), _depthwise_bwd)


def depthwise_grouped(x_BTD: Float[Array, 'B T D'], kernel_WD: Float[Array, 'W D'], back: int) -> Float[Array, 'B T D']:
  """XLA's convolution with one group per channel; `back` as in the module."""
  taps, channels = kernel_WD.shape
  return jax.lax.conv_general_dilated(
    x_BTD,
    kernel_WD[:, None],
    window_strides=(1,),
    padding=[(back, taps - 1 - back)],
    dimension_numbers=('NWC', 'WIO', 'NWC'),
    feature_group_count=channels,
  )


def _depthwise_grouped_kernel(x_BTD: Array, g_BTD: Array, taps: int, back: int) -> Array:
  zeros = jnp.zeros((taps, x_BTD.shape[-1]), x_BTD.dtype)
  return jax.vjp(lambda kernel_WD: depthwise_grouped(x_BTD, kernel_WD, back), zeros)[1](g_BTD)[0]


def depthwise_slices(x_BTD: Float[Array, 'B T D'], kernel_WD: Float[Array, 'W D'], back: int) -> Float[Array, 'B T D']:
  """W shifted products; `back` as in the module."""
  taps, length = kernel_WD.shape[0], x_BTD.shape[1]
  padded = materialize(_pad_time(x_BTD, taps, back))
  return _add(padded[:, j : j + length] * kernel_WD[None, None, j] for j in range(taps))


def _depthwise_slices_kernel(x_BTD: Array, g_BTD: Array, taps: int, back: int) -> Array:
  padded, g_BTD = materialize((_pad_time(x_BTD, taps, back), g_BTD))
  return _sums(padded, g_BTD, taps, axes=(0, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dynamic(v_BTHK: Array, taps_WBTH: Array, back: int) -> Array:
  return _choose(dynamic_band, dynamic_slices, back, v_BTHK, taps_WBTH)


def _dynamic_bwd(back: int, saved: tuple[Array, Array], g_BTHK: Array) -> Any:
  return _choose(_dynamic_band_bwd, _dynamic_slices_bwd, back, *saved, g_BTHK)


_dynamic.defvjp(lambda v, taps, back: (_dynamic(v, taps, back), (v, taps)), _dynamic_bwd)


def _choose(band: Any, slices: Any, back: int, v_BTHK: Array, *rest: Array) -> Any:
  slices = functools.partial(slices, back=back)
  if v_BTHK.shape[1] > BAND_LENGTH:
    return slices(v_BTHK, *rest)
  return jax.lax.platform_dependent(v_BTHK, *rest, tpu=functools.partial(band, back=back), default=slices)


def dynamic_band(
  v_BTHK: Float[Array, 'B T H K'], taps_WBTH: Float[Array, 'W B T H'], back: int
) -> Float[Array, 'B T H K']:
  """A product with the T x T matrix that holds the taps on its W middle diagonals; `back` as in the module."""
  return jnp.einsum('bhts,bshk->bthk', _band(taps_WBTH, back), v_BTHK)


def _dynamic_band_bwd(v_BTHK: Array, taps_WBTH: Array, g_BTHK: Array, back: int) -> tuple[Array, Array]:
  dv_BTHK = jnp.einsum('bhts,bthk->bshk', _band(taps_WBTH, back), g_BTHK)
  dband_BHTS = jnp.einsum('bthk,bshk->bhts', g_BTHK, v_BTHK, preferred_element_type=jnp.float32)
  tap = _tap(dband_BHTS.shape[-1], back)
  dtaps_WBHT = jnp.stack([jnp.where(tap == j, dband_BHTS, 0).sum(3) for j in range(taps_WBTH.shape[0])])
  return dv_BTHK, dtaps_WBHT.swapaxes(2, 3).astype(taps_WBTH.dtype)


def _band(taps_WBTH: Array, back: int) -> Array:
  """[B, H, T, S]: at (t, s) the tap through which position t reads position s, or 0.

  In the order of attention's probabilities: with [S, T] the compiler has been seen to lay the band out so that taps
  are spread over lanes one by one, which doubles the cycles of its products.
  """
  taps_WBHT, tap = taps_WBTH.swapaxes(2, 3), _tap(taps_WBTH.shape[2], back)
  band_BHTS = jnp.zeros((), taps_WBTH.dtype)
  for j, tap_BHT in enumerate(taps_WBHT):
    band_BHTS = jnp.where(tap == j, tap_BHT[..., None], band_BHTS)
  return band_BHTS


def _tap(length: int, back: int) -> Array:
  """[1, 1, T, S]: number of the tap through which position t reads position s; outside [0, W) there is none."""
  t, s = (jax.lax.broadcasted_iota(jnp.int32, (1, 1, length, length), axis) for axis in (2, 3))
  return s - t + back


def dynamic_slices(
  v_BTHK: Float[Array, 'B T H K'], taps_WBTH: Float[Array, 'W B T H'], back: int
) -> Float[Array, 'B T H K']:
  """W shifted products; `back` as in the module."""
  taps, length = taps_WBTH.shape[0], v_BTHK.shape[1]
  padded = materialize(_pad_time(v_BTHK, taps, back))
  return _add(padded[:, j : j + length] * taps_WBTH[j][..., None] for j in range(taps))


def _dynamic_slices_bwd(v_BTHK: Array, taps_WBTH: Array, g_BTHK: Array, back: int) -> tuple[Array, Array]:
  taps, length = taps_WBTH.shape[0], v_BTHK.shape[1]
  padded, g_BTHK = materialize((_pad_time(v_BTHK, taps, back), g_BTHK))
  dtaps = _sums(padded, g_BTHK, taps, axes=(3,))
  # v[t] was read by position t + back - j through tap j.
  pad = functools.partial(_pad_time, taps=taps, back=taps - 1 - back)
  g_padded, taps_padded = materialize((pad(g_BTHK), jax.vmap(pad)(taps_WBTH)))
  starts = [taps - 1 - j for j in range(taps)]
  terms = (g_padded[:, i : i + length] * taps_padded[j, :, i : i + length][..., None] for j, i in enumerate(starts))
  return _add(terms), dtaps


def _sums(padded: Array, g: Array, taps: int, axes: tuple[int, ...]) -> Array:
  """[W, ...]: padded, shifted by each tap, times g, summed over `axes`."""
  cpu, default = (functools.partial(f, taps=taps, axes=axes) for f in (_sums_in_pieces, _sums_plain))
  return jax.lax.platform_dependent(padded, g, cpu=cpu, default=default)


def _sums_plain(padded: Array, g: Array, taps: int, axes: tuple[int, ...]) -> Array:
  return jnp.stack([(padded[:, j : j + g.shape[1]] * g).sum(axes) for j in range(taps)])


def _sums_in_pieces(padded: Array, g: Array, taps: int, axes: tuple[int, ...]) -> Array:
  """Pieces of the last of `axes` are added up first, in one loop.

  XLA's CPU compiler hands a plain sum to a library, for which it first writes down every shifted copy.
  """
  axis, length = axes[-1], g.shape[1]
  pieces = next(n for n in (8, 4, 2, 1) if g.shape[axis] % n == 0)
  size = g.shape[axis] // pieces

  def piece(x: Array, i: int) -> Array:
    return jax.lax.slice_in_dim(x, i * size, (i + 1) * size, axis=axis)

  def tap(j: int) -> Array:
    shifted = padded[:, j : j + length]
    return _add(piece(shifted, i) * piece(g, i) for i in range(pieces))

  return materialize(jnp.stack([tap(j) for j in range(taps)])).sum(tuple(axis + 1 for axis in axes))


def _add(terms: Iterable[Array]) -> Array:
  return functools.reduce(operator.add, terms)


def _pad_time(x: Array, taps: int, back: int) -> Array:
  """`back` zeros before the second axis and taps - 1 - back behind it."""
  return jnp.pad(x, ((0, 0), (back, taps - 1 - back)) + ((0, 0),) * (x.ndim - 2))
