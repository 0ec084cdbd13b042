"""Candidates for data augmentation: all gaps of many sentences together, one sentence at a time, one word at a time.

All ways read the same texts in one process and must find the same candidates; compilation is not counted, rounds
alternate and the best one counts. The PyTorch way is the original's: one gap for each call, scores of all tokens at
all positions, all of them sorted. A model without a head that guesses words gets one of its token embeddings: times
do not depend on it. Neighbours of word vectors, a matrix product for each batch of words, are left out.

Command: python benchmarks/augment.py --model=FOLDER --texts=FILE.tsv --column=text [--rows=64 --rounds=2]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers

import compactlm_jax as clm
from compactlm_jax.cpu import keep_memory
from compactlm_jax.data.augment import Text, find_words, whole_words
from compactlm_jax.data.table import table_rows
from compactlm_jax.jobs.candidates import CONTEXTS, Finder
from compactlm_jax.tasks.mlm import init_mlm

Found = list[list[tuple[str, ...]]]


def with_head(bundle: clm.Bundle) -> clm.Bundle:
  """The bundle with its own head for hidden words, or with one that compares hidden states and token embeddings."""
  head = bundle.params.get('mlm_head')
  if head is None:
    head = jax.tree.map(np.asarray, init_mlm(bundle.config, jax.random.key(0))['mlm_head'])
    head['dense']['kernel'] = np.eye(*head['dense']['kernel'].shape, dtype=np.float32)
  return dataclasses.replace(bundle, params={'encoder': bundle.params['encoder'], 'mlm_head': head})


def single_pieces(texts: tuple[Text, ...]) -> tuple[Text, ...]:
  return tuple(dataclasses.replace(t, words=tuple(w for w in t.words if w.pieces == 1)) for t in texts)


def torch_runner(folder: str, texts: tuple[Text, ...], finder: Finder) -> Callable[[], Found]:
  model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
  tokenizer = finder.reader.tokenizer
  special = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)

  def guess(text: Text, piece: int) -> tuple[str, ...]:
    first = [tokenizer.cls_id, *text.ids, tokenizer.sep_id]
    first[1 + piece] = tokenizer.mask_id
    second = [*text.ids, tokenizer.sep_id] if finder.context == 'published' else []
    segments = [0] * len(first) + [1] * len(second)
    logits = model(torch.tensor([[*first, *second]]), token_type_ids=torch.tensor([segments])).logits
    best = torch.argsort(logits[0, 1 + piece], descending=True)[: finder.count]
    return whole_words(best.tolist(), finder.pieces, special)

  def run() -> Found:
    with torch.inference_mode():
      return [[guess(text, word.piece) for word in text.words] for text in texts]

  return run


def one_word_each(finder: Finder, texts: tuple[Text, ...]) -> Found:
  return [[finder.find([dataclasses.replace(text, words=(word,))])[0][0] for word in text.words] for text in texts]


def best_of(
  runs: dict[str, Callable[[], Found]], rounds: int
) -> tuple[dict[str, tuple[float, float]], dict[str, Found]]:
  """((seconds, seconds of all cores), candidates) of each; rounds alternate, the best of each kind counts."""
  found: dict[str, Found] = {}
  best: dict[str, tuple[float, float]] = {}
  for turn in range(rounds + 1):
    for name, run in runs.items():
      clock, cores = time.perf_counter(), time.process_time()
      found[name] = run()
      took = time.perf_counter() - clock, time.process_time() - cores
      print(f'round {turn} of {rounds}, {name}: {took[0]:.1f} s, {took[1]:.1f} s of all cores', file=sys.stderr)
      if turn:  # the first one compiles
        before = best.get(name, took)
        best[name] = min(before[0], took[0]), min(before[1], took[1])
  return best, found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', default='demo_run/models/teacher')
  parser.add_argument('--texts', required=True, help='.tsv or .jsonl, perhaps .gz')
  parser.add_argument('--column', default='text')
  parser.add_argument('--rows', type=int, default=64)
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--context', default=CONTEXTS[0], choices=CONTEXTS)
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--threads', type=int, default=0, help='of PyTorch; 0 takes all cores, 1 where they are busy')
  parser.add_argument('--json', default='')
  args = parser.parse_args()
  keep_memory()
  torch.set_num_threads(args.threads or os.cpu_count() or 1)
  bundle = with_head(clm.from_pretrained(args.model))
  finder = Finder.of(bundle, context=args.context, batch_size=args.batch)
  rows = [row[args.column] for _, row in table_rows(args.texts)]
  texts = single_pieces(find_words(rows[:: max(1, len(rows) // args.rows)][: args.rows], finder.reader.tokenizer))
  with tempfile.TemporaryDirectory() as folder:
    clm.save_pretrained(bundle, folder)
    runs = {
      'all sentences together': lambda: finder.find(texts),
      'one sentence at a time': lambda: [finder.find([text])[0] for text in texts],
      'one word at a time': lambda: one_word_each(finder, texts),
      'PyTorch, one word at a time, as the original': torch_runner(folder, texts, finder),
    }
    seconds, found = best_of(runs, args.rounds)
  together, words = found['all sentences together'], sum(len(text.words) for text in texts)
  print(f'{len(texts)} sentences, {words} gaps, context {args.context}, {jax.devices()[0].device_kind}')
  print('| | words/s | together is faster by | by time of all cores | words with other candidates |')
  print('|---|---:|---:|---:|---:|')
  base = seconds['all sentences together']
  for name, (clock, cores) in seconds.items():
    others = sum(a != b for x, y in zip(together, found[name], strict=True) for a, b in zip(x, y, strict=True))
    print(f'| {name} | {words / clock:,.1f} | {clock / base[0]:.2f}x | {cores / base[1]:.2f}x | {others} |')
  if args.json:
    with open(args.json, 'w') as file:
      json.dump({'sentences': len(texts), 'words': words, 'seconds': seconds}, file, indent=2)


if __name__ == '__main__':
  main()
