"""The way from text to rows: read, tokenise, pack, count, hold out, pad. One pass, in order, with little memory."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from compactlm_jax.data import packing, text
from compactlm_jax.data.tokenizer import Tokenizer, one_thread_each
from compactlm_jax.errors import DataError

_CHUNK_CHARS = 1 << 17


@dataclasses.dataclass
class Counts:
  """What was read and made so far."""

  documents: int = 0
  lines: int = 0
  rows: int = 0
  tokens: int = 0
  words: int = 0
  unknown_tokens: int = 0

  def totals(self, seq_len: int) -> dict[str, float]:
    """The counts of a manifest."""
    fraction = round(self.tokens / max(1, self.rows * seq_len), 6)
    return {**dataclasses.asdict(self), 'real_token_fraction': fraction}


def make_examples(
  sources: Sequence[text.TextSource],
  tokenizer: Tokenizer,
  settings: dict[str, Any],
  workers: int,
  on_bytes: text.OnBytes,
  counts: Counts,
  contents: dict[str, dict[str, int]],
) -> Generator[tuple[str, dict[str, Any]], None, None]:
  """The rows of texts, which depend on neither `workers` nor time.

  Args:
    sources: read one after the other.
    tokenizer: makes the ids.
    settings: mode, seq_len, seed, pair_rule and holdout_rows of `prepare`.
    workers: threads that tokenise.
    on_bytes: told of what was read.
    counts: filled.
    contents: filled: rows, tokens and words of each split.

  Yields:
    (split, example) with input_ids int32 [T], token_type_ids uint8 [T], length int32; those of 'validation' last.

  Raises:
    DataError: no rows, or none left to train on; not UTF-8.
  """
  with contextlib.closing(_tokenized(sources, tokenizer, workers, on_bytes, counts)) as lines:
    rows = _counted(_rows(lines, tokenizer, settings), tokenizer, counts)
    names = ', '.join(s.name for s in sources)
    yield from _totalled(_split(rows, settings, names, counts), tokenizer.pad_id, settings['seq_len'], contents)


def _tokenized(
  sources: Sequence[text.TextSource], tokenizer: Tokenizer, workers: int, on_bytes: text.OnBytes, counts: Counts
) -> Generator[list[int] | None, None, None]:
  """Token ids of each line in order, the first of each word marked; None after each document."""

  def encode(chunk: list[str]) -> list[list[int] | None]:
    encodings = tokenizer.encodings(line for line in chunk if line)
    return [_marked(line, next(encodings)) if line else None for line in chunk]

  # The encoder runs outside the interpreter lock, so threads are enough, and nothing is forked or pickled.
  pool = ThreadPoolExecutor(workers)
  waiting: collections.deque[Future[list[list[int] | None]]] = collections.deque()
  try:
    with one_thread_each():
      for chunk in _chunks(sources, on_bytes, counts):
        waiting.append(pool.submit(encode, chunk))
        if len(waiting) > 2 * workers:
          yield from waiting.popleft().result()
      while waiting:
        yield from waiting.popleft().result()
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def _marked(line: str, encoding: Any) -> list[int]:
  return packing.mark_words(line, encoding.ids, [end for _, end in encoding.offsets])


def _chunks(sources: Sequence[text.TextSource], on_bytes: text.OnBytes, counts: Counts) -> Iterator[list[str]]:
  chunk: list[str] = []
  chars, previous = 0, ''
  for source in sources:
    for line in source.lines(on_bytes):
      counts.lines += bool(line)
      counts.documents += bool(previous and not line)
      previous = line
      chunk.append(line)
      chars += len(line)
      if chars >= _CHUNK_CHARS:
        yield chunk
        chunk, chars = [], 0
  if chunk:
    yield chunk


def _rows(lines: Iterable[list[int] | None], tokenizer: Tokenizer, settings: dict[str, Any]) -> Iterator[packing.Row]:
  seq_len, cls_id, sep_id = settings['seq_len'], tokenizer.cls_id, tokenizer.sep_id
  if settings['mode'] == 'packed':
    return packing.pack_documents(lines, seq_len, cls_id, sep_id)
  if settings['mode'] == 'sentences':
    return packing.one_per_line(lines, seq_len, cls_id, sep_id)
  seed, rule = settings['seed'], settings['pair_rule']
  return packing.sentence_pairs(lines, seq_len, cls_id, sep_id, seed=seed, rule=rule)


class _Counted(NamedTuple):
  ids: np.ndarray
  second: int
  words: int


def _counted(rows: Iterable[packing.Row], tokenizer: Tokenizer, counts: Counts) -> Iterator[_Counted]:
  """Takes the marks of words off again."""
  for row in rows:
    marked = np.asarray(row.ids, np.int32)
    ids, words = marked & ~packing.WORD_START, int((marked >= packing.WORD_START).sum())
    counts.rows += 1
    counts.tokens += len(ids)
    counts.words += words
    counts.unknown_tokens += int((ids == tokenizer.unk_id).sum())
    yield _Counted(ids, row.second, words)


def _split(
  rows: Iterable[_Counted], settings: dict[str, Any], names: str, counts: Counts
) -> Iterator[tuple[str, _Counted]]:
  """(split, row) pairs; held-out rows are a uniform sample (reservoir), known when all rows were seen."""
  rng = random.Random(settings['seed'])
  held: list[tuple[int, _Counted]] = []
  for number, row in enumerate(rows):
    if len(held) < settings['holdout_rows']:
      held.append((number, row))
      continue
    if held and (slot := rng.randrange(number + 1)) < len(held):
      (_, row), held[slot] = held[slot], (number, row)
    yield 'train', row
  if not counts.rows:
    raise DataError(f'input {names}: no rows, the text is empty')
  if counts.rows <= len(held):
    raise DataError(
      f'input {names}: {counts.rows} rows only, holdout_rows {settings["holdout_rows"]} leaves none to train on'
    )
  for _, row in sorted(held, key=lambda item: item[0]):
    yield 'validation', row


def _totalled(
  rows: Iterable[tuple[str, _Counted]], pad_id: int, seq_len: int, contents: dict[str, dict[str, int]]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """(split, example) pairs; `contents` gets what each split holds."""
  for split, row in rows:
    content = contents.setdefault(split, {'rows': 0, 'tokens': 0, 'words': 0})
    for name, number in (('rows', 1), ('tokens', len(row.ids)), ('words', row.words)):
      content[name] += number
    yield split, _example(row, seq_len, pad_id)


def _example(row: _Counted, seq_len: int, pad_id: int) -> dict[str, Any]:
  input_ids = np.full(seq_len, pad_id, np.int32)
  input_ids[: len(row.ids)] = row.ids
  token_type_ids = np.zeros(seq_len, np.uint8)
  token_type_ids[row.second : len(row.ids)] = 1
  return {'input_ids': input_ids, 'token_type_ids': token_type_ids, 'length': np.int32(len(row.ids))}
