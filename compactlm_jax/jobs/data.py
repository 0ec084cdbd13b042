"""Rows of a job: prepared datasets, and generated ones for trying things without files."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from compactlm_jax.config import RunConfig
from compactlm_jax.data import source as rows
from compactlm_jax.data.manifest import read_manifest
from compactlm_jax.data.source import RowSource
from compactlm_jax.data.synthetic import synthetic_rows
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.interop.tokenizer_files import TokenizerFiles
from compactlm_jax.jobs.models import params_digest, tokenizer_of
from compactlm_jax.types import Files, Score


@dataclasses.dataclass(frozen=True)
class EvalSet:
  """Held-out rows.

  Attributes:
    rows: what is evaluated.
    score: metrics of the gathered outputs, which come in the order of `rows`.
    prefix: of the names of all its metrics.
    files: predictions that `compactlm evaluate` writes.
    digest: of what was read; '' for rows that `JobData.identity` stands for.
  """

  rows: RowSource
  score: Score = lambda rows: {}
  prefix: str = ''
  files: Files = lambda rows: {}
  digest: str = ''


@dataclasses.dataclass(frozen=True)
class JobData:
  """Rows of a job, and what identifies it.

  Attributes:
    train: its rows.
    evals: held-out rows.
    identity: digest of the rows.
    tokenizer: files that are kept with the run.
    start: digest of the weights that were loaded to start from; '' for fresh ones.
  """

  train: RowSource
  evals: tuple[EvalSet, ...]
  identity: str
  tokenizer: TokenizerFiles | None
  start: str = ''

  def starting_from(self, *bundles: Bundle | None) -> JobData:
    """The same, for a run that starts from these weights."""
    found = [params_digest(bundle.params) for bundle in bundles if bundle is not None]
    return dataclasses.replace(self, start=' '.join(found))

  @property
  def held_out(self) -> str:
    """Digest of the held-out rows that `identity` does not stand for; '' if there are none."""
    named = [f'{held.prefix}{held.digest}' for held in self.evals if held.digest]
    return hashlib.sha256(' '.join(named).encode()).hexdigest() if named else ''


def generated(config: RunConfig) -> JobData:
  """Rows of `data.seq_len` tokens for trying a task; their seed is the run's.

  Raises:
    ConfigError: fields are set that would not be read.
  """
  _refuse_labelled(config)
  refuse_unread(
    {'data.eval_path': config.data.eval_path, 'data.tokenizer': config.data.tokenizer},
    'config.data.path is not set, and without it rows are generated; name a dataset written by `compactlm prepare`',
  )
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
    ConfigError: no path, another tokenizer, or fields that would not be read.
    DataError: damaged or missing files.
  """
  _refuse_labelled(config)
  if not config.data.path:
    raise ConfigError('config.data.path: name a dataset written by `compactlm prepare`')
  check_tokenizer(config, fingerprint)
  budget = config.data.bad_record_budget
  path = epath.Path(config.data.path)
  source, held_digest = rows.open_dataset(path, 'train', fingerprint, bad_record_budget=budget), ''
  if config.data.eval_path:
    dev: RowSource = rows.open_dataset(config.data.eval_path, 'train', fingerprint, bad_record_budget=budget)
    held_digest = _digest(epath.Path(config.data.eval_path))
  elif 'validation' in read_manifest(path).splits:
    dev = rows.open_dataset(path, 'validation', fingerprint, bad_record_budget=budget)
  else:
    source, dev = rows.hold_out(source, config.data.eval_rows)
  return JobData(source, (EvalSet(dev, digest=held_digest),), _digest(path), tokenizer)


def _digest(dataset: epath.Path) -> str:
  return hashlib.sha256((dataset / 'manifest.json').read_bytes()).hexdigest()


def refuse_unread(fields: Mapping[str, str | int], why: str) -> None:
  """Raises ConfigError for the first field that is set although the job does not read it.

  Args:
    fields: name in the configuration -> its value, '' or 0 where it is not set.
    why: it is not read, and what to do about it.
  """
  for name, value in fields.items():
    if value:
      raise ConfigError(f'config.{name}: {value} would not be read: {why}')


def _refuse_labelled(config: RunConfig) -> None:
  names = ('train', 'dev', 'train_rows')
  refuse_unread(
    {f'data.{name}': getattr(config.data, name) for name in names},
    'it is for labelled tables, and this task takes the rows of config.data.path; leave it out',
  )


def check_tokenizer(config: RunConfig, fingerprint: str) -> None:
  """Raises ConfigError if `data.tokenizer` names another tokenizer."""
  named = config.data.tokenizer
  if named and tokenizer_of(named).fingerprint() != fingerprint:
    owner = config.teacher or config.model or config.data.path
    raise ConfigError(f'config.data.tokenizer: {named} is not the tokenizer of {owner}')
