"""Jobs that make networks adaptive: a stage of DynaBERT on labelled rows, or elastic pre-training."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from compactlm_jax.compress.subnet import cut
from compactlm_jax.config import SQUAD, Cell, EncoderConfig, RunConfig, cells, from_config_dict
from compactlm_jax.config.adapt import PUBLISHED_HIDDEN_WEIGHT
from compactlm_jax.data.batches import Batches
from compactlm_jax.data.glue_tasks import glue_task
from compactlm_jax.data.source import RowSource
from compactlm_jax.data.table import read_table, tokenize_table
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.jobs.adapt_best import BestCells
from compactlm_jax.jobs.adapt_importance import rewired
from compactlm_jax.jobs.data import JobData, refuse_unread
from compactlm_jax.jobs.distill import distill_job
from compactlm_jax.jobs.finetune import (
  Labelled,
  check_knowledge,
  check_labels,
  generated_labelled,
  labelled_data,
  labelled_teacher,
  table_digest,
)
from compactlm_jax.jobs.grid_rows import cell_scores
from compactlm_jax.jobs.models import load_model, tokenizer_of
from compactlm_jax.jobs.pretrain import electra_job, mlm_job
from compactlm_jax.jobs.start import check_length, starting_model
from compactlm_jax.tasks.adapt import make_adapt_task, terms
from compactlm_jax.tasks.finetune import SentenceModel, check_head, make_finetune_task
from compactlm_jax.types import Params, Task

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class AdaptJob:
  """Parts of a job that trains an adaptive network.

  Attributes:
    task: losses and evaluation of all cells.
    data: its rows; held-out rows are scored for each cell.
    keeper: of the best networks, and of the grid.
  """

  task: Task
  data: JobData
  keeper: BestCells


def adapt_job(config: RunConfig) -> AdaptJob:
  """Elastic pre-training (`config.adapt.base`), or the last of `config.adapt.stages` on labelled rows.

  A stage starts from `config.model`, or from `config.teacher` if none is named.
  'width' starts from a fine-tuned model, rewired, which learns from `config.teacher`; 'depth' from a network of the
  stage before (a fine-tuned model, if it is the only stage), which is its teacher too; 'final' from such a network, on
  labels. Without tables the rows are generated and the model may be left out: a random one is then trained, on labels
  (`adapt.width_loss`) and by itself.

  Raises:
    ConfigError, DataError: fields, weights or files that do not fit.
  """
  adapt = config.adapt
  if adapt.base != 'finetune':
    return _pretraining(config)
  stage = adapt.stages[-1]
  if adapt.term == 'relations' and config.optimizer.accumulate > 1 and config.distill.normalize == 'tokens':
    raise ConfigError(
      'config.distill.normalize: relations are a mean over tokens and the other terms one over rows, so that parts of '
      "a batch (config.optimizer.accumulate) do not add up to it; set it to 'examples'"
    )
  if config.finetune.benchmark in SQUAD:
    raise ConfigError(
      f'config.finetune.benchmark: {config.finetune.benchmark}: adaptive networks are trained for classes and scores, '
      'not for spans; use a task of GLUE or tables of your own'
    )
  bundle, rows = _labelled(config) if config.data.train or config.finetune.benchmark else _generated(config)
  field = 'model' if config.model else 'teacher'
  check_head(bundle.params, max(1, len(rows.classes)), f'config.{field}')
  check_labels(bundle, rows.classes, field, _source(config))
  encoder = bundle.config.with_run_options(config.encoder)
  # The head that is already there decides what it reads.
  model = SentenceModel(encoder, rows.classes, dataclasses.replace(config.finetune, pooled=encoder.pooler))
  _check_cells(config, encoder)
  grid = cells(adapt, encoder, full_depth=stage == 'width')
  teacher, params = _teacher(config, stage, bundle, rows), bundle.params
  if stage == 'width' and adapt.rewire:
    params = rewired(params, model, rows, config)
  make = functools.partial(
    make_adapt_task, encoder, rows.classes, model.config, adapt, stage, start=params, teacher=teacher,
    distill=config.distill,
  )  # fmt: skip
  train, identity = _augmented(config, rows) if adapt.augmented and stage != 'final' else (rows.job.train, '')
  evals = tuple(dataclasses.replace(held, score=cell_scores(held.score, grid)) for held in rows.job.evals)
  data = dataclasses.replace(rows.job, train=train, identity=identity or rows.job.identity, evals=evals)
  task = _balanced(make, config, stage, train)
  metric, keep = rows.metrics[0], adapt.keep_best and len(evals) > 0
  keeper = BestCells(grid, encoder, task.model, metric, metric != 'mse', data.tokenizer, config.data.seq_len, keep)
  return AdaptJob(task, data.starting_from(bundle if _source(config) else None), keeper)


def _pretraining(config: RunConfig) -> AdaptJob:
  """All cells on the objective of `adapt.base`; compared by their loss."""
  refuse_unread({'adapt.augmented': config.adapt.augmented}, 'pre-training has no labelled rows; leave it empty')
  task, data = {'mlm': mlm_job, 'electra': electra_job, 'distill': distill_job}[config.adapt.base](config)
  encoder = from_config_dict(EncoderConfig, task.model['encoder'], 'encoder.')
  _check_cells(config, encoder)
  keep, grid = config.adapt.keep_best and len(data.evals) > 0, cells(config.adapt, encoder)
  keeper = BestCells(grid, encoder, task.model, 'loss', False, data.tokenizer, data.train.seq_len, keep)
  return AdaptJob(task, data, keeper)


def _check_cells(config: RunConfig, encoder: EncoderConfig) -> None:
  """Raises ConfigError for a cell that cannot be cut, of this stage or a later one, or that is another's network."""
  sizes = config.adapt.hidden_sizes
  if sizes and sizes[-1] != encoder.hidden_size:
    raise ConfigError(
      f'config.adapt.hidden_sizes: {sizes} must end with {encoder.hidden_size}, the hidden size of the full network'
    )
  seen: dict[Any, Cell] = {}
  for cell in cells(config.adapt, encoder):
    small, _ = network = cut(encoder, cell)
    first = seen.setdefault(network, cell)
    if first != cell:
      field = 'widths' if first.width != cell.width else 'depths'
      raise ConfigError(
        f'config.adapt.{field}: {first.name} and {cell.name} are the same network '
        f'({small.num_heads} heads, {small.num_layers} layers); leave one out'
      )


def _source(config: RunConfig) -> str:
  return config.model or config.teacher


def _labelled(config: RunConfig) -> tuple[Bundle, Labelled]:
  """(the model to start from, the rows)."""
  if not _source(config):
    raise ConfigError('config.teacher: name the fine-tuned model that is to become adaptive')
  bundle, tokenizer = starting_model(dataclasses.replace(config, model=_source(config)))
  return bundle, labelled_data(config, tokenizer, bundle.tokenizer)


def _generated(config: RunConfig) -> tuple[Bundle, Labelled]:
  """As `_labelled`, with generated rows; a random model if none is named."""
  if config.adapt.augmented:
    raise ConfigError('config.adapt.augmented: are rows of data.train or of a benchmark, and neither is named')
  rows = generated_labelled(config)
  if not _source(config):
    check_length(config, config.encoder, 'encoder')
    finetune = dataclasses.replace(config.finetune, pooled=config.encoder.pooler)
    task = make_finetune_task(config.encoder, rows.classes, finetune)
    return Bundle(config.encoder, task.init(jax.random.key(config.seed)), None, rows.classes), rows
  bundle = load_model(_source(config))
  check_length(config, bundle.config, 'model' if config.model else 'teacher')
  if bundle.config.vocab_size != rows.job.train.vocab_size:
    raise ConfigError(
      f'config.encoder.vocab_size: generated rows have {rows.job.train.vocab_size} tokens and {_source(config)} '
      f'{bundle.config.vocab_size}; set it to {bundle.config.vocab_size}, or name tables of your own'
    )
  return bundle, rows


def _teacher(config: RunConfig, stage: str, bundle: Bundle, rows: Labelled) -> tuple[Params, EncoderConfig] | None:
  """Who teaches a stage; None where labels do."""
  if stage == 'depth':
    if len(config.adapt.stages) == 1 and _source(config):  # else it was made by the stage before, or from nothing
      check_knowledge(bundle, rows.classes, rows.job.train, 'model' if config.model else 'teacher', _source(config))
    return bundle.params, bundle.config
  if stage == 'final' or config.adapt.width_loss == 'labels':
    return None
  if not config.teacher:
    raise ConfigError(
      'config.teacher: the stage of widths distils from a fine-tuned model: name one, or train it on labels with '
      'adapt.width_loss=labels'
    )
  return labelled_teacher(config, rows.classes, rows.job.train)


def _balanced(make: Callable[..., Task], config: RunConfig, stage: str, train: RowSource) -> Task:
  """The task of a stage; with `adapt.balance` 'auto' equal weights mean terms of equal scale."""
  task, adapt = make(), config.adapt
  if adapt.balance == 'given' or task.frozen is None:
    return task
  rows = Batches(train, config.batch_size, config.seed)
  outputs, other = terms(
    task, task.init(jax.random.key(config.seed)), [rows.batch(i) for i in range(adapt.balance_batches)]
  )
  given = adapt.hidden_weight if stage == 'width' else adapt.depth_hidden_weight
  if stage == 'width' and given == PUBLISHED_HIDDEN_WEIGHT:
    given = 1.0
  # Measured again after an interruption: the same on equal devices, and with three digits nearly always on others.
  weight = float(f'{given * outputs / other:.3g}') if other > 0 else given
  log.info('outputs %.4g, %s %.4g: the latter weighs %g', outputs, adapt.term, other, weight)
  task = make(term_weight=weight)
  return dataclasses.replace(task, model={**task.model, 'term_weight': weight})


def _augmented(config: RunConfig, rows: Labelled) -> tuple[RowSource, str]:
  """(rows of `adapt.augmented`, their digest): the columns of the user's table, or a benchmark's as its files have."""
  benchmark = glue_task(config.finetune.benchmark) if config.finetune.benchmark else None
  if benchmark:
    texts, label = benchmark.texts, benchmark.label
  else:
    texts, label = config.data.text_columns, config.data.score_column or config.data.label_column
  path, known = config.adapt.augmented, (rows.classes, benchmark.written if benchmark else ())
  table = read_table(path, texts, label, scores=not rows.classes)
  if rows.classes:
    index = {name: i for names in known for i, name in enumerate(names)}
    if unknown := [name for name in table.classes if name not in index]:
      raise ConfigError(
        f'config.adapt.augmented: {path} has the label {unknown[0]!r}; the task has {", ".join(rows.classes)}'
      )
    labels = np.asarray([index[name] for name in table.classes], np.int32)[table.labels]
    table = dataclasses.replace(table, labels=labels, classes=rows.classes)
  log.info('%s: %d rows in place of the %d of training', path, len(table), len(rows.job.train))
  return tokenize_table(table, tokenizer_of(_source(config)), config.data.seq_len), table_digest(table)
