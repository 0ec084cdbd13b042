"""Rows by index: of a prepared dataset, proved against its manifest and checked when read, or of arrays in memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from compactlm_jax.data.local_copy import local_copy
from compactlm_jax.data.manifest import Manifest, read_manifest, verify_files
from compactlm_jax.data.records import Reader, Record
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.storage import is_remote


@dataclasses.dataclass(frozen=True)
class RowSource:
  """Rows of equal length, by index.

  A row is a dict: input_ids int32 [T], token_type_ids int32 [T], length int32 (real tokens), and label where there is
  one (int32 class index or float32 score).

  Attributes:
    fetch: indices int64 [n], each 0 <= index < size -> their rows, a dict of arrays with a leading axis n.
    size: number of rows.
    vocab_size: ids are below it.
    seq_len: row length T.
    fingerprint: of the tokenizer that made the ids.
    name: what to call it in messages.
    classes: class names, if rows are labelled with classes.
    damaged: indices of rows that were found damaged and replaced so far (`bad_record_budget`).
    words_per_token: words per token after the first of each row (`Manifest.words_per_token`); 0 if it is unknown.
    lengths: real tokens of each row, int32 [size], where all rows are in memory; None for rows on disk.
  """

  fetch: Callable[[np.ndarray], Record]
  size: int
  vocab_size: int
  seq_len: int
  fingerprint: str
  name: str = ''
  classes: tuple[str, ...] = ()
  damaged: set[int] = dataclasses.field(default_factory=set, compare=False)
  words_per_token: float = 0.0
  lengths: np.ndarray | None = dataclasses.field(default=None, compare=False)

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: Any) -> Record:
    index = index.__index__()
    if not 0 <= index < self.size:
      raise IndexError(f'{self.name}: row {index} of {self.size}')
    return {name: values[0] for name, values in self.fetch(np.asarray([index])).items()}

  def part(self, start: int, stop: int) -> RowSource:
    """The rows start <= index < stop as a source of their own; how many words they hold is not known."""
    if not 0 <= start < stop <= self.size:
      raise ConfigError(f'{self.name}: rows {start} to {stop} do not lie within its {self.size} rows')
    lengths = None if self.lengths is None else self.lengths[start:stop]
    return dataclasses.replace(
      self, fetch=lambda indices: self.fetch(start + indices), size=stop - start, words_per_token=0.0, lengths=lengths
    )

  def reordered(self, order: np.ndarray) -> RowSource:
    """The same rows; row i of the result is row order[i] (int64 [size], a permutation)."""
    lengths = None if self.lengths is None else self.lengths[order]
    return dataclasses.replace(self, fetch=lambda indices: self.fetch(order[indices]), lengths=lengths)


def hold_out(source: RowSource, eval_rows: int) -> tuple[RowSource, RowSource]:
  """Splits a source into (training rows, its last `eval_rows` rows).

  Raises:
    ConfigError: too few rows.
  """
  if not 0 < eval_rows < len(source):
    raise ConfigError(
      f'config.data.eval_rows: {eval_rows} rows cannot be held out of the {len(source)} rows of {source.name}'
    )
  return source.part(0, len(source) - eval_rows), source.part(len(source) - eval_rows, len(source))


def array_source(
  rows: Record, *, vocab_size: int, fingerprint: str, name: str, classes: tuple[str, ...] = ()
) -> RowSource:
  """A source over arrays in memory, each with a leading row axis."""
  size, seq_len = rows['input_ids'].shape
  return RowSource(
    fetch=lambda indices: {key: value[indices] for key, value in rows.items()},
    size=size,
    vocab_size=vocab_size,
    seq_len=seq_len,
    fingerprint=fingerprint,
    name=name,
    classes=classes,
    lengths=rows['length'],
  )


def open_dataset(
  path: Any,
  split: str = 'train',
  expect_fingerprint: str | None = None,
  *,
  bad_record_budget: float = 0.0,
  verify: str = 'sizes',
) -> RowSource:
  """Opens a dataset written by `prepare`.

  Args:
    path: its folder; of one in a bucket the rows are copied to the disk first (`local_copy`).
    split: 'train', or 'validation' if rows were held out.
    expect_fingerprint: fingerprint of the model's tokenizer; None compares nothing.
    bad_record_budget: fraction of the rows that may be damaged; each is replaced by the next intact row. 0 stops at
      the first.
    verify: 'sizes' compares file sizes and record counts, 'full' also reads every file and compares SHA-256.

  Returns:
    The rows, each checked when it is read.

  Raises:
    DataError: the dataset is incomplete or damaged; so do reads of damaged rows.
    ConfigError: another tokenizer made the ids, or the split does not exist.
  """
  if verify not in ('sizes', 'full'):
    raise ConfigError(f"verify {verify!r} is unknown; use 'sizes' or 'full'")
  manifest = read_manifest(path)
  if split not in manifest.splits:
    raise ConfigError(f'{path} has no split {split!r}, only {", ".join(manifest.splits)}; prepare it with holdout_rows')
  if expect_fingerprint is not None and expect_fingerprint != manifest.fingerprint:
    raise ConfigError(
      f'{path} was made with another tokenizer (fingerprint {manifest.fingerprint[:12]}..., the model has '
      f'{expect_fingerprint[:12]}...); prepare the text again with the tokenizer of the model'
    )
  folder = local_copy(path, manifest) if is_remote(path) else epath.Path(path)
  verify_files(folder, manifest, digests=verify == 'full')
  limit = int(bad_record_budget * manifest.rows(split))
  reader = Reader(_builder(folder, split, manifest), split, manifest, folder, limit)
  return RowSource(
    fetch=reader.read,
    size=manifest.rows(split),
    vocab_size=manifest.vocab_size,
    seq_len=manifest.seq_len,
    fingerprint=manifest.fingerprint,
    name=f'{path} ({split})',
    damaged=reader.damaged,
    words_per_token=0.0 if limit else manifest.words_per_token(split),  # replaced rows have other words
  )


def _builder(path: Any, split: str, manifest: Manifest) -> Any:
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(os.fspath(path))
    lengths = [int(n) for n in builder.info.splits[split].shard_lengths]
  except Exception as e:  # TFDS has no common base of its errors
    raise DataError(f'{path}: cannot be opened as a TFDS dataset ({e}); prepare it again with overwrite') from e
  if lengths != [s.rows for s in manifest.splits[split]]:
    raise DataError(
      f'{epath.Path(path) / "dataset_info.json"}: {lengths} rows per shard, the manifest has others; copy it again'
    )
  return builder
