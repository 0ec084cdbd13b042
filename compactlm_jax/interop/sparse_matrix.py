"""One matrix with many zeros as a few short arrays, and back.

A matrix is stored row by row in the layout of transformers ([out, in]; further axes are flattened), as the smallest of

  dense    ''         every value;
  bitmask  'bitmask'  a bit for every element, first element in the highest bit, then the values that are not zero;
  columns  'columns'  the column of every value that is not zero (uint16), 'rows' says where each row begins;
  gaps     'gaps'     how many zeros stand between a value and the one before it in its row (uint8): a byte of 255 means
                      255 zeros without a value behind them, so that a gap of 255 is the bytes 255, 0 and one of 256 is
                      255, 1. 'rows' says at which byte each row begins.

Values are float32, bfloat16, or int8 with one float32 scale per row ('scales'): value = int8 * scale, scale = the row's
largest magnitude / 127. What rounds to zero is stored as a zero. A negative zero that is not stored densely comes back
as +0.0: a mask that is multiplied onto weights leaves them at half of what it removes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from compactlm_jax.errors import DataError, NumericsError

VALUES = ('float32', 'bfloat16', 'int8')
"""How values can be stored."""

_VALUE_DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'int8': np.int8}
_PARTS = {
  'dense': {''},
  'bitmask': {'bitmask', 'values', 'shape'},
  'columns': {'columns', 'rows', 'values', 'shape'},
  'gaps': {'gaps', 'rows', 'values', 'shape'},
}
"""Encoding -> its arrays, scales aside."""

_ESCAPE = 255
_MAX_COLUMNS = 1 << 16
_LARGEST = 127
_MAX_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(_LARGEST), np.float32(0))  # its 127-fold is finite


@dataclasses.dataclass(frozen=True)
class Packed:
  """A matrix as it is stored.

  Attributes:
    encoding: 'dense', 'bitmask', 'columns' or 'gaps'.
    parts: what is stored: part of the matrix -> array; '' is the matrix itself.
    nonzeros: values that are not zero once rounded.
  """

  encoding: str
  parts: Mapping[str, np.ndarray]
  nonzeros: int

  @property
  def bytes(self) -> int:
    """Bytes of the arrays, without their names in the file's header."""
    return sum(part.nbytes for part in self.parts.values())


def pack(name: str, matrix: np.ndarray, values: str) -> Packed:
  """The smallest form of a matrix; among equals the first of dense, bitmask, columns, gaps.

  Args:
    name: of the tensor, for messages.
    matrix: float32, two or more axes; rows are along the first.
    values: one of `VALUES`.

  Raises:
    NumericsError: a value that is too large for bfloat16.
  """
  rounded_RC, scales = _rounded(name, matrix.reshape(matrix.shape[0], math.prod(matrix.shape[1:])), values)
  kept_RC = rounded_RC != 0
  nonzeros = int(np.count_nonzero(kept_RC))
  encoding, index = _smallest_index(kept_RC, nonzeros, rounded_RC.itemsize, matrix.ndim)
  if encoding == 'dense':
    parts = {'': rounded_RC.reshape(matrix.shape)}
  else:
    parts = {**index, 'values': rounded_RC[kept_RC], 'shape': np.array(matrix.shape, np.int32)}
  return Packed(encoding, parts | ({} if scales is None else {'scales': scales}), nonzeros)


def unpack(name: str, parts: Mapping[str, np.ndarray], shape: tuple[int, ...], values: str) -> np.ndarray:
  """The matrix of stored arrays, which are not trusted.

  Args:
    name: of the tensor, for messages.
    parts: as in `Packed`, of any dtype and shape.
    shape: of the matrix: `declared_shape`, checked by the caller, who knows how large it may be.
    values: one of `VALUES`: how the file says that values are stored.

  Returns:
    float32, of this shape. Values may be not finite if the stored ones are.

  Raises:
    DataError: arrays that are missing, superfluous, of a wrong dtype or size, or that contradict each other; the
      message names the tensor.
  """
  _require_parts(name, parts, values)
  rows, columns = shape[0], math.prod(shape[1:])
  if '' in parts:
    _require(parts[''].shape == shape, name, f'has shape {parts[""].shape}, expected {shape}')
    flat = parts[''].astype(np.float32).reshape(-1)
  else:
    flat = np.zeros(rows * columns, np.float32)
    flat[_positions(name, parts, rows, columns)] = parts['values'].astype(np.float32)
  if values == 'int8':
    scales_R = parts['scales']
    _require(scales_R.shape == (rows,), name, f'scales of shape {scales_R.shape} for {rows} rows')
    _require(bool((np.isfinite(scales_R) & (scales_R >= 0)).all()), name, 'a scale is negative or not finite')
    with np.errstate(over='ignore'):  # what overflows is not finite, and refused as such with the other tensors
      flat.reshape(rows, columns)[:] *= scales_R[:, None]
  return flat.reshape(shape)


def declared_shape(name: str, parts: Mapping[str, np.ndarray]) -> tuple[int, ...]:
  """The shape that a stored matrix claims to have; it can be anything.

  Raises:
    DataError: it claims none.
  """
  if '' in parts:
    return parts[''].shape
  shape = parts.get('shape')
  if shape is None or shape.dtype != np.int32 or shape.ndim != 1:
    raise DataError(f'tensor {name}: has no shape (int32, one entry per axis); the file is damaged')
  return tuple(int(n) for n in shape)


def _rounded(name: str, matrix_RC: np.ndarray, values: str) -> tuple[np.ndarray, np.ndarray | None]:
  """The values as they are stored, and the scales of the rows (int8 alone)."""
  if values == 'float32':
    return matrix_RC, None
  if values == 'bfloat16':
    with np.errstate(over='ignore'):
      rounded_RC = matrix_RC.astype(ml_dtypes.bfloat16)
    if not np.isfinite(rounded_RC).all():
      raise NumericsError(f"tensor {name}: holds values that are too large for bfloat16; use values='float32'")
    return rounded_RC, None
  largest_R = np.abs(matrix_RC).max(axis=1, initial=0)
  scales_R = np.minimum(largest_R / np.float32(_LARGEST), _MAX_SCALE)
  scales_R[scales_R < np.finfo(np.float32).tiny] = 0  # a subnormal scale has too few bits; such a row is all zeros
  scaled_RC = matrix_RC / np.where(scales_R, scales_R, np.float32(np.inf))[:, None]
  return np.clip(np.rint(scaled_RC, out=scaled_RC), -_LARGEST, _LARGEST, out=scaled_RC).astype(np.int8), scales_R


def _smallest_index(kept_RC: np.ndarray, nonzeros: int, itemsize: int, axes: int) -> tuple[str, dict[str, np.ndarray]]:
  """The encoding of the fewest bytes, and its arrays that say where the values stand."""
  rows, columns = kept_RC.shape
  stored = nonzeros * itemsize + 4 * axes  # the values and the shape
  sizes = {'dense': kept_RC.size * itemsize, 'bitmask': -(-kept_RC.size // 8) + stored}
  if nonzeros + 4 * (rows + 1) + stored < min(sizes.values()):  # a byte per value is the least that lists can take
    row, column = np.divmod(np.flatnonzero(kept_RC), columns)
    first = np.searchsorted(row, np.arange(rows + 1))
    gap = np.diff(column, prepend=0) - 1
    starts = first[:-1][first[:-1] < first[1:]]
    gap[starts] = column[starts]
    ends = np.cumsum(gap // _ESCAPE + 1)
    total = int(ends[-1]) if nonzeros else 0
    if columns <= _MAX_COLUMNS:
      sizes['columns'] = 2 * nonzeros + 4 * (rows + 1) + stored
    sizes['gaps'] = total + 4 * (rows + 1) + stored
  best = min(sizes, key=sizes.__getitem__)
  if best == 'columns':
    return best, {'columns': column.astype(np.uint16), 'rows': first.astype(np.uint32)}
  if best == 'gaps':
    gaps = np.full(total, _ESCAPE, np.uint8)
    gaps[ends - 1] = gap % _ESCAPE
    return best, {'gaps': gaps, 'rows': np.concatenate([[0], ends])[first].astype(np.uint32)}
  return best, {'bitmask': np.packbits(kept_RC)} if best == 'bitmask' else {}


def _require_parts(name: str, parts: Mapping[str, np.ndarray], values: str) -> None:
  """The arrays of one encoding, no more, each with its dtype; all of one axis but for a dense matrix."""
  marks = [encoding for encoding in _PARTS if ('' if encoding == 'dense' else encoding) in parts]
  _require(bool(marks), name, 'neither dense values nor a bitmask, columns or gaps are there')
  _require(len(marks) == 1, name, f'stored twice, as {" and as ".join(marks)}')
  wanted, found = _PARTS[marks[0]] | ({'scales'} if values == 'int8' else set()), set(parts)
  _require(found <= wanted, name, f'unexpected {", ".join(sorted(found - wanted))} in {marks[0]} storage')
  _require(wanted <= found, name, f'{", ".join(sorted(wanted - found))} missing in {marks[0]} storage')
  dtypes = {
    '': _VALUE_DTYPES[values],
    'values': _VALUE_DTYPES[values],
    'scales': np.float32,
    'bitmask': np.uint8,
    'columns': np.uint16,
    'gaps': np.uint8,
    'rows': np.uint32,
    'shape': np.int32,
  }
  for part, array in parts.items():
    what = part or 'values'
    _require(array.dtype == dtypes[part], name, f'{what} are {array.dtype}, expected {np.dtype(dtypes[part])}')
    _require(array.ndim == 1 or not part, name, f'{what} of shape {array.shape}, expected one axis')


def _positions(name: str, parts: Mapping[str, np.ndarray], rows: int, columns: int) -> np.ndarray:
  """Where the stored values stand in the flattened matrix: ascending indices, or a bool for every element."""
  given = parts['values'].size
  if 'bitmask' in parts:
    bits, size = parts['bitmask'], rows * columns
    _require(bits.size == -(-size // 8), name, f'bitmask of {bits.size} bytes for {size} elements')
    _require(not size % 8 or not bits[-1] & (0xFF >> size % 8), name, 'bitmask has bits behind the last element')
    ones = int(np.bitwise_count(bits).sum())
    _require(ones == given, name, f'bitmask marks {ones} elements, but there are {given} values')
    return np.unpackbits(bits, count=size).view(np.bool_)
  lists = parts['columns'] if 'columns' in parts else parts['gaps']
  first = parts['rows'].astype(np.int64)
  _require(first.size == rows + 1, name, f'{first.size} row pointers for {rows} rows, expected {rows + 1}')
  _require(bool((first[1:] >= first[:-1]).all()), name, 'row pointers are not ascending')
  _require(
    first[0] == 0 and first[-1] == lists.size, name, f'row pointers do not span the {lists.size} entries of the rows'
  )
  begins = np.repeat(np.arange(rows) * columns, np.diff(first))  # of each entry's row
  if 'columns' in parts:
    _require(lists.size == given, name, f'{lists.size} columns, but {given} values')
    column = lists.astype(np.int64)
    _require(bool((column < columns).all()), name, f'a column is outside the {columns} that the matrix has')
    position = begins + column
    _require(bool((position[1:] > position[:-1]).all()), name, 'columns of a row are not strictly ascending')
    return position
  ends = lists != _ESCAPE
  _require(int(np.count_nonzero(ends)) == given, name, f'{np.count_nonzero(ends)} gaps, but {given} values')
  filled = first[1:][first[1:] > first[:-1]]
  _require(bool(ends[filled - 1].all()), name, 'gaps of a row end without a value')
  walked = np.concatenate([[0], np.cumsum(lists + ends.astype(np.int64))])
  column = walked[1:] - np.repeat(walked[first[:-1]], np.diff(first)) - 1
  _require(bool((column[ends] < columns).all()), name, f'a column is outside the {columns} that the matrix has')
  return (begins + column)[ends]


def _require(fine: bool, name: str, problem: str) -> None:
  if not fine:
    raise DataError(f'tensor {name}: {problem}; the file is damaged or was written by another program')
