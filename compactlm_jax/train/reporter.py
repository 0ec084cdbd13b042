"""What the loop says about each step, read one step late so that reading never stalls the device."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from compactlm_jax.config import RunConfig
from compactlm_jax.errors import NumericsError, first_line
from compactlm_jax.metrics import MetricsWriter
from compactlm_jax.parallel import to_global
from compactlm_jax.train.step import bad_leaves
from compactlm_jax.types import Batch, Metrics, Task, TrainState

log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Pending:
  """A step that is not reported yet, and when it was first seen to be finished."""

  done: int
  metrics: Mapping[str, Any]
  batch: Batch
  finished: float | None = None

  def look(self) -> None:
    if self.finished is None and all(value.is_ready() for value in self.metrics.values()):
      self.finished = time.monotonic()


class Reporter:
  """Writes metrics and ends the run when non-finite updates do not stop.

  Rates are taken between the times at which steps finished, whenever their lines are written. Where a step is computed
  while it is called (a CPU), that is when it is added; where it is only started then (an accelerator), it is when the
  wait for its metrics ends or, if the rows of the next step took longer than it did, when those have come.

  Args:
    task: of the run.
    config: of the run.
    schedule: step -> learning rate.
    writer: metrics.jsonl and the progress bar.
    workdir: where failure.json is written.
  """

  def __init__(
    self, task: Task, config: RunConfig, schedule: Callable[[int], Any], writer: MetricsWriter, workdir: str
  ) -> None:
    self._task, self._config, self._schedule = task, config, schedule
    self._writer, self._workdir = writer, epath.Path(workdir)
    self._pending: _Pending | None = None
    self._bad_steps: list[int] = []

  def add(self, done: int, metrics: Metrics, batch: Batch, state: TrainState, frozen: Any) -> None:
    """Takes the metrics of step `done` (1-based) and reports those of the step before.

    Raises:
      NumericsError: `max_bad_steps` non-finite updates in a row.
    """
    self._latest = (state, frozen)  # older states were donated to the step
    added = _Pending(done, metrics, batch)
    for step in (self._pending, added):  # before the wait for the earlier one, which the later one may not need
      if step is not None:
        step.look()
    self.flush()
    self._pending = added

  def flush(self) -> None:
    """Reports what is pending.

    Raises:
      NumericsError: see `add`.
    """
    if self._pending is None:
      return
    pending, self._pending = self._pending, None
    done, batch = pending.done, pending.batch
    values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
    pending.look()
    self._bad_steps = [*self._bad_steps, done] if values['bad_step'] else []
    # Those of all hosts, taken from the share of this one.
    tokens = round(int(batch.attention_mask.sum()) * self._config.batch_size / len(batch.input_ids))
    line = {**values, 'learning_rate': float(self._schedule(done - 1))}
    logged = done % self._config.log_every == 0 or bool(values['bad_step'])
    self._writer.step(done, line, tokens=tokens, logged=logged, finished=pending.finished)
    if len(self._bad_steps) >= self._config.optimizer.max_bad_steps:
      self._give_up(batch, line)

  def _give_up(self, batch: Batch, line: dict[str, float]) -> None:
    config, (state, frozen) = self._config, self._latest
    mesh, last = jax.tree.leaves(state.params)[0].sharding.mesh, self._bad_steps[-1] - 1
    accumulate = config.optimizer.accumulate
    leaves = bad_leaves(self._task, config.seed, state, frozen, to_global(mesh, batch), last, accumulate, mesh)
    report = {'steps': self._bad_steps, 'metrics': {k: str(v) for k, v in line.items()}, 'bad_gradients': leaves}
    if jax.process_index() == 0:
      try:
        (self._workdir / 'failure.json').write_text(json.dumps(report, indent=2) + '\n')
      except Exception as e:  # of a full disk, of a bucket: the numbers end the run
        log.warning('failure.json cannot be written (%s); it would hold %s', first_line(e), json.dumps(report))
    raise NumericsError(
      f'{len(self._bad_steps)} non-finite updates in a row, the last at step {self._bad_steps[-1]} '
      f'(first leaf: {leaves[0] if leaves else "loss only"}); none was applied. {self._workdir}/failure.json names the '
      'leaves. Lower config.optimizer.learning_rate or look at the rows of that step'
    )
