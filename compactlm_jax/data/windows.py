"""Questions as rows: [CLS] question [SEP] window of the context [SEP], windows sliding over long contexts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from compactlm_jax.data.records import Record
from compactlm_jax.data.source import RowSource
from compactlm_jax.data.squad import Question, Questions
from compactlm_jax.data.tokenizer import Tokenizer
from compactlm_jax.errors import ConfigError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Windows:
  """Rows of questions, and the way back from tokens to text.

  Window w shows the tokens first[w] <= t < first[w] + count[w] of the context of question[w], at the places
  prefix[w], prefix[w] + 1, ... of row w. Windows of one question are neighbours.

  Attributes:
    questions: one entry of `question` each points here.
    rows: the rows, with labels int32 [n, 3]: places of the first and the last token of the answer in the row (0 and
      0, the [CLS] token, if the window does not hold all of it), and whether the question has no answer at all.
    question: index of the question, int32 [n].
    first: index of the first context token, int32 [n].
    count: context tokens shown, int32 [n].
    prefix: place of the first context token in the row, int32 [n].
    offsets: per question, character range [start, stop) of each context token, int32 [tokens, 2]; questions on one
      context share the array.
    report: counts: 'questions', 'windows', 'truncated_questions' (cut to `max_query_length`), 'unaligned_answers' (no
      token covers them), 'widened_answers' (tokens reach over the answer's ends).
  """

  questions: tuple[Question, ...]
  rows: RowSource
  question: np.ndarray
  first: np.ndarray
  count: np.ndarray
  prefix: np.ndarray
  offsets: tuple[np.ndarray, ...]
  report: dict[str, int]

  def max_context(self, places: np.ndarray) -> np.ndarray:
    """Whether no other window of the question shows a context token with more context around it.

    Args:
      places: token places in the rows [n, k], one row of k for each window.

    Returns:
      bool [n, k]. Of equally good windows the first one wins. Places outside the context give False.

    Source: google-research/bert `run_squad._check_is_max_context`: the smaller of the tokens to the left and to the
    right, plus 0.01 per token of the window.
    """
    token = places - self.prefix[:, None] + self.first[:, None]
    windows = np.arange(len(self.question))
    own = self._context(token, windows)
    best = np.isfinite(own)
    for distance in range(1, int(np.bincount(self.question).max())):
      for other, beats in ((windows - distance, np.greater), (windows + distance, np.greater_equal)):
        at = np.clip(other, 0, len(windows) - 1)
        same = (at == other) & (self.question[at] == self.question)
        best &= ~same[:, None] | beats(own, self._context(token, at))
    return best

  def _context(self, token: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """How much context a window has around a token; -inf where it does not show it."""
    first, count = self.first[windows][:, None], self.count[windows][:, None]
    smaller = np.minimum(token - first, first + count - 1 - token)
    return np.where(smaller >= 0, smaller + 0.01 * count, -np.inf)

  def shown(self, places: np.ndarray) -> np.ndarray:
    """Whether places [n, k] in the rows show a token of the context, bool [n, k]."""
    return (places >= self.prefix[:, None]) & (places < (self.prefix + self.count)[:, None])

  def text(self, window: int, start: int, end: int) -> str:
    """The context from the token at place `start` of a row to the one at `end`, both included.

    Tokens know their characters, so this is the original text: nothing has to be put together from word pieces.
    """
    number, shift = self.question[window], self.first[window] - self.prefix[window]
    offsets = self.offsets[number]
    return self.questions[number].context[offsets[start + shift, 0] : offsets[end + shift, 1]]


def make_windows(
  questions: Questions,
  tokenizer: Tokenizer,
  seq_len: int,
  *,
  doc_stride: int = 128,
  max_query_length: int = 64,
  train: bool = False,
) -> Windows:
  """Cuts contexts into overlapping windows and finds the tokens of the answers.

  Args:
    questions: what to read.
    tokenizer: the tokenizer.
    seq_len: row length T.
    doc_stride: tokens from the start of one window to the start of the next, as in BERT, ELECTRA and MiniLM.
      (`run_qa.py` of transformers means the tokens that two windows share.)
    max_query_length: tokens of a question that are kept.
    train: leave out questions whose answer no token covers; evaluation keeps them, they count as they are answered.

  Returns:
    The rows with what is needed to read answers from them.

  Raises:
    ConfigError: rows too short to hold a question and one token of context; no question is left.
  """
  _check_room(seq_len, max_query_length)
  contexts, context = _distinct([q.context for q in questions.items])
  asked, query = _distinct([q.question for q in questions.items])
  ids, offsets = _encode(tokenizer, contexts)
  spans = np.asarray([_align(q, offsets[c]) for q, c in zip(questions.items, context, strict=True)], np.int32)
  answered = np.asarray([bool(q.answers) for q in questions.items])
  unaligned = answered & (spans[:, 0] < 0)
  keep = np.flatnonzero(~unaligned if train else np.ones_like(unaligned))
  if not len(keep):
    raise ConfigError(f'{questions.name}: no answer could be aligned with tokens; is this the right tokenizer?')
  context, query = context[keep], query[keep]
  tokens, queries = _Flat.of(ids), _Flat.of(tokenizer.encode(asked))
  size = np.minimum(queries.count[query], max_query_length)
  question, first, count = _slide(tokens.count[context], seq_len - 3 - size, doc_stride)
  prefix = (size[question] + 2).astype(np.int32)
  labels = _labels(np.column_stack([spans[keep, :2], ~answered[keep]])[question], first, count, prefix)
  token_start, query_start = tokens.start[context[question]] + first, queries.start[query[question]]
  rows = RowSource(
    _Gather(tokenizer, seq_len, tokens.values, token_start, count, queries.values, query_start, prefix, labels),
    size=len(question),
    vocab_size=tokenizer.vocab_size,
    seq_len=seq_len,
    fingerprint=tokenizer.fingerprint(),
    name=questions.name,
    lengths=prefix + count + 1,
  )
  too_long = int((queries.count[query] > max_query_length).sum())
  report = _report(len(keep), len(question), too_long, int(unaligned.sum()), int(spans[:, 2].sum()))
  log.info('%s: %s', questions.name, report)
  items = tuple(questions.items[i] for i in keep)
  return Windows(items, rows, question, first, count, prefix, tuple(offsets[c] for c in context), report)


def _check_room(seq_len: int, max_query_length: int) -> None:
  if seq_len < max_query_length + 4:
    raise ConfigError(
      f'config.data.seq_len: {seq_len} tokens do not hold a question of config.span.max_query_length='
      f'{max_query_length}, 3 special tokens and a window; raise it or lower max_query_length'
    )


def _report(questions: int, windows: int, truncated: int, unaligned: int, widened: int) -> dict[str, int]:
  return {
    'questions': questions,
    'windows': windows,
    'truncated_questions': truncated,
    'unaligned_answers': unaligned,
    'widened_answers': widened,
  }


@dataclasses.dataclass(frozen=True)
class _Flat:
  """Lists of ids end to end: list i is values[start[i] : start[i] + count[i]]."""

  values: np.ndarray
  start: np.ndarray
  count: np.ndarray

  @classmethod
  def of(cls, lists: Sequence[Sequence[int]]) -> _Flat:
    count = np.asarray([len(v) for v in lists], np.int64)
    return cls(np.concatenate([np.asarray(v, np.int32) for v in lists]), np.cumsum(count) - count, count)


@dataclasses.dataclass(frozen=True)
class _Gather:
  """Builds rows when they are asked for: windows overlap, so that storing rows would take several times the memory."""

  tokenizer: Tokenizer
  seq_len: int
  tokens: np.ndarray  # of all contexts
  token_start: np.ndarray  # [n], where the window begins in `tokens`
  count: np.ndarray
  queries: np.ndarray  # of all questions
  query_start: np.ndarray  # [n]
  prefix: np.ndarray
  labels: np.ndarray

  def __call__(self, indices: np.ndarray) -> Record:
    place = np.arange(self.seq_len)[None]
    count, prefix = self.count[indices, None], self.prefix[indices, None]
    last = prefix + count
    query = _take(self.queries, self.query_start[indices, None] + place - 1)
    tokens = _take(self.tokens, self.token_start[indices, None] + place - prefix)
    ids = np.where(place < prefix - 1, query, np.where(place < last, tokens, self.tokenizer.pad_id))
    ids = np.where((place == prefix - 1) | (place == last), self.tokenizer.sep_id, ids)
    ids[:, 0] = self.tokenizer.cls_id
    return {
      'input_ids': ids.astype(np.int32),
      'token_type_ids': ((place >= prefix) & (place <= last)).astype(np.int32),
      'length': (last[:, 0] + 1).astype(np.int32),
      'label': self.labels[indices],
    }


def _take(values: np.ndarray, index: np.ndarray) -> np.ndarray:
  return values.take(index, mode='clip') if len(values) else np.zeros(index.shape, np.int32)


def _distinct(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
  """(texts without repetition, index of each text among them); many questions share a context."""
  index: dict[str, int] = {}
  places = np.asarray([index.setdefault(text, len(index)) for text in texts])
  return list(index), places


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[list[int]], list[np.ndarray]]:
  ids, offsets = [], []
  for found in tokenizer.encodings(texts):
    ids.append(found.ids)
    offsets.append(np.asarray(found.offsets, np.int32).reshape(-1, 2))
  return ids, offsets


def _align(question: Question, offsets: np.ndarray) -> tuple[int, int, bool]:
  """(first token, last token, whether they reach over the ends) of the first answer; -1, -1 if none covers it."""
  if not question.answers:
    return -1, -1, False
  text, start = question.answers[0]
  stop = start + len(text)
  first = int(np.searchsorted(offsets[:, 1], start, side='right'))
  last = int(np.searchsorted(offsets[:, 0], stop, side='left')) - 1
  if first > last:
    return -1, -1, False
  return first, last, bool(offsets[first, 0] < start or offsets[last, 1] > stop)


def _slide(length: np.ndarray, room: np.ndarray, doc_stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(question, first token, tokens) of each window; the last window of a context ends with it (BERT)."""
  step = np.minimum(room, doc_stride)
  windows = 1 - (np.minimum(room - length, 0) // step)
  question = np.repeat(np.arange(len(length)), windows)
  number = np.arange(len(question)) - np.repeat(np.cumsum(windows) - windows, windows)
  first = number * step[question]
  count = np.minimum(room[question], length[question] - first)
  return question.astype(np.int32), first.astype(np.int32), count.astype(np.int32)


def _labels(spans: np.ndarray, first: np.ndarray, count: np.ndarray, prefix: np.ndarray) -> np.ndarray:
  """Labels of windows [n, 3] from (first token, last token, impossible) of their questions."""
  inside = (spans[:, 0] >= first) & (spans[:, 1] < first + count)
  places = np.where(inside[:, None], spans[:, :2] + (prefix - first)[:, None], 0)
  return np.concatenate([places, spans[:, 2:]], axis=1).astype(np.int32)
