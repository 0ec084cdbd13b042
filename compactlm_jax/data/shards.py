"""Writes rows as a TFDS dataset of ArrayRecord shards, one after the other and with the same bytes every time.

`tfds.core.SequentialWriter` would do, but for two things: it serialises the fields of a tf.Example in the order of a
hash map with a random seed, so that two runs write different bytes; and it takes 60 us for a row. All fields are raw
bytes of fixed size here, so all records have the same layout, and a batch of them is one NumPy view (`Layout`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from etils import epath

from compactlm_jax.data.manifest import Shard
from compactlm_jax.data.text import file_sha256
from compactlm_jax.storage import whole_file

NAME = 'compactlm_rows'
# Measured for rows of 128: snappy reads as fast as no compression (2.5 us for a row), zstd takes twice as long; files
# are 10 % larger than with zstd and a quarter smaller than without.
_OPTIONS = 'group_size:1,snappy'
_TEMPLATE = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}'

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the fields lie in a record.

  Attributes:
    dtype: of a record: the fields at their offsets; its item size is the length of a record.
    template: a record whose fields are zero.
    fixed: the parts of a record that are the same in all of them.
  """

  dtype: np.dtype
  template: bytes
  fixed: tuple[slice, ...]

  def encode(self, example: Example) -> bytes:
    """The record of an example.

    Raises:
      KeyError: a field is missing.
      ValueError: a field has another shape, or values that its type does not hold.
    """
    record = np.frombuffer(bytearray(self.template), self.dtype)
    for name in self.dtype.names or ():
      value = np.asarray(example[name])
      record[name] = value
      if value.shape != record[name].shape[1:] or (record[name][0] != value).any():
        raise ValueError(f'{name}: {value.dtype}{list(value.shape)} cannot be stored as {self.dtype[name]}')
    return record.tobytes()


def row_features(seq_len: int, vocab_size: int) -> Any:
  """The TFDS features of a row: ids are uint16 where the vocabulary allows it, else int32."""
  import tensorflow_datasets as tfds

  def raw(shape: tuple[int, ...], dtype: Any) -> Any:
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding='bytes')

  return tfds.features.FeaturesDict(
    {
      'input_ids': raw((seq_len,), np.uint16 if vocab_size <= 1 << 16 else np.int32),
      'token_type_ids': raw((seq_len,), np.uint8),
      'length': raw((), np.int32),
    }
  )


def find_layout(features: Any) -> Layout | None:
  """The layout of records of these features, found by serialising examples that differ in one field.

  Args:
    features: a TFDS FeaturesDict of tensors.

  Returns:
    None if records have no common layout (datasets that are older than `row_features`).
  """
  from tensorflow_datasets.core import example_serializer

  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

  def serialize(example: Example) -> bytes:
    return serializer.get_tf_example(features.encode_example(example)).SerializeToString(deterministic=True)

  kinds = {name: np.dtype((f.np_dtype, tuple(f.shape))) for name, f in features.items()}
  zeros = {name: np.zeros(kind.shape, kind.base) for name, kind in kinds.items()}
  template = serialize(zeros)
  offsets, free = {}, np.ones(len(template), bool)
  for name, kind in kinds.items():
    ones = np.frombuffer(b'\xff' * kind.itemsize, kind.base).reshape(kind.shape)
    record = serialize({**zeros, name: ones})
    start = next((i for i, (a, b) in enumerate(zip(template, record, strict=False)) if a != b), 0)
    stop = start + kind.itemsize
    if record != template[:start] + b'\xff' * kind.itemsize + template[stop:]:
      return None
    offsets[name], free[start:stop] = start, False
  dtype = np.dtype(
    {
      'names': list(kinds),
      'formats': list(kinds.values()),
      'offsets': [offsets[name] for name in kinds],
      'itemsize': len(template),
    }
  )
  edges = np.flatnonzero(np.diff(free, prepend=False, append=False)).tolist()
  return Layout(dtype, template, tuple(slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)))


def rows_layout(seq_len: int, vocab_size: int) -> Layout:
  """The layout of records of rows."""
  layout = find_layout(row_features(seq_len, vocab_size))
  assert layout is not None
  return layout


@contextlib.contextmanager
def shard_file(path: epath.Path, done: Callable[[Shard], None]) -> Iterator[Callable[[bytes], None]]:
  """One file of records, which appears whole or not at all; a bucket gets it from a local disk, where it is written.

  Args:
    path: of the file.
    done: told of the file, with its digest, before it appears.

  Yields:
    What adds a record.
  """
  from array_record.python import array_record_module

  with whole_file(path, shared=True) as local:
    writer = array_record_module.ArrayRecordWriter(os.fspath(local), _OPTIONS)
    rows = 0

    def add(record: bytes) -> None:
      nonlocal rows
      writer.write(record)
      rows += 1

    try:
      yield add
    finally:
      writer.close()
    done(Shard(path.name, rows, int(local.stat().length), file_sha256(local)))


class _Split:
  """The shards of one split, written in order."""

  def __init__(self, folder: epath.Path, name: str, shard_rows: int) -> None:
    self._folder, self._name, self._shard_rows = folder, name, shard_rows
    self._open = contextlib.ExitStack()
    self._add: Callable[[bytes], None] | None = None
    self._rows = 0
    self.shards: list[Shard] = []

  def add(self, record: bytes) -> None:
    if self._add is None:
      path = self._folder / shard_name(self._name, len(self.shards))
      self._add, self._rows = self._open.enter_context(shard_file(path, self.shards.append)), 0
    self._add(record)
    self._rows += 1
    if self._rows == self._shard_rows:
      self._open.close()
      self._add = None

  def __enter__(self) -> _Split:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self._open.__exit__(kind, error, trace)


def write_dataset(
  folder: epath.Path, examples: Iterable[tuple[str, Example]], seq_len: int, shard_rows: int, vocab_size: int
) -> dict[str, tuple[Shard, ...]]:
  """Writes shards, features.json and dataset_info.json, readable by `tfds.builder_from_directory(folder)`.

  Args:
    folder: existing empty folder.
    examples: (split, example) pairs; an example has input_ids int32 [T], token_type_ids uint8 [T], length int32.
    seq_len: row length T.
    shard_rows: rows per file.
    vocab_size: ids are below it.

  Returns:
    The shards of each split.

  Raises:
    ValueError, KeyError: an example does not have these fields.
    OSError: the disk is full or not writable.
    RuntimeError: the same, as ArrayRecord reports it.
  """
  layout = rows_layout(seq_len, vocab_size)
  splits: dict[str, _Split] = {}
  with contextlib.ExitStack() as stack:
    for name, example in examples:
      if name not in splits:
        splits[name] = stack.enter_context(_Split(folder, name, shard_rows))
      splits[name].add(layout.encode(example))
  found = {name: tuple(split.shards) for name, split in splits.items()}
  write_info(folder, found, seq_len, vocab_size)
  return found


def write_info(folder: epath.Path, splits: Mapping[str, Sequence[Shard]], seq_len: int, vocab_size: int) -> None:
  """Writes features.json and dataset_info.json for shards that are there.

  Args:
    folder: with the shards.
    splits: name -> shards in order.
    seq_len: row length.
    vocab_size: ids are below it.
  """
  import tensorflow_datasets as tfds

  identity = tfds.core.DatasetIdentity(
    name=NAME, version=tfds.core.Version('1.0.0'), data_dir=os.fspath(folder), module_name=__name__
  )
  features = row_features(seq_len, vocab_size)
  info = tfds.core.DatasetInfo(
    builder=identity, description='Rows of token ids.', features=features, disable_shuffling=True
  )
  info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
  size = len(rows_layout(seq_len, vocab_size).template)
  info.set_splits(
    tfds.core.SplitDict(
      [
        tfds.core.SplitInfo(
          name=name,
          shard_lengths=[shard.rows for shard in found],
          num_bytes=size * sum(shard.rows for shard in found),
          filename_template=_template(folder, name),
        )
        for name, found in splits.items()
      ]
    )
  )
  info.write_to_directory(os.fspath(folder))


def shard_name(split: str, index: int) -> str:
  """Name of a file of a split."""
  return f'{NAME}-{split}.array_record-{index:05d}'


def _template(folder: epath.Path, split: str) -> Any:
  import tensorflow_datasets as tfds

  return tfds.core.ShardedFileTemplate(
    dataset_name=NAME, data_dir=folder, split=split, filetype_suffix='array_record', template=_TEMPLATE
  )
