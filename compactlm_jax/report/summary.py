"""One metric over several seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

_LOWER = ('loss', 'perplexity', 'relation', 'error', 'kl', 'mse')


@dataclasses.dataclass(frozen=True)
class Summary:
  """What several runs measured.

  Attributes:
    n: runs.
    median: middle value, or the mean of the two in the middle.
    mean: arithmetic mean.
    std: standard deviation of a sample (divides by n - 1); None for one run.
    stderr: standard error of the mean, std / sqrt(n); None for one run.
    best: the highest score, or the lowest loss.
    worst: its opposite.
  """

  n: int
  median: float
  mean: float
  std: float | None
  stderr: float | None
  best: float
  worst: float


def lower_is_better(metric: str) -> bool:
  """Whether a metric falls as a model improves: losses, errors, perplexities, divergences."""
  return any(part.startswith(_LOWER) for part in metric.split('_'))


def summarize(values: Sequence[float], metric: str) -> Summary:
  """The spread of one metric.

  Args:
    values: one for each run, at least one; a NaN makes every figure NaN.
    metric: its name, which says whether low values are good.
  """
  array = np.asarray(values, np.float64)
  std = float(np.std(array, ddof=1)) if array.size > 1 else None
  low, high = float(np.min(array)), float(np.max(array))
  best, worst = (low, high) if lower_is_better(metric) else (high, low)
  return Summary(
    n=array.size,
    median=float(np.median(array)),
    mean=float(np.mean(array)),
    std=std,
    stderr=None if std is None else std / array.size**0.5,
    best=best,
    worst=worst,
  )
