"""Writes rows as a TFDS dataset of ArrayRecord shards, one after the other and with the same bytes every time.

`tfds.core.SequentialWriter` would do, but for one thing: it serialises the fields of a tf.Example in the order of a
hash map with a random seed, so that two runs write different bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

NAME = 'compactlm_rows'
_TEMPLATE = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}'

Example = dict[str, Any]


class _Split:
  """The shards of one split, written in order."""

  def __init__(self, template: Any, shard_rows: int) -> None:
    self.template = template
    self.shard_rows = shard_rows
    self.lengths: list[int] = []
    self.num_bytes = 0
    self.writer: Any = None

  def add(self, record: bytes) -> None:
    from array_record.python import array_record_module

    if self.writer is None:
      path = self.template.sharded_filepath(shard_index=len(self.lengths), num_shards=None)
      self.writer = array_record_module.ArrayRecordWriter(os.fspath(path), 'group_size:1')
      self.lengths.append(0)
    self.writer.write(record)
    self.lengths[-1] += 1
    self.num_bytes += len(record)
    if self.lengths[-1] == self.shard_rows:
      self.close()

  def close(self) -> None:
    if self.writer is not None:
      self.writer.close()
      self.writer = None


def write_dataset(folder: epath.Path, examples: Iterable[tuple[str, Example]], seq_len: int, shard_rows: int) -> None:
  """Writes shards, features.json and dataset_info.json, readable by `tfds.builder_from_directory(folder)`.

  Args:
    folder: existing empty folder.
    examples: (split, example) pairs; an example has input_ids int32 [T], token_type_ids uint8 [T], length int32.
    seq_len: row length T.
    shard_rows: rows per file.

  Raises:
    OSError: the disk is full or not writable.
    RuntimeError: the same, as ArrayRecord reports it.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import example_serializer

  features = tfds.features.FeaturesDict(
    {
      'input_ids': tfds.features.Tensor(shape=(seq_len,), dtype=np.int32),
      'token_type_ids': tfds.features.Tensor(shape=(seq_len,), dtype=np.uint8),
      'length': tfds.features.Scalar(np.int32),
    }
  )
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  splits: dict[str, _Split] = {}
  try:
    for name, example in examples:
      if name not in splits:
        splits[name] = _Split(_template(folder, name), shard_rows)
      record = serializer.get_tf_example(features.encode_example(example))
      splits[name].add(record.SerializeToString(deterministic=True))
  finally:
    for split in splits.values():
      split.close()
  identity = tfds.core.DatasetIdentity(
    name=NAME, version=tfds.core.Version('1.0.0'), data_dir=os.fspath(folder), module_name=__name__
  )
  info = tfds.core.DatasetInfo(
    builder=identity, description='Rows of token ids.', features=features, disable_shuffling=True
  )
  info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
  info.set_splits(
    tfds.core.SplitDict(
      [
        tfds.core.SplitInfo(
          name=name, shard_lengths=split.lengths, num_bytes=split.num_bytes, filename_template=split.template
        )
        for name, split in splits.items()
      ]
    )
  )
  info.write_to_directory(os.fspath(folder))


def _template(folder: epath.Path, split: str) -> Any:
  import tensorflow_datasets as tfds

  return tfds.core.ShardedFileTemplate(
    dataset_name=NAME, data_dir=folder, split=split, filetype_suffix='array_record', template=_TEMPLATE
  )
