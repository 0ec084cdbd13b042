"""Jobs that fine-tune on labelled tables."""

from __future__ import annotations

import hashlib
from typing import Any

from etils import epath

from compactlm_jax.config import RunConfig
from compactlm_jax.data.source import RowSource
from compactlm_jax.data.synthetic import synthetic_table
from compactlm_jax.data.table import read_table, tokenize_table
from compactlm_jax.errors import ConfigError
from compactlm_jax.jobs.data import JobData, check_tokenizer
from compactlm_jax.jobs.models import load_model, tokenizer_of
from compactlm_jax.tasks.finetune import make_finetune_task
from compactlm_jax.types import Task


def finetune_job(config: RunConfig) -> tuple[Task, JobData]:
  """A model and labelled tables; without tables, generated ones.

  Raises:
    ConfigError, DataError: fields or files that do not fit.
  """
  if not config.data.train:
    sizes: dict[str, Any] = {'seq_len': config.data.seq_len, 'vocab_size': config.encoder.vocab_size}
    train_rows = synthetic_table(seed=config.seed, **sizes)
    dev: RowSource | None = synthetic_table(seed=config.seed, rows=512, rows_seed=1, **sizes)
    data = JobData(train_rows, dev, f'generated table {sizes}', None)
    return make_finetune_task(config.encoder, train_rows.classes, config.finetune), data
  if not config.model:
    raise ConfigError('config.model: name the model folder or run to fine-tune')
  bundle, tokenizer = load_model(config.model), tokenizer_of(config.model)
  check_tokenizer(config, tokenizer.fingerprint())
  if config.data.seq_len > bundle.config.max_positions:
    raise ConfigError(
      f'config.data.seq_len: {config.data.seq_len} is more than the {bundle.config.max_positions} positions of '
      'the model'
    )
  columns = (config.data.text_columns, config.data.label_column)
  table = read_table(config.data.train, *columns)
  if config.finetune.num_classes not in (0, len(table.classes)):
    raise ConfigError(
      f'config.finetune.num_classes: {config.finetune.num_classes}, but {config.data.train} has {len(table.classes)} '
      f'classes ({", ".join(table.classes[:8])}); set it to 0'
    )
  train_rows = tokenize_table(table, tokenizer, config.data.seq_len)
  dev = None
  if config.data.dev:
    held = read_table(config.data.dev, *columns, classes=table.classes)
    dev = tokenize_table(held, tokenizer, config.data.seq_len)
  identity = hashlib.sha256(epath.Path(config.data.train).read_bytes()).hexdigest()
  encoder = bundle.config.with_run_options(config.encoder)
  task = make_finetune_task(encoder, table.classes, config.finetune, bundle.params)
  return task, JobData(train_rows, dev, identity, bundle.tokenizer)
