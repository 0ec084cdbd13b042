"""Damaged rows never reach a device: row 7 of the fault matrix (docs/reliability.md).

Single bits all over a file, batches against TFDS and manifests: data/test_records.py, data/test_source.py.
"""

import itertools

import numpy as np
import pytest
from damaging import BAD_ROW, IN_ONE_RECORD, RECORDS
from every_task import same_bits

from compactlm_jax.data.batches import Batches
from compactlm_jax.data.source import open_dataset
from compactlm_jax.errors import DataError


def batches(folder, budget=0.0, first=0, count=10):
  """Batches of five rows; ten are two epochs."""
  rows = Batches(open_dataset(folder, bad_record_budget=budget), 5, 0)
  return [batch for _, batch in itertools.islice(rows.prefetch(first), count)]


@pytest.mark.parametrize('name', RECORDS)
def test_damaged_rows_are_named(name, tmp_path):
  """File and index, exit 65. (Token types and the form of records: data/test_records.py.)

  Mutations: leave out a check of ids or lengths in `Reader`, or of existence or sizes in `verify_files`.
  """
  make, message = RECORDS[name]
  make(tmp_path / 'rows')
  with pytest.raises(DataError, match=message) as refused:
    batches(tmp_path / 'rows')
  assert refused.value.exit_code == 65


@pytest.mark.parametrize('name', IN_ONE_RECORD)
def test_a_budget_replaces_a_row_by_its_neighbour_however_often_the_run_stops(name, tmp_path):
  """Whether a run starts here or before, a batch is the same. Mutation: replace by the row that was read last."""
  RECORDS[name][0](tmp_path / 'rows')
  whole = batches(tmp_path / 'rows', 0.05)
  ids = np.concatenate([batch.input_ids[:, 0] for batch in whole])
  assert sorted(ids) == sorted([i for i in range(25) if i != BAD_ROW] * 2 + [BAD_ROW + 1] * 2)
  for stop in range(1, 10):
    resumed = batches(tmp_path / 'rows', 0.05, stop, 10 - stop)
    assert all(same_bits(a, b) for a, b in zip(resumed, whole[stop:], strict=True))
