"""What jobs on labelled data start from: a model, a teacher that knows the task, a part of the rows."""

from __future__ import annotations

import numpy as np

from compactlm_jax.config import EncoderConfig, RunConfig
from compactlm_jax.data.source import RowSource
from compactlm_jax.data.synthetic import synthetic_fingerprint
from compactlm_jax.data.tokenizer import Tokenizer
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.jobs.data import check_tokenizer
from compactlm_jax.jobs.models import load_model, tokenizer_of


def starting_model(config: RunConfig) -> tuple[Bundle, Tokenizer]:
  """The model of `config.model` and its tokenizer.

  Raises:
    ConfigError: none is named, another tokenizer is asked for, or it has too few positions.
    DataError, StorageError: see `load_model`.
  """
  if not config.model:
    raise ConfigError('config.model: name the model folder or run to fine-tune')
  bundle, tokenizer = load_model(config.model), tokenizer_of(config.model)
  check_tokenizer(config, tokenizer.fingerprint())
  check_length(config, bundle.config, 'model')
  return bundle, tokenizer


def teacher_model(config: RunConfig, rows: RowSource) -> Bundle:
  """The model of `config.teacher`, which must read the same rows.

  Raises:
    ConfigError: another tokenizer, or too few positions.
    DataError, StorageError: see `load_model`.
  """
  bundle = load_model(config.teacher)
  # Generated rows have no tokenizer, the size of the vocabulary stands for one.
  generated = rows.fingerprint == synthetic_fingerprint(bundle.config.vocab_size)
  if not generated and tokenizer_of(config.teacher).fingerprint() != rows.fingerprint:
    raise ConfigError(f'config.teacher: {config.teacher} has another tokenizer than {config.model or "the rows"}')
  check_length(config, bundle.config, 'teacher')
  return bundle


def probe_rows(rows: RowSource, count: int) -> RowSource:
  """Up to `count` evenly spaced rows: files are often sorted by label."""
  places = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64)
  return RowSource(lambda indices: rows.fetch(places[indices]), len(places), rows.vocab_size, rows.seq_len, '')


def kept_rows(config: RunConfig, size: int, name: str) -> np.ndarray | None:
  """Indices of the `data.train_rows` rows that are trained on, ascending, the same for every seed; None for all.

  Raises:
    ConfigError: there are fewer.
  """
  count = config.data.train_rows
  if count > size:
    raise ConfigError(f'config.data.train_rows: {count}, but {name} has {size} rows')
  return np.sort(np.random.default_rng(0).permutation(size)[:count]) if count else None


def check_length(config: RunConfig, encoder: EncoderConfig, owner: str) -> None:
  """Raises ConfigError for rows that are longer than an encoder has positions; `owner` is what it belongs to."""
  if config.data.seq_len > encoder.max_positions:
    remedy = 'lower it' if owner != 'encoder' else 'lower it, or raise config.encoder.max_positions'
    raise ConfigError(
      f'config.data.seq_len: {config.data.seq_len} is more than the {encoder.max_positions} positions of the {owner}; '
      f'{remedy}'
    )
