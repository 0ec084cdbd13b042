"""Attention concentration C of a model on a text: attention within 4 positions over attention beyond.

The authors of ConvBERT report 0.941 for BERT and 0.608 for ConvBERT, averaged on MRPC (answer to reviewers, NeurIPS
2020); `compactlm_jax.analysis.concentration` says what is averaged here. The text has one example per line, plain
(.txt), or tab-separated (.tsv) with the columns of the sentences named by their numbers; .gz is read.

Usage: python benchmarks/concentration.py --model=FOLDER --text=MRPC/dev.tsv.gz --columns=3,4 [--seq_len=128 --rows=500]
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
from collections.abc import Iterator

import jax
import numpy as np

from compactlm_jax.analysis.concentration import attention_mass
from compactlm_jax.cpu import keep_memory
from compactlm_jax.data.tokenizer import Tokenizer
from compactlm_jax.jobs import load_model, tokenizer_of


def examples(path: str, columns: tuple[int, ...]) -> Iterator[tuple[str, ...]]:
  """One or two texts of each line that has them; the header of a table is skipped."""
  opened = gzip.open(path, 'rt', encoding='utf-8') if path.endswith('.gz') else open(path, encoding='utf-8')
  with opened as lines:
    for line in itertools.islice(lines, 1 if columns else 0, None):
      fields = line.rstrip('\n').split('\t') if columns else [line.strip()]
      texts = tuple(fields[i] for i in columns or (0,))
      if all(texts):
        yield texts


def row(tokenizer: Tokenizer, texts: tuple[str, ...], seq_len: int) -> tuple[list[int], int]:
  """([CLS] first [SEP] second [SEP], where the second segment starts), the longer text cut to fit."""
  parts = tokenizer.encode(texts)
  while sum(map(len, parts)) > seq_len - 1 - len(parts):
    max(parts, key=len).pop()
  ids = [tokenizer.cls_id, *parts[0], tokenizer.sep_id]
  return ids + [i for part in parts[1:] for i in [*part, tokenizer.sep_id]], len(ids)


def batches(rows: list[tuple[list[int], int]], size: int, length: int) -> Iterator[tuple[np.ndarray, ...]]:
  """(ids, mask, token types) of equal shape; rows of nothing fill up the last."""
  for start in range(0, len(rows), size):
    ids, mask, types = (np.zeros((size, length), np.int32) for _ in range(3))
    for i, (tokens, second) in enumerate(rows[start : start + size]):
      ids[i, : len(tokens)], mask[i, : len(tokens)], types[i, second : len(tokens)] = tokens, 1, 1
    yield ids, mask, types


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', required=True, help='Hugging Face folder or run directory')
  parser.add_argument('--text', required=True)
  parser.add_argument('--columns', default='', help='0-based columns of a .tsv; empty reads whole lines')
  parser.add_argument('--seq_len', type=int, default=128)
  parser.add_argument('--rows', type=int, default=500)
  parser.add_argument('--batch', type=int, default=16)
  args = parser.parse_args()
  keep_memory()
  columns = tuple(int(c) for c in args.columns.split(',') if c)
  bundle, tokenizer = load_model(args.model), tokenizer_of(args.model)
  config = dataclasses.replace(bundle.config, scan_unroll=1)
  length = min(args.seq_len, config.max_positions)
  rows = [row(tokenizer, texts, length) for texts in itertools.islice(examples(args.text, columns), args.rows)]
  measure = jax.jit(attention_mass, static_argnums=1)
  near_N, far_N = np.zeros(config.num_layers), np.zeros(config.num_layers)
  for batch in batches(rows, args.batch, length):
    mass = measure(bundle.params, config, *batch)
    near_N += np.asarray(mass.near_NBH.sum((1, 2)))
    far_N += np.asarray(mass.far_NBH.sum((1, 2)))
  print(f'{args.model}, {args.text}: {len(rows)} rows, {np.mean([len(ids) for ids, _ in rows]):.1f} tokens on average')
  print('layer  C\n' + '\n'.join(f'{n:>5}  {c:.3f}' for n, c in enumerate(near_N / far_N, 1)))
  print(f'all    {near_N.sum() / far_N.sum():.3f}')


if __name__ == '__main__':
  main()
