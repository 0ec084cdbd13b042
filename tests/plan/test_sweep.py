"""The search for the largest batch that fits, on made-up memory."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compactlm_jax.plan.sweep import FINENESS, largest_batch


def search(limit, start, unit, memory):
  tried = []

  def needs(batch):
    tried.append(batch)
    return memory(batch) <= limit, memory(batch)

  return largest_batch(needs, start, unit, memory(0), limit, tries=12), tried


@settings(deadline=None, max_examples=100)
@given(st.integers(8, 4096), st.sampled_from([1, 8, 32]), st.floats(0.5, 50), st.floats(0, 800), st.floats(1.0, 1.2))
def test_bounds_are_right_and_close(start, unit, slope, fixed, bend):
  """Memory grows as a line or a little faster. Mutation: return the last batch tried."""
  (fits, fails), tried = search(1000.0, start, unit, lambda batch: fixed + slope * batch**bend)
  assert all(batch % unit == 0 for batch in tried) and len(tried) <= 12
  if fits:
    assert fixed + slope * fits**bend <= 1000
  assert fails is None or fixed + slope * fails**bend > 1000
  if fixed + slope * unit**bend > 1000:
    assert (fits, fails) == (0, unit)
  else:
    assert fits > 0 and fails is not None
    assert fails - fits <= max(unit, fits // FINENESS)


def test_a_line_is_found_in_few_tries():
  """Two compilations of a base model cost minutes each. Mutation: halve instead of following the line."""
  (fits, fails), tried = search(16.0, 256, 8, lambda batch: 2 + batch / 256)
  assert fits == 3584 and fails is not None and len(tried) <= 4


def test_a_batch_that_never_grows_stops():
  (fits, fails), tried = search(16.0, 8, 8, lambda batch: 1.0)
  assert fails is None and fits > 8 and len(tried) == 12


@pytest.mark.parametrize('start', [1, 9, 4096])
def test_starts_that_are_no_multiple(start):
  (fits, _), _ = search(16.0, start, 8, lambda batch: 2 + batch / 256)
  assert fits == pytest.approx(3584, rel=1 / FINENESS)
