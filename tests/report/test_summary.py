"""Figures over seeds, worked by hand."""

import math

import numpy as np
import pytest

from compactlm_jax.report.summary import lower_is_better, summarize


def test_figures_worked_by_hand():
  """2, 4, 4, 10: squares of the differences from the mean 5 add up to 36, so std = sqrt(12). Mutation: divide by n."""
  found = summarize([4, 10, 2, 4], 'accuracy')
  assert (found.n, found.median, found.mean, found.best, found.worst) == (4, 4, 5, 10, 2)
  assert found.std == pytest.approx(math.sqrt(12)) and found.stderr == pytest.approx(math.sqrt(3))
  assert summarize([1, 2], 'f1').median == 1.5


def test_one_run_has_no_spread():
  """Mutation: a standard deviation of 0."""
  found = summarize([0.5], 'accuracy')
  assert (found.n, found.median, found.mean, found.std, found.stderr) == (1, 0.5, 0.5, None, None)


def test_low_losses_are_the_best():
  """Mutation: take the highest always."""
  found = summarize([3, 1, 2], 'eval_loss')
  assert (found.best, found.worst) == (1, 3)
  assert all(
    map(lower_is_better, ('loss', 'generator_loss', 'word_perplexity', 'relation_qk', 'mismatched_loss', 'mse'))
  )
  assert not any(map(lower_is_better, ('accuracy', 'f1', 'mismatched_accuracy', 'exact', 'spearman', 'matthews')))


def test_a_score_that_is_not_finite_is_not_hidden():
  """Mutation: use the functions that skip NaN."""
  found = summarize([0.5, math.nan], 'accuracy')
  assert all(np.isnan(x) for x in (found.median, found.mean, found.std, found.best, found.worst))
