"""Reads rows of a prepared dataset in bulk, and checks every one of them."""

from __future__ import annotations

import bisect
import itertools
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from compactlm_jax.data.manifest import Manifest, Shard
from compactlm_jax.data.shards import Layout, find_layout
from compactlm_jax.errors import DataError, first_line

Record = dict[str, np.ndarray]

# Rows are read one by one in random order: no read-ahead, and small reads, as a row of 128 tokens takes 300 bytes.
_READER_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'
_BUFFER_BYTES = 1024

log = logging.getLogger(__name__)


class _Files:
  """Bytes of records by index, for any number of threads."""

  def __init__(self, paths: Sequence[str], rows: Sequence[int]) -> None:
    self.ends = np.cumsum(rows)
    self.starts = self.ends - np.asarray(rows)
    self.paths = paths
    self.readers: list[Any] = [None] * len(paths)
    self.lock = threading.Lock()

  def __call__(self, indices: np.ndarray) -> list[bytes]:
    """The records; an empty one for each that cannot be read."""
    shards = np.searchsorted(self.ends, indices, 'right')
    places = list(zip(shards.tolist(), (indices - self.starts[shards]).tolist(), strict=True))
    readers = self.readers
    try:
      # A range of one record costs 2.5 us and leaves the interpreter lock alone while it reads. A list of records, as
      # in `__getitems__` of the data source, costs 1 ns per record of the *file*, 300 us for 262,144, and that for
      # each file (array_record/cpp/array_record_reader.cc:ParallelReadRecordsWithIndices).
      return [readers[shard].read(place, place + 1)[0] for shard, place in places]
    except Exception:  # a file that is not open yet, or damage: RuntimeError, IndexError, ...
      return [self._one(*place) for place in places]

  def _one(self, shard: int, place: int) -> bytes:
    from array_record.python import array_record_module

    try:
      with self.lock:
        if self.readers[shard] is None:
          self.readers[shard] = array_record_module.ArrayRecordReader(
            self.paths[shard], options=_READER_OPTIONS, file_reader_buffer_size=_BUFFER_BYTES
          )
      return self.readers[shard].read(place, place + 1)[0]
    except Exception:
      return b''


class Reader:
  """Rows by index; messages name the file and the record's index in it.

  A batch of intact records is one NumPy view. A record that does not look as expected, and every record of a dataset
  without a common layout, is parsed by TFDS, and checked field by field to say what is wrong with it.
  """

  def __init__(self, builder: Any, split: str, manifest: Manifest, folder: epath.Path, limit: int = 0) -> None:
    """Prepares reading; opens no file.

    Args:
      builder: TFDS builder of the dataset.
      split: name of the split.
      manifest: of the dataset.
      folder: of the dataset.
      limit: damaged rows that are replaced by the next intact row before the next one raises.

    Raises:
      DataError: dataset_info.json is damaged.
    """
    try:
      self.data = builder.as_data_source(split)
    except Exception as e:  # TFDS has no common base of its errors
      why = f'damaged ({first_line(e)}); copy the dataset again, or prepare it again with overwrite'
      raise DataError(f'{folder / "dataset_info.json"}: {why}') from e
    self.features = builder.info.features
    self.shards: Sequence[Shard] = manifest.splits[split]
    self.size = manifest.rows(split)
    self.manifest = manifest
    self.folder = folder
    self.limit = limit
    self.damaged: set[int] = set()
    layout = find_layout(self.features)
    shape = (manifest.seq_len,)
    expected = {'input_ids': shape, 'token_type_ids': shape, 'length': ()}
    fields: Any = layout.dtype.fields if layout else {}
    self.layout: Layout | None = layout if {k: v[0].shape for k, v in fields.items()} == expected else None
    if self.layout is None:
      log.warning('%s: an older format, several times slower to read; prepare it again with overwrite', folder)
    self.files = _Files([os.fspath(folder / s.file) for s in self.shards], [s.rows for s in self.shards])

  def read(self, indices: np.ndarray) -> Record:
    """The checked rows of these indices, in their order.

    Raises:
      DataError: a record is damaged, and its row cannot be replaced.
    """
    rows, good = self._bulk(indices, self.layout) if self.layout else self._empty(len(indices))
    for place in np.flatnonzero(~good).tolist():
      row = self._row_or_neighbour(int(indices[place])) if self.limit else self.row(int(indices[place]))
      for name, values in rows.items():
        values[place] = row[name]
    return rows

  def _empty(self, size: int) -> tuple[Record, np.ndarray]:
    tokens = (size, self.manifest.seq_len)
    shapes = {'input_ids': tokens, 'token_type_ids': tokens, 'length': (size,)}
    return {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}, np.zeros(size, bool)

  def _bulk(self, indices: np.ndarray, layout: Layout) -> tuple[Record, np.ndarray]:
    """(rows, which of them are intact)."""
    size = len(layout.template)
    records = self.files(indices)
    good = np.fromiter(map(len, records), np.int64, len(records)) == size
    if not good.all():
      records = [record if ok else layout.template for record, ok in zip(records, good, strict=True)]
    content = b''.join(records)
    fields = np.frombuffer(content, layout.dtype)
    raw, template = np.frombuffer(content, np.uint8).reshape(-1, size), np.frombuffer(layout.template, np.uint8)
    for part in layout.fixed:
      good &= (raw[:, part] == template[part]).all(1)
    rows = {name: fields[name].astype(np.int32) for name in ('input_ids', 'token_type_ids', 'length')}
    # Unsigned, so that one comparison finds negative ids too.
    good &= rows['input_ids'].view(np.uint32).max(1) < self.manifest.vocab_size
    good &= fields['token_type_ids'].max(1) <= 1
    good &= (rows['length'] >= 1) & (rows['length'] <= self.manifest.seq_len)
    return rows, good

  def _row_or_neighbour(self, index: int) -> Record:
    """The row, or the first intact one after it, so that the replacement is a function of the index alone."""
    for candidate in itertools.chain(range(index, self.size), range(index)):
      try:
        return self.row(candidate)
      except DataError as e:
        if candidate not in self.damaged:
          log.warning('row replaced by its neighbour: %s', e)
        self.damaged.add(candidate)
        if len(self.damaged) > self.limit:
          raise DataError(
            f'{len(self.damaged)} damaged rows are more than bad_record_budget allows ({self.limit}); the last: {e}'
          ) from e
    raise DataError(f'{self.folder}: every row is damaged')

  def row(self, index: int) -> Record:
    """The checked row, as TFDS reads it.

    Raises:
      DataError: the record is damaged.
    """
    try:
      # The data source takes far longer, but says why a record cannot be read.
      record = self.files(np.asarray([index]))[0] or self.data.data_source[index]
      # Names stand in a record as they are; TFDS does not say which field it misses.
      missing = [name for name in ('input_ids', 'token_type_ids', 'length') if name.encode() not in record]
      raw = {} if missing else self.features.deserialize_example_np(record)
    except Exception as e:  # ArrayRecord and protobuf raise RuntimeError, DecodeError, ValueError, ...
      raise self._error(index, f'cannot be read ({e})') from e
    if missing:
      raise self._error(index, f'field {missing[0]} is missing; the file is truncated or damaged')
    input_ids, types, length = raw['input_ids'], raw['token_type_ids'], int(raw['length'])
    shape = (self.manifest.seq_len,)
    for name, value, dtypes in (
      ('input_ids', input_ids, (np.uint16, np.int32)),
      ('token_type_ids', types, (np.uint8,)),
    ):
      if value.shape != shape or value.dtype not in dtypes:
        wanted = ' or '.join(f'{np.dtype(dtype)}{list(shape)}' for dtype in dtypes)
        raise self._error(index, f'{name} is {value.dtype}{list(value.shape)} instead of {wanted}')
    input_ids = input_ids.astype(np.int32)
    if input_ids.min() < 0 or input_ids.max() >= self.manifest.vocab_size:
      bad = input_ids[(input_ids < 0) | (input_ids >= self.manifest.vocab_size)][0]
      raise self._error(index, f'token id {bad} is outside the vocabulary of {self.manifest.vocab_size}')
    if types.max() > 1:
      raise self._error(index, f'token type {types.max()} is neither 0 nor 1')
    if not 1 <= length <= shape[0]:
      raise self._error(index, f'length {length} is outside 1 to {shape[0]}')
    return {'input_ids': input_ids, 'token_type_ids': types.astype(np.int32), 'length': np.asarray(length, np.int32)}

  def _error(self, index: int, what: str) -> DataError:
    ends = list(itertools.accumulate(s.rows for s in self.shards))
    shard = bisect.bisect_right(ends, index)
    inside = index - (ends[shard - 1] if shard else 0)
    return DataError(
      f'{self.folder / self.shards[shard].file}: record {inside} (row {index}): {what}; '
      'prepare the data again, or set data.bad_record_budget'
    )
