"""Rows of similar length in a batch, and batches cut to the shortest length that holds them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compactlm_jax.data.batches import Batches, by_length, eval_batches
from compactlm_jax.data.source import array_source
from compactlm_jax.errors import ConfigError

T, BUCKETS = 16, (4, 8, 12)


def source(rows, seed=0):
  """Row i holds i in its real tokens; lengths 2 to 16."""
  length = np.random.default_rng(seed).integers(2, T + 1, rows).astype(np.int32)
  ids = np.repeat(np.arange(rows, dtype=np.int32)[:, None], T, 1)
  arrays = {'input_ids': ids, 'token_type_ids': np.zeros_like(ids), 'length': length}
  return array_source(arrays, vocab_size=rows, fingerprint='f', name='n')


def ids(batch):
  return batch.input_ids[:, 0].tolist()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_grouped_rows_come_once_per_epoch_on_any_number_of_hosts(rows, epochs, hosts):
  """Mutation: let the last window be as long as the others: its part of the run then leaves rows out."""
  steps = -(-rows * epochs // 4)
  whole = Batches(source(rows), 4, 7, BUCKETS, steps)
  parts = [dataclasses.replace(whole, host_rows=mine) for mine in np.split(np.arange(4), hosts)]
  seen = []
  for step in np.random.default_rng(1).permutation(steps):  # in any order
    shares = [part.batch(int(step)) for part in parts]
    assert len({share.input_ids.shape for share in shares}) == 1  # hosts agree on the length
    rows_of_step = [i for share in shares for i in ids(share)]
    assert rows_of_step == ids(whole.batch(int(step)))
    seen += rows_of_step
  counts = np.bincount(seen, minlength=rows)
  # The last batch runs into the next epoch.
  assert counts.min() >= epochs and counts.sum() == steps * 4


def test_grouping_pads_less_and_keeps_the_order_random():
  """Mutation: do not sort, or do not shuffle the batches of a window."""
  rows = source(2000)
  steps = 2000 // 8

  def padded(batches):
    tokens = [batches.batch(step).input_ids.size for step in range(steps)]
    return sum(tokens) / rows.lengths.sum() - 1, tokens

  plain, _ = padded(Batches(rows, 8, 0, buckets=BUCKETS))
  grouped, tokens = padded(Batches(rows, 8, 0, buckets=BUCKETS, grouped_steps=steps))
  assert grouped < 0.5 * plain
  assert abs(np.corrcoef(np.arange(32), tokens[:32])[0, 1]) < 0.6
  other = Batches(rows, 8, 1, buckets=BUCKETS, grouped_steps=steps)
  assert ids(other.batch(0)) != ids(Batches(rows, 8, 0, buckets=BUCKETS, grouped_steps=steps).batch(0))


@given(st.integers(1, 40), st.sampled_from([4, 8]), st.sampled_from([1, 2]))
def test_a_batch_is_cut_to_the_shortest_bucket_that_holds_it(rows, batch_size, hosts):
  """Mutation: take the longest row of this host instead of all hosts'."""
  rows = source(rows, seed=3)
  parts = [list(eval_batches(rows, batch_size, BUCKETS, mine)) for mine in np.split(np.arange(batch_size), hosts)]
  for number, group in enumerate(zip(*parts, strict=True)):
    longest = rows.lengths[number * batch_size : (number + 1) * batch_size].max()
    wanted = min([b for b in BUCKETS if b >= longest], default=T)
    assert {batch.input_ids.shape[1] for batch in group} == {wanted}
    assert all(batch.attention_mask.shape == batch.token_type_ids.shape == batch.input_ids.shape for batch in group)
    kept = sum(int((batch.attention_mask.sum(1) * batch.weights).sum()) for batch in group)
    assert kept == rows.lengths[number * batch_size : (number + 1) * batch_size].sum()


def test_short_rows_come_first_and_their_places_are_told():
  rows = source(50)
  ordered, order = by_length(rows)
  assert (np.diff(ordered.lengths) >= 0).all() and sorted(order) == list(range(50))
  assert ordered.fetch(np.arange(50))['input_ids'][:, 0].tolist() == order.tolist()


def test_rows_of_unknown_length_cannot_be_grouped():
  rows = dataclasses.replace(source(9), lengths=None)
  for fields in ({'buckets': BUCKETS}, {'grouped_steps': 3}):
    with pytest.raises(ConfigError, match='config.data.buckets and config.data.group_by_length: .* rows of n are not'):
      Batches(rows, 4, 0, **fields)
