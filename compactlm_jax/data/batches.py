"""Batches that are a pure function of (seed, step): in Grain's order of shuffling, defined over all hosts, read ahead
with Grain. Nothing has to be saved to resume.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from compactlm_jax.data.records import Record
from compactlm_jax.data.source import RowSource
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.types import Batch

_ENDLESS = 1 << 48
_WINDOW = 32  # batches whose rows are dealt out anew by length; what is left of padding falls little beyond that


@dataclasses.dataclass(frozen=True)
class Batches:
  """Training batches: shuffled anew each epoch, every row exactly once per epoch, the same for any number of hosts.

  Row number step * batch_size + i of the endless sequence epoch 0, epoch 1, ... is row i of batch `step`; a batch may
  hold the end of one epoch and the start of the next. Each host gets those rows of it that its `host_rows` name.

  Attributes:
    source: the rows.
    batch_size: rows of a batch over all hosts (B).
    seed: of the order.
    buckets: ascending row lengths; a batch is cut to the shortest that holds its longest row. () cuts nothing.
    grouped_steps: steps of the run, to let rows of similar length share batches: the rows of every 32 neighbouring
      batches are sorted by length, and these batches come in random order. 0 leaves the order alone.
    host_rows: which rows of each batch this host gets (see `parallel.host_rows`); None for all.
  """

  source: RowSource
  batch_size: int
  seed: int
  buckets: tuple[int, ...] = ()
  grouped_steps: int = 0
  host_rows: np.ndarray | None = None

  def __post_init__(self) -> None:
    _check_batch_size(self.batch_size)
    if not len(self.source):
      raise DataError(f'{self.source.name}: no rows')
    if self.buckets or self.grouped_steps:
      _lengths(self.source)

  @functools.cached_property
  def _seed(self) -> int:
    # The number of the epoch is added to it: hashed, so that neighbouring seeds do not share epochs.
    return int(np.random.SeedSequence(self.seed).generate_state(1)[0])

  def _places(self, first: int, count: int) -> np.ndarray:
    """Row indices at `count` places of the endless sequence, int64.

    Each epoch has the order of `grain.MapDataset.shuffle`, asked for single indices here because a pipeline of them
    takes three times as long.
    """
    from grain.experimental import index_shuffle

    size = len(self.source)
    # Grain's cipher is one bit too short for the last of 2**k + 1 rows (k even, from 16 on), and would return one row
    # twice and another never. There the last row keeps its place.
    last = size - 1
    fixed = last >= 1 << 16 and last.bit_count() == 1 and last.bit_length() % 2 == 1
    found = []
    for number in range(first, first + count):
      epoch, place = divmod(number, size)
      if not (fixed and place == last):
        place = index_shuffle(place, last - fixed, (self._seed + epoch) % 2**32, 4)
      found.append(place)
    return np.asarray(found, np.int64)

  @functools.cached_property
  def _window(self) -> Any:
    """Number of a window -> row indices [batches, B] of its batches, in their order; the latest few are kept."""

    def make(number: int) -> np.ndarray:
      first = number * _WINDOW
      batches = min(_WINDOW, max(1, self.grouped_steps - first))  # the run ends within its last window
      places = self._places(first * self.batch_size, batches * self.batch_size)
      by_length = places[np.argsort(_lengths(self.source)[places], kind='stable')]
      order = np.random.default_rng([self._seed, number]).permutation(batches)
      return by_length.reshape(batches, self.batch_size)[order]

    return functools.lru_cache(maxsize=4)(make)

  def _all_indices(self, step: int) -> np.ndarray:
    """Row indices of batch `step` over all hosts."""
    if not self.grouped_steps:
      return self._places(step * self.batch_size, self.batch_size)
    number, inside = divmod(step, _WINDOW)
    window = self._window(number)
    return window[inside % len(window)]

  def indices(self, step: int) -> np.ndarray:
    """This host's row indices of batch `step` >= 0, int64, in the order of the batch."""
    if step < 0:
      raise ValueError(f'step {step} must not be negative')
    every = self._all_indices(step)
    return every if self.host_rows is None else every[self.host_rows]

  def batch(self, step: int) -> Batch:
    """This host's rows of batch `step` >= 0 as NumPy arrays, a pure function of (seed, step)."""
    rows = self.source.fetch(self.indices(step))
    if not self.buckets:
      return _batch(rows)
    return _batch(rows, length=_bucket(self.source, self._all_indices(step), self.buckets))

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


def eval_batches(
  source: RowSource,
  batch_size: int,
  buckets: Sequence[int] = (),
  host_rows: np.ndarray | None = None,
) -> Iterator[Batch]:
  """Every row once, in order; the last batch is filled up with copies of the last row, which have weight 0.

  Args:
    source: the rows.
    batch_size: rows of a batch over all hosts.
    buckets: see `Batches`.
    host_rows: see `Batches`.

  Returns:
    Batches of equal shape but for `buckets`, with weights.
  """
  _check_batch_size(batch_size)
  last, mine = len(source) - 1, np.arange(batch_size) if host_rows is None else host_rows
  for first in range(0, len(source), batch_size):
    indices = first + mine
    length = _bucket(source, np.arange(first, min(first + batch_size, len(source))), buckets) if buckets else None
    rows = source.fetch(np.minimum(indices, last))
    yield _batch(rows, (indices <= last).astype(np.float32), length)


def by_length(source: RowSource) -> tuple[RowSource, np.ndarray]:
  """(the rows from short to long, the row of `source` that each is, int64 [size])."""
  order = np.argsort(_lengths(source), kind='stable')
  return source.reordered(order), order


def _check_batch_size(batch_size: int) -> None:
  if batch_size < 1:
    raise ConfigError(f'config.batch_size: {batch_size} must be at least 1')


def _lengths(source: RowSource) -> np.ndarray:
  if source.lengths is None:
    raise ConfigError(
      f'config.data.buckets and config.data.group_by_length: the lengths of the rows of {source.name} are not known '
      'beforehand (they are on disk); leave both out'
    )
  return source.lengths


def _bucket(source: RowSource, indices: np.ndarray, buckets: Sequence[int]) -> int:
  longest = int(_lengths(source)[indices].max())
  return min([size for size in buckets if longest <= size <= source.seq_len], default=source.seq_len)


def _batch(rows: Record, weights: np.ndarray | None = None, length: int | None = None) -> Batch:
  input_ids = rows['input_ids'][:, :length]
  tokens = np.arange(input_ids.shape[1], dtype=np.int32)
  fields: dict[str, Any] = {
    'input_ids': input_ids,
    'attention_mask': (tokens < rows['length'][:, None]).astype(np.int32),
    'token_type_ids': rows['token_type_ids'][:, :length],
    'labels': rows.get('label'),
    'weights': weights,
  }
  return Batch(**fields)
