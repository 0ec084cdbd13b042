"""Evaluation over batches, so that a padded last batch and several hosts count each row exactly once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from compactlm_jax.errors import PreemptedError
from compactlm_jax.parallel import batch_sharding, param_shardings, replicated, to_global
from compactlm_jax.types import Batch, Files, Params, Score, Task


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Held-out rows, and what to make of a task's outputs on them.

  Attributes:
    batches: starts a pass over this host's rows; with weights.
    score: see `types.Score`.
    prefix: of the names of its metrics, where a run has several evaluations.
    files: see `types.Files`.
  """

  batches: Callable[[], Iterable[Batch]]
  score: Score = lambda rows: {}
  prefix: str = ''
  files: Files = lambda rows: {}


def make_finished(task: Task, mesh: Mesh) -> Callable[[Params], Params]:
  """`Task.finished`, compiled, with the result where parameters of its names live."""
  run = task.finished
  if run is None:
    return lambda params: params
  return lambda params: jax.jit(run, out_shardings=param_shardings(mesh, jax.eval_shape(run, params)))(params)


def make_evaluate(task: Task, mesh: Mesh, stopped: Callable[[], bool] = lambda: False) -> Any:
  """evaluate(params, frozen, evaluation) -> {metric: value}; compiled once for each shape of batch."""
  gather = make_gather(task, mesh, stopped)

  def evaluate(params: Params, frozen: Any, evaluation: Evaluation) -> dict[str, float]:
    means, rows = gather(params, frozen, evaluation.batches())
    return metrics_of(task, evaluation, means, rows)

  return evaluate


def metrics_of(
  task: Task, evaluation: Evaluation, means: Mapping[str, float], rows: Mapping[str, np.ndarray]
) -> dict[str, float]:
  """All metrics of what was gathered, by their names in metrics.jsonl and results.json."""
  found = {**means, **evaluation.score(rows), **task.summarize(means)}
  return {evaluation.prefix + name: float(value) for name, value in found.items()}


def make_gather(task: Task, mesh: Mesh, stopped: Callable[[], bool] = lambda: False) -> Any:
  """gather(params, frozen, batches) -> ({metric: mean}, {output: rows in order}); on every host, of all hosts' rows.

  It raises PreemptedError once `stopped`, which is asked after each batch and must answer alike on all hosts.
  """

  def run(params: Params, frozen: Any, batch: Batch) -> tuple[Mapping[str, Any], jax.Array | None]:
    return task.evaluate(params, frozen, batch), batch.weights

  step = jax.jit(run, in_shardings=(None, None, batch_sharding(mesh)), out_shardings=replicated(mesh))

  def gather(params: Params, frozen: Any, batches: Iterable[Batch]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    totals: dict[str, np.ndarray] = {}
    rows: dict[str, list[np.ndarray]] = {}
    for batch in batches:
      found, weights = jax.device_get(step(params, frozen, to_global(mesh, batch)))
      for name, value in found.items():
        if isinstance(value, tuple):
          # float64 on the host: a long evaluation adds up without rounding away late batches.
          totals[name] = totals.get(name, np.zeros(2)) + np.array([float(value[0]), float(value[1])])
        else:
          rows.setdefault(name, []).append(value if weights is None else value[weights > 0])
      if stopped():
        raise PreemptedError('asked to stop during an evaluation; the same command evaluates again')
    means = {name: float(total / count) if count else float('nan') for name, (total, count) in totals.items()}
    return means, {name: np.concatenate(parts) for name, parts in rows.items()}

  return gather
