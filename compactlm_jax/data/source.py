"""The training side of data: rows by index, and batches that are a pure function of (seed, step).

`open_dataset` proves a prepared dataset against its manifest and checks every record that it hands out. `Batches`
shuffles, repeats, batches and slices by host with Grain; nothing has to be saved to resume.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from compactlm_jax.data.manifest import Manifest, Shard, read_manifest, verify_files
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.types import Batch

Record = dict[str, np.ndarray]

_ENDLESS = 1 << 48

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RowSource:
  """Rows of equal length, by index.

  A row is a dict: input_ids int32 [T], token_type_ids int32 [T], length int32 (real tokens), and label where there is
  one (int32 class index or float32 score).

  Attributes:
    fetch: index -> row, for 0 <= index < size.
    size: number of rows.
    vocab_size: ids are below it.
    seq_len: row length T.
    fingerprint: of the tokenizer that made the ids.
    name: what to call it in messages.
    classes: class names, if rows are labelled with classes.
    damaged: indices of rows that were found damaged and replaced so far (`bad_record_budget`).
    words_per_token: words per token after the first of each row (`Manifest.words_per_token`); 0 if it is unknown.
  """

  fetch: Callable[[int], Record]
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
    return self.fetch(index)

  def part(self, start: int, stop: int) -> RowSource:
    """The rows start <= index < stop as a source of their own; how many words they hold is not known."""
    if not 0 <= start < stop <= self.size:
      raise ConfigError(f'{self.name}: rows {start} to {stop} do not lie within its {self.size} rows')
    return dataclasses.replace(self, fetch=lambda i: self.fetch(start + i), size=stop - start, words_per_token=0.0)


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
    fetch=lambda i: {key: value[i] for key, value in rows.items()},
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
  reader = _Reader(_records(path, split, manifest), manifest.splits[split], manifest, epath.Path(path))
  damaged: set[int] = set()
  limit = int(bad_record_budget * manifest.rows(split))
  return RowSource(
    fetch=functools.partial(_fetch_or_neighbour, reader, manifest.rows(split), limit, damaged)
    if limit
    else reader.read,
    size=manifest.rows(split),
    vocab_size=manifest.vocab_size,
    seq_len=manifest.seq_len,
    fingerprint=manifest.fingerprint,
    name=f'{path} ({split})',
    damaged=damaged,
    words_per_token=0.0 if limit else manifest.words_per_token(split),  # replaced rows have other words
  )


def _records(path: Any, split: str, manifest: Manifest) -> Any:
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(os.fspath(path))
    lengths = [int(n) for n in builder.info.splits[split].shard_lengths]
    data = builder.as_data_source(split)
  except Exception as e:  # TFDS has no common base of its errors
    raise DataError(f'{path}: cannot be opened as a TFDS dataset ({e}); prepare it again with overwrite') from e
  if lengths != [s.rows for s in manifest.splits[split]]:
    raise DataError(
      f'{epath.Path(path) / "dataset_info.json"}: {lengths} rows per shard, the manifest has others; copy it again'
    )
  return data


def _fetch_or_neighbour(reader: _Reader, size: int, limit: int, damaged: set[int], index: int) -> Record:
  """The row, or the first intact one after it, so that the replacement is a function of the index alone."""
  for candidate in itertools.chain(range(index, size), range(index)):
    try:
      return reader.read(candidate)
    except DataError as e:
      if candidate not in damaged:
        log.warning('row replaced by its neighbour: %s', e)
      damaged.add(candidate)
      if len(damaged) > limit:
        raise DataError(
          f'{len(damaged)} damaged rows are more than bad_record_budget allows ({limit}); the last: {e}'
        ) from e
  raise DataError(f'{reader.folder}: every row is damaged')


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Reads and checks records; messages name the file and the record's index in it."""

  data: Any
  shards: Sequence[Shard]
  manifest: Manifest
  folder: epath.Path

  def read(self, index: int) -> Record:
    """The checked row.

    Raises:
      DataError: the record is damaged or out of range.
    """
    try:
      raw = self.data[index]
    except Exception as e:  # ArrayRecord and protobuf raise RuntimeError, DecodeError, ValueError, ...
      raise self._error(index, f'cannot be read ({e})') from e
    missing = [k for k in ('input_ids', 'token_type_ids', 'length') if raw.get(k) is None]
    if missing:
      raise self._error(index, f'field {missing[0]} is missing; the file is truncated or damaged')
    input_ids, types, length = raw['input_ids'], raw['token_type_ids'], raw['length']
    shape = (self.manifest.seq_len,)
    for name, value, dtype in (('input_ids', input_ids, np.int32), ('token_type_ids', types, np.uint8)):
      if value.shape != shape or value.dtype != dtype:
        raise self._error(
          index, f'{name} is {value.dtype}{list(value.shape)} instead of {np.dtype(dtype)}{list(shape)}'
        )
    if input_ids.min() < 0 or input_ids.max() >= self.manifest.vocab_size:
      bad = input_ids[(input_ids < 0) | (input_ids >= self.manifest.vocab_size)][0]
      raise self._error(index, f'token id {bad} is outside the vocabulary of {self.manifest.vocab_size}')
    if types.max() > 1:
      raise self._error(index, f'token type {types.max()} is neither 0 nor 1')
    if not 1 <= length <= shape[0]:
      raise self._error(index, f'length {length} is outside 1 to {shape[0]}')
    return {'input_ids': input_ids, 'token_type_ids': types.astype(np.int32), 'length': np.int32(length)}

  def _error(self, index: int, what: str) -> DataError:
    ends = list(itertools.accumulate(s.rows for s in self.shards))
    shard = bisect.bisect_right(ends, index)
    inside = index - (ends[shard - 1] if shard else 0)
    return DataError(
      f'{self.folder / self.shards[shard].file}: record {inside} (row {index}): {what}; '
      'prepare the data again, or set data.bad_record_budget'
    )


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
  def _dataset(self) -> Any:
    import grain

    # Grain adds the number of the epoch to the seed: hashed, so that neighbouring seeds do not share epochs.
    seed = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
    # An endless repeat overflows in Grain for one row per host; this one is long enough and stays exact as a float.
    rows = grain.MapDataset.source(self.source).shuffle(seed).repeat(-(-_ENDLESS // len(self.source)))
    per_host = rows.batch(self.batch_size // self.process_count, batch_fn=_stack)
    return per_host[self.process_index :: self.process_count]

  def batch(self, step: int) -> Batch:
    """This host's rows of batch `step` >= 0 as NumPy arrays, a pure function of (seed, step)."""
    if step < 0:
      raise ValueError(f'step {step} must not be negative')
    return self._dataset[step]

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
    ahead = self._dataset[start_step:].to_iter_dataset(options)
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
    indices = range(start, start + share)
    weights = np.asarray([i < len(source) for i in indices], np.float32)
    yield _stack([source[min(i, len(source) - 1)] for i in indices], weights)


def _stack(rows: Sequence[Record], weights: np.ndarray | None = None) -> Batch:
  input_ids = np.stack([r['input_ids'] for r in rows])
  lengths = np.asarray([r['length'] for r in rows])
  fields: dict[str, Any] = {
    'input_ids': input_ids,
    'attention_mask': (np.arange(input_ids.shape[1]) < lengths[:, None]).astype(np.int32),
    'token_type_ids': np.stack([r['token_type_ids'] for r in rows]),
    'labels': np.stack([r['label'] for r in rows]) if 'label' in rows[0] else None,
    'weights': weights,
  }
  return Batch(**fields)
