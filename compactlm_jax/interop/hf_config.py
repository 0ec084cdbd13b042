"""Scores of classes and of numbers, by scikit-learn and SciPy.

A prediction that is the same for every row has defined values without a warning: accuracy as counted, F1 of class 1 is
0 where nothing is class 1 or nothing is found, Matthews, Pearson and Spearman are 0 (they are 0 / 0 there).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np

from compactlm_jax.errors import ConfigError, DataError, NumericsError

CLASS_METRICS = ('accuracy', 'f1', 'macro_f1', 'matthews')
SCORE_METRICS = ('pearson', 'spearman', 'mse')


def metric_names(num_classes: int) -> tuple[str, ...]:
  """What a user's own table is scored by: f1 (of class 1) for two classes, macro_f1 (mean over classes) for more.

  Args:
    num_classes: classes; 0 for scores.

  Returns:
    Names for `class_scores`, or for `score_scores` where there are no classes.
  """
  if num_classes == 0:
    return SCORE_METRICS
  return ('accuracy', 'f1' if num_classes == 2 else 'macro_f1')


def class_scores(outputs_BC: np.ndarray, labels_B: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
  """Scores of predicted classes; the prediction of a row is its (first) largest output.

  Args:
    outputs_BC: [B, C] logits or probabilities.
    labels_B: [B] class indices.
    names: some of 'accuracy', 'f1' (of class 1, two classes only), 'macro_f1', 'matthews'.

  Returns:
    Name -> value between 0 and 1, 'matthews' between -1 and 1.

  Raises:
    ConfigError: an unknown name, or 'f1' of more than two classes.
    DataError: no rows, shapes that do not fit, or a label outside the classes.
    NumericsError: an output is not a number.
  """
  outputs_BC, labels_B = np.asarray(outputs_BC), np.asarray(labels_B)
  if outputs_BC.ndim != 2 or labels_B.shape != outputs_BC.shape[:1] or not labels_B.size:
    raise DataError(f'outputs {outputs_BC.shape} and labels {labels_B.shape} must be [rows, classes] and [rows]')
  _finite(outputs_BC)
  count = outputs_BC.shape[1]
  if not np.issubdtype(labels_B.dtype, np.integer) or labels_B.min() < 0 or labels_B.max() >= count:
    raise DataError(f'labels must be class indices from 0 to {count - 1}, found {np.unique(labels_B)[:8]}')
  if 'f1' in names and count != 2:
    raise ConfigError(f"'f1' is the score of class 1 of two; of {count} classes use 'macro_f1'")
  return _scores(_class_functions(count), names, labels_B, outputs_BC.argmax(-1))


def score_scores(outputs: np.ndarray, labels_B: np.ndarray, names: tuple[str, ...] = SCORE_METRICS) -> dict[str, float]:
  """Scores of predicted numbers.

  Args:
    outputs: [B] or [B, 1] predictions, in the unit of the labels.
    labels_B: [B] numbers.
    names: some of 'pearson', 'spearman' (ties have their mean rank), 'mse'.

  Returns:
    Name -> value; correlations between -1 and 1, the mean squared error in squared units.

  Raises:
    ConfigError: an unknown name.
    DataError: no rows, or shapes that do not fit.
    NumericsError: an output is not a number.
  """
  outputs, labels_B = np.asarray(outputs, np.float64), np.asarray(labels_B, np.float64)
  if outputs.shape not in (labels_B.shape, (*labels_B.shape, 1)) or labels_B.ndim != 1 or not labels_B.size:
    raise DataError(f'outputs {outputs.shape} and labels {labels_B.shape} must be [rows] or [rows, 1], and [rows]')
  _finite(outputs)
  return _scores(_score_functions(), names, labels_B, outputs.reshape(-1))


_Metric = Callable[[np.ndarray, np.ndarray], float]


def _class_functions(count: int) -> Mapping[str, _Metric]:
  from sklearn import metrics

  return {
    'accuracy': metrics.accuracy_score,
    'f1': lambda true, found: metrics.f1_score(true, found, zero_division=0),
    'macro_f1': lambda true, found: metrics.f1_score(
      true, found, labels=range(count), average='macro', zero_division=0
    ),
    # One class on either side makes it 0 / 0; scikit-learn returns 0 too, with a warning where both sides agree.
    'matthews': lambda true, found: 0.0 if _constant(true, found) else metrics.matthews_corrcoef(true, found),
  }


def _score_functions() -> Mapping[str, _Metric]:
  from scipy import stats
  from sklearn import metrics

  return {
    'pearson': lambda true, found: _correlation(stats.pearsonr, true, found),
    'spearman': lambda true, found: _correlation(stats.spearmanr, true, found),
    'mse': metrics.mean_squared_error,
  }


def _correlation(function: Callable[..., tuple[float, float]], true: np.ndarray, found: np.ndarray) -> float:
  if _constant(true, found):
    return 0.0
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', RuntimeWarning)  # SciPy's about inputs that vary by rounding errors only
    value = float(function(true, found)[0])
  return value if np.isfinite(value) else 0.0


def _constant(*arrays: np.ndarray) -> bool:
  return any(bool((a == a[0]).all()) for a in arrays)


def _scores(
  functions: Mapping[str, _Metric], names: tuple[str, ...], true: np.ndarray, found: np.ndarray
) -> dict[str, float]:
  for name in names:
    if name not in functions:
      raise ConfigError(f'metric {name!r} is unknown here; use some of {", ".join(functions)}')
  return {name: float(functions[name](true, found)) for name in names}


def _finite(outputs: np.ndarray) -> None:
  if bad := int((~np.isfinite(outputs)).reshape(len(outputs), -1).any(-1).sum()):
    raise NumericsError(f'the outputs of {bad} of {len(outputs)} rows are not finite; the model has diverged')
