"""Jobs that pre-train: replaced-token detection, masked and causal language modelling; the first two elastic too."""

from __future__ import annotations

import dataclasses
import logging

from compactlm_jax.config import EncoderConfig, RunConfig
from compactlm_jax.data import synthetic
from compactlm_jax.data.manifest import read_manifest
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.interop.folder import open_folder
from compactlm_jax.interop.pretrained import electra_start, mlm_start
from compactlm_jax.interop.tokenizer_files import read_tokenizer
from compactlm_jax.jobs.data import JobData, generated, prepared, refuse_unread
from compactlm_jax.jobs.models import load_generator, load_model, tokenizer_folder, tokenizer_of
from compactlm_jax.tasks.elastic_pretrain import make_elastic_electra_task, make_elastic_mlm_task
from compactlm_jax.tasks.electra import make_electra_task
from compactlm_jax.tasks.lm import make_lm_task
from compactlm_jax.tasks.mlm import make_mlm_task
from compactlm_jax.types import Params, SpecialTokens, Task

log = logging.getLogger(__name__)


def electra_job(config: RunConfig) -> tuple[Task, JobData]:
  """Generator and discriminator, from scratch or from `model` and `electra.generator`.

  Raises:
    ConfigError, DataError: fields, weights or files that do not fit.
  """
  data, special = _rows(config)
  found, encoder = _encoder(config, data)
  generator = load_generator(config.electra.generator) if config.electra.generator else None
  _check_words(generator, data, config.electra.generator)
  small = config.electra.generator_encoder(encoder)
  start, fresh = electra_start(found, generator, encoder, small, config.electra.sharing)
  data = data.starting_from(found, generator)
  if found or generator:
    _report(fresh)
  if config.task == 'adapt':
    return make_elastic_electra_task(encoder, config.electra, config.mask, special, config.adapt, start), data
  return make_electra_task(encoder, config.electra, config.mask, special, start), data


def _check_words(generator: Bundle | None, data: JobData, folder: str) -> None:
  """Raises ConfigError if a generator's tokenizer gives tokens other ids than that of the rows."""
  if generator is None or generator.tokenizer is None or data.tokenizer is None:
    return
  theirs, ours = generator.tokenizer.vocab, data.tokenizer.vocab
  if theirs != ours:
    token = min((token for token in {*theirs, *ours} if theirs.get(token) != ours.get(token)), key=str)
    raise ConfigError(
      f'config.electra.generator: the tokenizer in {folder} is another one than that of the rows ({token!r} has id '
      f'{theirs.get(token)} there and {ours.get(token)} here); take the generator that was trained with it'
    )


def mlm_job(config: RunConfig) -> tuple[Task, JobData]:
  """A masked language model, from scratch or from `model`.

  Raises:
    ConfigError, DataError: fields, weights or files that do not fit.
  """
  data, special = _rows(config)
  found, encoder = _encoder(config, data)
  start = _start(found, encoder)
  if config.task == 'adapt':
    return make_elastic_mlm_task(encoder, config.mask, special, config.adapt, start), data.starting_from(found)
  return make_mlm_task(encoder, config.mask, special, start), data.starting_from(found)


def lm_job(config: RunConfig) -> tuple[Task, JobData]:
  """A causal language model, from scratch or from `model` (one that read both directions starts to read one).

  Raises:
    ConfigError, DataError: fields, weights or files that do not fit.
  """
  data, _ = _rows(config)
  found, encoder = _encoder(config, data)
  encoder = dataclasses.replace(encoder, causal=config.encoder.causal)
  words_per_token = data.evals[0].rows.words_per_token if data.evals else 0.0
  return make_lm_task(encoder, words_per_token=words_per_token, start=_start(found, encoder)), data.starting_from(found)


def _start(found: Bundle | None, encoder: EncoderConfig) -> Params | None:
  """What a loaded model gives to a language model; says what it does not."""
  if found is None:
    return None
  start, fresh = mlm_start(found, encoder)
  _report(fresh)
  return start


def _report(fresh: tuple[str, ...]) -> None:
  if fresh:
    log.info('starting fresh: %s', ', '.join(fresh))


def _rows(config: RunConfig) -> tuple[JobData, SpecialTokens]:
  """The rows of a run and the ids of their special tokens."""
  why = 'this objective has no teacher; leave it out, or distil (config.task=distill, or config.adapt.base=distill)'
  refuse_unread({'teacher': config.teacher}, why)
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
  files = read_tokenizer(open_folder(tokenizer_folder(source)))
  special = SpecialTokens(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
  return prepared(config, tokenizer.fingerprint(), files), special


def _encoder(config: RunConfig, data: JobData) -> tuple[Bundle | None, EncoderConfig]:
  """(the model to continue from, its encoder or that of the configuration), if it fits the rows."""
  found, rows = load_model(config.model) if config.model else None, data.train
  encoder = found.config.with_run_options(config.encoder) if found else config.encoder
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
  return found, encoder if pad is None else dataclasses.replace(encoder, pad_token_id=pad)
