"""The training loop, the only one: resume, step, log, save, stop, evaluate."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
from etils import epath
from jax.sharding import Mesh

from compactlm_jax.checkpoint import Checkpoints
from compactlm_jax.config import RunConfig
from compactlm_jax.errors import PreemptedError
from compactlm_jax.metrics import MetricsWriter, read_metrics
from compactlm_jax.parallel import check_batch_size, make_mesh, param_shardings, state_shardings, to_global
from compactlm_jax.parse import parse_row
from compactlm_jax.storage import write_whole
from compactlm_jax.train.evaluate import Evaluation, make_evaluate, make_finished
from compactlm_jax.train.optimizer import learning_rate_schedule, make_optimizer
from compactlm_jax.train.profile import Profile
from compactlm_jax.train.reporter import Reporter
from compactlm_jax.train.rundir import open_run
from compactlm_jax.train.signals import StopRequest
from compactlm_jax.train.step import compile_step, init_state, make_train_step
from compactlm_jax.train.watchdog import Watchdog
from compactlm_jax.types import Batch, Params, Task, TrainState

log = logging.getLogger(__name__)

_Evaluate = Callable[[], tuple[Params, dict[str, float]]]
_MISSED = 'evaluation_missed'  # in the metadata of a checkpoint: asked to stop, the run left without it


class BatchSource(Protocol):
  """Rows of training: a batch is a pure function of (seed, step)."""

  def prefetch(self, start_step: int) -> Iterator[tuple[int, Batch]]:
    """(step, this host's rows of its global batch) from `start_step` on, read ahead, without end."""


class Keeper(Protocol):
  """What a run keeps of its evaluations beside its checkpoints, and says of the last one."""

  def start(self, workdir: epath.Path, step: int) -> None:
    """Before the first step of this process, which is `step`; whoever calls holds the run directory."""

  def offer(self, state: TrainState, scores: Mapping[str, float], metadata: Mapping[str, Any]) -> None:
    """After an evaluation: finished parameters (without optimiser), their metrics, metadata of a checkpoint."""

  def results(self, params: Params, scores: Mapping[str, float]) -> Mapping[str, Any]:
    """After the last evaluation: entries of results.json, in place of those of the same name."""


@dataclasses.dataclass(frozen=True)
class Job:
  """What the loop runs.

  Attributes:
    task: losses, evaluation and frozen weights.
    config: the resolved configuration.
    total_steps: optimiser steps.
    batches: training rows.
    evals: what is evaluated; () without held-out rows.
    identity: fingerprints (tokenizer, data, teacher) that a resumed run must share.
    files: relative path -> content of what is kept beside the checkpoints (the tokenizer).
    keeper: see `Keeper`; None keeps nothing.
  """

  task: Task
  config: RunConfig
  total_steps: int
  batches: BatchSource
  evals: tuple[Evaluation, ...] = ()
  identity: Mapping[str, str] = dataclasses.field(default_factory=dict)
  files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
  keeper: Keeper | None = None


def train(
  job: Job, workdir: str, *, allow_change: tuple[str, ...] = (), steal_lock: bool = False, profile: str = ''
) -> dict[str, Any]:
  """Runs a job to its last step, from its newest intact checkpoint if there is one.

  Args:
    job: what to run.
    workdir: the run directory; created if absent.
    allow_change: configuration fields that may differ from those of the run that is resumed.
    steal_lock: take the directory over from a run on another host that is known to be dead.
    profile: 'START:STOP', steps to trace into WORKDIR/profile; '' for none.

  Returns:
    What results.json holds.

  Raises:
    PreemptedError: a signal asked to stop; the state is saved, if there is a step of it.
    NumericsError, LockedError, ConfigError, DataError, StorageError: see those classes.
  """
  started, config, total = time.monotonic(), job.config, job.total_steps
  with contextlib.ExitStack() as stack:
    trace = stack.enter_context(Profile(profile, epath.Path(workdir) / 'profile', total))
    mesh = _checked_mesh(job)
    stop = stack.enter_context(StopRequest())  # before the lock is taken: it is not left behind
    held = open_run(workdir, config, job.identity, allow_change=allow_change, steal_lock=steal_lock, total_steps=total)
    stack.enter_context(held)
    _keep_files(job, epath.Path(workdir))
    checkpoints = stack.enter_context(Checkpoints(epath.Path(workdir) / 'checkpoints', keep=config.keep))
    state, frozen, step_fn, missed = _set_up(job, mesh, checkpoints)
    first = int(state.step)
    if first >= total and (results := _results_of(workdir, total)):
      log.info('all %d steps are done; results.json is kept (delete it to evaluate again)', total)
      return results
    writer = stack.enter_context(MetricsWriter(workdir, total, start_step=first))
    reporter = Reporter(job.task, config, learning_rate_schedule(config.optimizer, total), writer, workdir)
    metadata = {'model': dict(job.task.model), 'task': job.task.name, 'identity': dict(job.identity)}
    evaluated = _evaluator(job, mesh, frozen, metadata, checkpoints, stop.requested)
    _catch_up(job, writer, workdir, first, functools.partial(evaluated, state) if missed else None)
    if first < total and stop.requested():
      raise PreemptedError(f'asked to stop before step {first + 1}; the same command continues')
    watchdog = stack.enter_context(Watchdog())
    for step, batch in watchdog.over(first, itertools.islice(job.batches.prefetch(first), max(0, total - first))):
      state, metrics = trace.run(step, step_fn, state, frozen, to_global(mesh, batch))
      done, stopping = step + 1, stop.requested()
      reporter.add(done, metrics, batch, state, frozen)
      watchdog.done()
      # Before the save: a run that resumes from this step does not evaluate it again, unless it was asked to stop here.
      due = bool(config.eval_every and done % config.eval_every == 0 and done < total and job.evals)
      if due and not stopping:
        reporter.flush()
        stopping = not _written(writer, done, functools.partial(evaluated, state))
      if stopping or done == total or done % config.checkpoint_every == 0:
        reporter.flush()
        noted, last = {**metadata, _MISSED: due and stopping}, stopping or done == total
        checkpoints.save(done, state, noted, wait=last, before=writer.sync)
      if stopping and done < total:
        raise PreemptedError(f'asked to stop: step {done} is saved in {workdir}; the same command continues from it')
    params, scores = evaluated(state)
    further = {**job.task.results(params), **(job.keeper.results(params, scores) if job.keeper else {})}
    return _finish(job, workdir, scores, further, time.monotonic() - started)


def _checked_mesh(job: Job) -> Mesh:
  """The mesh, once rows and parameters are known to divide over it: what is refused leaves no run directory."""
  config = job.config
  mesh = make_mesh(config.mesh)
  check_batch_size(mesh, config.batch_size, config.optimizer.accumulate)
  for params in (jax.eval_shape(job.task.init, jax.random.key(config.seed)), job.task.frozen or {}):
    param_shardings(mesh, params)
  return mesh


def _set_up(job: Job, mesh: Mesh, checkpoints: Checkpoints) -> tuple[TrainState, Any, Any, bool]:
  """The state (restored or fresh), the frozen weights, the compiled step, and if an evaluation is missing."""
  config = job.config
  tx = make_optimizer(config.optimizer, job.total_steps, job.task.trainable, job.task.groups)
  state = init_state(job.task, tx, mesh, config.seed)
  placed = state_shardings(mesh, state)
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)
  restored = checkpoints.restore(abstract)
  if restored is not None:
    state = restored[0]
    log.info('resuming at step %d of %d', int(state.step), job.total_steps)
  frozen = None if job.task.frozen is None else jax.device_put(job.task.frozen, param_shardings(mesh, job.task.frozen))
  step_fn = make_train_step(job.task, tx, config.seed, config.optimizer.accumulate, mesh)
  missed = restored is not None and bool(restored[1].get(_MISSED))
  return state, frozen, compile_step(step_fn, mesh, state, frozen), missed


def _line(scores: Mapping[str, float]) -> dict[str, float]:
  return {f'eval_{name}': value for name, value in scores.items()}


def _catch_up(job: Job, writer: MetricsWriter, workdir: str, step: int, missed: _Evaluate | None) -> None:
  """Before the first step: the keeper, and the line of an evaluation that a stop came before, if one did.

  A run that was killed after it has that line already.
  """
  if job.keeper is not None:
    job.keeper.start(epath.Path(workdir), step)
  if missed is not None:
    line = _line(missed()[1])
    if not any(known['step'] == step and line.keys() <= known.keys() for known in read_metrics(workdir)):
      writer.write(step, line)


def _written(writer: MetricsWriter, step: int, evaluate: _Evaluate) -> bool:
  """Whether an evaluation came to its end and has its line; if not, the run was asked to stop."""
  try:
    writer.write(step, _line(evaluate()[1]))
  except PreemptedError:
    return False
  return True


def _evaluator(
  job: Job,
  mesh: Mesh,
  frozen: Any,
  metadata: Mapping[str, Any],
  checkpoints: Checkpoints,
  stopped: Callable[[], bool],
) -> Callable[[TrainState], tuple[Params, dict[str, float]]]:
  """State -> finished parameters and their metrics, which the keeper gets to see; a stop is not kept waiting by it."""
  evaluate, finished = make_evaluate(job.task, mesh, stopped), make_finished(job.task, mesh)

  def evaluated(state: TrainState) -> tuple[Params, dict[str, float]]:
    params = finished(state.params)
    scores = {name: value for held in job.evals for name, value in evaluate(params, frozen, held).items()}
    if job.keeper is not None:
      checkpoints.settle()  # Orbax counts saves: two at once would be counted otherwise on each host
      job.keeper.offer(TrainState(state.step, params, ()), scores, metadata)
    return params, scores

  return evaluated


def _keep_files(job: Job, workdir: epath.Path) -> None:
  if jax.process_index() == 0:
    for name, content in job.files.items():
      (workdir / name).parent.mkdir(parents=True, exist_ok=True)
      (workdir / name).write_bytes(content)


def _results_of(workdir: str, total: int) -> dict[str, Any] | None:
  """What a run of `total` steps that is over has left; None if it was cut off before."""
  try:
    results = parse_row((epath.Path(workdir) / 'results.json').read_bytes())
    return results if results['steps'] == total and isinstance(results['metrics'], dict) else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _finish(
  job: Job, workdir: str, scores: Mapping[str, float], further: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
  known = {'metrics': dict(scores), 'task': job.task.name, 'steps': job.total_steps, 'seconds': round(seconds, 3)}
  results = {**known, **further}
  if jax.process_index() == 0:
    write_whole(epath.Path(workdir) / 'results.json', json.dumps(results, indent=2) + '\n')
  return results
