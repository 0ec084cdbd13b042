"""Counting among scores by integers of their order; each function reads the scores once.

R: rows of a layer, all its axes but the last. J: candidates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

INFINITY = np.int32(0x7F800000)
"""The key of infinity, above which there is none."""

LOWEST = np.int32(-0x7F800001)
"""Just below the key of minus infinity: every element is above it."""


class Rows(NamedTuple):
  """Of each row: the highest and the lowest key between the bounds, and how many lie there."""

  most_NR: Int[Array, 'N R']
  least_NR: Int[Array, 'N R']
  count_NR: Int[Array, 'N R']


def last_tie(x: Array, high: Array, need: Array) -> Int[Array, ' N']:
  """Index of the need-th element that equals the key `high`, in two passes: its row, then its column."""
  axes = tuple(range(1, x.ndim))
  same = to_keys(x) == jnp.expand_dims(high, axes)
  hits_NR = jnp.cumsum(same.sum(-1, dtype=jnp.int32).reshape(x.shape[0], -1), axis=1)
  earlier_NR = hits_NR < need[:, None]
  row, before = earlier_NR.sum(1, dtype=jnp.int32), jnp.where(earlier_NR, hits_NR, 0).max(1)
  rows = np.arange(math.prod(x.shape[1:-1]), dtype=np.int32).reshape((1, *x.shape[1:-1], 1))
  hits_NC = (same & (rows == jnp.expand_dims(row, axes))).sum(axes[:-1], dtype=jnp.int32)
  column = (jnp.cumsum(hits_NC, axis=1) < (need - before)[:, None]).sum(1, dtype=jnp.int32)
  return row * x.shape[-1] + column


def count_above(x: Float[Array, 'N ...'], candidates_NJ: Int[Array, 'N J']) -> Int[Array, 'N J']:
  """How many elements of each layer are above each candidate, in one read."""
  axes = tuple(range(1, x.ndim))
  number = candidates_NJ.shape[1]

  def above(x: Array, t_NJ: Array) -> list[Array]:
    keys = to_keys(x)
    return [(keys > jnp.expand_dims(t_NJ[:, j], axes)).astype(jnp.int32) for j in range(number)]

  def together(x: Array, t_NJ: Array) -> Array:
    zeros = (np.int32(0),) * number
    sums = lax.reduce(tuple(above(x, t_NJ)), zeros, lambda a, b: tuple(map(lax.add, a, b)), axes)
    return jnp.stack(sums, 1)

  def apart(x: Array, t_NJ: Array) -> Array:
    return jnp.stack([hit.sum(axes) for hit in above(x, t_NJ)], 1)

  # XLA's CPU compiler reads the scores once only for one reduction; that of a TPU merges sums, and their exchange.
  return lax.platform_dependent(x, candidates_NJ, cpu=together, default=apart)


def extremes(x: Float[Array, 'N ...'], low: Int[Array, ' N'], high: Int[Array, ' N']) -> Rows:
  """The highest, the lowest and the number of keys in (low, high] in each row, in one read."""
  axes, last = tuple(range(1, x.ndim)), x.ndim - 1

  def parts(x: Array, low: Array, high: Array) -> tuple[Array, Array, Array]:
    keys = to_keys(x)
    inside = (keys > jnp.expand_dims(low, axes)) & (keys <= jnp.expand_dims(high, axes))
    return jnp.where(inside, keys, LOWEST), jnp.where(inside, keys, INFINITY), inside.astype(jnp.int32)

  def together(x: Array, low: Array, high: Array) -> tuple[Array, ...]:
    def combine(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
      return lax.max(a[0], b[0]), lax.min(a[1], b[1]), lax.add(a[2], b[2])

    return tuple(lax.reduce(parts(x, low, high), (LOWEST, INFINITY, np.int32(0)), combine, (last,)))

  def apart(x: Array, low: Array, high: Array) -> tuple[Array, ...]:
    most, least, count = parts(x, low, high)
    return most.max(last), least.min(last), count.sum(last)

  found = lax.platform_dependent(x, low, high, cpu=together, default=apart)
  return Rows(*(part.reshape(x.shape[0], -1) for part in found))


def count_in_rows(rows: Rows, candidates_NJ: Int[Array, 'N J']) -> Int[Array, 'N J']:
  """How many elements are above each candidate, if each row holds two at most or equal ones."""
  t_NJ1 = candidates_NJ[:, :, None]
  others_N1R = jnp.maximum(rows.count_NR - 1, 0)[:, None]
  above = (rows.most_NR[:, None] > t_NJ1).astype(jnp.int32) + others_N1R * (rows.least_NR[:, None] > t_NJ1)
  return above.sum(-1)


def count_equal(x: Array, key: Array) -> Int[Array, ' N']:
  axes = tuple(range(1, x.ndim))
  return (to_keys(x) == jnp.expand_dims(key, axes)).sum(axes, dtype=jnp.int32)


def flat_index(shape: tuple[int, ...]) -> Int[Array, '1 ...']:
  """Index of each element within its layer."""
  index: Array | int = 0
  for axis, size in enumerate(shape):
    index = index * size + lax.broadcasted_iota(jnp.int32, (1, *shape), axis + 1)
  return jnp.asarray(index)


def to_keys(x: Array) -> Int[Array, '...']:
  """Integers in the order of the floats; both zeros are 0, NaN is as minus infinity. Denormals are not flushed."""
  bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  keys = jnp.where(bits < 0, np.int32(-(2**31)) - bits, bits)
  return jnp.where(jnp.abs(keys) > INFINITY, -INFINITY, keys)


def to_floats(keys: Array) -> Float[Array, '...']:
  """The inverse of `to_keys`."""
  return lax.bitcast_convert_type(jnp.where(keys < 0, np.int32(-(2**31)) - keys, keys), jnp.float32)
