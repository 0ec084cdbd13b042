"""Prediction from file to file, a chunk at a time."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

import jax
import tqdm
from etils import epath

from compactlm_jax.config import EncoderConfig, FinetuneConfig, SpanConfig
from compactlm_jax.data.squad import Question, Questions
from compactlm_jax.data.table import numbered_lines, table_rows
from compactlm_jax.data.windows import make_windows
from compactlm_jax.errors import ConfigError, DataError, StorageError
from compactlm_jax.jobs.models import load_model
from compactlm_jax.jobs.output import output_table, tsv_cell
from compactlm_jax.jobs.predict import CHUNK, Reader, Usage, class_names, classify_texts, require_classifier
from compactlm_jax.jobs.squad import span_answers
from compactlm_jax.storage import whole_file
from compactlm_jax.tasks.span import make_span_task
from compactlm_jax.types import Batch, Params

Row = tuple[str, tuple[str, ...]]
"""(where it stands, its texts)."""

Answer = dict[str, Any]
"""Column -> value of a row of the output; None is an empty cell."""


_CHUNK_CHARS = 1 << 24
"""Characters that are in memory at a time, with one row more: rows may be as long as a megabyte."""


@dataclasses.dataclass(frozen=True)
class Answerer:
  """What turns rows into answers.

  Attributes:
    columns: of the output.
    answer: rows with texts -> their answers.
    readable: whether a row has enough text to be answered.
  """

  columns: tuple[str, ...]
  answer: Callable[[Sequence[Row]], tuple[list[Answer], Usage]]
  readable: Callable[[Iterable[object]], bool] = any


log = logging.getLogger(__name__)


def predict_file(
  model: str,
  source: str,
  output: str,
  *,
  text_columns: Sequence[str] = ('text',),
  question: str = '',
  context: str = '',
  batch_size: int = 32,
  seq_len: int = 0,
  null_threshold: float | None = None,
) -> str:
  """Reads texts from a file and writes one row of predictions for each, in the same order.

  A classifier gives 'prediction' and the probability of each class ('probability:NAME' in .tsv, an object
  'probabilities' in .jsonl), a regression the score as 'prediction', a span model 'answer', 'probability' among its
  n best answers, and 'null_odds' where it can say that there is no answer.

  Every line of a .txt file is a row; blank lines of .tsv and .jsonl are none. A row whose texts are all empty (of a
  question and its context: one of them) gets an empty prediction (null in .jsonl), and is counted.

  Args:
    model: model folder or run.
    source: .tsv (with a header), .jsonl or .txt, each perhaps with .gz. Memory does not grow with its length.
    output: .tsv or .jsonl; appears when it is complete.
    text_columns: one column, or two for pairs; 'text' is the line of a .txt file.
    question: column of the questions, for a span model.
    context: column of the texts that hold the answers, for a span model.
    batch_size: see `predict`.
    seq_len: see `predict`; 0 takes the positions of the model. Longer contexts are read in windows.
    null_threshold: of a span model: no answer where the null odds exceed it; None always answers.

  Returns:
    One line: rows, rows/s, tokens/s, padding, what was cut or empty.

  Raises:
    ConfigError: a model without a trained head, a missing column, a kind of file that is not known.
    DataError: damaged files.
    StorageError: the output cannot be written.
  """
  target = output_table(output, source)
  if bool(question) != bool(context):
    raise ConfigError('--question, --context: name both columns')
  columns = (question, context) if question else tuple(text_columns)
  if len(columns) not in (1, 2):
    raise ConfigError(f'--text_columns: {",".join(columns)!r} must name one or two columns')
  rows = _rows(epath.Path(source), columns)
  first = next(rows, None)
  if first is None:
    raise DataError(f'{source}: no rows')
  bundle = load_model(model)
  if question:
    if 'span' not in bundle.params:
      raise ConfigError(f'{model}: has no trained head for answers; fine-tune it on questions first (squad1, squad2)')
    answer = _span_answerer(Reader.of(bundle, ('span',), batch_size, seq_len=seq_len or None), null_threshold)
  else:
    require_classifier(bundle)
    reader = Reader.of(bundle, ('classifier',), batch_size, seq_len=seq_len or None)
    answer = _class_answerer(reader, target.suffix == '.jsonl')
  return _write(target, itertools.chain([first], rows), answer)


def _write(target: epath.Path, rows: Iterator[Row], answerer: Answerer) -> str:
  """Predicts chunk by chunk into a file beside the target, which takes its place at the end."""
  started, usage, empty, written = time.monotonic(), Usage(), 0, 0
  try:
    with whole_file(target) as draft, draft.open('w', encoding='utf-8') as file, _bar() as bar:
      for chunk in _chunks(rows):
        readable = [answerer.readable(text.strip() for text in texts) for _, texts in chunk]
        full = list(itertools.compress(chunk, readable))
        answers, used = answerer.answer(full) if full else ([], Usage())
        given = iter(answers)
        for known in readable:
          line = next(given) if known else dict.fromkeys(answerer.columns)
          _write_line(file, line, target.suffix == '.jsonl', header=not written)
          written += 1
        usage, empty = usage + used, empty + len(chunk) - len(full)
        bar.update(len(chunk))
  except OSError as e:
    raise StorageError(f'{target}: cannot be written ({e.strerror or e}); nothing was left there') from e
  return _summary(target, written, empty, usage, time.monotonic() - started)


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
  """CHUNK rows at a time, or as many as have _CHUNK_CHARS."""
  chunk: list[Row] = []
  chars = 0
  for row in rows:
    chunk.append(row)
    chars += sum(map(len, row[1]))
    if len(chunk) == CHUNK or chars >= _CHUNK_CHARS:
      yield chunk
      chunk, chars = [], 0
  if chunk:
    yield chunk


def _summary(target: epath.Path, written: int, empty: int, usage: Usage, seconds: float) -> str:
  parts = [
    f'{target}: {written:,} rows in {seconds:.1f} s',
    f'{written / seconds:,.0f} rows/s',
    f'{usage.tokens / seconds:,.0f} tokens/s',
    f'{100 * usage.padding:.0f}% padding',
  ]
  if usage.truncated:
    parts.append(f'{usage.truncated:,} longer than the limit and cut')
  if empty:
    parts.append(f'{empty:,} empty and not predicted')
  return ', '.join(parts)


def _bar() -> Any:
  return tqdm.tqdm(unit=' rows', disable=not sys.stderr.isatty(), file=sys.stderr)


def _write_line(file: TextIO, answer: Answer, as_json: bool, header: bool) -> None:
  if as_json:
    file.write(json.dumps(answer, ensure_ascii=False) + '\n')
    return
  if header:
    file.write('\t'.join(map(tsv_cell, answer)) + '\n')
  file.write('\t'.join(map(tsv_cell, answer.values())) + '\n')


def _rows(file: epath.Path, columns: tuple[str, ...]) -> Iterator[Row]:
  kind = epath.Path(file.name.removesuffix('.gz')).suffix
  if kind == '.txt':
    lines: Iterator[tuple[int, dict[str, Any]]] = ((number, {'text': line}) for number, line in numbered_lines(file))
  elif kind in ('.tsv', '.jsonl'):
    lines = table_rows(file)
  else:
    raise ConfigError(f'--input: {file} is of an unknown kind; use .tsv, .jsonl or .txt, optionally with .gz')
  for number, row in lines:
    texts = []
    for name in columns:
      if name not in row:
        raise ConfigError(f'{file}:{number}: no column {name!r}; columns are {", ".join(map(str, row))}')
      text = '' if row[name] is None else row[name]
      if not isinstance(text, str):
        raise DataError(f'{file}:{number}: column {name!r} holds {text!r} instead of text')
      texts.append(text)
    yield f'{file}:{number}', tuple(texts)


def _class_answerer(reader: Reader, as_json: bool) -> Answerer:
  classes = class_names(reader.bundle)
  named = ('probabilities',) if as_json else tuple(f'probability:{name}' for name in classes)

  def answer(rows: Sequence[Row]) -> tuple[list[Answer], Usage]:
    found = classify_texts(reader, list(zip(*(texts for _, texts in rows), strict=True)))
    if not classes:
      return [{'prediction': float(score)} for score in found.scores], found.usage
    answers: list[Answer] = []
    for label, shares in zip(found.labels, found.probabilities.tolist(), strict=True):
      values = [dict(zip(classes, shares, strict=True))] if as_json else shares
      answers.append({'prediction': label, **dict(zip(named, values, strict=True))})
    return answers, found.usage

  return Answerer(('prediction', *(named if classes else ())), answer)


def _span_answerer(reader: Reader, null_threshold: float | None) -> Answerer:
  head = reader.params['span']
  joint = 'kernel' not in head
  # An independent head always knows the score of no answer; a joint head decides it only if it has learned to.
  version = 2 if not joint or 'answerable_hidden' in head else 1
  span = SpanConfig(head='joint' if joint else 'independent')
  forward = functools.partial(_find, reader.bundle.config, span, version)

  def answer(rows: Sequence[Row]) -> tuple[list[Answer], Usage]:
    items = tuple(Question(str(i), texts[0], texts[1], ()) for i, (_, texts) in enumerate(rows))
    longest = min(span.max_query_length, max(1, reader.seq_len // 2 - 4))
    windows = make_windows(
      Questions(items, 'questions', ''),
      reader.tokenizer,
      reader.seq_len,
      doc_stride=span.doc_stride,
      max_query_length=longest,
    )
    outputs, usage = reader.run(windows.rows, forward)
    found = span_answers(windows, outputs, span, version)
    answers: list[Answer] = []
    for item in items:
      best = next((e for e in found.nbest[item.id] if e['text']), {'text': '', 'probability': 0.0})
      odds = found.null_odds.get(item.id)
      none = odds is not None and null_threshold is not None and odds > null_threshold
      answers.append({'answer': '' if none else best['text'], 'probability': best['probability'], 'null_odds': odds})
    return answers, dataclasses.replace(usage, truncated=windows.report['truncated_questions'])

  return Answerer(('answer', 'probability', 'null_odds'), answer, all)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _find(config: EncoderConfig, span: SpanConfig, version: int, params: Params, batch: Batch) -> Any:
  return make_span_task(config, span, FinetuneConfig(), version=version).evaluate(params, None, batch)
