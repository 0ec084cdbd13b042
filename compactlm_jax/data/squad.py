"""Questions with answers that are spans of a context: SQuAD's files, and the same form from elsewhere."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from compactlm_jax.data.table import numbered_lines
from compactlm_jax.data.text import hf_records, tfds_records
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.parse import parse_json, parse_row

MAX_BYTES = 1 << 30
"""Most bytes of one JSON document (SQuAD v2.0 has 42 MB); a small file can decompress to anything."""


@dataclasses.dataclass(frozen=True)
class Question:
  """One question.

  Attributes:
    id: its name in prediction files.
    question: the text asked.
    context: the paragraph that may hold the answer.
    answers: (text, index of its first character in `context`); empty if the context does not answer it (v2.0). The
      first one is trained on, all are gold.
  """

  id: str
  question: str
  context: str
  answers: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Questions:
  """The questions of a file or split.

  Attributes:
    items: in the order of the file.
    name: what to call it in messages.
    digest: SHA-256 (hex) of all of them.
  """

  items: tuple[Question, ...]
  name: str
  digest: str

  def __len__(self) -> int:
    return len(self.items)

  def answerable(self) -> Questions:
    """Those that have an answer: what SQuAD v1.1 is made of."""
    return dataclasses.replace(self, items=tuple(q for q in self.items if q.answers))


def find_squad(root: Any, version: int, split: str) -> str:
  """What `read_squad` reads for one part of SQuAD.

  Args:
    root: folder with train-v1.1.json, dev-v1.1.json, train-v2.0.json, dev-v2.0.json (or .json.gz), or 'tfds:NAME' or
      'hf:NAME'.
    version: 1 or 2.
    split: 'train' or 'dev'.

  Returns:
    The file, or the name as it was given.

  Raises:
    DataError: the folder lacks the file.
  """
  if str(root).startswith(('tfds:', 'hf:')):
    return str(root)
  name = f'{split}-v{ {1: "1.1", 2: "2.0"}[version] }.json'
  for file in (epath.Path(root) / name, epath.Path(root) / f'{name}.gz'):
    if file.exists():
      return str(file)
  raise DataError(
    f'{root}: no {name} (or .gz) there; put the official file in it, or name files in data.train, data.dev'
  )


def read_squad(path: Any, split: str = 'train') -> Questions:
  """Reads questions and checks that each answer stands where it is said to.

  Args:
    path: official JSON of SQuAD v1.1 or v2.0, or JSON lines (id, context, question, and either `answers` with `text`
      and `answer_start` lists, or `answer` and `answer_start`), both with or without .gz; 'tfds:NAME' or
      'hf:NAME[:CONFIG]'.
    split: 'train' or 'dev' of a named dataset.

  Returns:
    The questions.

  Raises:
    DataError: no or malformed content, an empty context, two questions with one id, or an answer that does not stand
      at its `answer_start`; file and question are named.
    ConfigError: a dataset cannot be opened, or a file of another kind.
  """
  spec = str(path)
  part = 'validation' if split == 'dev' else split
  kind, _, name = spec.partition(':')
  if kind == 'tfds':
    data = tfds_records(name, part)[1]
    records: Iterable[tuple[str, Any]] = _numbered(f'{spec} ({part})', (data[i] for i in range(len(data))))
  elif kind == 'hf':
    records = _numbered(f'{spec} ({part})', hf_records(name, part))
  elif '.jsonl' in epath.Path(path).suffixes[-2:]:
    records = _json_lines(epath.Path(path))
  elif '.json' in epath.Path(path).suffixes[-2:]:
    records = _official(epath.Path(path))
  else:
    raise ConfigError(f'{spec}: unknown kind of file; use .json (official SQuAD) or .jsonl, optionally with .gz')
  items: list[Question] = []
  seen: set[str] = set()
  for where, record in records:
    item = _question(record, where)
    if item.id in seen:
      raise DataError(f'{where}: id {item.id!r} occurs twice; predictions are kept by id, give each question its own')
    seen.add(item.id)
    items.append(item)
  if not items:
    raise DataError(f'{spec}: no questions')
  digest = hashlib.sha256()
  for item in items:
    digest.update(json.dumps(dataclasses.astuple(item)).encode())
  return Questions(tuple(items), spec, digest.hexdigest())


def _question(record: Any, where: str) -> Question:
  """A checked question from a record in any of the forms."""
  if not isinstance(record, Mapping):
    raise DataError(f'{where}: expected an object with id, context and question, got {record!r:.60}')
  texts = {}
  for key in ('id', 'context', 'question'):
    value = record.get(key)
    value = value.decode() if isinstance(value, bytes) else str(value) if isinstance(value, int) else value
    if not isinstance(value, str):
      raise DataError(f'{where}: {key!r} is missing or no text; SQuAD needs id, context and question')
    texts[key] = value
  if not texts['context'].strip():
    raise DataError(f'{where}: question {texts["id"]!r} has an empty context; leave it out')
  answers = tuple(_answers(record, where))
  for text, start in answers:
    if start < 0 or texts['context'][start : start + len(text)] != text:
      found = texts['context'][max(start, 0) : max(start, 0) + len(text)]
      raise DataError(
        f'{where}: question {texts["id"]!r}: the answer {text!r} is not in the context at answer_start {start} '
        f'(there is {found!r}); correct answer_start (in characters, from 0) or leave the question out'
      )
  return Question(answers=answers, **texts)


def _answers(record: Mapping[str, Any], where: str) -> Iterator[tuple[str, int]]:
  answers: Any = record.get('answers')
  impossible = _plain(record.get('is_impossible'))
  if impossible is not None and not isinstance(impossible, bool):
    raise DataError(f'{where}: is_impossible is {impossible!r:.60}; expected true or false')
  if impossible:
    answers = []
  elif answers is None and 'answer' in record:
    none = record['answer'] in (None, '', b'')
    answers = [] if none else [{'text': record['answer'], 'answer_start': record.get('answer_start')}]
  elif isinstance(answers, Mapping) and {'text', 'answer_start'} <= set(answers):
    try:
      pairs = list(zip(answers['text'], answers['answer_start'], strict=True))
    except (TypeError, ValueError) as e:
      raise DataError(f'{where}: answers: text and answer_start have to be lists of one length') from e
    answers = [{'text': text, 'answer_start': start} for text, start in pairs]
  if not isinstance(answers, list):
    raise DataError(f"{where}: no answers; give 'answers' (an empty list if there is none) or 'answer'")
  for answer in answers:
    try:
      text, start = answer['text'], _plain(answer['answer_start'])
    except (KeyError, TypeError) as e:
      raise DataError(f'{where}: an answer needs text and answer_start, got {answer!r:.60}') from e
    if type(start) is not int:
      raise DataError(f'{where}: answer_start is {start!r:.60}; expected a whole number of characters, from 0')
    text = text.decode() if isinstance(text, bytes) else text
    if not isinstance(text, str) or not text:
      raise DataError(f"{where}: the answer {text!r} is no text; a question without an answer has 'answers': []")
    yield text, start


def _plain(value: Any) -> Any:
  """What datasets hold as scalars of NumPy, as Python's own."""
  return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value


def _read(file: epath.Path) -> str:
  if not file.exists():
    raise DataError(f'{file}: no such file')
  try:
    with file.open('rb') as raw:
      stream = gzip.GzipFile(fileobj=raw) if file.suffix == '.gz' else raw
      data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
      raise DataError(f'{file}: holds more than {MAX_BYTES} bytes; give large sets as JSON lines (.jsonl)')
    return data.decode('utf-8-sig')
  except (EOFError, gzip.BadGzipFile, zlib.error) as e:
    raise DataError(f'{file}: damaged gzip file ({e}); fetch or compress it again') from e
  except UnicodeDecodeError as e:
    raise DataError(f'{file}: not UTF-8 at byte {e.start} ({e.reason}); convert it') from e


def _json_lines(file: epath.Path) -> Iterator[tuple[str, Any]]:
  for number, line in numbered_lines(file):
    if line.strip():
      try:
        yield f'{file}:{number}', parse_row(line)
      except ValueError as e:
        raise DataError(f'{file}:{number}: not JSON ({e}); correct the line or remove it') from e


def _official(file: epath.Path) -> Iterator[tuple[str, Any]]:
  try:
    content = parse_json(_read(file))
  except ValueError as e:
    raise DataError(f'{file}: not JSON ({e}); fetch it again') from e
  try:
    for article in content['data']:
      for number, paragraph in enumerate(article['paragraphs']):
        where = f'{file}: article {article.get("title", "")!r}, paragraph {number}'
        for record in paragraph['qas']:
          yield where, {**record, 'context': paragraph['context']}
  except (KeyError, TypeError, AttributeError) as e:
    raise DataError(f'{file}: not in the form data / paragraphs / qas of SQuAD ({e!r}); fetch it again') from e


def _numbered(name: str, records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
  return ((f'{name}, record {index}', record) for index, record in enumerate(records))
