"""The schedule of densities and thresholds: published numbers, the original's loop, exact counts, messages."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compactlm_jax.compress.schedule import cubic_schedule, kept, least_density
from compactlm_jax.config import PruneConfig
from compactlm_jax.errors import ConfigError

PUBLISHED = PruneConfig(initial_warmup=1, final_warmup=2)


def original(step, total, warmup, first, last, initial_warmup, final_warmup):
  """One step as the original's scripts describe it (papers.md 4.2)."""
  if step <= initial_warmup * warmup:
    return first
  if step > total - final_warmup * warmup:
    return last
  done = (step - initial_warmup * warmup) / (total - (initial_warmup + final_warmup) * warmup)
  return last + (first - last) * (1 - done) ** 3


def test_published_numbers():
  """papers.md 4.2: T = 54,000, w = 5,400, 1 -> .15. Mutation: a square in place of the cube."""
  values = cubic_schedule(1.0, 0.15, 54_000, 5_400, PUBLISHED)
  assert len(values) == 54_001
  for step, expected in {5_400: 1.0, 10_000: 0.7259, 20_000: 0.3465, 30_000: 0.1862}.items():
    assert values[step] == pytest.approx(expected, abs=5e-5)
  assert np.all(values[:5_401] == 1.0) and np.all(values[43_201:] == 0.15) and values[5_401] < 1
  assert values[43_200] == pytest.approx(0.15, abs=1e-12)
  assert np.all(np.diff(values) <= 0)


def test_squads_script_is_one_step_ahead():
  """Its first step is number 1. Mutation: leave `first_step` out."""
  glue = cubic_schedule(1.0, 0.15, 1000, 100, PUBLISHED)
  squad = cubic_schedule(1.0, 0.15, 1000, 100, dataclasses.replace(PUBLISHED, first_step=1))
  np.testing.assert_array_equal(squad[:-1], glue[1:])


@settings(max_examples=60, deadline=None)
@given(
  total=st.integers(20, 400),
  warmup=st.integers(0, 40),
  multiples=st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 1.0, 2.5])),
  ends=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
  first_step=st.integers(0, 1),
)
def test_every_step_is_the_originals(total, warmup, multiples, ends, first_step):
  """Soft movement's thresholds rise by the same function. Mutation: both multiples exchanged."""
  config = PruneConfig(initial_warmup=multiples[0], final_warmup=multiples[1], first_step=first_step)
  if total <= sum(multiples) * warmup:
    with pytest.raises(ConfigError, match='warmup_steps'):
      cubic_schedule(*ends, total, warmup, config)
    return
  found = cubic_schedule(*ends, total, warmup, config)
  expected = [original(step + first_step, total, warmup, *ends, *multiples) for step in range(total)]
  np.testing.assert_allclose(found, [*expected, ends[1]], rtol=1e-12)


@settings(max_examples=200, deadline=None)
@given(density=st.floats(0.001, 1), size=st.integers(1, 3_000_000))
def test_counts_are_the_floor_of_the_product_in_double_precision(density, size):
  """As Python's int(v * n) in the original. Mutation: float32 (off by one at .15 * 589,824)."""
  assert kept(np.array([density]), size)[0] == int(density * size)


def test_counts_where_the_product_is_an_integer_up_to_rounding():
  """0.29 * 100 is 28.999..., and so the original keeps 28. Mutation: round."""
  assert kept(np.array([0.29, 0.15, 0.1]), 100).tolist() == [28, 15, 10]
  assert kept(np.array([0.15]), 589_824)[0] == int(Fraction(15, 100) * 589_824) == 88_473


def test_the_message_of_a_short_run_says_what_to_change():
  """Mutation: another bound; following the advice must be accepted."""
  with pytest.raises(ConfigError, match='at most 66') as caught:
    cubic_schedule(1.0, 0.15, 200, 100, PUBLISHED)
  assert 'train for more than 300 steps' in str(caught.value) and 'prune.final_warmup' in str(caught.value)
  cubic_schedule(1.0, 0.15, 200, 66, PUBLISHED)
  cubic_schedule(1.0, 0.15, 301, 100, PUBLISHED)


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 3_000_000))
def test_the_least_density_keeps_one(size):
  """And little less keeps none. Mutation: 1 / size as it is (int(1 / 49 * 49) is 0)."""
  found = least_density(size)
  assert kept(np.array([found]), size)[0] == 1 and float(f'{found:.2g}') == found
  assert kept(np.array([found / 1.12]), size)[0] == 0
