"""Evaluation: sums and counts over batches, so that a padded last batch and several hosts count each row once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from compactlm_jax.parallel import batch_sharding, replicated, to_global
from compactlm_jax.types import Batch, Params, Task


def make_evaluate(task: Task, mesh: Mesh) -> Any:
  """evaluate(params, frozen, batches) -> {metric: mean}; compiled once for all calls."""
  step = jax.jit(task.evaluate, in_shardings=(None, None, batch_sharding(mesh)), out_shardings=replicated(mesh))

  def evaluate(params: Params, frozen: Any, batches: Iterable[Batch]) -> dict[str, float]:
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
      for name, pair in step(params, frozen, to_global(mesh, batch)).items():
        # float64 on the host: a long evaluation adds up without rounding away late batches.
        totals[name] = totals.get(name, np.zeros(2)) + np.array([float(pair[0]), float(pair[1])])
    means = {name: float(total / count) if count else float('nan') for name, (total, count) in totals.items()}
    return {**means, **task.summarize(means)}

  return evaluate
