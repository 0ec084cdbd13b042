"""Jobs that fine-tune on SQuAD."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from compactlm_jax.config import EncoderConfig, RunConfig, SpanConfig
from compactlm_jax.data.batches import eval_batches
from compactlm_jax.data.source import RowSource
from compactlm_jax.data.squad import Questions, find_squad, read_squad
from compactlm_jax.data.windows import Windows, make_windows
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.jobs.data import EvalSet, JobData
from compactlm_jax.jobs.start import kept_rows, probe_rows, starting_model, teacher_model
from compactlm_jax.losses.span import span_cross_entropy
from compactlm_jax.scoring.nbest import Answers, answer_questions
from compactlm_jax.scoring.squad import score_v1, score_v2
from compactlm_jax.tasks.span import make_span_task, span_logits
from compactlm_jax.types import Files, Params, Score, Task

_PROBE_ROWS = 64

log = logging.getLogger(__name__)


def squad_job(config: RunConfig) -> tuple[Task, JobData]:
  """A model and SQuAD, from `data.path` or from the files `data.train` and `data.dev`.

  Metrics are those of the official scripts, and the counts of `Windows.report`.

  Raises:
    ConfigError, DataError: fields or files that do not fit.
  """
  version, span = 2 if config.finetune.benchmark == 'squad2' else 1, config.span
  bundle, tokenizer = starting_model(config)
  cut = functools.partial(
    make_windows,
    tokenizer=tokenizer,
    seq_len=config.data.seq_len,
    doc_stride=span.doc_stride,
    max_query_length=span.max_query_length,
  )
  train, dev = _questions(config, version)
  windows = cut(train, train=True)
  _warn(windows)
  evals = []
  if dev is not None:
    held = cut(dev)
    _warn(held)
    score, files = span_score(held, span, version), span_files(held, span, version)
    evals.append(EvalSet(held.rows, score, files=files, digest=dev.digest))
  encoder = bundle.config.with_run_options(config.encoder)
  teacher = _teacher(config, windows.rows) if config.teacher else None
  task = make_span_task(encoder, span, config.finetune, version=version, start=bundle.params, teacher=teacher)
  return task, JobData(windows.rows, tuple(evals), train.digest, bundle.tokenizer).starting_from(bundle)


def span_answers(windows: Windows, outputs: Mapping[str, np.ndarray], span: SpanConfig, version: int) -> Answers:
  """What a model answers.

  Args:
    windows: the rows that it read.
    outputs: what the task's `evaluate` gave for each of them, in order.
    span: n-best size and longest answer.
    version: of SQuAD, 1 or 2.
  """
  return answer_questions(
    outputs,
    [q.id for q in windows.questions],
    windows.question,
    windows.shown,
    windows.max_context,
    windows.text,
    n_best=span.n_best,
    max_answer_length=span.max_answer_length,
    version=version,
  )


def span_score(windows: Windows, span: SpanConfig, version: int) -> Score:
  """Official metrics of the outputs of all windows, and the counts of `Windows.report`."""
  golds = {q.id: [text for text, _ in q.answers] for q in windows.questions}
  counts = {name: float(count) for name, count in windows.report.items() if name != 'questions'}

  def score(outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
    answers = span_answers(windows, outputs, span, version)
    if version == 1:
      return {**score_v1(golds, answers.best()), **counts}
    return {**score_v2(golds, answers.best(), answers.null_odds, span.null_threshold), **counts}

  return score


def span_files(windows: Windows, span: SpanConfig, version: int) -> Files:
  """SQuAD's files of the outputs of all windows: predictions.json, nbest_predictions.json, for v2.0 null_odds.json."""

  def files(outputs: Mapping[str, np.ndarray]) -> dict[str, str]:
    answers = span_answers(windows, outputs, span, version)
    contents = {
      'predictions.json': answers.predictions(span.null_threshold),
      'nbest_predictions.json': answers.nbest,
      'null_odds.json': answers.null_odds,
    }
    return {
      name: json.dumps(content, indent=2, ensure_ascii=False) + '\n'
      for name, content in contents.items()
      if version == 2 or name != 'null_odds.json'
    }

  return files


def _questions(config: RunConfig, version: int) -> tuple[Questions, Questions | None]:
  """Training and held-out questions; v1.1 takes only those that have an answer."""
  data = config.data
  if not (data.train or data.path):
    raise ConfigError(
      'config.data.path: name the folder with the official SQuAD files, tfds:NAME or hf:NAME; or set config.data.train '
      'and config.data.dev'
    )
  train = read_squad(data.train or find_squad(data.path, version, 'train'), 'train')
  if data.dev or data.path:
    dev = read_squad(data.dev or find_squad(data.path, version, 'dev'), 'dev')
  else:
    dev = None
  if version == 1:
    return _subset(_answerable(train), config), None if dev is None else _answerable(dev)
  if len(train.answerable()) == len(train):
    log.warning('%s: every question has an answer; a model trained on it cannot learn to give none', train.name)
  return _subset(train, config), dev


def _subset(questions: Questions, config: RunConfig) -> Questions:
  kept = kept_rows(config, len(questions), questions.name)
  return questions if kept is None else dataclasses.replace(questions, items=tuple(questions.items[i] for i in kept))


def _answerable(questions: Questions) -> Questions:
  kept = questions.answerable()
  if not len(kept):
    raise DataError(f'{questions.name}: no question has an answer; SQuAD v1.1 needs them')
  if len(kept) < len(questions):
    left = len(questions) - len(kept)
    log.warning('%s: %d of %d questions have no answer; squad1 leaves them out', questions.name, left, len(questions))
  return kept


def _warn(windows: Windows) -> None:
  name, report = windows.rows.name, windows.report
  if report['truncated_questions']:
    log.warning('%s: %d questions are cut to max_query_length', name, report['truncated_questions'])
  if report['unaligned_answers']:
    log.warning('%s: %d answers have no token; training leaves them out', name, report['unaligned_answers'])


def _teacher(config: RunConfig, rows: RowSource) -> tuple[Params, EncoderConfig]:
  """The fine-tuned teacher, after a look at what it knows of the training rows.

  Raises:
    ConfigError: another tokenizer, no independent span head, or one that was never trained.
  """
  bundle = teacher_model(config, rows)
  teacher = (bundle.params, bundle.config)
  make_span_task(bundle.config, config.span, config.finetune, teacher=teacher)  # checks the head
  probe = probe_rows(rows, _PROBE_ROWS)
  run = jax.jit(lambda params, batch: span_logits(params, bundle.config, batch))
  losses, uniform = [], []
  for batch in eval_batches(probe, min(16, len(probe))):
    real = np.asarray(batch.attention_mask) > 0
    start, end = (jnp.where(real, x, -1e9) for x in run(bundle.params, batch))
    kept = np.asarray(batch.weights) > 0
    losses.append(np.asarray(span_cross_entropy(start, end, jnp.asarray(batch.labels)))[kept])
    uniform.append(np.log(real.sum(-1))[kept])
  # A fresh head is within a few percent of guessing; a trained one far below.
  if not np.concatenate(losses).mean() < 0.9 * np.concatenate(uniform).mean():
    raise ConfigError(
      f'config.teacher: the span head of {config.teacher} does no better on the training rows than guessing; it was '
      'not fine-tuned on SQuAD'
    )
  return teacher
