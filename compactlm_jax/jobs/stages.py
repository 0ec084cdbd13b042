"""Runs of several stages: WORKDIR/stages/NAME for each but the last, which runs in WORKDIR itself."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from etils import epath

from compactlm_jax.config import RunConfig
from compactlm_jax.errors import ConfigError, PreemptedError
from compactlm_jax.jobs.adapt_best import BEST, BestCells
from compactlm_jax.jobs.data import refuse_unread
from compactlm_jax.jobs.finished import finished_results
from compactlm_jax.train.loop import Job, train
from compactlm_jax.train.rundir import read_run
from compactlm_jax.train.signals import StopRequest

log = logging.getLogger(__name__)

FOLDER = 'stages'
"""Folder in WORKDIR of the runs of all stages but the last."""


def run_stages(config: RunConfig, workdir: str, build: Callable[[RunConfig], Job], **options: Any) -> dict[str, Any]:
  """Trains an adaptive network stage by stage; the same call continues after a kill.

  Each stage is an ordinary run directory whose config.json names that stage alone; WORKDIR's is the given one. A stage
  starts from the best network of the one before (its last, if none was kept), whose weights are its identity 'start':
  paths are not recorded, so a directory may move. What the stage before kept is kept on until something is better (see
  `adapt_best`). A finished stage is kept, an interrupted one resumes.

  Args:
    config: of task 'adapt', with one or more `adapt.stages`.
    workdir: the run directory.
    build: the job of the last stage of a configuration; it is given those up to the one that runs.
    options: see `train.loop.train`.

  Returns:
    What results.json of the last stage holds.

  Raises:
    ConfigError: a teacher or rows that no stage reads; WORKDIR holds a run of other stages.
    PreemptedError: a signal asked to stop; what was done is saved.
    CompactLMError: see `train.loop.train`.
  """
  _check_read(config)
  _check_same_stages(config, workdir)
  *earlier, last = config.adapt.stages
  model, before = config.model, ''
  with StopRequest() as stop:
    for number, stage in enumerate(earlier, 1):
      folder, recorded = f'{workdir}/{FOLDER}/{stage}', _staged(config, stage)
      log.info('stage %s (%d of %d): %s', stage, number, len(earlier) + 1, folder)
      if finished_results(recorded, folder) is None:
        job = build(dataclasses.replace(_staged(config, *earlier[:number]), model=model))
        train(_after(before, job, recorded), folder, **options)
      before = folder
      best = f'{folder}/{BEST}'
      model = best if epath.Path(best, 'checkpoints').exists() else folder
      if stop.requested():
        raise PreemptedError(f'asked to stop after stage {stage}; the same command continues in {workdir}')
    log.info('stage %s (%d of %d): %s', last, len(earlier) + 1, len(earlier) + 1, workdir)
    return train(_after(before, build(dataclasses.replace(config, model=model)), config), workdir, **options)


def _check_read(config: RunConfig) -> None:
  """Raises ConfigError for what is named and read by no stage."""
  first, adapt = config.adapt.stages[0], config.adapt
  if config.model and (first != 'width' or adapt.width_loss == 'labels'):
    why = "only the stage 'width' has a teacher of its own, with adapt.width_loss=distil; 'depth' learns from what it "
    refuse_unread({'teacher': config.teacher}, why + "starts from, 'final' from labels: leave one of the two empty")
  if set(adapt.stages) == {'final'}:
    refuse_unread({'adapt.augmented': adapt.augmented}, "the stage 'final' takes the original rows; leave it empty")


def _check_same_stages(config: RunConfig, workdir: str) -> None:
  """Raises ConfigError before a stage is trained that the run in WORKDIR did not have."""
  if not (epath.Path(workdir) / 'config.json').exists():
    return
  before = read_run(workdir)[0]
  if before.task == config.task and before.adapt.stages != config.adapt.stages:
    was, now = (','.join(stages) for stages in (before.adapt.stages, config.adapt.stages))
    raise ConfigError(
      f"config.adapt.stages: {workdir} was begun with '{was}', now '{now}'; to go on from it, choose another "
      f'directory, with --config.model={workdir} and the stages that are left'
    )


def _staged(config: RunConfig, *stages: str) -> RunConfig:
  return dataclasses.replace(config, adapt=dataclasses.replace(config.adapt, stages=stages))


def _after(before: str, job: Job, recorded: RunConfig) -> Job:
  """The job of a stage with the configuration to record; it goes on from what the run `before` kept, if any."""
  keeper = job.keeper
  if before and isinstance(keeper, BestCells):
    keeper = dataclasses.replace(keeper, before=before)
  return dataclasses.replace(job, config=recorded, keeper=keeper)
