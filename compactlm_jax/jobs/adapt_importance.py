"""Heads and neurons of a fine-tuned model, sorted by importance on labelled rows before its widths are trained."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import jax
import numpy as np

from compactlm_jax.compress.importance import Importance, add_importance, no_importance
from compactlm_jax.compress.rewire import rewire
from compactlm_jax.config import RunConfig
from compactlm_jax.data.batches import eval_batches
from compactlm_jax.errors import ConfigError
from compactlm_jax.jobs.finetune import Labelled
from compactlm_jax.jobs.start import probe_rows
from compactlm_jax.losses.reduce import masked_mean
from compactlm_jax.tasks.finetune import SentenceModel
from compactlm_jax.types import Batch, Params

log = logging.getLogger(__name__)


def rewired(params: Params, model: SentenceModel, rows: Labelled, config: RunConfig) -> Params:
  """The model with heads and neurons in descending order of importance; what it computes stays.

  Every process measures all rows, on one device and in one order, so that an interrupted run finds the same order.

  Args:
    params: fine-tuned 'encoder' and 'classifier', whose scores are in units of the labels.
    model: what they are the parameters of.
    rows: of the run; `config.adapt.importance_rows` says which are measured.
    config: of the run. A batch is `batch_size` rows (absolute values are taken per batch; the original has 8 for each
      device).

  Raises:
    ConfigError: no held-out rows to measure on, or an encoder whose layers differ in size.
    NumericsError: importance that is not finite.
  """
  found = _measured(params, model, _batches(rows, config), config.adapt.importance_sum)
  return rewire(params, model.encoder, np.asarray(found.heads_NH), np.asarray(found.neurons_NF))


def _measured(params: Params, model: SentenceModel, batches: Iterator[Batch], importance_sum: str) -> Importance:
  def loss(params: Params, batch: Batch) -> jax.Array:
    losses_B = model.losses(model.outputs(params, batch, None), batch)
    return masked_mean(losses_B, batch.weights)

  @jax.jit
  def add(total: Importance, params: Params, batch: Batch) -> Importance:
    grads = jax.grad(loss)(params, batch)
    return add_importance(total, params, grads, model.encoder, importance_sum)

  head = jax.tree.map(lambda leaf: leaf / model.scale, params['classifier'])
  params, total = {**params, 'classifier': head}, no_importance(model.encoder)
  for batch in batches:
    total = add(total, params, batch)
  return total


def _batches(rows: Labelled, config: RunConfig) -> Iterator[Batch]:
  """The batches that are measured: all rows, or evenly spaced ones of each set where their number is limited."""
  sources, count = [held.rows for held in rows.job.evals], config.adapt.importance_batches
  if config.adapt.importance_rows == 'train':
    sources = [rows.job.train]
  if not sources:
    raise ConfigError(
      "config.adapt.importance_rows: there are no held-out rows; name them (data.dev), or measure on 'train'"
    )
  if count:
    shares = [count // len(sources) + (i < count % len(sources)) for i in range(len(sources))]
    sources = [probe_rows(source, share * config.batch_size) for source, share in zip(sources, shares) if share]
  log.info('importance of heads and neurons: measured on %d rows', sum(map(len, sources)))
  return itertools.chain.from_iterable(eval_batches(source, config.batch_size) for source in sources)
