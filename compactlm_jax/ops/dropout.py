"""Dropout as a pure function of its key, the place in the model and the position in the array.

Masks come from a hash of (key, site, row, column): a few integer operations an element that fuse with their
surroundings, where a general-purpose generator costs more than a small matrix product on a CPU. The same mask is drawn
again in the backward pass instead of being stored, and it does not depend on how the array is spread over devices.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from compactlm_jax.ops.fusion import materialize


def dropout(x: Float[Array, '*s'], rate: float, key: jax.Array | None, site: int | Array = 0) -> Float[Array, '*s']:
  """Zeroes each element with probability `rate` and scales the others by 1 / (1 - rate).

  Args:
    x: any array of rank one or more.
    rate: static, in [0, 1). In a type shorter than float32 the nearest one whose scale that type holds: .0986 for .1 in
      bfloat16.
    key: a JAX key, or None for evaluation.
    site: number of the place in the model; each place of a step needs its own.

  Returns:
    An array like `x`; `x` itself if `key` is None or `rate` is 0.
  """
  if key is None or rate == 0.0:
    return x
  return _dropout(x, rate, site_words(key, site))


def site_words(key: jax.Array, site: int | Array) -> UInt32[Array, '2']:
  """Two words that stand for (key, site)."""
  words = jax.random.key_data(key).reshape(-1).astype(jnp.uint32)
  site = jnp.asarray(site).astype(jnp.uint32)
  first = _mix(words[0] ^ _mix(site + np.uint32(0x9E3779B9)))
  second = _mix(words[-1] + _mix(first ^ np.uint32(0x85EBCA6B)) + site)
  return jnp.stack([first, second])


def keep_mask(words: UInt32[Array, '2'], shape: tuple[int, ...], rate: float) -> Bool[Array, '...']:
  """True with probability 1 - rate, independently for each element of `shape`."""
  return random_bits(words, shape) >= np.int32(round(rate * 2**31))


def random_bits(words: UInt32[Array, '2'], shape: tuple[int, ...]) -> Int[Array, '...']:
  """Uniform integers in [0, 2^31), independent for each element of `shape`."""
  rows, columns = math.prod(shape[:-1]), shape[-1]
  index = jax.lax.iota(jnp.uint32, rows)
  a = _mix(_mix(index ^ words[0]) + words[1])
  b = _mix(a + words[1] + index * np.uint32(0x9E3779B1))
  a, b = materialize((a, b))  # two words a row, kept out of the loop over elements
  h = (jax.lax.broadcasted_iota(jnp.uint32, (rows, columns), 1) * np.uint32(0x9E3779B1)) ^ a[:, None]
  h = h * np.uint32(0x21F0AAAD)
  h = ((h ^ (h >> 15)) + b[:, None]) * np.uint32(0x735A2D97)
  # The low bits of a product are weak: the high 31 are given.
  return (h >> 1).astype(jnp.int32).reshape(shape)


def apply_mask(x: Float[Array, '*s'], rate: float, words: UInt32[Array, '2']) -> Float[Array, '*s']:
  """`x` where kept, scaled; 0 elsewhere. Its own transpose, so the backward pass applies it to the gradient."""
  # A product, not a select: XLA would hoist the zeros of a select out of the layer loop and write them to memory.
  scale = np.asarray(1 / (1 - rate), x.dtype)
  if x.dtype != jnp.float32:
    # 1 / .9 is 1.109 in bfloat16. Keeping 1 / 1.109 of the elements, not .9, leaves the mean as it was; a product in
    # float32 would too, but XLA then keeps float32 copies of `x` for the backward pass.
    rate = 1 - 1 / float(scale)
  return x * (keep_mask(words, x.shape, rate).astype(x.dtype) * scale)


def _mix(h: Array) -> Array:
  """A bijection of 32-bit words in which every input bit moves about half of the output bits."""
  h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
  h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
  return h ^ (h >> 16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _dropout(x: Array, rate: float, words: Array) -> Array:
  return apply_mask(x, rate, words)


def _dropout_fwd(x: Array, rate: float, words: Array) -> tuple[Array, Array]:
  return apply_mask(x, rate, words), words


def _dropout_bwd(rate: float, words: Array, g: Array) -> tuple[Array, np.ndarray]:
  return apply_mask(g, rate, words), np.zeros(words.shape, jax.dtypes.float0)


_dropout.defvjp(_dropout_fwd, _dropout_bwd)
