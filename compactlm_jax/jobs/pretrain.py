"""Jobs that pre-train: replaced-token detection, masked and causal language modelling."""

from __future__ import annotations

import dataclasses
import logging

from etils import epath

from compactlm_jax.config import EncoderConfig, RunConfig
from compactlm_jax.data import synthetic
from compactlm_jax.data.manifest import read_manifest
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.interop.folder import open_folder
from compactlm_jax.interop.pretrained import electra_start, mlm_start
from compactlm_jax.interop.tokenizer_files import read_tokenizer
from compactlm_jax.jobs.data import JobData, generated, prepared, with_run_options
from compactlm_jax.jobs.models import load_generator, load_model, tokenizer_of
from compactlm_jax.tasks.electra import make_electra_task
from compactlm_jax.tasks.lm import make_lm_task
from compactlm_jax.tasks.mlm import make_mlm_task
from compactlm_jax.types import SpecialTokens, Task

log = logging.getLogger(__name__)


def electra_job(config: RunConfig) -> tuple[Task, JobData]:
  """Generator and discriminator, from scratch or from `model` and `electra.generator`.

  Raises:
    ConfigError, DataError: fields, weights or files that do not fit.
  """
  data, special = _rows(config)
  found = load_model(config.model) if config.model else None
  generator = load_generator(config.electra.generator) if config.electra.generator else None
  encoder = _encoder(config, found, data)
  small = config.electra.generator_encoder(encoder)
  start, fresh = electra_start(found, generator, encoder, small, config.electra.sharing)
  _report(found or generator, fresh)
  return make_electra_task(encoder, config.electra, config.mask, special, start), data


def mlm_job(config: RunConfig) -> tuple[Task, JobData]:
  """A masked language model, from scratch or from `model`.

  Raises:
    ConfigError, DataError: fields, weights or files that do not fit.
  """
  data, special = _rows(config)
  found = load_model(config.model) if config.model else None
  encoder = _encoder(config, found, data)
  start, fresh = mlm_start(found, encoder) if found else ({}, ())
  _report(found, fresh)
  return make_mlm_task(encoder, config.mask, special, start), data


def lm_job(config: RunConfig) -> tuple[Task, JobData]:
  """A causal language model, from scratch or from `model` (one that read both directions starts to read one).

  Raises:
    ConfigError, DataError: fields, weights or files that do not fit.
  """
  data, _ = _rows(config)
  found = load_model(config.model) if config.model else None
  encoder = dataclasses.replace(_encoder(config, found, data), causal=config.encoder.causal)
  start, fresh = mlm_start(found, encoder) if found else ({}, ())
  _report(found, fresh)
  words_per_token = data.dev.words_per_token if data.dev else 0.0
  return make_lm_task(encoder, words_per_token=words_per_token, start=start), data


def _report(found: Bundle | None, fresh: tuple[str, ...]) -> None:
  if found is not None and fresh:
    log.info('starting fresh: %s', ', '.join(fresh))


def _rows(config: RunConfig) -> tuple[JobData, SpecialTokens]:
  """The rows of a run and the ids of their special tokens."""
  if not config.data.path:
    if config.model:
      raise ConfigError(
        'config.data.path: name a dataset written by `compactlm prepare` with the tokenizer of the model'
      )
    special = SpecialTokens(pad=synthetic.PAD, cls=synthetic.CLS, sep=synthetic.SEP, mask=synthetic.MASK)
    return generated(config), special
  read_manifest(config.data.path)
  source = config.model or config.data.path
  tokenizer = tokenizer_of(source)
  inside = epath.Path(source) / 'tokenizer'
  files = read_tokenizer(open_folder(inside if inside.exists() else source))
  special = SpecialTokens(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
  return prepared(config, tokenizer.fingerprint(), files), special


def _encoder(config: RunConfig, found: Bundle | None, data: JobData) -> EncoderConfig:
  """The encoder, if it fits the rows."""
  encoder, rows = with_run_options(found.config, config.encoder) if found else config.encoder, data.train
  if encoder.vocab_size != rows.vocab_size:
    raise ConfigError(
      f'config.encoder.vocab_size: the model has {encoder.vocab_size} and the data {rows.vocab_size} tokens; set it to '
      f'{rows.vocab_size}, or prepare the text with the tokenizer of the model'
    )
  if rows.seq_len > encoder.max_positions:
    raise ConfigError(
      f'config.encoder.max_positions: the rows have {rows.seq_len} tokens, the model positions for '
      f'{encoder.max_positions}; prepare shorter rows or raise it'
    )
  pad = 0 if data.tokenizer is None else data.tokenizer.pad_token_id
  return encoder if pad is None else dataclasses.replace(encoder, pad_token_id=pad)
