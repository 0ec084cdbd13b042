"""Labelled tables (.tsv, .jsonl, optionally .gz) for fine-tuning."""

from __future__ import annotations

import dataclasses
import gzip
import logging
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from compactlm_jax.data.source import Record, RowSource, array_source
from compactlm_jax.data.text import MAX_ROW_BYTES, limited_lines
from compactlm_jax.data.tokenizer import Tokenizer
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.parse import parse_row

_LARGEST = float(np.finfo(np.float32).max)
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Table:
  """Texts and labels.

  Attributes:
    texts: one or two columns of texts.
    labels: int32 class index per row, or float32 score; None for texts without labels.
    classes: class names in the order of their indices; empty for scores.
    name: the file.
  """

  texts: tuple[tuple[str, ...], ...]
  labels: np.ndarray | None
  classes: tuple[str, ...]
  name: str

  def __len__(self) -> int:
    return len(self.texts[0])


def read_table(
  path: Any,
  text_columns: Sequence[str] = ('text',),
  label_column: str = 'label',
  *,
  classes: Sequence[str] | None = None,
  scores: bool = False,
) -> Table:
  """Reads a table of texts with a class (or score) each.

  Args:
    path: .tsv (header row, tab-separated, no quoting) or .jsonl (one object per line), either with .gz.
    text_columns: one column, or two for pairs.
    label_column: column of class names or integers (or of numbers, with `scores`).
    classes: class names of the training table, for a dev table; None collects and sorts them (as numbers, if all are
      integers).
    scores: labels are numbers to predict instead of classes.

  Returns:
    The table.

  Raises:
    DataError: no rows, not UTF-8, a malformed line, two columns of one name, or an empty text; file and line are named.
    ConfigError: a column is missing, or a label does not occur in `classes`.
  """
  file = epath.Path(path)
  if len(text_columns) not in (1, 2):
    raise ConfigError(f'text_columns {",".join(text_columns)!r} must name one or two columns')
  texts: list[list[str]] = [[] for _ in text_columns]
  found: list[str] = []
  numbers: list[int] = []
  for number, row in table_rows(file):
    for name in (*text_columns, label_column):
      if name not in row:
        raise ConfigError(f'{file}:{number}: no column {name!r}; columns are {", ".join(map(str, row))}')
      if row[name] is None:
        raise DataError(f'{file}:{number}: column {name!r} is null; fill it in or remove the row')
    for column, name in zip(texts, text_columns, strict=True):
      if not isinstance(row[name], str):
        raise DataError(f'{file}:{number}: column {name!r} holds {row[name]!r} instead of text')
      if not row[name].strip():
        raise DataError(f'{file}:{number}: column {name!r} is empty; fill it in or remove the row')
      column.append(row[name])
    found.append(_label_name(row[label_column], f'{file}:{number}'))
    numbers.append(number)
  if not found:
    raise DataError(f'{file}: no rows')
  if scores:
    labels, classes = _scores(found, numbers, file), ()
  else:
    classes = _sorted_classes(found) if classes is None else tuple(classes)
    labels = _class_indices(found, numbers, file, classes)
  return Table(tuple(tuple(c) for c in texts), labels, tuple(classes), str(file))


def table_rows(path: Any) -> Iterator[tuple[int, dict[str, Any]]]:
  """(line number, column -> value) of each row of a .tsv or .jsonl file, optionally .gz, read one at a time.

  Lines without any text are left out. In a .tsv they are rows of empty texts, where they have a tab between all columns
  or there is one column alone and another row follows.

  Raises:
    DataError: no such file, not UTF-8, a malformed line, or two columns of one name; file and line are named.
    ConfigError: another kind of file.
  """
  file = epath.Path(path)
  return _tsv(file) if file.name.removesuffix('.gz').endswith('.tsv') else _jsonl(file)


def _label_name(value: Any, where: str) -> str:
  if isinstance(value, str) and value.strip():
    return value.strip()
  if isinstance(value, (bool, int, float)):
    return str(value)
  raise DataError(f'{where}: the label is {value!r}; expected a class name or a number')


def _sorted_classes(found: Sequence[str]) -> tuple[str, ...]:
  names = set(found)
  try:
    return tuple(sorted(names, key=lambda n: (int(n), n)))
  except ValueError:
    return tuple(sorted(names))


def _class_indices(found: Sequence[str], numbers: Sequence[int], file: Any, classes: tuple[str, ...]) -> np.ndarray:
  index = {name: i for i, name in enumerate(classes)}
  for name, number in zip(found, numbers, strict=True):
    if name not in index:
      raise ConfigError(
        f'{file}:{number}: label {name!r} does not occur in the training table; it has {", ".join(classes)}'
      )
  return np.asarray([index[name] for name in found], np.int32)


def _scores(found: Sequence[str], numbers: Sequence[int], file: Any) -> np.ndarray:
  values = []
  for name, number in zip(found, numbers, strict=True):
    try:
      values.append(float(name))
    except ValueError:
      values.append(np.nan)
    if not abs(values[-1]) <= _LARGEST:
      raise DataError(f'{file}:{number}: the label {name!r} is not a finite number of 32 bits')
  return np.asarray(values, np.float32)


def numbered_lines(file: epath.Path) -> Iterator[tuple[int, str]]:
  """The lines of a text file (.gz is decompressed) with their numbers from 1, without byte order mark and line ends.

  Raises:
    DataError: no such file, not UTF-8, a damaged gzip file, or a line of more than MAX_ROW_BYTES.
  """
  if not file.exists():
    raise DataError(f'{file}: no such file')
  with file.open('rb') as raw:
    stream = gzip.GzipFile(fileobj=raw) if file.suffix == '.gz' else raw
    try:
      for number, line in enumerate(limited_lines(stream, str(file), MAX_ROW_BYTES), 1):
        yield number, line.decode('utf-8-sig' if number == 1 else 'utf-8').rstrip('\r\n')
    except UnicodeDecodeError as e:
      raise DataError(f'{file}:{number}: not UTF-8 at byte {e.start} of the line ({e.reason}); convert it') from e
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
      raise DataError(f'{file}: damaged gzip file ({e})') from e


def _tsv(file: epath.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  header: list[str] | None = None
  last = 0
  for number, line in numbered_lines(file):
    cells = line.split('\t')
    if not line.strip() and (header is None or len(header) == 1 or len(cells) != len(header)):
      continue
    if header is None:
      header = header_of(cells, f'{file}:{number}')
    elif len(cells) != len(header):
      raise DataError(f'{file}:{number}: {len(cells)} columns, but the header has {len(header)} ({", ".join(header)})')
    else:
      if len(header) == 1:  # what ends a file is no text, and anything else without text would shift the rows
        yield from ((blank, {header[0]: ''}) for blank in range(last + 1, number))
      yield number, dict(zip(header, cells, strict=True))
    last = number


def header_of(cells: Sequence[str], where: str) -> list[str]:
  """The names of columns; those without a name, as behind tabs at the end of the line, are nobody's.

  Args:
    cells: of the first line.
    where: the file, for the message.

  Raises:
    DataError: two have one name.
  """
  header = [c.strip() for c in cells]
  if twice := next((name for name in header if name and header.count(name) > 1), ''):
    raise DataError(f'{where}: two columns are named {twice!r}; rename or remove one of them')
  return header


def _jsonl(file: epath.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  if '.jsonl' not in file.suffixes[-2:]:
    raise ConfigError(f'{file}: unknown kind of table; use .tsv or .jsonl, optionally with .gz')
  for number, line in numbered_lines(file):
    if not line.strip():
      continue
    try:
      row = parse_row(line)
    except ValueError as e:
      raise DataError(f'{file}:{number}: not JSON ({e}); correct the line or remove it') from e
    if not isinstance(row, dict):
      raise DataError(f'{file}:{number}: expected one JSON object per line')
    yield number, row


def tokenize_table(table: Table, tokenizer: Tokenizer, seq_len: int) -> RowSource:
  """Rows [CLS] a [SEP] or [CLS] a [SEP] b [SEP] (b in segment 1), padded, with labels.

  Texts that are too long are cut at the end, of a pair the longer text first, as Hugging Face's `longest_first`; how
  many is logged.

  Args:
    table: texts and labels.
    tokenizer: the tokenizer.
    seq_len: row length T.

  Returns:
    The rows, in memory.
  """
  columns = [tokenizer.encode(texts) for texts in table.texts]
  rows = len(table)
  input_ids = np.full((rows, seq_len), tokenizer.pad_id, np.int32)
  token_type_ids = np.zeros((rows, seq_len), np.int32)
  length = np.zeros(rows, np.int32)
  cut = 0
  for i, texts in enumerate(zip(*columns, strict=True)):
    ids, segments, shortened = join_ids(texts, tokenizer, seq_len)
    cut += shortened
    input_ids[i, : len(ids)], token_type_ids[i, : len(ids)] = ids, segments
    length[i] = len(ids)
  if cut:
    log.warning('%s: %d of %d rows are longer than %d tokens and were cut', table.name, cut, rows, seq_len)
  arrays: Record = {'input_ids': input_ids, 'token_type_ids': token_type_ids, 'length': length}
  if table.labels is not None:
    arrays['label'] = table.labels
  return array_source(
    arrays,
    vocab_size=tokenizer.vocab_size,
    fingerprint=tokenizer.fingerprint(),
    name=table.name,
    classes=table.classes,
  )


def join_ids(texts: Sequence[Sequence[int]], tokenizer: Tokenizer, seq_len: int) -> tuple[list[int], list[int], bool]:
  """One row of `tokenize_table`, not padded.

  Args:
    texts: token ids of one or two texts.
    tokenizer: their tokenizer.
    seq_len: most tokens of the row.

  Returns:
    (token ids, segment of each, whether a text was cut).
  """
  ids, segments = [tokenizer.cls_id], [0]
  kept = _keep([len(t) for t in texts], seq_len - 1 - len(texts))
  for segment, (text, keep) in enumerate(zip(texts, kept, strict=True)):
    ids += [*text[:keep], tokenizer.sep_id]
    segments += [segment] * (keep + 1)
  return ids, segments, sum(kept) < sum(map(len, texts))


def _keep(lengths: Sequence[int], room: int) -> list[int]:
  """How many tokens of each text stay."""
  if sum(lengths) <= room:
    return list(lengths)
  if len(lengths) == 1:
    return [room]
  first, second = lengths
  short, half = min(first, second), room // 2
  if short > half:
    # An odd token goes to the longer text, and to the second of two equal ones (tokenizers, `truncate_encodings`).
    return [room - half, half] if first > second else [half, room - half]
  return [first, room - first] if first <= second else [room - second, second]
