"""Rows of a job: prepared datasets, and generated ones for trying things without files."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from etils import epath

from compactlm_jax.config import RunConfig
from compactlm_jax.data import source as rows
from compactlm_jax.data.manifest import read_manifest
from compactlm_jax.data.source import RowSource
from compactlm_jax.data.synthetic import synthetic_rows
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.tokenizer_files import TokenizerFiles
from compactlm_jax.jobs.models import tokenizer_of
from compactlm_jax.types import Files, Score


@dataclasses.dataclass(frozen=True)
class EvalSet:
  """Held-out rows.

  Attributes:
    rows: what is evaluated.
    score: metrics of the gathered outputs, which come in the order of `rows`.
    prefix: of the names of all its metrics.
    files: predictions that `compactlm evaluate` writes.
  """

  rows: RowSource
  score: Score = lambda rows: {}
  prefix: str = ''
  files: Files = lambda rows: {}


@dataclasses.dataclass(frozen=True)
class JobData:
  """Rows of a job, and what identifies them."""

  train: RowSource
  evals: tuple[EvalSet, ...]
  identity: str
  tokenizer: TokenizerFiles | None


def generated(config: RunConfig) -> JobData:
  """Rows of `data.seq_len` tokens for trying a task; their seed is the run's."""
  sizes: dict[str, Any] = {'seq_len': config.data.seq_len, 'vocab_size': config.encoder.vocab_size}
  source = synthetic_rows(seed=config.seed, **sizes)
  train_rows, dev = rows.hold_out(source, config.data.eval_rows)
  return JobData(train_rows, (EvalSet(dev),), f'generated {sizes}', None)


def prepared(config: RunConfig, fingerprint: str, tokenizer: TokenizerFiles | None) -> JobData:
  """The rows of `data.path`.

  Args:
    config: of the run.
    fingerprint: of the tokenizer that must have made the ids.
    tokenizer: its files, kept with the run.

  Raises:
    ConfigError: no path, or another tokenizer.
    DataError: damaged or missing files.
  """
  if not config.data.path:
    raise ConfigError('config.data.path: name a dataset written by `compactlm prepare`')
  check_tokenizer(config, fingerprint)
  budget = config.data.bad_record_budget
  path = epath.Path(config.data.path)
  source = rows.open_dataset(path, 'train', fingerprint, bad_record_budget=budget)
  if config.data.eval_path:
    dev: RowSource = rows.open_dataset(config.data.eval_path, 'train', fingerprint, bad_record_budget=budget)
  elif 'validation' in read_manifest(path).splits:
    dev = rows.open_dataset(path, 'validation', fingerprint, bad_record_budget=budget)
  else:
    source, dev = rows.hold_out(source, config.data.eval_rows)
  digest = hashlib.sha256((path / 'manifest.json').read_bytes()).hexdigest()
  return JobData(source, (EvalSet(dev),), digest, tokenizer)


def check_tokenizer(config: RunConfig, fingerprint: str) -> None:
  """Raises ConfigError if `data.tokenizer` names another tokenizer."""
  named = config.data.tokenizer
  if named and tokenizer_of(named).fingerprint() != fingerprint:
    owner = config.teacher or config.model or config.data.path
    raise ConfigError(f'config.data.tokenizer: {named} is not the tokenizer of {owner}')
