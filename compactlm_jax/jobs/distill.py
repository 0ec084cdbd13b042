"""Jobs that distil."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax

from compactlm_jax.config import RunConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.jobs.data import JobData, generated, prepared, refuse_unread
from compactlm_jax.jobs.models import load_model, tokenizer_of
from compactlm_jax.nn.encoder import init_encoder
from compactlm_jax.tasks.distill import make_distill_task
from compactlm_jax.tasks.elastic_pretrain import make_elastic_distill_task
from compactlm_jax.types import Task


def distill_job(config: RunConfig) -> tuple[Task, JobData]:
  """A student and its frozen teacher; without a teacher, generated rows and a random one.

  Raises:
    ConfigError, DataError: a pair or files that do not fit.
  """
  if not config.teacher:
    return _distill_generated(config)
  teacher, fingerprint = load_model(config.teacher), tokenizer_of(config.teacher).fingerprint()
  data = prepared(config, fingerprint, teacher.tokenizer)
  start = load_model(config.model) if config.model else None
  student = start.config.with_run_options(config.encoder) if start else config.encoder
  task = _maker(config)(
    student,
    teacher.config,
    teacher.params,
    config.distill,
    start=start.params if start else None,
    student_tokenizer=data.train.fingerprint,
    teacher_tokenizer=fingerprint,
  )
  return task, data.starting_from(start)


def _maker(config: RunConfig) -> Callable[..., Task]:
  """What makes the task: of one student, or of one whose sub-networks all learn."""
  return (
    functools.partial(make_elastic_distill_task, adapt=config.adapt) if config.task == 'adapt' else make_distill_task
  )


def _distill_generated(config: RunConfig) -> tuple[Task, JobData]:
  """A random teacher, twice as deep: for trying the machinery without any file."""
  if config.data.path:
    raise ConfigError('config.teacher: name a model folder or a run; only generated data can do without')
  why = 'config.teacher is not set, and without it teacher and student are random; name a model folder or a run there'
  refuse_unread({'model': config.model}, why)
  deeper = dataclasses.replace(config.encoder, num_layers=2 * config.encoder.num_layers)
  # Wide kernels: a fresh teacher's relations are almost uniform, and there would be nothing to learn.
  deeper = dataclasses.replace(deeper, initializer_range=0.1)
  teacher = init_encoder(deeper, jax.random.key(config.seed + 1))
  return _maker(config)(config.encoder, deeper, teacher, config.distill), generated(config)
