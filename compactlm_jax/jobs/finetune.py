"""Jobs that fine-tune on labelled tables."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

from compactlm_jax.config import EncoderConfig, FinetuneConfig, RunConfig
from compactlm_jax.data.batches import eval_batches
from compactlm_jax.data.source import RowSource
from compactlm_jax.data.synthetic import synthetic_table
from compactlm_jax.data.table import Table, read_table, tokenize_table
from compactlm_jax.errors import ConfigError
from compactlm_jax.jobs.data import EvalSet, JobData, check_tokenizer
from compactlm_jax.jobs.models import load_model, tokenizer_of
from compactlm_jax.scoring.classification import class_scores, metric_names, score_scores
from compactlm_jax.tasks.finetune import classify, make_finetune_task
from compactlm_jax.types import Params, Score, Task

_PROBE_ROWS = 512


def finetune_job(config: RunConfig) -> tuple[Task, JobData]:
  """A model and labelled tables; without tables, generated ones.

  Raises:
    ConfigError, DataError: fields or files that do not fit.
  """
  if not config.data.train:
    return _generated(config)
  if not config.model:
    raise ConfigError('config.model: name the model folder or run to fine-tune')
  bundle, tokenizer = load_model(config.model), tokenizer_of(config.model)
  check_tokenizer(config, tokenizer.fingerprint())
  if config.data.seq_len > bundle.config.max_positions:
    raise ConfigError(
      f'config.data.seq_len: {config.data.seq_len} is more than the {bundle.config.max_positions} positions of '
      'the model'
    )
  train, held, metrics = _tables(config)
  classes = train.classes
  if config.finetune.swap_pairs:
    train = _with_swapped(train)
  rows = tokenize_table(train, tokenizer, config.data.seq_len)
  evals = tuple(
    EvalSet(tokenize_table(table, tokenizer, config.data.seq_len), _score(classes, metrics), prefix)
    for prefix, table in held
  )
  encoder = bundle.config.with_run_options(config.encoder)
  teacher = _teacher(config, classes, rows) if config.teacher else None
  task = make_finetune_task(encoder, classes, config.finetune, bundle.params, teacher)
  return task, JobData(rows, evals, _digest(train), bundle.tokenizer)


def _generated(config: RunConfig) -> tuple[Task, JobData]:
  sizes: dict[str, Any] = {'seq_len': config.data.seq_len, 'vocab_size': config.encoder.vocab_size}
  rows = synthetic_table(seed=config.seed, **sizes)
  dev = synthetic_table(seed=config.seed, rows=512, rows_seed=1, **sizes)
  task = make_finetune_task(config.encoder, rows.classes, config.finetune)
  return task, JobData(rows, (EvalSet(dev, _score(rows.classes)),), f'generated table {sizes}', None)


def _tables(config: RunConfig) -> tuple[Table, list[tuple[str, Table]], tuple[str, ...]]:
  """(training table, [(prefix of metrics, held-out table)], names of metrics; () for the usual ones)."""
  scores = bool(config.data.score_column)
  columns = (config.data.text_columns, config.data.score_column or config.data.label_column)
  train = read_table(config.data.train, *columns, scores=scores)
  if config.finetune.num_classes not in (0, len(train.classes)):
    raise ConfigError(
      f'config.finetune.num_classes: {config.finetune.num_classes}, but {config.data.train} has {len(train.classes)} '
      f'classes ({", ".join(train.classes[:8])}); set it to 0'
    )
  held = []
  if config.data.dev:
    held.append(('', read_table(config.data.dev, *columns, classes=None if scores else train.classes, scores=scores)))
  return train, held, ()


def _score(classes: tuple[str, ...], names: tuple[str, ...] = ()) -> Score:
  names = names or metric_names(len(classes))
  function = class_scores if classes else score_scores
  return lambda rows: function(rows['outputs'], rows['labels'], names)


def _with_swapped(table: Table) -> Table:
  if len(table.texts) != 2 or table.labels is None:
    raise ConfigError('config.finetune.swap_pairs: is for pairs; name two text columns, or set it to False')
  first, second = table.texts
  return Table((first + second, second + first), np.concatenate([table.labels] * 2), table.classes, table.name)


def _digest(table: Table) -> str:
  """SHA-256 (hex) of texts, labels and classes."""
  digest = hashlib.sha256(repr(table.classes).encode())
  for text in (text for column in table.texts for text in column):
    digest.update(f'{len(text)} {text}'.encode())
  digest.update(b'' if table.labels is None else np.ascontiguousarray(table.labels).data)
  return digest.hexdigest()


def _teacher(config: RunConfig, classes: tuple[str, ...], rows: RowSource) -> tuple[Params, EncoderConfig]:
  """The fine-tuned teacher, after a look at what it knows of the training rows.

  Raises:
    ConfigError: another tokenizer, another label set, or a head that predicts no better than a constant.
  """
  bundle, tokenizer = load_model(config.teacher), tokenizer_of(config.teacher)
  if tokenizer.fingerprint() != rows.fingerprint:
    raise ConfigError(f'config.teacher: {config.teacher} has another tokenizer than {config.model}')
  if config.data.seq_len > bundle.config.max_positions:
    raise ConfigError(
      f'config.data.seq_len: {config.data.seq_len} is more than the {bundle.config.max_positions} positions of the '
      'teacher'
    )
  task = make_finetune_task(bundle.config, classes, FinetuneConfig(), teacher=(bundle.params, bundle.config))
  places = np.linspace(0, len(rows) - 1, min(_PROBE_ROWS, len(rows))).astype(np.int64)
  probe = RowSource(lambda indices: rows.fetch(places[indices]), len(places), rows.vocab_size, rows.seq_len, '')
  run = jax.jit(lambda params, batch: classify(params, bundle.config, batch))
  outputs, labels, kept = [], [], []
  for batch in eval_batches(probe, 32):
    outputs.append(np.asarray(run(task.frozen, batch)))
    labels.append(np.asarray(batch.labels))
    kept.append(np.asarray(batch.weights) > 0)
  real = np.concatenate(kept)
  if _knows_nothing(np.concatenate(outputs)[real], np.concatenate(labels)[real], bool(classes)):
    raise ConfigError(
      f'config.teacher: the head of {config.teacher} predicts the training rows no better than a constant would; it '
      'was not fine-tuned for this task'
    )
  return bundle.params, bundle.config


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
