"""From tokenised lines to rows of at most `seq_len` tokens.

Every function takes a stream of token-id lists, one per line, in which None ends a document, and yields rows in order.
A row depends on the stream and the seed only. Ids may carry WORD_START: it travels with its token, so that the words of
a row can be counted wherever the row was cut.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

TokenLines = Iterable[list[int] | None]

WORD_START = 1 << 30
"""Bit of an id that marks the first token of a whitespace-separated word; larger than any id."""

_WORD = re.compile(r'\S+')


class Row(NamedTuple):
  """One row before padding: its ids, and the index at which the second segment starts (len(ids) if there is none)."""

  ids: list[int]
  second: int


def mark_words(line: str, ids: Sequence[int], ends: Iterable[int]) -> list[int]:
  """Ids with WORD_START on the first token of each word that has one.

  Words are what `line.split()` gives. A word that the tokenizer drops altogether (control characters) is not counted,
  nor is any word but the last of those that one token spans.

  Args:
    line: the text.
    ids: its tokens.
    ends: index in `line` after the last character of each token. (Starts may lie on the space before a word.)
  """
  starts = (match.start() for match in _WORD.finditer(line))
  word, marked = next(starts, len(line)), []
  for token, end in zip(ids, ends, strict=True):
    if end > word:
      token |= WORD_START
      while word < end:
        word = next(starts, len(line))
    marked.append(token)
  return marked


def pack_documents(lines: TokenLines, seq_len: int, cls_id: int, sep_id: int) -> Iterator[Row]:
  """Fills every row: [CLS] + seq_len - 2 tokens of the stream + [SEP]; only the last row is shorter.

  The stream is all documents, each followed by [SEP]. A document that does not fit goes on in the next row; the [SEP]
  after a document that ends exactly with a row is that row's own. (A document that ends one token earlier leaves its
  [SEP] before the row's.) All tokens are in segment 0.
  """
  room = seq_len - 2
  buffer: list[int] = []
  open_document = False
  for line in lines:
    if line is None:
      if open_document:
        buffer.append(sep_id)
      open_document = False
    else:
      buffer += line
      open_document |= bool(line)
    start = 0
    while len(buffer) - start > room:
      ids = [cls_id, *buffer[start : start + room], sep_id]
      start += room
      if buffer[start] == sep_id:
        start += 1
      yield Row(ids, seq_len)
    del buffer[:start]
  if buffer and buffer[-1] == sep_id:
    buffer.pop()
  if buffer:
    yield Row([cls_id, *buffer, sep_id], len(buffer) + 2)


def one_per_line(lines: TokenLines, seq_len: int, cls_id: int, sep_id: int) -> Iterator[Row]:
  """One row per line, [CLS] line [SEP], cut at seq_len; lines without tokens are left out."""
  for line in lines:
    if line:
      ids = [cls_id, *line[: seq_len - 2], sep_id]
      yield Row(ids, len(ids))


def sentence_pairs(
  lines: TokenLines, seq_len: int, cls_id: int, sep_id: int, *, seed: int, rule: str = 'electra'
) -> Iterator[Row]:
  """ELECTRA's pre-training examples: [CLS] A [SEP] B [SEP], or [CLS] A [SEP].

  Sentences of a document are collected until they reach a target length (seq_len; in 5 % of the examples uniform in
  [5, seq_len]) and then split into A and B around half of it, or kept in A (10 %). The random numbers of a document
  come from (seed, number of the document), so that rows do not depend on how the work is shared out; the original
  draws from one unseeded stream per process (google-research/electra `build_pretraining_dataset.py`).

  Args:
    lines: tokenised lines.
    seq_len: longest row (T).
    cls_id: id of [CLS].
    sep_id: id of [SEP].
    seed: seed of all draws.
    rule: 'electra' is the fixed condition, 'convbert' the one before the fix (B stays almost always empty).

  Returns:
    The rows, in the order of the stream.
  """
  number = -1
  pending: list[list[int]] = []
  rng: random.Random | None = None
  for line in itertools.chain(lines, [None]):
    if line:
      if rng is None:
        number += 1
        rng = random.Random((seed << 64) + number)
        target, length = _target_length(rng, seq_len), 0
      pending.append(line)
      length += len(line)
    if rng is not None and pending and (line is None or length >= target):
      yield _pair(*_split(pending, target, rng, rule), seq_len, cls_id, sep_id)
      pending = []
      target, length = _target_length(rng, seq_len), 0
    if line is None:
      rng = None


def _pair(first: list[int], second: list[int], seq_len: int, cls_id: int, sep_id: int) -> Row:
  first = first[: seq_len - 2]
  second = second[: max(0, seq_len - len(first) - 3)]
  ids = [cls_id, *first, sep_id]
  return Row([*ids, *second, sep_id], len(ids)) if second else Row(ids, len(ids))


def _target_length(rng: random.Random, seq_len: int) -> int:
  return rng.randint(5, seq_len) if rng.random() < 0.05 else seq_len


def _split(sentences: list[list[int]], target: int, rng: random.Random, rule: str) -> tuple[list[int], list[int]]:
  goal = 100_000 if rng.random() < 0.1 else (target - 3) // 2
  first: list[int] = []
  second: list[int] = []
  for sentence in sentences:
    # `rule` flips both emptiness tests: ConvBERT's copy asks "is A non-empty", "is B non-empty".
    a_open = (not first) if rule == 'electra' else bool(first)
    b_open = (not second) if rule == 'electra' else bool(second)
    if a_open or len(first) + len(sentence) < goal or (b_open and len(first) < goal and rng.random() < 0.5):
      first += sentence
    else:
      second += sentence
  return first, second
