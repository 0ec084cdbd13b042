"""What pruning left: remaining weights of each layer and matrix, and the values of those that survived."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from compactlm_jax.analysis.statistics import Model
from compactlm_jax.compress.density import densities
from compactlm_jax.compress.structure import maskable
from compactlm_jax.tree import named_leaves

BINS = 161
"""Of the histogram; odd, so that one of them has zero in its middle."""

_SHOWN = 0.9999
"""Share of the survivors that the bins cover; a handful of weights of released models is ten times as large."""


@dataclasses.dataclass(frozen=True)
class Sparsity:
  """Zeros and survivors in the maskable matrices of one encoder.

  Attributes:
    found: 'density', 'nonzero', 'weights', 'by_matrix' and 'by_layer' of `compress.density.densities`.
    edges: [BINS + 1] of the histogram, symmetric; of all models the same.
    counts: [BINS] of the weights that are not zero, int64.
    beyond: how many of them are larger in magnitude than the last edge.
  """

  found: Mapping[str, Any]
  edges: np.ndarray
  counts: np.ndarray
  beyond: int

  @property
  def matrices(self) -> tuple[str, ...]:
    """Kinds of matrices, in the order of `by_matrix_NM`."""
    return tuple(self.found['by_matrix'])

  @property
  def by_matrix_NM(self) -> np.ndarray:
    """Remaining fraction, a row for each layer, a column for each kind of matrix."""
    return np.array(list(self.found['by_matrix'].values())).T


def sparsities(models: Mapping[str, Model]) -> dict[str, Sparsity]:
  """By the same keys what is left of each model; {} if none has a zero in its maskable matrices.

  A dense model beside a pruned one is counted too: the histogram shows which of its weights are no more.

  Args:
    models: one or more.
  """
  found = {key: densities(model.params, model.config) for key, model in models.items()}
  if all(one['nonzero'] == one['weights'] for one in found.values()):
    return {}
  kernels = {key: _kernels(model) for key, model in models.items()}
  limit = max(map(_limit, kernels.values())) or 1.0
  edges = np.linspace(-limit, limit, BINS + 1)
  out = {}
  for key, own in kernels.items():
    counts = _counts(own, edges)
    out[key] = Sparsity(found[key], edges, counts, found[key]['nonzero'] - int(counts.sum()))
  return out


def _kernels(model: Model) -> list[np.ndarray]:
  leaves = named_leaves(model.params)
  return [np.asarray(leaves[name], np.float32) for name in maskable(model.config)]


def _limit(kernels: list[np.ndarray]) -> float:
  """A magnitude that all but one in 1 / (1 - _SHOWN) survivors stay below."""
  sizes = np.abs(np.concatenate([leaf[leaf != 0] for leaf in kernels] or [np.zeros(0, np.float32)]))
  if not sizes.size:
    return 0.0
  at = min(sizes.size - 1, int(np.ceil(_SHOWN * sizes.size)))
  return float(np.partition(sizes, at)[at])


def _counts(kernels: list[np.ndarray], edges: np.ndarray) -> np.ndarray:
  total = np.zeros(BINS, np.int64)
  for leaf in kernels:
    total += np.histogram(leaf[leaf != 0], edges)[0]
  return total
