"""Generated rows with structure that a small model can learn, for runs without data."""

from __future__ import annotations

import numpy as np

from compactlm_jax.data.source import Record, RowSource, array_source
from compactlm_jax.errors import ConfigError

PAD, UNK, CLS, SEP, MASK = range(5)
"""Ids of the special tokens, as in vocabularies that `train_wordpiece` makes."""

_SUCCESSORS = 4
_ODDS = np.cumsum([0.7, 0.2, 0.07, 0.03])


def synthetic_fingerprint(vocab_size: int) -> str:
  """Stands for the tokenizer of generated rows."""
  return f'synthetic-{vocab_size}'


def synthetic_rows(*, rows: int = 2048, seq_len: int = 128, vocab_size: int = 1000, seed: int = 0) -> RowSource:
  """A corpus of Markov chains: each token has four successors with odds 70, 20, 7 and 3 %.

  A model that learns the chain predicts a masked token inside a row far better than its frequency does (entropy of a
  step 0.86 nats, of a token about log(vocab_size)). A quarter of the rows is shorter than T, so that padding occurs.

  Args:
    rows: number of rows.
    seq_len: row length T, at least 8.
    vocab_size: ids are below it; the first five are special.
    seed: of the chain and the rows.

  Returns:
    The rows, in memory.
  """
  return _source(rows, seq_len, vocab_size, seed, num_classes=0)


def synthetic_table(
  *,
  rows: int = 2048,
  seq_len: int = 128,
  vocab_size: int = 1000,
  num_classes: int = 2,
  seed: int = 0,
  rows_seed: int = 0,
) -> RowSource:
  """Labelled rows: the class of a row decides which Markov chain wrote it and, at one token in four, its topic word.

  Args:
    rows: number of rows.
    seq_len: row length T, at least 8.
    vocab_size: ids are below it; the first five are special.
    num_classes: classes, about equally frequent.
    seed: of the chains and topic words: what is to be learnt.
    rows_seed: of the rows: another value gives held-out rows of the same problem.

  Returns:
    The rows, in memory, with labels.
  """
  if num_classes < 2:
    raise ConfigError(f'num_classes {num_classes} must be at least 2')
  return _source(rows, seq_len, vocab_size, seed, num_classes, rows_seed)


def _source(rows: int, seq_len: int, vocab_size: int, seed: int, num_classes: int, rows_seed: int = 0) -> RowSource:
  words = vocab_size - 5
  if seq_len < 8 or rows < 1 or words < 8 * max(1, num_classes):
    raise ConfigError(
      f'generated data: rows {rows} must be at least 1, seq_len {seq_len} at least 8, vocab_size {vocab_size} at least '
      f'{5 + 8 * max(1, num_classes)}'
    )
  rule = np.random.default_rng([seed, 1])
  chains = rule.integers(0, words, (max(1, num_classes), words, _SUCCESSORS))
  topics = rule.permutation(words)[: 4 * num_classes].reshape(num_classes, 4)
  rng = np.random.default_rng([seed, rows_seed, 2])
  label = rng.integers(0, max(1, num_classes), rows)
  length = np.where(rng.random(rows) < 0.25, rng.integers(seq_len // 2, seq_len + 1, rows), seq_len)
  text = np.empty((rows, seq_len), np.int64)
  text[:, 0] = rng.integers(0, words, rows)
  for t in range(1, seq_len):
    text[:, t] = chains[label, text[:, t - 1], np.searchsorted(_ODDS[:-1], rng.random(rows))]
  if num_classes:
    chosen = rng.random((rows, seq_len)) < 0.25
    text = np.where(chosen, topics[label[:, None], rng.integers(0, 4, (rows, seq_len))], text)
  columns = np.arange(seq_len)
  input_ids = np.where(columns < length[:, None], text + 5, PAD).astype(np.int32)
  input_ids[:, 0] = CLS
  input_ids[np.arange(rows), length - 1] = SEP
  arrays: Record = {
    'input_ids': input_ids,
    'token_type_ids': np.zeros((rows, seq_len), np.int32),
    'length': length.astype(np.int32),
  }
  if num_classes:
    arrays['label'] = label.astype(np.int32)
  return array_source(
    arrays,
    vocab_size=vocab_size,
    fingerprint=synthetic_fingerprint(vocab_size),
    name='generated rows',
    classes=tuple(str(c) for c in range(num_classes)),
  )
