"""Counting among scores; each function reads the scores once, on a CPU and on a TPU, and each device its own slice.

Bounds and candidates are keys: integers in the order of the floats. The comparisons themselves are those of floats.
R: rows of a layer, all its axes but the last. J: candidates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

_DENORMAL = np.int32(0x7FFFFF)  # bits of the largest one

INFINITY = np.int32(0x7F800000 - 0x7FFFFF)
"""The key of infinity; that of minus infinity is its negative."""


class Rows(NamedTuple):
  """Of each row: the highest and the lowest element between the bounds, and how many lie there."""

  most_NR: Float[Array, 'N R']
  least_NR: Float[Array, 'N R']
  count_NR: Int[Array, 'N R']


def to_keys(x: Array) -> Int[Array, '...']:
  """Integers in the order of the floats; zeros and denormals are 0 (devices flush them), NaN is as minus infinity."""
  bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  size = jnp.maximum((bits & np.int32(0x7FFFFFFF)) - _DENORMAL, 0)
  return jnp.where((bits < 0) | (size > INFINITY), -jnp.minimum(size, INFINITY), size)


def to_floats(keys: Array) -> Float[Array, '...']:
  """The inverse of `to_keys`."""
  size = jnp.abs(keys)
  sign = jnp.where(keys < 0, np.int32(-(2**31)), 0)
  return lax.bitcast_convert_type(jnp.where(size > 0, size + _DENORMAL, 0) | sign, jnp.float32)


def count_above(x: Float[Array, 'N ...'], candidates_NJ: Int[Array, 'N J']) -> Int[Array, 'N J']:
  """How many elements of each layer are above each candidate."""
  axes = tuple(range(1, x.ndim))
  number = candidates_NJ.shape[1]

  def above(x: Array, t_NJ: Array) -> list[Array]:
    return [(x > jnp.expand_dims(t_NJ[:, j], axes)).astype(jnp.int32) for j in range(number)]

  def together(x: Array, t_NJ: Array) -> Array:
    zeros = (np.int32(0),) * number
    sums = lax.reduce(tuple(above(x, t_NJ)), zeros, lambda a, b: tuple(map(lax.add, a, b)), axes)
    return jnp.stack(sums, 1)

  def apart(x: Array, t_NJ: Array) -> Array:
    return jnp.stack([hit.sum(axes) for hit in above(x, t_NJ)], 1)

  # XLA's CPU compiler reads the scores once only for one reduction; that of a TPU merges sums, and their exchange.
  return lax.platform_dependent(x, to_floats(candidates_NJ), cpu=together, default=apart)


def extremes(x: Float[Array, 'N ...'], low: Int[Array, ' N'], high: Int[Array, ' N']) -> Rows:
  """The highest, the lowest and the number of elements above `low` and not above `high` in each row."""
  axes, last = tuple(range(1, x.ndim)), x.ndim - 1

  def inside(x: Array, low: Array, high: Array) -> Array:
    return (x > jnp.expand_dims(low, axes)) & (x <= jnp.expand_dims(high, axes))

  def together(x: Array, low: Array, high: Array) -> tuple[Array, ...]:
    def combine(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
      return lax.max(a[0], b[0]), lax.min(a[1], b[1]), lax.add(a[2], b[2])

    # A CPU's compiler makes vector instructions of such reductions of integers, not of floats.
    hit, keys = inside(x, low, high), to_keys(x)
    parts = jnp.where(hit, keys, -INFINITY), jnp.where(hit, keys, INFINITY), hit.astype(jnp.int32)
    most, least, count = lax.reduce(parts, (-INFINITY, INFINITY, np.int32(0)), combine, (last,))
    return to_floats(most), to_floats(least), count

  def apart(x: Array, low: Array, high: Array) -> tuple[Array, ...]:
    # Three reductions of floats: a TPU's compiler merges those of one type.
    hit = inside(x, low, high)
    most, least = jnp.where(hit, x, -jnp.inf).max(last), jnp.where(hit, x, jnp.inf).min(last)
    return most, least, hit.astype(jnp.float32).sum(last).astype(jnp.int32)

  found = lax.platform_dependent(x, to_floats(low), to_floats(high), cpu=together, default=apart)
  return Rows(*(part.reshape(x.shape[0], -1) for part in found))


def count_in_rows(rows: Rows, candidates_NJ: Int[Array, 'N J']) -> Int[Array, 'N J']:
  """How many elements are above each candidate, if each row holds two at most or equal ones."""
  t_NJ1 = to_floats(candidates_NJ)[:, :, None]
  others_N1R = jnp.maximum(rows.count_NR - 1, 0)[:, None]
  above = (rows.most_NR[:, None] > t_NJ1).astype(jnp.int32) + others_N1R * (rows.least_NR[:, None] > t_NJ1)
  return above.sum(-1)


def count_equal(x: Float[Array, 'N ...'], value: Float[Array, ' N']) -> Int[Array, ' N']:
  """How many elements of each layer equal a value."""
  axes = tuple(range(1, x.ndim))
  return (x == jnp.expand_dims(value, axes)).sum(axes, dtype=jnp.int32)


def nth_equal(x: Float[Array, 'N ...'], value: Float[Array, ' N'], n: Int[Array, ' N']) -> Int[Array, ' N']:
  """Index within its layer of the n-th element that equals a value, in two reads: its row, then its column."""
  axes = tuple(range(1, x.ndim))
  same = x == jnp.expand_dims(value, axes)
  hits_NR = jnp.cumsum(same.sum(-1, dtype=jnp.int32).reshape(x.shape[0], -1), axis=1)
  earlier_NR = hits_NR < n[:, None]
  row, before = earlier_NR.sum(1, dtype=jnp.int32), jnp.where(earlier_NR, hits_NR, 0).max(1)
  rows = np.arange(math.prod(x.shape[1:-1]), dtype=np.int32).reshape((1, *x.shape[1:-1], 1))
  hits_NC = (same & (rows == jnp.expand_dims(row, axes))).sum(axes[:-1], dtype=jnp.int32)
  column = (jnp.cumsum(hits_NC, axis=1) < (n - before)[:, None]).sum(1, dtype=jnp.int32)
  return row * x.shape[-1] + column


def flat_index(shape: tuple[int, ...]) -> Int[Array, '1 ...']:
  """Index of each element within its layer."""
  index: Array | int = 0
  for axis, size in enumerate(shape):
    index = index * size + lax.broadcasted_iota(jnp.int32, (1, *shape), axis + 1)
  return jnp.asarray(index)
