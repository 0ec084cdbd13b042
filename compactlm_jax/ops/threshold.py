"""Exact order statistics of scores by counting: which elements are the `keep` highest.

A threshold is found without sorting or moving the scores. Each pass reads every score once and counts how many lie
above seven candidates. A sorted sample of each layer proposes the first candidates, interpolation the next, so that
about three passes leave a few dozen elements between the bounds. One more pass notes the highest and the lowest of
these in each row: rows hold one or two, so all are known, and the search ends on that small array. Searches of all
layers and matrices advance in one loop. Where scores lie in slices on several devices, each counts its own and only
counts and the sample travel.

Whatever the values, there are at most 22 passes of counting: after `_GUIDED` = 6 of them each also divides the bounds,
which are less than 2^32 apart, by four. Noting follows `_ROUND` of them at most, and equal elements that an index must
separate cost two passes more. Letters beside those of types.py: Q searches (one for each layer, or one for all), J
candidates, M sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from compactlm_jax.ops.counting import (
  INFINITY,
  count_above,
  count_equal,
  count_in_rows,
  extremes,
  flat_index,
  nth_equal,
  to_floats,
  to_keys,
)
from compactlm_jax.types import struct

_SPREAD_J = np.array([[5.0, 3.0, 0.9, 0.0, -0.9, -3.0, -5.0]], np.float32)
"""Candidates around the expected place, in standard deviations, in ascending order of thresholds."""

_RING_J = np.array([[0.45, 0.04, 0.0, 0.0, 0.0, -0.04, -0.45]], np.float32)
"""And further out by these parts of the way to the bound: scores of a row resemble each other, so that a sample says
less than its size, and between two bounds the density may vary."""

_OUTWARD_J = np.array([[1 << bit for bit in (18, 20, 21, 22, 23, 25, 27)]], np.uint32)
"""Steps beyond the sample, in keys: 2^23 of them double a value."""

_SAMPLE, _FEW_SAMPLES, _ROW_STEP = 4096, 128, 16
_FEW = 64
"""So many elements between the bounds are rarely three in one row."""

_GUIDED, _ROUND = 6, 4


@struct
class Cut:
  """Where each layer is cut: an element is kept iff it is above `threshold`, or equal to it and not after `last`.

  Attributes:
    threshold: a value of the layer's, or infinite.
    last: index within the flattened layer, -1 where no element that equals the threshold is kept.
  """

  threshold: Float[Array, ' N']
  last: Int[Array, ' N']


class _Bounds(NamedTuple):
  """Keys around each threshold, and how many elements are above them: above_low >= keep >= above_high."""

  low: Int[Array, ' Q']
  high: Int[Array, ' Q']
  above_low: Int[Array, ' Q']
  above_high: Int[Array, ' Q']
  keep: Int[Array, ' Q']


_Count = Callable[[Int[Array, 'Q J']], Int[Array, 'Q J']]
"""Candidates -> how many elements are above each."""


def local_cuts(leaves: Mapping[str, Float[Array, 'N ...']], keeps: Mapping[str, Int[Array, ' N']]) -> dict[str, Cut]:
  """The cuts that keep exactly the `keep` highest elements of each layer of each leaf, ties to lower indices.

  Args:
    leaves: float32. 0.0, -0.0 and denormals are equal (XLA flushes denormals on a CPU and a TPU). NaN and minus
      infinity are never kept. A layer holds fewer than 2^31 elements.
    keeps: for each leaf and layer, static or traced; below 0 counts as 0, above the size as the size.

  Returns:
    A cut for each leaf. Layers of which nothing or everything is kept need no pass over the scores.
  """
  return _local_cuts(leaves, keeps)[0]


def global_cut(leaves: Mapping[str, Float[Array, 'N ...']], keep: Int[Array, '']) -> dict[str, Cut]:
  """The cuts that keep exactly the `keep` highest elements of all leaves together.

  Ties go to lower indices, lower layers and lower names, in this order of increasing weight.

  Args:
    leaves: float32, fewer than 2^31 elements in all; as in `local_cuts`.
    keep: static or traced.
  """
  return _global_cut(leaves, keep)[0]


def passes(
  leaves: Mapping[str, Float[Array, 'N ...']], keeps: Mapping[str, Int[Array, ' N']] | Array
) -> Int[Array, '']:
  """How many times `local_cuts` (or, given one number, `global_cut`) reads the scores; ties are not counted."""
  return (_local_cuts(leaves, keeps) if isinstance(keeps, Mapping) else _global_cut(leaves, keeps))[1]


def keep_mask(values: Float[Array, 'N ...'], cut: Cut) -> Bool[Array, 'N ...']:
  """True where an element is kept.

  Args:
    values: what the cut was made from.
    cut: of each layer.
  """
  axes = range(1, values.ndim)
  threshold, last = (jnp.expand_dims(x, axes) for x in (cut.threshold, cut.last))
  return (values > threshold) | ((values == threshold) & (flat_index(values.shape[1:]) <= last))


def _local_cuts(leaves: Mapping[str, Array], keeps: Mapping[str, Array]) -> tuple[dict[str, Cut], Array]:
  names, arrays = _sorted(leaves)
  sizes = [x[0].size for x in arrays]
  ends = np.cumsum([x.shape[0] for x in arrays])[:-1]
  wanted = [jnp.broadcast_to(jnp.asarray(keeps[name], jnp.int32), x.shape[:1]) for name, x in zip(names, arrays)]
  size = np.repeat(np.array(sizes, np.int32), [x.shape[0] for x in arrays])
  found, count = _solve(
    arrays,
    _start(jnp.concatenate(wanted), jnp.asarray(size)),
    lambda q: jnp.split(q, ends),
    jnp.concatenate,
    lambda: sample_local(arrays),
  )
  needs = jnp.split(found.keep - found.above_high, ends)
  cuts = {}
  for name, x, high, need, part in zip(
    names, arrays, jnp.split(found.high, ends), needs, jnp.split(found.above_low - found.above_high, ends)
  ):
    cuts[name] = _cut(x, high, need, part)
  return cuts, count


def _global_cut(leaves: Mapping[str, Array], keep: Array) -> tuple[dict[str, Cut], Array]:
  names, arrays = _sorted(leaves)
  layers = [x.shape[0] for x in arrays]
  size = sum(x.size for x in arrays)
  found, count = _solve(
    arrays,
    _start(jnp.asarray(keep, jnp.int32).reshape(1), jnp.full((1,), size, jnp.int32)),
    lambda q: [jnp.broadcast_to(q, (n, *q.shape[1:])) for n in layers],
    lambda parts: jnp.stack([part.sum(0, keepdims=True) for part in parts]).sum(0),
    lambda: jnp.sort(jnp.concatenate([s.reshape(1, -1) for s in _samples(arrays)], 1), axis=1),
  )
  high, need, equal = found.high, (found.keep - found.above_high)[0], (found.above_low - found.above_high)[0]

  def shares() -> Array:
    """How many of the elements that equal the threshold each layer may keep."""
    each = jnp.concatenate([count_equal(x, to_floats(jnp.broadcast_to(high, x.shape[:1]))) for x in arrays])
    before = jnp.cumsum(each) - each
    return jnp.stack([jnp.clip(need - before, 0, each), each])

  every = sum(layers)
  kept, each = lax.cond(
    (need > 0) & (need < equal), shares, lambda: jnp.stack([jnp.full(every, x, jnp.int32) for x in (need, equal)])
  )
  ends = np.cumsum(layers)[:-1]
  cuts = {}
  for name, x, part, of in zip(names, arrays, jnp.split(kept, ends), jnp.split(each, ends)):
    cuts[name] = _cut(x, jnp.broadcast_to(high, x.shape[:1]), part, of)
  return cuts, count


def _sorted(leaves: Mapping[str, Array]) -> tuple[list[str], list[Array]]:
  names = sorted(leaves)
  arrays = [jnp.asarray(leaves[name]) for name in names]
  return names, [x[:, None] if x.ndim == 1 else x for x in arrays]


def _start(keep: Array, size: Array) -> _Bounds:
  keep = jnp.clip(keep, 0, size)
  lowest, highest = jnp.full_like(keep, -INFINITY), jnp.full_like(keep, INFINITY)
  # All or nothing is settled from the start.
  low, high = jnp.where(keep == 0, highest, lowest), jnp.where(keep == size, lowest, highest)
  return _Bounds(low, high, jnp.where(keep == 0, 0, size), jnp.where(keep == size, size, 0), keep)


def _solve(
  arrays: Sequence[Array],
  bounds: _Bounds,
  spread: Callable[[Array], list[Array]],
  merge: Callable[[list[Array]], Array],
  sample: Callable[[], Int[Array, 'Q M']],
) -> tuple[_Bounds, Array]:
  """Moves the bounds together until they are settled.

  Args:
    arrays: the scores.
    bounds: at the start.
    spread: values of the searches -> for each array, values of its layers.
    merge: for each array, counts of its layers -> counts of the searches.
    sample: gives sorted keys of each search.
  """
  shape = jax.eval_shape(sample)
  sample_QM = lax.cond(_settled(bounds).all(), lambda: jnp.zeros(shape.shape, shape.dtype), sample)

  def count(candidates_QJ: Array) -> Array:
    return merge([count_above(x, t_NJ) for x, t_NJ in zip(arrays, spread(candidates_QJ))])

  def few(b: _Bounds) -> Array:
    return (_settled(b) | (b.above_low - b.above_high <= _FEW)).all()

  def inspect(before: _Bounds) -> tuple[_Bounds, Array]:
    rows = [extremes(x, low, high) for x, low, high in zip(arrays, spread(before.low), spread(before.high))]
    known = merge([((r.count_NR > 2) & (r.most_NR != r.least_NR)).sum(1, dtype=jnp.int32) for r in rows]) == 0

    def count_rows(candidates_QJ: Array) -> Array:
      parts = [count_in_rows(r, t_NJ) for r, t_NJ in zip(rows, spread(candidates_QJ))]
      return before.above_high[:, None] + merge(parts)

    inner, _ = _search(count_rows, before, sample_QM, jnp.int32(0), lambda b, made: (_settled(b) | ~known).all())
    return _chosen(known, inner, before), jnp.int32(1)

  def one_round(carry: tuple[_Bounds, Array, Array]) -> tuple[_Bounds, Array, Array]:
    bounds, number, noted = carry
    # At least one pass: where few elements were left but three in one row, noting them again would not help.
    bounds, number = _search(count, bounds, sample_QM, number, lambda b, made: ((made > 0) & few(b)) | (made >= _ROUND))
    bounds, one = lax.cond(_settled(bounds).all(), lambda b: (b, jnp.int32(0)), inspect, bounds)
    return bounds, number, noted + one

  start = (bounds, jnp.int32(0), jnp.int32(0))
  bounds, number, noted = lax.while_loop(lambda carry: ~_settled(carry[0]).all(), one_round, start)
  return bounds, number + noted


def _settled(b: _Bounds) -> Bool[Array, ' Q']:
  """Nothing lies between the bounds, or the elements to keep are exactly those above one of them."""
  return (b.high <= b.low) | (_width(b) == 1)


def _chosen(pick: Array, a: _Bounds, b: _Bounds) -> _Bounds:
  return _Bounds(*(jnp.where(pick, x, y) for x, y in zip(a, b)))


def _width(b: _Bounds) -> Array:
  return b.high.astype(jnp.uint32) - b.low.astype(jnp.uint32)


def _search(
  count: _Count, bounds: _Bounds, sample_QM: Array, number: Array, done: Callable[[_Bounds, Array], Array]
) -> tuple[_Bounds, Array]:
  """Narrows the bounds until done(bounds, passes made here); also the number of passes made so far."""
  first = number

  def step(carry: tuple[_Bounds, Array]) -> tuple[_Bounds, Array]:
    b, number = carry
    t_QJ = _candidates(b, sample_QM, number)
    above_QJ, keep_Q1 = count(t_QJ), b.keep[:, None]
    enough_QJ, not_more_QJ = above_QJ >= keep_Q1, above_QJ <= keep_Q1
    closer = _Bounds(
      jnp.maximum(b.low, jnp.where(enough_QJ, t_QJ, b.low[:, None]).max(1)),
      jnp.minimum(b.high, jnp.where(not_more_QJ, t_QJ, b.high[:, None]).min(1)),
      jnp.minimum(b.above_low, jnp.where(enough_QJ, above_QJ, b.above_low[:, None]).min(1)),
      jnp.maximum(b.above_high, jnp.where(not_more_QJ, above_QJ, b.above_high[:, None]).max(1)),
      b.keep,
    )
    return _chosen(_settled(b), b, closer), number + 1

  return lax.while_loop(lambda carry: ~done(carry[0], carry[1] - first), step, (bounds, number))


def _candidates(b: _Bounds, sample_QM: Array, number: Array) -> Int[Array, 'Q J']:
  """Ascending keys strictly between the bounds (settled searches get some key)."""
  inside_QM = (sample_QM > b.low[:, None]) & (sample_QM <= b.high[:, None])
  first, inside = (sample_QM <= b.low[:, None]).sum(1), inside_QM.sum(1)
  part = (b.keep - b.above_high) / jnp.maximum(b.above_low - b.above_high, 1)  # of what is inside, from above

  def around(total: Array) -> Array:
    """Places from above, as fractions of the inside, at which the wanted one of `total` elements is expected."""
    total = total.astype(jnp.float32)
    deviation = jnp.sqrt(part * (1 - part) / total + 0.25 / total**2)
    way_QJ = jnp.where(_RING_J > 0, (1 - part)[:, None], part[:, None])
    return part[:, None] + _SPREAD_J * deviation[:, None] + _RING_J * way_QJ

  sampled = jnp.maximum(inside, 1)
  place_QJ = first[:, None] + sampled[:, None] * (1 - around(sampled)) - 1
  place_QJ = jnp.clip(jnp.round(place_QJ).astype(jnp.int32), first[:, None], (first + inside - 1)[:, None])
  from_sample_QJ = jnp.take_along_axis(sample_QM, jnp.clip(place_QJ, 0, sample_QM.shape[1] - 1), axis=1)

  low, high = to_floats(b.low)[:, None], to_floats(b.high)[:, None]
  finite_Q1 = (jnp.abs(b.low) < INFINITY)[:, None] & (jnp.abs(b.high) < INFINITY)[:, None]
  low, high = jnp.where(finite_Q1, low, 0), jnp.where(finite_Q1, high, 0)
  weight_QJ = jnp.clip(around(jnp.maximum(b.above_low - b.above_high, 1)), 0, 1)
  between_QJ = to_keys(low * weight_QJ + high * (1 - weight_QJ))

  width_Q1, low_Q1, high_Q1 = _width(b)[:, None], b.low.astype(jnp.uint32)[:, None], b.high.astype(jnp.uint32)[:, None]
  j = np.arange(1, 4, dtype=np.uint32)[None]
  even_QJ = (low_Q1 + width_Q1 // 4 * j + width_Q1 % 4 * j // 4).astype(jnp.int32)
  out_QJ = jnp.minimum(_OUTWARD_J, width_Q1)
  tail_QJ = jnp.where((b.high == INFINITY)[:, None], low_Q1 + out_QJ, high_Q1 - out_QJ[:, ::-1]).astype(jnp.int32)

  guess_QJ = jnp.where((inside >= _FEW_SAMPLES)[:, None], from_sample_QJ, jnp.where(finite_Q1, between_QJ, tail_QJ))
  safe_QJ = jnp.sort(jnp.concatenate([guess_QJ[:, 1:3], guess_QJ[:, 4:6], even_QJ], 1), axis=1)
  guess_QJ = jnp.where(number < _GUIDED, guess_QJ, safe_QJ)
  # Where candidates coincide, those just below show whether the value is shared by many elements.
  columns = [guess_QJ[:, -1]]
  for i in range(guess_QJ.shape[1] - 2, -1, -1):
    columns.append(jnp.minimum(guess_QJ[:, i], columns[-1] - 1))
  return jnp.clip(jnp.stack(columns[::-1], 1), (b.low + 1)[:, None], (b.high - 1)[:, None])


def _samples(arrays: Sequence[Array]) -> list[Int[Array, 'N M']]:
  """Keys of a grid of elements of each layer, about `_SAMPLE` of them."""
  found = []
  for x in arrays:
    if x.ndim > 2:
      # Whole rows first, one of `step` each: on a TPU steps along the last axis are dear. No row leaves its device.
      step = math.gcd(_ROW_STEP, x.shape[-2])
      while step > 1 and x[0].size < 2 * step * _SAMPLE:
        step //= 2
      x = x.reshape(*x.shape[:-2], -1, step, x.shape[-1])[..., 0, :]
      x = lax.optimization_barrier(x)
    stride = max(1, round(x[0].size / _SAMPLE))
    found.append(to_keys(x[..., ::stride]).reshape(x.shape[0], -1))
  return found


def sample_local(arrays: Sequence[Array]) -> Int[Array, 'Q M']:
  """Sorted samples of all layers, of one length: the ends of long ones are left out, short ones repeat elements."""
  samples = _samples(arrays)
  length = min(_SAMPLE, max(s.shape[1] for s in samples))
  samples = [s[:, :length] if s.shape[1] >= length else s[:, np.arange(length) * s.shape[1] // length] for s in samples]
  return jnp.sort(jnp.concatenate(samples), axis=1)


def _cut(x: Array, high: Array, need: Array, equal: Array) -> Cut:
  """The cut at key `high`, of whose `equal` elements `need` are kept."""
  size = x[0].size
  torn = (need > 0) & (need < equal)
  last = lax.cond(torn.any(), lambda: nth_equal(x, to_floats(high), need), lambda: jnp.zeros_like(need))
  everything = high == -INFINITY
  last = jnp.where(torn, last, jnp.where((need > 0) | everything, size - 1, -1)).astype(jnp.int32)
  return Cut(to_floats(high), last)
