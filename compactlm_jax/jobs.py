"""What the commands do, as functions: loading models and runs, building jobs, training, exporting.

The one place where configuration, data, weights and tasks meet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from compactlm_jax.checkpoint import load_params
from compactlm_jax.config import EncoderConfig, RunConfig, from_config_dict
from compactlm_jax.data import source as rows
from compactlm_jax.data.manifest import read_manifest
from compactlm_jax.data.source import Batches, RowSource
from compactlm_jax.data.synthetic import synthetic_rows, synthetic_table
from compactlm_jax.data.table import read_table, tokenize_table
from compactlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle, drop_pooler, from_pretrained, save_pretrained
from compactlm_jax.interop.folder import open_folder
from compactlm_jax.interop.tokenizer_files import TokenizerFiles, read_tokenizer
from compactlm_jax.nn.encoder import init_encoder
from compactlm_jax.tasks.distill import make_distill_task
from compactlm_jax.tasks.finetune import make_finetune_task
from compactlm_jax.train.loop import Job, train
from compactlm_jax.tree import named_leaves
from compactlm_jax.types import Batch, Params, Task


@dataclasses.dataclass(frozen=True)
class _Data:
  """Rows of a job, and what identifies them."""

  train: RowSource
  dev: RowSource | None
  identity: str
  tokenizer: TokenizerFiles | None


def load_model(path: epath.PathLike) -> Bundle:
  """A model from a Hugging Face folder, from an export, or from the newest intact checkpoint of a run.

  Args:
    path: the folder or run directory.

  Raises:
    ConfigError, DataError, StorageError: the folder cannot be used; the message says why.
  """
  run = epath.Path(path)
  if not (run / 'checkpoints').exists():
    return from_pretrained(path)
  params, metadata = load_params(run / 'checkpoints')
  encoder = from_config_dict(EncoderConfig, metadata['model']['encoder'], 'encoder.')
  tokenizer = read_tokenizer(open_folder(run / 'tokenizer')) if (run / 'tokenizer').exists() else None
  bundle = Bundle(encoder, jax.tree.map(jnp.asarray, params), tokenizer)
  # In a bundle a classifier reads the pooler if there is one; this run's reads the first token itself.
  raw = 'classifier' in params and encoder.pooler and not metadata['model']['finetune']['pooled']
  return drop_pooler(bundle) if raw else bundle


def tokenizer_of(path: epath.PathLike) -> Tokenizer:
  """The tokenizer of a model folder or a run."""
  inside = epath.Path(path) / 'tokenizer'
  return load_tokenizer(inside if inside.exists() else path)


def run_train(config: RunConfig, workdir: str, **options: Any) -> dict[str, Any]:
  """Builds the job of a configuration and runs it; see `train.loop.train`."""
  return train(build_job(config), workdir, **options)


def run_export(checkpoint: str, output: str) -> Bundle:
  """Writes the model of a run, or of a folder, as a Hugging Face folder; returns what was written."""
  bundle = load_model(checkpoint)
  save_pretrained(bundle, output)
  return bundle


def build_job(config: RunConfig) -> Job:
  """Loads data and weights, checks that they fit together, and returns what the loop runs.

  Raises:
    ConfigError: a field, or files that do not belong together.
    DataError: unusable data or weights.
  """
  task, data = {'distill': _distill, 'finetune': _finetune}[config.task](config)
  steps = config.steps or max(1, math.ceil(config.epochs * len(data.train) / config.batch_size))
  identity = {'data': data.identity, 'tokenizer': data.train.fingerprint}
  if task.frozen is not None:
    identity['teacher'] = params_digest(task.frozen)
  files = {f'tokenizer/{name}': content for name, content in data.tokenizer.files.items()} if data.tokenizer else {}
  return Job(task, config, steps, _batches(config, data.train), _eval_batches(config, data.dev), identity, files)


def _batches(config: RunConfig, source: RowSource) -> Batches:
  return Batches(source, config.batch_size, config.seed, jax.process_index(), jax.process_count())


def _eval_batches(config: RunConfig, source: RowSource | None) -> Callable[[], Iterable[Batch]] | None:
  if source is None:
    return None
  return lambda: rows.eval_batches(source, config.batch_size, jax.process_index(), jax.process_count())


def params_digest(params: Params) -> str:
  """SHA-256 (hex) over names, dtypes, shapes and bytes of a parameter tree."""
  digest = hashlib.sha256()
  for name, leaf in sorted(named_leaves(params).items()):
    array = np.ascontiguousarray(leaf)
    digest.update(f'{name} {array.dtype} {array.shape};'.encode())
    digest.update(array.data)
  return digest.hexdigest()


def _distill(config: RunConfig) -> tuple[Task, _Data]:
  if not config.teacher:
    return _distill_generated(config)
  teacher, fingerprint = load_model(config.teacher), tokenizer_of(config.teacher).fingerprint()
  data = _prepared(config, fingerprint, teacher)
  start = load_model(config.model) if config.model else None
  student = _with_run_options(start.config, config.encoder) if start else config.encoder
  task = make_distill_task(
    student,
    teacher.config,
    teacher.params,
    config.distill,
    start=start.params if start else None,
    student_tokenizer=data.train.fingerprint,
    teacher_tokenizer=fingerprint,
  )
  return task, data


def _distill_generated(config: RunConfig) -> tuple[Task, _Data]:
  """A random teacher, twice as deep: for trying the machinery without any file."""
  if config.data.path:
    raise ConfigError('config.teacher: name a model folder or a run; only generated data can do without')
  deeper = dataclasses.replace(config.encoder, num_layers=2 * config.encoder.num_layers)
  # Wide kernels: a fresh teacher's relations are almost uniform, and there would be nothing to learn.
  deeper = dataclasses.replace(deeper, initializer_range=0.1)
  teacher = init_encoder(deeper, jax.random.key(config.seed + 1))
  return make_distill_task(config.encoder, deeper, teacher, config.distill), _generated(config)


def _generated(config: RunConfig) -> _Data:
  sizes: dict[str, Any] = {'seq_len': config.data.seq_len, 'vocab_size': config.encoder.vocab_size}
  source = synthetic_rows(seed=config.seed, **sizes)
  train_rows, dev = rows.hold_out(source, config.data.eval_rows)
  return _Data(train_rows, dev, f'generated {sizes}', None)


def _prepared(config: RunConfig, fingerprint: str, owner: Bundle) -> _Data:
  """A prepared dataset whose ids the owner's tokenizer made."""
  if not config.data.path:
    raise ConfigError('config.data.path: name a dataset written by `compactlm prepare`')
  _check_tokenizer(config, fingerprint)
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
  return _Data(source, dev, digest, owner.tokenizer)


def _check_tokenizer(config: RunConfig, fingerprint: str) -> None:
  named = config.data.tokenizer
  if named and tokenizer_of(named).fingerprint() != fingerprint:
    raise ConfigError(f'config.data.tokenizer: {named} is not the tokenizer of {config.teacher or config.model}')


def _finetune(config: RunConfig) -> tuple[Task, _Data]:
  if not config.data.train:
    sizes: dict[str, Any] = {'seq_len': config.data.seq_len, 'vocab_size': config.encoder.vocab_size}
    train_rows = synthetic_table(seed=config.seed, **sizes)
    dev: RowSource | None = synthetic_table(seed=config.seed, rows=512, rows_seed=1, **sizes)
    data = _Data(train_rows, dev, f'generated table {sizes}', None)
    return make_finetune_task(config.encoder, train_rows.classes, config.finetune), data
  if not config.model:
    raise ConfigError('config.model: name the model folder or run to fine-tune')
  bundle, tokenizer = load_model(config.model), tokenizer_of(config.model)
  _check_tokenizer(config, tokenizer.fingerprint())
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
  encoder = _with_run_options(bundle.config, config.encoder)
  task = make_finetune_task(encoder, table.classes, config.finetune, bundle.params)
  return task, _Data(train_rows, dev, identity, bundle.tokenizer)


def _with_run_options(loaded: EncoderConfig, asked: EncoderConfig) -> EncoderConfig:
  """Sizes of the loaded model; dropout, dtype, remat and unroll of this run."""
  names = ('hidden_dropout', 'attention_dropout', 'dtype', 'remat', 'scan_unroll')
  return dataclasses.replace(loaded, **{name: getattr(asked, name) for name in names})
