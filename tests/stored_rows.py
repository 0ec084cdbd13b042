"""Datasets of any content, with manifests that agree with it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from compactlm_jax.data import shards
from compactlm_jax.data.manifest import Manifest, Shard
from compactlm_jax.data.text import file_sha256

T, V = 8, 50


def example(i: int, **fields: Any) -> dict[str, Any]:
  """Row i holds i everywhere."""
  values = {'input_ids': np.full(T, i % V, np.int32), 'token_type_ids': np.zeros(T, np.uint8), 'length': np.int32(T)}
  return {**values, **fields}


def write(folder: Path, examples: list[dict[str, Any]], shard_rows: int = 10, stored_vocab: int = V) -> Path:
  """A dataset of these examples; ids are stored as those of a vocabulary of `stored_vocab`."""
  folder.mkdir()
  shards.write_dataset(folder, [('train', e) for e in examples], T, shard_rows, stored_vocab)
  files = sorted(folder.glob('*array_record*'))
  lengths = [min(shard_rows, len(examples) - i * shard_rows) for i in range(len(files))]
  train = tuple(Shard(f.name, n, f.stat().st_size, file_sha256(f)) for f, n in zip(files, lengths, strict=True))
  settings = {'seq_len': T, 'tokenizer': 'abc'}
  manifest = Manifest(settings=settings, vocab_size=V, counts={}, splits={'train': train}, versions={})
  (folder / 'manifest.json').write_text(manifest.dumps())
  return folder


def write_format_1(folder: Path, examples: list[dict[str, Any]], shard_rows: int = 10) -> Path:
  """The same as the first version wrote it: numbers of variable length, fields int32, uint8, int32."""
  features = tfds.features.FeaturesDict(
    {
      'input_ids': tfds.features.Tensor(shape=(T,), dtype=np.int32),
      'token_type_ids': tfds.features.Tensor(shape=(T,), dtype=np.uint8),
      'length': tfds.features.Scalar(np.int32),
    }
  )
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

  def encode(fields: dict[str, Any]) -> bytes:
    return serializer.get_tf_example(features.encode_example(fields)).SerializeToString(deterministic=True)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(shards, 'row_features', lambda *_: features)
    patch.setattr(shards, 'find_layout', lambda _: types.SimpleNamespace(encode=encode, template=b''))
    patch.setattr(shards, '_OPTIONS', 'group_size:1')
    write(folder, examples, shard_rows)
  manifest = folder / 'manifest.json'
  manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
  return folder
