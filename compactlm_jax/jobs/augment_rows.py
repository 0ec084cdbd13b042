"""Rows with all their columns, in and out: what augmentation copies."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from compactlm_jax.data.glue import read_glue
from compactlm_jax.data.glue_tasks import GlueTask, glue_task
from compactlm_jax.data.table import table_rows
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.jobs.output import tsv_cell

Row = dict[str, Any]
"""Column -> value."""


@dataclasses.dataclass(frozen=True)
class Rows:
  """A table of which not everything is in memory.

  Attributes:
    read: starts a fresh pass over the rows.
    columns: of all rows.
    text_columns: one or two of them.
    count: number of rows.
    sha256: of what they hold, hex.
    name: the file.
  """

  read: Callable[[], Iterator[Row]]
  columns: tuple[str, ...]
  text_columns: tuple[str, ...]
  count: int
  sha256: str
  name: str


def open_rows(source: str, task: str = '', text_columns: Sequence[str] = ()) -> Rows:
  """Reads a table once, for its columns, number of rows and digest.

  Args:
    source: .tsv with a header or .jsonl, perhaps with .gz; with a task what `read_glue` takes.
    task: GLUE task, of which the texts and labels of the training set are taken, named and written as in its official
      file; '' takes all columns of any table.
    text_columns: one or two; () means 'text'. A task has its own.

  Returns:
    The rows.

  Raises:
    ConfigError: no such task, or a missing column.
    DataError: no rows, or what `table_rows` and `read_glue` complain about; file and line are named.
  """
  if task and text_columns:
    raise ConfigError(f'--text_columns: GLUE task {task} has its own; leave them out')
  if task:
    glue = glue_task(task, '--task')
    read, names = _glue_rows(source, glue), glue.texts
  else:
    names = tuple(text_columns) or ('text',)
    read = _checked(source, names)
  if len(names) not in (1, 2):
    raise ConfigError(f'--text_columns: {",".join(names)!r} must name one or two columns')
  digest, count = hashlib.sha256(), 0
  columns: tuple[str, ...] = ()
  for row in read():
    columns = columns or tuple(row)
    digest.update(json.dumps(row, sort_keys=True).encode() + b'\n')
    count += 1
  if not count:
    raise DataError(f'{source}: no rows')
  return Rows(read, columns, names, count, digest.hexdigest(), source)


@dataclasses.dataclass(frozen=True)
class Writer:
  """Rows as lines of text.

  Attributes:
    suffix: '.tsv' (not quoted: tabs and line ends in a cell become blanks) or '.jsonl'.
    columns: of a .tsv.
  """

  suffix: str
  columns: tuple[str, ...]

  def header(self) -> str:
    """What stands before the rows."""
    return '\t'.join(self.columns) + '\n' if self.suffix == '.tsv' else ''

  def line(self, row: Mapping[str, Any]) -> str:
    """A row."""
    if self.suffix == '.tsv':
      return '\t'.join(tsv_cell(row.get(name), exact=True) for name in self.columns) + '\n'
    return json.dumps(row, ensure_ascii=False) + '\n'


def _checked(source: str, names: Sequence[str]) -> Callable[[], Iterator[Row]]:
  def read() -> Iterator[Row]:
    for number, row in table_rows(source):
      for name in names:
        if name not in row:
          raise ConfigError(f'{source}:{number}: no column {name!r}; columns are {", ".join(map(str, row))}')
        if not isinstance(row[name], str):
          raise DataError(f'{source}:{number}: column {name!r} holds {row[name]!r} instead of text')
      yield row

  return read


def _glue_rows(source: str, task: GlueTask) -> Callable[[], Iterator[Row]]:
  table = read_glue(task.name, source, 'train')
  assert table.labels is not None  # a training set has them
  if task.classes:
    labels: list[str] = [task.written[i] for i in table.labels]
  else:
    labels = [np.format_float_positional(score, trim='0') for score in table.labels]

  def read() -> Iterator[Row]:
    for *texts, label in zip(*table.texts, labels, strict=True):
      yield {**dict(zip(task.texts, texts, strict=True)), task.label: label}

  return read
