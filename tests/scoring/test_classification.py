"""Scores against hand-worked cases, against formulas in NumPy, and their properties."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compactlm_jax.errors import ConfigError, DataError, NumericsError
from compactlm_jax.scoring.classification import class_scores, metric_names, score_scores

ALL = ('accuracy', 'f1', 'macro_f1', 'matthews')


def one_hot(predictions, classes=2):
  return np.eye(classes)[np.asarray(predictions)]


def test_two_classes_by_hand():
  """3 true positives, 1 false positive, 2 false negatives, 4 true negatives. Mutation: F1 of class 0."""
  labels = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
  found = class_scores(one_hot([1, 1, 1, 1, 0, 0, 0, 0, 0, 0]), labels, ALL)
  assert found['accuracy'] == pytest.approx(0.7)
  assert found['f1'] == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))
  assert found['macro_f1'] == pytest.approx((2 / 3 + 8 / 11) / 2)
  assert found['matthews'] == pytest.approx((3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6))
  assert all(type(value) is float for value in found.values())


def test_three_classes_by_hand():
  """Class 2 is never predicted: its F1 of 0 counts. Mutation: average over the classes that occur in predictions."""
  found = class_scores(one_hot([0, 0, 1, 1], 3), np.array([0, 1, 1, 2]), ('accuracy', 'macro_f1'))
  assert found == {'accuracy': 0.5, 'macro_f1': pytest.approx((2 / 3 + 0.5 + 0) / 3)}


def test_numbers_by_hand():
  """Ranks 1 2.5 2.5 4 against 1 2 3 4. Mutation: ranks in order of appearance."""
  found = score_scores(np.array([[1.0], [2.0], [2.0], [9.0]]), np.array([0.0, 1.0, 2.0, 3.0]))
  assert found['pearson'] == pytest.approx(12 / np.sqrt(5 * 41))
  assert found['spearman'] == pytest.approx(4.5 / np.sqrt(5 * 4.5))
  assert found['mse'] == pytest.approx((1 + 1 + 0 + 36) / 4)


@pytest.mark.parametrize('label, prediction', list(itertools.product([0, 1, None], [0, 1])))
def test_constant_predictions_have_values_and_no_warnings(label, prediction):
  """Warnings are errors here. Mutation: scikit-learn's Matthews without the guard."""
  labels = np.array([0, 1, 1, 0]) if label is None else np.full(4, label)
  found = class_scores(one_hot([prediction] * 4), labels, ALL)
  assert found['accuracy'] == np.mean(labels == prediction) and found['matthews'] == 0
  assert found['f1'] == pytest.approx(2 * labels.mean() / (1 + labels.mean()) if prediction else 0)


@pytest.mark.parametrize('outputs', [np.zeros(5), np.full((5, 1), 1e30), np.full(5, 0.1)])
def test_constant_numbers_do_not_correlate(outputs):
  """Mutation: NaN of SciPy."""
  found = score_scores(outputs, np.arange(5.0), ('pearson', 'spearman'))
  assert found == {'pearson': 0, 'spearman': 0}
  assert score_scores(np.arange(5.0), np.ones(5))['pearson'] == 0
  assert score_scores(np.ones(1), np.ones(1)) == {'pearson': 0, 'spearman': 0, 'mse': 0}


def test_numbers_that_differ_by_rounding_only_do_not_warn():
  found = score_scores(1 + 1e-15 * np.arange(5), np.arange(5.0))
  assert all(np.isfinite(value) for value in found.values())


labels_of = st.integers(2, 5).flatmap(
  lambda c: st.tuples(
    st.just(c), st.lists(st.tuples(st.integers(0, c - 1), st.integers(0, c - 1)), min_size=1, max_size=30)
  )
)


@given(labels_of)
def test_classes_equal_formulas(case):
  """Mutation: labels and predictions swapped in the confusion matrix (precision for recall) leaves F1 as it is; a
  missing transpose of the Matthews sums does not."""
  count, pairs = case
  true, found = np.array(pairs).T
  table = np.zeros((count, count))
  for t, p in pairs:
    table[t, p] += 1
  scores = class_scores(one_hot(found, count), true, tuple(n for n in ALL if n != 'f1' or count == 2))
  assert scores['accuracy'] == pytest.approx(np.trace(table) / len(pairs))
  total, right = table.sum(), np.trace(table)
  t, p = table.sum(1), table.sum(0)
  below = np.sqrt((total**2 - p @ p) * (total**2 - t @ t))
  assert scores['matthews'] == pytest.approx((right * total - t @ p) / below if below else 0, abs=1e-9)
  f1 = [2 * table[i, i] / (t[i] + p[i]) if t[i] + p[i] else 0 for i in range(count)]
  assert scores['macro_f1'] == pytest.approx(np.mean(f1))
  assert count != 2 or scores['f1'] == pytest.approx(f1[1])


numbers = hnp.arrays(np.float32, 12, elements=st.integers(-20, 20).map(lambda n: n / 4))


@given(numbers, numbers)
def test_numbers_equal_formulas(outputs, labels):
  """Mutation: Pearson of float32 sums (the tolerance fails), Spearman without mean ranks."""

  def ranks(x):
    return (x[:, None] > x[None]).sum(1) + ((x[:, None] == x[None]).sum(1) + 1) / 2

  def correlation(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x @ y) / np.sqrt((x @ x) * (y @ y)) if (x @ x) * (y @ y) > 1e-12 else 0

  a, b = outputs.astype(float), labels.astype(float)
  found = score_scores(outputs, labels)
  assert found['pearson'] == pytest.approx(correlation(a, b), abs=1e-7)
  assert found['spearman'] == pytest.approx(correlation(ranks(a), ranks(b)), abs=1e-7)
  assert found['mse'] == pytest.approx(np.mean((a - b) ** 2))


@given(st.randoms(use_true_random=False), labels_of)
def test_the_order_of_rows_does_not_matter(random, case):
  count, pairs = case
  names = ('accuracy', 'macro_f1', 'matthews')
  mixed = random.sample(pairs, len(pairs))
  scores = [
    class_scores(one_hot([p for _, p in rows], count), np.array([t for t, _ in rows]), names) for rows in (pairs, mixed)
  ]
  assert scores[0] == pytest.approx(scores[1])


def test_names_of_own_tables():
  assert metric_names(0) == ('pearson', 'spearman', 'mse')
  assert metric_names(2) == ('accuracy', 'f1') and metric_names(3) == ('accuracy', 'macro_f1')


@pytest.mark.parametrize(
  'call, error, message',
  [
    (lambda: class_scores(np.ones((2, 2)), np.array([0, 2]), ALL), DataError, 'from 0 to 1, found'),
    (lambda: class_scores(np.ones((2, 2)), np.array([0, -1]), ALL), DataError, 'from 0 to 1, found'),
    (lambda: class_scores(np.ones((2, 2)), np.array([0.0, 1.0]), ALL), DataError, 'from 0 to 1, found'),
    (lambda: class_scores(np.ones((2, 2)), np.array([0]), ALL), DataError, r'outputs \(2, 2\) and labels \(1,\)'),
    (lambda: class_scores(np.ones((0, 2)), np.zeros(0, int), ALL), DataError, r'outputs \(0, 2\)'),
    (lambda: class_scores(np.ones((1, 3)), np.array([0]), ('f1',)), ConfigError, "of 3 classes use 'macro_f1'"),
    (lambda: class_scores(np.ones((1, 2)), np.array([0]), ('mse',)), ConfigError, "metric 'mse' is unknown here"),
    (lambda: class_scores(np.array([[0, np.nan]]), np.array([0]), ALL), NumericsError, '1 of 1 rows are not finite'),
    (lambda: score_scores(np.ones((2, 2)), np.ones(2)), DataError, r'\[rows\] or \[rows, 1\]'),
    (lambda: score_scores(np.array([1, np.inf]), np.ones(2)), NumericsError, '1 of 2 rows'),
    (lambda: score_scores(np.ones(2), np.ones(2), ('f1',)), ConfigError, 'use some of pearson, spearman, mse'),
  ],
)
def test_bad_input(call, error, message):
  with pytest.raises(error, match=message):
    call()
