"""GLUE as tables, from its official files or from TFDS and Hugging Face datasets; submission files for its server."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from compactlm_jax.data.glue_tasks import TASKS, GlueSplit, GlueTask, glue_split
from compactlm_jax.data.table import Table, header_of, numbered_lines
from compactlm_jax.data.text import hf_records, tfds_records
from compactlm_jax.errors import ConfigError, DataError, NumericsError

_FEW = 10
"""Short lines that are always forgiven where the original readers skip them; beyond, one in a thousand."""

log = logging.getLogger(__name__)

_Row = tuple[str, tuple[str, ...], int | float | None]
"""(where it stands, texts, class index or score or None)."""


def read_glue(task: str, root: Any, split: str) -> Table:
  """One split of a GLUE task.

  Official files are unquoted TSV, .gz or not; byte order marks and carriage returns are dropped, quotes are ordinary
  characters. Of QQP's labelled files, lines with too few columns are left out and reported, as the original readers do
  (BERT, ELECTRA, TFDS); elsewhere they are errors. Empty texts are kept, and reported.

  Args:
    task: such as 'rte'; 'ax' is the diagnostic set.
    root: the folder of all tasks or the task's own, in the official layout; one file with a task's columns;
      'tfds:NAME' (NAME 'glue' means glue/TASK) or the version directory of such a dataset after 'tfds:';
      'hf:NAME[:CONFIG]' (a NAME that ends in 'glue' has the task's name as CONFIG).
    split: 'train', 'dev', 'test'; for MNLI also 'dev_mismatched', 'test_mismatched' and 'ax'.

  Returns:
    The table. Its classes are in GLUE's official order, its labels None where the split has none.

  Raises:
    ConfigError: no such task, split or dataset.
    DataError: a file or column is missing, a line is malformed or a label outside the classes; file and line are named.
  """
  row, part = glue_split(task, split)
  kind, _, name = str(root).partition(':')
  if kind == 'tfds':
    name = f'{name or "glue"}/{row.name}' if name in ('', 'glue') else name
    builder, records = tfds_records(name, part.dataset)
    ordered: Iterable[Any] = (records[i] for i in range(len(records)))
    rows: Iterable[_Row] = _dataset_rows(row, ordered, builder.info.features, f'tfds:{name} ({part.dataset})')
  elif kind == 'hf':
    name = f'{name}:{row.name}' if name.endswith('glue') else name
    data = hf_records(name, part.dataset)
    rows = _dataset_rows(row, data, data.features, f'hf:{name} ({part.dataset})')
  else:
    file = _find(row, part, root)
    return _table(row, part, _file_rows(row, part, file), str(file))
  return _table(row, part, rows, f'{root} ({row.name}, {part.dataset})')


def submission(task: str, split: str, outputs: np.ndarray) -> tuple[str, str]:
  """The file that GLUE's server takes for predictions of a test set.

  Args:
    task: such as 'rte'.
    split: 'test'; for MNLI also 'test_mismatched' and 'ax'.
    outputs: [B, C] outputs per class, or [B] or [B, 1] scores, for every row of the split in order.

  Returns:
    (file name, text): a header and one line per row with its number from 0 and the class as GLUE writes it, or the
    score within its range with three decimals.

  Raises:
    ConfigError: no such task, or a split that is not submitted.
    DataError: outputs of another shape.
    NumericsError: an output is not a number.
  """
  row, part = glue_split(task, split)
  if not part.submission:
    raise ConfigError(
      f'GLUE task {task}: split {split!r} has no submission file; use {", ".join(s.name for s in row.test_splits)}'
    )
  outputs = np.asarray(outputs)
  if not np.isfinite(outputs).all():
    raise NumericsError(f'{part.submission}: some outputs are not finite; the model has diverged')
  if row.classes:
    if outputs.ndim != 2 or outputs.shape[1] != len(row.classes):
      raise DataError(f'{part.submission}: outputs {outputs.shape} must be [rows, {len(row.classes)}]')
    found = [row.written[index] for index in outputs.argmax(-1)]
  else:
    if outputs.ndim not in (1, 2) or outputs.shape[1:] not in ((), (1,)):
      raise DataError(f'{part.submission}: outputs {outputs.shape} must be [rows] or [rows, 1]')
    found = [f'{score:.3f}' for score in np.clip(outputs.reshape(-1), *row.score_range)]
  return part.submission, ''.join(['index\tprediction\n', *(f'{i}\t{name}\n' for i, name in enumerate(found))])


def _find(task: GlueTask, part: GlueSplit, root: Any) -> epath.Path:
  if not str(root):
    raise ConfigError("config.data.path: name the folder of GLUE, 'tfds:glue' or 'hf:nyu-mll/glue'")
  top = epath.Path(root)
  if top.is_file():
    return top
  others = {name for t in TASKS if t.folder != task.folder for name in (t.name, t.folder.lower())}
  # A file dev.tsv in the folder of another task is not ours. The diagnostic set may lie in MNLI's (ELECTRA).
  own = () if top.name.lower() in others - ({'mnli'} if task.name == 'ax' else set()) else ('',)
  for folder in (task.folder, task.name, *own):
    for suffix in ('.tsv', '.tsv.gz'):
      file = top / folder / (part.file + suffix)
      if file.exists():
        return file
  raise DataError(
    f'{top}: no {task.folder}/{part.file}.tsv (or .tsv.gz) there; config.data.path must be the folder of all GLUE '
    f"tasks or of {task.folder} in the official layout, 'tfds:glue' or 'hf:nyu-mll/glue'"
  )


def _file_rows(task: GlueTask, part: GlueSplit, file: epath.Path) -> Iterator[_Row]:
  columns: Sequence[str] = ()
  labelled, short, count = part.name in ('train', *(s.name for s in task.dev_splits)), [], 0
  read = _label_reader(task, task.written)
  for number, line in numbered_lines(file):
    if not line.strip():
      continue
    cells = line.split('\t')
    if not columns:
      headed = not (task.header and labelled) or set(task.texts) <= {c.strip() for c in cells}
      columns = _columns(task, labelled, file, cells) if headed else task.header
      if headed:
        continue
    count += 1
    if len(cells) < len(columns) and labelled and task.skips_short_lines:
      short.append(number)
      continue
    if len(cells) != len(columns):
      raise DataError(
        f'{file}:{number}: {len(cells)} columns, expected {len(columns)} ({", ".join(columns)}); is the file complete?'
      )
    found = dict(zip(columns, cells, strict=True))
    label = read(found[task.label], f'{file}:{number}') if task.label in found else None
    yield f'{file}:{number}', tuple(found[name] for name in task.texts), label
  if len(short) > max(_FEW, count // 1000):
    raise DataError(f'{file}: {len(short)} of {count} lines have too few columns, the first is line {short[0]}')
  if short:
    log.warning(
      '%s: %d of %d lines have too few columns and are left out, as the original readers do: lines %s',
      *(file, len(short), count, ', '.join(map(str, short))),
    )


def _columns(task: GlueTask, labelled: bool, file: epath.Path, cells: Sequence[str]) -> list[str]:
  columns = header_of(cells, str(file))
  for name in (*task.texts, *((task.label,) if labelled else ())):
    if name not in columns:
      raise DataError(f'{file}: no column {name!r}; columns are {", ".join(columns)}. Is it the file of {task.folder}?')
  return columns


def _label_reader(task: GlueTask, names: Sequence[str]) -> Callable[[Any, str], int | float]:
  """The function (label, where) -> class index or score; `names` are what indices or texts stand for."""
  index = {name: i for known in (task.classes, task.written) for i, name in enumerate(known)}

  def score(value: Any, where: str) -> float:
    low, high = task.score_range
    try:
      number = float(value)
    except ValueError:
      number = np.nan
    if not low <= number <= high:
      raise DataError(f'{where}: score {value!r} is not a number from {low:g} to {high:g}')
    return number

  def class_index(value: Any, where: str) -> int:
    known = isinstance(value, (int, np.integer)) and 0 <= value < len(names)
    name = value.strip() if isinstance(value, str) else names[value] if known else ''
    if name not in index:
      raise DataError(f'{where}: label {value!r} is not one of {", ".join(names)}')
    return index[name]

  return class_index if task.classes else score


def _dataset_rows(task: GlueTask, records: Iterable[Any], features: Any, name: str) -> list[_Row]:
  """The rows in the order of the official file: TFDS stores them shuffled, and submissions number them."""
  fields = task.fields or task.texts
  for field in (*fields, 'label'):
    if field not in features:
      raise ConfigError(f'{name}: no field {field!r}; it has {", ".join(features)}. Is it the dataset of {task.name}?')
  # A dataset may order its classes in its own way.
  names = getattr(features['label'], 'names', None) or task.classes
  if task.classes and not set(names) <= {*task.classes, *task.written}:
    raise ConfigError(f'{name}: its classes are {", ".join(names)}, those of {task.name} are {", ".join(task.classes)}')
  read, rows = _label_reader(task, names), []
  for number, record in enumerate(records):
    where, label = f'{name}, row {number}', record['label']
    texts = tuple(_text(record[field], field, where) for field in fields)
    row: _Row = (where, texts, None if label is None or label == -1 else read(label, where))
    rows.append((int(record['idx']) if 'idx' in features else number, row))
  return [row for _, row in sorted(rows, key=lambda numbered: numbered[0])]


def _text(value: Any, field: str, where: str) -> str:
  if isinstance(value, bytes):
    try:
      return value.decode('utf-8')
    except UnicodeDecodeError as e:
      raise DataError(f'{where}: field {field!r} is not UTF-8 at byte {e.start}') from e
  if not isinstance(value, str):
    raise DataError(f'{where}: field {field!r} holds {value!r} instead of text')
  return value


def _table(task: GlueTask, part: GlueSplit, rows: Iterable[_Row], name: str) -> Table:
  places: list[str] = []
  texts: list[tuple[str, ...]] = []
  labels: list[Any] = []
  for place, row, label in rows:
    places.append(place)
    texts.append(row)
    labels.append(label)
  if not texts:
    raise DataError(f'{name}: no rows')
  unlabelled = [place for place, label in zip(places, labels, strict=True) if label is None]
  if unlabelled and (len(unlabelled) < len(labels) or part.name.startswith(('train', 'dev'))):
    raise DataError(f'{unlabelled[0]}: has no label; {len(unlabelled)} of {len(labels)} rows have none')
  empty = [place for place, row in zip(places, texts, strict=True) if not all(text.strip() for text in row)]
  if empty:
    log.warning(
      '%s: %d of %d rows have an empty text and are kept; the first is %s', name, len(empty), len(texts), empty[0]
    )
  array = None if unlabelled else np.asarray(labels, np.int32 if task.classes else np.float32)
  return Table(tuple(zip(*texts, strict=True)), array, task.classes, name)
