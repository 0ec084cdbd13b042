"""Jobs that fine-tune on labelled tables and on GLUE."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np

from compactlm_jax.config import SQUAD, EncoderConfig, FinetuneConfig, RunConfig
from compactlm_jax.data.batches import eval_batches
from compactlm_jax.data.glue import read_glue
from compactlm_jax.data.glue_tasks import glue_task
from compactlm_jax.data.source import RowSource
from compactlm_jax.data.synthetic import synthetic_table
from compactlm_jax.data.table import Table, read_table, tokenize_table
from compactlm_jax.data.tokenizer import Tokenizer
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.interop.tokenizer_files import TokenizerFiles
from compactlm_jax.jobs.data import EvalSet, JobData, refuse_unread
from compactlm_jax.jobs.squad import squad_job
from compactlm_jax.jobs.start import check_length, kept_rows, probe_rows, starting_model, teacher_model
from compactlm_jax.scoring.classification import class_scores, metric_names, score_scores
from compactlm_jax.tasks.finetune import classify, make_finetune_task
from compactlm_jax.types import Params, Score, Task

_PROBE_ROWS = 512
_GENERATED = (
  'config.data.train is not set, and without it rows are generated; name your table, or set config.finetune.benchmark'
)


def finetune_job(config: RunConfig) -> tuple[Task, JobData]:
  """A model and labelled tables, of the user or of a benchmark; without tables, generated ones.

  Raises:
    ConfigError, DataError: fields or files that do not fit.
  """
  if config.finetune.benchmark in SQUAD:
    return squad_job(config)
  if not config.data.train and not config.finetune.benchmark:
    return _generated(config)
  bundle, tokenizer = starting_model(config)
  data = labelled_data(config, tokenizer, bundle.tokenizer)
  encoder = bundle.config.with_run_options(config.encoder)
  teacher = labelled_teacher(config, data.classes, data.job.train) if config.teacher else None
  task = make_finetune_task(encoder, data.classes, config.finetune, bundle.params, teacher)
  return task, data.job.starting_from(bundle)


@dataclasses.dataclass(frozen=True)
class Labelled:
  """Labelled rows of a job.

  Attributes:
    job: training and held-out rows.
    classes: class names, in the order of their indices; () for scores.
    metrics: names of what held-out rows are scored by; the first is the one to compare by.
  """

  job: JobData
  classes: tuple[str, ...]
  metrics: tuple[str, ...]


def labelled_data(config: RunConfig, tokenizer: Tokenizer, files: TokenizerFiles | None) -> Labelled:
  """The rows of the user's tables, or of a benchmark.

  Args:
    config: of the run.
    tokenizer: of the model.
    files: its files, kept with the run.

  Raises:
    ConfigError, DataError: fields or files that do not fit.
  """
  train, held, metrics = _tables(config)
  train, classes = _subset(train, config), train.classes
  if config.finetune.swap_pairs:
    train = _with_swapped(train)
  seq_len = config.data.seq_len
  rows = tokenize_table(train, tokenizer, seq_len)
  metrics = metrics or metric_names(len(classes))
  evals = tuple(
    EvalSet(tokenize_table(table, tokenizer, seq_len), _score(classes, metrics), prefix, digest=table_digest(table))
    for prefix, table in held
  )
  return Labelled(JobData(rows, evals, table_digest(train), files), classes, metrics)


def generated_labelled(config: RunConfig) -> Labelled:
  """Generated rows of two classes, for trying a task without files; their seed is the run's.

  Raises:
    ConfigError: fields are set that would not be read.
  """
  names = ('dev', 'path', 'eval_path', 'train_rows', 'tokenizer')
  refuse_unread({f'data.{name}': getattr(config.data, name) for name in names}, _GENERATED)
  sizes: dict[str, Any] = {'seq_len': config.data.seq_len, 'vocab_size': config.encoder.vocab_size}
  rows = synthetic_table(seed=config.seed, **sizes)
  dev = synthetic_table(seed=config.seed, rows=512, rows_seed=1, **sizes)
  metrics = metric_names(len(rows.classes))
  data = JobData(rows, (EvalSet(dev, _score(rows.classes, metrics)),), f'generated table {sizes}', None)
  return Labelled(data, rows.classes, metrics)


def _generated(config: RunConfig) -> tuple[Task, JobData]:
  refuse_unread({'model': config.model, 'teacher': config.teacher}, _GENERATED)
  data = generated_labelled(config)
  check_length(config, config.encoder, 'encoder')
  return make_finetune_task(config.encoder, data.classes, config.finetune), data.job


def _tables(config: RunConfig) -> tuple[Table, list[tuple[str, Table]], tuple[str, ...]]:
  """(training table, [(prefix of metrics, held-out table)], names of metrics; () for the usual ones)."""
  if config.finetune.benchmark:
    return _glue_tables(config)
  scores = bool(config.data.score_column)
  columns = (config.data.text_columns, config.data.score_column or config.data.label_column)
  train = read_table(config.data.train, *columns, scores=scores)
  _check_classes(config, train)
  held = []
  if config.data.dev:
    held.append(('', read_table(config.data.dev, *columns, classes=None if scores else train.classes, scores=scores)))
  return train, held, ()


def _glue_tables(config: RunConfig) -> tuple[Table, list[tuple[str, Table]], tuple[str, ...]]:
  """As `_tables`, of a GLUE task."""
  if config.data.train or config.data.dev:
    raise ConfigError(
      f'config.data.train: {config.finetune.benchmark} is read from config.data.path; leave train and dev out, or set '
      "config.finetune.benchmark to '' for tables of your own"
    )
  if config.data.score_column:
    raise ConfigError(
      f'config.data.score_column: {config.data.score_column!r} is for tables of your own; {config.finetune.benchmark} '
      "knows its columns: set it to ''"
    )
  task, root = glue_task(config.finetune.benchmark), config.data.path
  held = [(split.prefix, read_glue(task.name, root, split.name)) for split in task.dev_splits]
  train = read_glue(task.name, root, 'train')
  _check_classes(config, train)
  return train, held, task.metrics


def _check_classes(config: RunConfig, train: Table) -> None:
  if config.finetune.num_classes not in (0, len(train.classes)):
    raise ConfigError(
      f'config.finetune.num_classes: {config.finetune.num_classes}, but {train.name} has {len(train.classes)} '
      f'classes ({", ".join(train.classes[:8])}); set it to 0'
    )


def _score(classes: tuple[str, ...], names: tuple[str, ...]) -> Score:
  function = class_scores if classes else score_scores
  return lambda rows: function(rows['outputs'], rows['labels'], names)


def _subset(table: Table, config: RunConfig) -> Table:
  kept = kept_rows(config, len(table), table.name)
  if kept is None:
    return table
  texts = tuple(tuple(column[i] for i in kept) for column in table.texts)
  return dataclasses.replace(table, texts=texts, labels=None if table.labels is None else table.labels[kept])


def _with_swapped(table: Table) -> Table:
  if len(table.texts) != 2 or table.labels is None:
    raise ConfigError('config.finetune.swap_pairs: is for pairs; name two text columns, or set it to False')
  first, second = table.texts
  return Table((first + second, second + first), np.concatenate([table.labels] * 2), table.classes, table.name)


def table_digest(table: Table) -> str:
  """SHA-256 (hex) of texts, labels and classes."""
  digest = hashlib.sha256(repr(table.classes).encode())
  for text in (text for column in table.texts for text in column):
    digest.update(f'{len(text)} {text}'.encode())
  digest.update(b'' if table.labels is None else np.ascontiguousarray(table.labels).data)
  return digest.hexdigest()


def labelled_teacher(config: RunConfig, classes: tuple[str, ...], rows: RowSource) -> tuple[Params, EncoderConfig]:
  """The fine-tuned teacher, after a look at what it knows of the training rows.

  Args:
    config: of the run.
    classes: of the task.
    rows: of training.

  Raises:
    ConfigError: another tokenizer, another label set, or a head that predicts no better than a constant.
  """
  bundle = teacher_model(config, rows)
  check_labels(bundle, classes, 'teacher', config.teacher)
  check_knowledge(bundle, classes, rows, 'teacher', config.teacher)
  return bundle.params, bundle.config


def check_knowledge(bundle: Bundle, classes: tuple[str, ...], rows: RowSource, field: str, path: str) -> None:
  """Raises ConfigError if the head of a fine-tuned model predicts the training rows no better than a constant."""
  task = make_finetune_task(bundle.config, classes, FinetuneConfig(), teacher=(bundle.params, bundle.config))
  run = jax.jit(lambda params, batch: classify(params, bundle.config, batch))
  outputs, labels, kept = [], [], []
  for batch in eval_batches(probe_rows(rows, _PROBE_ROWS), 32):
    outputs.append(np.asarray(run(task.frozen, batch)))
    labels.append(np.asarray(batch.labels))
    kept.append(np.asarray(batch.weights) > 0)
  real = np.concatenate(kept)
  if _knows_nothing(np.concatenate(outputs)[real], np.concatenate(labels)[real], bool(classes)):
    raise ConfigError(
      f'config.{field}: the head of {path} predicts the training rows no better than a constant would; it was not '
      'fine-tuned for this task'
    )


def check_labels(bundle: Bundle, classes: tuple[str, ...], field: str, path: str) -> None:
  """Raises ConfigError if a fine-tuned model knows other classes than those of the task."""
  if bundle.labels and classes and bundle.labels != classes:
    raise ConfigError(
      f'config.{field}: {path} knows the classes {", ".join(bundle.labels)}, the task has {", ".join(classes)}'
    )


def _knows_nothing(outputs_RC: np.ndarray, labels_R: np.ndarray, classes: bool) -> bool:
  """Whether neither hits nor loss beat the best constant prediction."""
  if not classes:
    return bool(np.mean((outputs_RC[:, 0] - labels_R) ** 2) >= labels_R.var())
  shares = np.bincount(labels_R, minlength=outputs_RC.shape[1]) / len(labels_R)
  entropy = -float((shares[shares > 0] * np.log(shares[shares > 0])).sum())
  log_probs = outputs_RC - np.logaddexp.reduce(outputs_RC, axis=1, keepdims=True)
  loss = -float(log_probs[np.arange(len(labels_R)), labels_R].mean())
  hits = float((outputs_RC.argmax(1) == labels_R).mean())
  return loss >= entropy and hits <= shares.max()
