"""The training side of data: rows by index, and batches that are a pure function of (seed, step).

`open_dataset` proves a prepared dataset against its manifest and checks every record that it hands out. `Batches` is
in Grain's order of shuffling, defined over all hosts, and reads ahead with Grain; nothing has to be saved to resume.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from compactlm_jax.data.manifest import Manifest, read_manifest, verify_files
from compactlm_jax.data.records import Reader, Record
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.types import Batch

_ENDLESS = 1 << 48


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
    return dataclasses.replace(
      self, fetch=lambda indices: self.fetch(start + indices), size=stop - start, words_per_token=0.0
    )


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
    path: its folder.
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
  verify_files(path, manifest, digests=verify == 'full')
  limit = int(bad_record_budget * manifest.rows(split))
  reader = Reader(_builder(path, split, manifest), split, manifest, epath.Path(path), limit)
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


@dataclasses.dataclass(frozen=True)
class Batches:
  """Training batches: shuffled anew each epoch, every row exactly once per epoch, the same for any number of hosts.

  Row number step * batch_size + i of the endless sequence epoch 0, epoch 1, ... is row i of batch `step`; a batch may
  hold the end of one epoch and the start of the next. Host p of P gets rows [p * B / P, (p + 1) * B / P) of the batch.

  Attributes:
    source: the rows.
    batch_size: rows of a batch over all hosts (B).
    seed: of the order.
    process_index: this host (p).
    process_count: hosts (P).
  """

  source: RowSource
  batch_size: int
  seed: int
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self) -> None:
    if self.batch_size < 1 or self.batch_size % self.process_count:
      raise ConfigError(
        f'config.batch_size: {self.batch_size} must be a positive multiple of the {self.process_count} hosts'
      )
    if not 0 <= self.process_index < self.process_count:
      raise ConfigError(f'process_index {self.process_index} is outside 0 to {self.process_count - 1}')
    if not len(self.source):
      raise DataError(f'{self.source.name}: no rows')

  @functools.cached_property
  def _seed(self) -> int:
    # The number of the epoch is added to it: hashed, so that neighbouring seeds do not share epochs.
    return int(np.random.SeedSequence(self.seed).generate_state(1)[0])

  def indices(self, step: int) -> np.ndarray:
    """This host's row indices of batch `step` >= 0, int64, in the order of the batch.

    Each epoch has the order of `grain.MapDataset.shuffle`, asked for single indices here because a pipeline of them
    takes three times as long.
    """
    from grain.experimental import index_shuffle

    if step < 0:
      raise ValueError(f'step {step} must not be negative')
    size, share = len(self.source), self.batch_size // self.process_count
    first = step * self.batch_size + self.process_index * share
    # Grain's cipher is one bit too short for the last of 2**k + 1 rows (k even, from 16 on), and would return one row
    # twice and another never. There the last row keeps its place.
    last = size - 1
    fixed = last >= 1 << 16 and last.bit_count() == 1 and last.bit_length() % 2 == 1
    found = []
    for number in range(first, first + share):
      epoch, place = divmod(number, size)
      if not (fixed and place == last):
        place = index_shuffle(place, last - fixed, (self._seed + epoch) % 2**32, 4)
      found.append(place)
    return np.asarray(found, np.int64)

  def batch(self, step: int) -> Batch:
    """This host's rows of batch `step` >= 0 as NumPy arrays, a pure function of (seed, step)."""
    return _batch(self.source.fetch(self.indices(step)))

  def prefetch(self, start_step: int = 0, *, threads: int = 2, buffer: int = 16) -> Iterator[tuple[int, Batch]]:
    """Endless (step, batch) pairs from `start_step` on, read ahead by threads.

    Args:
      start_step: first step.
      threads: reading threads.
      buffer: batches read ahead.

    Returns:
      The pairs; their batches equal `batch(step)`.
    """
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(buffer, threads))
    steps = grain.MapDataset.range(start_step, start_step + _ENDLESS)
    ahead = steps.map(self.batch).to_iter_dataset(options)
    return zip(itertools.count(start_step), ahead, strict=False)


def eval_batches(source: RowSource, batch_size: int, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
  """Every row once, in order; the last batch is filled up with copies of the last row, which have weight 0.

  Args:
    source: the rows.
    batch_size: rows of a batch over all hosts.
    process_index: this host.
    process_count: hosts; each gets its rows of every batch.

  Returns:
    Batches of equal shape, with weights.
  """
  if batch_size < 1 or batch_size % process_count:
    raise ConfigError(f'config.batch_size: {batch_size} must be a positive multiple of the {process_count} hosts')
  share = batch_size // process_count
  for start in range(process_index * share, -(-len(source) // batch_size) * batch_size, batch_size):
    indices = np.arange(start, start + share)
    rows = source.fetch(np.minimum(indices, len(source) - 1))
    yield _batch(rows, (indices < len(source)).astype(np.float32))


def _batch(rows: Record, weights: np.ndarray | None = None) -> Batch:
  input_ids = rows['input_ids']
  tokens = np.arange(input_ids.shape[1], dtype=np.int32)
  fields: dict[str, Any] = {
    'input_ids': input_ids,
    'attention_mask': (tokens < rows['length'][:, None]).astype(np.int32),
    'token_type_ids': rows['token_type_ids'],
    'labels': rows.get('label'),
    'weights': weights,
  }
  return Batch(**fields)
