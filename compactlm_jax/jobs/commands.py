"""From a configuration to a job, and from a job to its results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from compactlm_jax.config import RunConfig
from compactlm_jax.data.batches import Batches, by_length, eval_batches
from compactlm_jax.data.source import RowSource
from compactlm_jax.errors import ConfigError
from compactlm_jax.jobs.adapt import adapt_job
from compactlm_jax.jobs.data import EvalSet
from compactlm_jax.jobs.distill import distill_job
from compactlm_jax.jobs.finetune import finetune_job
from compactlm_jax.jobs.models import params_digest
from compactlm_jax.jobs.pretrain import electra_job, lm_job, mlm_job
from compactlm_jax.jobs.prune import pruned
from compactlm_jax.jobs.stages import run_stages
from compactlm_jax.jobs.start import probe_rows
from compactlm_jax.parallel import host_rows, make_mesh
from compactlm_jax.train.evaluate import Evaluation
from compactlm_jax.train.loop import Job, train
from compactlm_jax.tree import named_leaves
from compactlm_jax.types import Task

_BUILDERS = {
  'electra': electra_job,
  'mlm': mlm_job,
  'lm': lm_job,
  'distill': distill_job,
  'finetune': finetune_job,
  'prune': finetune_job,
}


def run_train(config: RunConfig, workdir: str, **options: Any) -> dict[str, Any]:
  """Builds the job of a configuration and runs it, stage by stage where it has several; see `train.loop.train`."""
  if config.task == 'adapt' and config.adapt.base == 'finetune':
    return run_stages(config, workdir, build_job, **options)
  return train(build_job(config), workdir, **options)


def build_job(config: RunConfig) -> Job:
  """Loads data and weights, checks that they fit together, and returns what the loop runs.

  Of an adaptive network with several stages it is the last one, from `config.model`.

  Raises:
    ConfigError: a field, or files that do not belong together.
    DataError: unusable data or weights.
  """
  made = adapt_job(config) if config.task == 'adapt' else None
  task, data = (made.task, made.data) if made else _BUILDERS[config.task](config)
  steps = config.steps or max(1, math.ceil(config.epochs * len(data.train) / config.batch_size))
  if config.optimizer.warmup_steps >= steps:
    raise ConfigError(
      f'config.optimizer.warmup_steps: the run has {steps} steps and would warm up for '
      f'{config.optimizer.warmup_steps}; lower it, or use optimizer.warmup_fraction'
    )
  _check_segments(task, data.train)
  if config.task == 'prune':
    task = pruned(task, config, steps)
  found = {'data': data.identity, 'eval': data.held_out, 'tokenizer': data.train.fingerprint, 'start': data.start}
  identity = {name: digest for name, digest in found.items() if digest}
  if task.frozen is not None:
    identity['teacher'] = params_digest(task.frozen)
  files = {f'tokenizer/{name}': content for name, content in data.tokenizer.files.items()} if data.tokenizer else {}
  grouped = steps if config.data.group_by_length else 0
  batches = Batches(
    data.train, config.batch_size, config.seed, buckets=config.data.buckets, grouped_steps=grouped,
    host_rows=_host_rows(config),
  )  # fmt: skip
  evals = tuple(evaluation(held, config) for held in data.evals)
  return Job(task, config, steps, batches, evals, identity, files, made.keeper if made else None)


def _check_segments(task: Task, rows: RowSource) -> None:
  """Raises ConfigError for a model or teacher without an embedding for the second texts of the rows."""
  probe = probe_rows(rows, 64)
  seen = int(np.max(probe.fetch(np.arange(len(probe)))['token_type_ids'], initial=0))
  trees = {'model': jax.eval_shape(task.init, jax.random.key(0)), 'teacher': task.frozen or {}}
  for owner, tree in trees.items():
    table = named_leaves(tree).get('encoder/embeddings/token_type/embedding')
    if table is not None and seen >= table.shape[0]:
      raise ConfigError(
        f'config.{owner}: it has embeddings for {table.shape[0]} kinds of tokens (type_vocab_size), and the rows have '
        f'{seen + 1}: first and second texts; prepare rows of single texts, or take a model that knows pairs'
      )


def evaluation(held: EvalSet, config: RunConfig) -> Evaluation:
  """A pass over held-out rows; with buckets from short to long, which scores and files do not get to see."""
  source, score, files, buckets = held.rows, held.score, held.files, config.data.buckets
  if buckets:
    source, order = by_length(held.rows)
    inverse = np.argsort(order)

    def score(rows: Mapping[str, np.ndarray]) -> Mapping[str, float]:
      return held.score({name: values[inverse] for name, values in rows.items()})

    def files(rows: Mapping[str, np.ndarray]) -> Mapping[str, str]:
      return held.files({name: values[inverse] for name, values in rows.items()})

  rows = _host_rows(config)
  return Evaluation(
    lambda: eval_batches(source, config.batch_size, buckets=buckets, host_rows=rows), score, held.prefix, files
  )


def _host_rows(config: RunConfig) -> np.ndarray | None:
  """Which rows of a batch this host gets; None for all."""
  return host_rows(make_mesh(config.mesh), config.batch_size) if jax.process_count() > 1 else None
