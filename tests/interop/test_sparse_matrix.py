"""One matrix stored sparsely: round trips, the choice by size, rounding, and arrays that contradict each other."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compactlm_jax.errors import DataError, NumericsError
from compactlm_jax.interop.sparse_matrix import VALUES, declared_shape, pack, unpack

ENCODINGS = ('dense', 'bitmask', 'columns', 'gaps')
DENSITIES = {'dense': 1.0, 'bitmask': 0.5, 'columns': 0.002, 'gaps': 0.05}
"""At these a matrix of 6 rows and 3000 columns takes the encoding."""


def _random(seed, shape, density):
  rng = np.random.default_rng(seed)
  return (rng.standard_normal(shape) * (rng.random(shape) < density)).astype(np.float32)


def _of(encoding, values='float32', seed=0, shape=(6, 3000)):
  """(matrix, its arrays) in this encoding."""
  matrix = _random(seed, shape, DENSITIES[encoding])
  packed = pack('m', matrix, values)
  assert packed.encoding == encoding
  return matrix, dict(packed.parts)


def _positions(parts, rows, columns):
  """(row, column) of the stored values, read in plain loops as the module's docstring describes the format."""
  if 'bitmask' in parts:
    bits = [int(byte) >> (7 - i) & 1 for byte in parts['bitmask'] for i in range(8)]
    return [divmod(i, columns) for i, bit in enumerate(bits) if bit]
  out, first = [], parts['rows'].tolist()
  for row in range(rows):
    column = 0
    for entry in parts['columns' if 'columns' in parts else 'gaps'][first[row] : first[row + 1]].tolist():
      if 'columns' in parts:
        out.append((row, entry))
      elif entry == 255:
        column += 255
      else:
        out.append((row, column + entry))
        column += entry + 1
  return out


def _index_bytes(matrix):
  """Encoding -> bytes beside the values, counted in plain loops; dense has its zeros there."""
  rows, columns = matrix.shape
  at = [np.flatnonzero(row).tolist() for row in matrix]
  gaps = sum(1 + (here - before - 1) // 255 for row in at for before, here in zip([-1, *row], row))
  pointers, nonzeros = 4 * (rows + 1), sum(map(len, at))
  out = {'bitmask': math.ceil(rows * columns / 8), 'columns': 2 * nonzeros + pointers, 'gaps': gaps + pointers}
  return {e: b for e, b in out.items() if e != 'columns' or columns <= 65536}


@settings(max_examples=150, deadline=None)
@given(
  seed=st.integers(0, 1 << 32),
  rows=st.integers(0, 7),
  columns=st.integers(0, 1200),
  density=st.sampled_from([0, 0.0005, 0.003, 0.01, 0.06, 0.11, 0.125, 0.14, 0.5, 0.96, 0.98, 1]),
  emptied=st.sets(st.integers(0, 6)),
)
def test_a_matrix_comes_back_and_takes_the_fewest_bytes(seed, rows, columns, density, emptied):
  """Mutation: `//` 256 in place of 255 for escapes; `<` turned in the choice; a pointer too early."""
  matrix = _random(seed, (rows, columns), density)
  matrix[[row for row in emptied if row < rows]] = 0
  packed = pack('m', matrix, 'float32')
  np.testing.assert_array_equal(unpack('m', packed.parts, matrix.shape, 'float32'), matrix)
  assert packed.nonzeros == np.count_nonzero(matrix)
  stored = 4 * packed.nonzeros + 8
  sizes = {'dense': matrix.nbytes} | {e: b + stored for e, b in _index_bytes(matrix).items()}
  assert packed.bytes == sizes[packed.encoding] == min(sizes.values())
  if packed.encoding != 'dense':
    rebuilt = np.zeros_like(matrix)
    for (row, column), value in zip(_positions(packed.parts, rows, columns), packed.parts['values'], strict=True):
      rebuilt[row, column] = value
    np.testing.assert_array_equal(rebuilt, matrix)


@pytest.mark.parametrize('values', VALUES)
@pytest.mark.parametrize('encoding', ENCODINGS)
def test_every_encoding_with_every_kind_of_values(encoding, values):
  density = {'float32': 1, 'bfloat16': 1, 'int8': 0.6 if encoding == 'bitmask' else 1}[values] * DENSITIES[encoding]
  matrix = _random(3, (6, 3000), density)
  packed = pack('m', matrix, values)
  assert packed.encoding == encoding
  back = unpack('m', packed.parts, matrix.shape, values)
  assert back.dtype == np.float32 and not back[matrix == 0].any()
  expected = {'float32': matrix, 'bfloat16': matrix.astype(ml_dtypes.bfloat16).astype(np.float32)}.get(values)
  if expected is not None:
    np.testing.assert_array_equal(back, expected)
  assert np.abs(back - matrix).max() <= np.abs(matrix).max() / 254 * 1.0001


@pytest.mark.parametrize('gap', [0, 1, 254, 255, 256, 509, 510, 511, 765, 2000])
def test_gaps_around_the_escape(gap):
  """The bytes by hand. Mutation: escape above 255 only, so that a gap of 255 reads as an escape."""
  matrix = np.zeros((40, 2300), np.float32)
  matrix[:, :200] = np.arange(1, 201)  # so many neighbours that gaps are the smallest
  matrix[7, 200 + gap] = 5
  packed = pack('m', matrix, 'float32')
  assert packed.encoding == 'gaps'
  np.testing.assert_array_equal(unpack('m', packed.parts, matrix.shape, 'float32'), matrix)
  first = packed.parts['rows'].tolist()
  row = packed.parts['gaps'][first[7] : first[8]].tolist()
  assert row == [0] * 200 + [255] * (gap // 255) + [gap % 255]


def test_empty_full_and_thin_matrices():
  for shape in ((0, 5), (5, 0), (1, 1), (1, 9), (9, 1), (768, 1), (3, 4, 5), (2, 1, 70)):
    for matrix in (np.zeros(shape, np.float32), np.ones(shape, np.float32), _random(1, shape, 0.1)):
      for values in VALUES:
        packed = pack('m', matrix, values)
        assert declared_shape('m', packed.parts) == shape
        back = unpack('m', packed.parts, shape, values)
        assert back.shape == shape
        np.testing.assert_allclose(back, matrix, rtol=0.004, atol=np.abs(matrix).max(initial=0) / 250)
  packed = pack('m', np.zeros((768, 3072), np.float32), 'float32')
  assert (packed.encoding, packed.bytes) == ('columns', 4 * 769 + 8)


def test_rows_longer_than_uint16_fall_back():
  """Few values far apart: columns, as long as a column fits. Mutation: allow one column more."""
  for columns, encoding in ((65536, 'columns'), (65537, 'gaps')):
    matrix = np.zeros((2, columns), np.float32)
    matrix[:, [0, 40000, columns - 1]] = 1, 2, 3
    packed = pack('m', matrix, 'float32')
    assert packed.encoding == encoding
    np.testing.assert_array_equal(unpack('m', packed.parts, matrix.shape, 'float32'), matrix)


def test_negative_zeros_are_not_stored():
  """A mask times weights leaves many. Mutation: find values by their bits."""
  matrix = _random(0, (6, 3000), 1) * (np.random.default_rng(1).random((6, 3000)) < 0.05)
  assert np.signbit(matrix[matrix == 0]).any()
  packed = pack('m', matrix, 'float32')
  assert packed.encoding == 'gaps' and packed.parts['values'].all()
  back = unpack('m', packed.parts, matrix.shape, 'float32')
  np.testing.assert_array_equal(back, matrix)
  assert not np.signbit(back[back == 0]).any()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), density=st.sampled_from([0.02, 0.3, 1]), spread=st.floats(0, 30))
def test_int8_is_within_half_a_step_of_its_row(seed, density, spread):
  """Rows of very different magnitudes. Mutation: one scale for the matrix; truncate in place of rounding."""
  rng = np.random.default_rng(seed)
  matrix = _random(seed, (5, 400), density) * np.exp(spread * rng.uniform(-1, 1, (5, 1))).astype(np.float32)
  back = unpack('m', pack('m', matrix, 'int8').parts, matrix.shape, 'int8')
  step = np.abs(matrix).max(1) / 127
  assert (np.abs(back - matrix).max(1) <= step * 0.50002).all()
  assert not back[matrix == 0].any()


def test_int8_at_the_ends_of_float32(recwarn):
  """Mutation: scales of largest / 127 alone: the largest float32 comes back infinite."""
  matrix = np.zeros((4, 3), np.float32)
  matrix[0], matrix[1], matrix[3] = np.finfo(np.float32).max, 1e-37, (1e-36, -2e-36, 0)
  parts = pack('m', matrix, 'int8').parts
  back = unpack('m', parts, matrix.shape, 'int8')
  assert parts['scales'][1] == 0 != parts['scales'][3]  # subnormal scales have too few bits, and JAX reads them as 0
  np.testing.assert_allclose(back, matrix, rtol=1e-6, atol=1.5e-36)
  assert not back[1:3].any() and not recwarn.list


def test_what_bfloat16_cannot_hold_is_refused():
  with pytest.raises(NumericsError, match="tensor m: .* too large for bfloat16; use values='float32'"):
    pack('m', np.full((2, 2), np.finfo(np.float32).max), 'bfloat16')


def _changed(parts, **changes):
  """Arrays with some replaced (by a function of the old), added, or left out (None)."""
  out = dict(parts)
  for name, change in changes.items():
    out[name] = change(out[name]) if callable(change) else change
  return {name: array for name, array in out.items() if array is not None}


def _set(index, value):
  def change(array):
    array = array.copy()
    array[index] = value
    return array

  return change


def _swapped(array):
  """The first two columns of the first row that has two."""
  return np.concatenate([array[1::-1], array[2:]])


DAMAGES = [
  ('bitmask', dict(bitmask=_set(0, 255)), 'bitmask marks .* elements, but there are .* values'),
  ('bitmask', dict(bitmask=lambda a: a[:-1]), 'bitmask of 2249 bytes for 18000 elements'),
  ('bitmask', dict(values=lambda a: a[:-1]), 'bitmask marks'),
  ('bitmask', dict(values=lambda a: a.astype(np.float64)), 'values are float64, expected float32'),
  ('bitmask', dict(values=lambda a: a.reshape(1, -1)), r'values of shape \(1, .*expected one axis'),
  ('bitmask', dict(values=None), 'values missing in bitmask storage'),
  ('bitmask', dict(rows=np.zeros(7, np.uint32)), 'unexpected rows in bitmask storage'),
  ('bitmask', dict(gaps=np.zeros(7, np.uint8)), 'stored twice, as bitmask and as gaps'),
  ('bitmask', {'': np.zeros((6, 3000), np.float32)}, 'stored twice, as dense and as bitmask'),
  ('bitmask', dict(bitmask=None), 'neither dense values nor a bitmask'),
  ('bitmask', dict(scales=np.ones(6, np.float32)), 'unexpected scales'),
  ('columns', dict(rows=lambda a: a[:-1]), '6 row pointers for 6 rows, expected 7'),
  ('columns', dict(rows=_set(1, 4000)), 'row pointers are not ascending'),
  ('columns', dict(rows=_set(0, 1)), 'row pointers do not span'),
  ('columns', dict(rows=_set(-1, 4_000_000_000)), 'row pointers do not span'),
  ('columns', dict(rows=lambda a: a.astype(np.int32)), 'rows are int32, expected uint32'),
  ('columns', dict(rows=None), 'rows missing in columns storage'),
  ('columns', dict(columns=_set(2, 3000)), 'a column is outside the 3000'),
  ('columns', dict(columns=_swapped), 'columns of a row are not strictly ascending'),
  ('columns', dict(columns=lambda a: np.concatenate([a[:1], a[:1], a[2:]])), 'not strictly ascending'),
  ('columns', dict(values=lambda a: a[:-1]), 'columns, but .* values'),
  ('gaps', dict(gaps=_set(0, 255)), 'gaps, but .* values'),
  ('gaps', dict(values=lambda a: np.append(a, a[:1])), 'gaps, but .* values'),
  ('gaps', dict(gaps=lambda a: np.full_like(a, 254)), 'a column is outside the 3000'),
  ('gaps', dict(rows=_set(3, 0)), 'row pointers are not ascending'),
  ('dense', {'': lambda a: a[:, :-1]}, r'has shape \(6, 2999\), expected \(6, 3000\)'),
  ('dense', {'': lambda a: a.astype(np.float16)}, 'values are float16, expected float32'),
  ('dense', dict(shape=np.array([6, 3000], np.int32)), 'unexpected shape in dense storage'),
]  # fmt: skip


@pytest.mark.parametrize(('encoding', 'changes', 'message'), DAMAGES)
def test_arrays_that_contradict_each_other_are_refused(encoding, changes, message):
  """Mutation: each check of `unpack` left out in turn."""
  matrix, parts = _of(encoding)
  with pytest.raises(DataError, match=f'^tensor layer.weight: .*{message}'):
    unpack('layer.weight', _changed(parts, **changes), matrix.shape, 'float32')


def test_gaps_that_lead_nowhere_are_refused():
  parts = {
    'gaps': np.array([3, 255], np.uint8),
    'rows': np.array([0, 2], np.uint32),
    'values': np.ones(1, np.float32),
    'shape': np.array([1, 900], np.int32),
  }
  with pytest.raises(DataError, match='gaps of a row end without a value'):
    unpack('m', parts, (1, 900), 'float32')


def test_a_bit_behind_the_end_is_refused():
  parts = dict(pack('m', np.eye(3, dtype=np.float32), 'float32').parts)
  assert parts['bitmask'].size == 2
  parts['bitmask'] = parts['bitmask'] ^ np.array([128, 64], np.uint8)
  with pytest.raises(DataError, match='bitmask has bits behind the last element'):
    unpack('m', parts, (3, 3), 'float32')


@pytest.mark.parametrize(
  ('scales', 'message'),
  [
    (np.full(6, np.nan, np.float32), 'negative or not finite'),
    (np.full(6, np.inf, np.float32), 'negative or not finite'),
    (np.full(6, -1, np.float32), 'negative or not finite'),
    (np.ones(5, np.float32), r'scales of shape \(5,\) for 6 rows'),
    (np.ones(6, np.float64), 'scales are float64'),
    (None, 'scales missing'),
  ],
)
@pytest.mark.parametrize('encoding', ['dense', 'gaps'])
def test_scales_are_checked(encoding, scales, message):
  matrix, parts = _of(encoding, 'int8')
  with pytest.raises(DataError, match=message):
    unpack('m', _changed(parts, scales=scales), matrix.shape, 'int8')


@pytest.mark.parametrize('shape', [None, np.array([6, 3000]), np.array([[6, 3000]], np.int32)])
def test_a_matrix_without_a_shape_is_refused(shape):
  _, parts = _of('gaps')
  with pytest.raises(DataError, match='tensor m: has no shape'):
    declared_shape('m', _changed(parts, shape=shape))


@settings(max_examples=200, deadline=None)
@given(
  encoding=st.sampled_from(ENCODINGS[1:]),
  part=st.sampled_from(['bitmask', 'columns', 'gaps', 'rows', 'values', 'scales']),
  data=st.data(),
)
def test_damaged_bytes_are_refused_or_a_matrix(encoding, part, data):
  """Whatever a few flipped bytes make of a file, no other error and no other shape comes out."""
  matrix, parts = _of(encoding, data.draw(st.sampled_from(['float32', 'int8'])) if encoding != 'bitmask' else 'float32')
  values = 'int8' if 'scales' in parts else 'float32'
  if part not in parts:
    return
  raw = bytearray(parts[part].tobytes())
  for _ in range(data.draw(st.integers(1, 3))):
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
  parts[part] = np.frombuffer(bytes(raw), parts[part].dtype)
  try:
    back = unpack('m', parts, matrix.shape, values)
  except DataError as e:
    assert str(e).startswith('tensor m: ')
  else:
    assert back.shape == matrix.shape and back.dtype == np.float32
