"""Throughput of prediction: short texts in length buckets, the same padded to the model's length, and PyTorch.

All read the same texts in one process, tokenisation included; compilation is not counted. PyTorch's transformers pads
each batch to its longest text, in the order of the file and sorted by length. Weights of the head are random unless
the model has one: times do not depend on them, and the logits of all ways are compared.

Command: python benchmarks/predict.py --model=FOLDER --texts=FILE.tsv --column=sentence [--rows=96 --rounds=2]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers

import compactlm_jax as clm
from compactlm_jax.cpu import keep_memory
from compactlm_jax.data.table import table_rows


def with_head(bundle: clm.Bundle) -> clm.Bundle:
  """The model with a classifier of two classes, on a pooler if it is a BERT, if it has none."""
  if 'classifier' in bundle.params:
    return bundle
  key, width, params = jax.random.key(0), bundle.config.hidden_size, dict(bundle.params)
  config = dataclasses.replace(bundle.config, pooler=bundle.config.architecture == 'bert')
  if config.pooler and not bundle.config.pooler:
    pooler = {'kernel': 0.05 * jax.random.normal(key, (width, width)), 'bias': jax.numpy.zeros(width)}
    params['encoder'] = {**params['encoder'], 'pooler': pooler}
  params['classifier'] = {'kernel': jax.random.normal(key, (width, 2)), 'bias': jax.numpy.zeros(2)}
  kept = {name: params[name] for name in ('encoder', 'classifier')}
  return dataclasses.replace(bundle, config=config, params=kept)


def read_texts(path: str, column: str, rows: int) -> list[str]:
  """The first `rows` texts of a table, or sentences of 5 to 40 words without a file."""
  if path:
    return [row[column] for _, row in table_rows(path)][:rows]
  rng = np.random.default_rng(0)
  words = 'the film was a very good and rather long story of two people who never met'.split()
  return [' '.join(rng.choice(words, rng.integers(5, 40))) for _ in range(rows)]


def torch_runner(folder: str, texts: list[str], batch: int, ordered: bool) -> Callable[[], np.ndarray]:
  model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

  def run() -> np.ndarray:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i])) if ordered else list(range(len(texts)))
    out = np.zeros((len(texts), model.config.num_labels), np.float32)
    with torch.inference_mode():
      for places in (order[i : i + batch] for i in range(0, len(order), batch)):
        tokens = tokenizer([texts[i] for i in places], padding=True, truncation=True, return_tensors='pt')
        out[places] = model(**tokens).logits.numpy()
    return out

  return run


def best_of(runs: dict[str, Callable[[], np.ndarray]], rounds: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """(seconds, outputs) of each; rounds alternate, the best one counts."""
  outputs = {name: run() for name, run in runs.items()}
  seconds = dict.fromkeys(runs, float('inf'))
  for _ in range(rounds):
    for name, run in runs.items():
      started = time.perf_counter()
      run()
      seconds[name] = min(seconds[name], time.perf_counter() - started)
  return seconds, outputs


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', default='demo_run/models/teacher')
  parser.add_argument('--texts', default='', help='.tsv or .jsonl, perhaps .gz')
  parser.add_argument('--column', default='sentence')
  parser.add_argument('--rows', type=int, default=96)
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--json', default='')
  args = parser.parse_args()
  keep_memory()
  torch.set_num_threads(os.cpu_count() or 1)
  bundle, texts = with_head(clm.from_pretrained(args.model)), read_texts(args.texts, args.column, args.rows)
  usage = clm.predict(bundle, texts, batch_size=args.batch).usage
  with tempfile.TemporaryDirectory() as folder:
    clm.save_pretrained(bundle, folder)
    runs = {
      'ours, length buckets': lambda: clm.predict(bundle, texts, batch_size=args.batch).outputs,
      f'ours, padded to {bundle.config.max_positions}': lambda: (
        clm.predict(bundle, texts, batch_size=args.batch, buckets=()).outputs
      ),
      'PyTorch, sorted by length': torch_runner(folder, texts, args.batch, True),
      'PyTorch, in order': torch_runner(folder, texts, args.batch, False),
    }
    seconds, outputs = best_of(runs, args.rounds)
  ours = next(iter(runs))
  print(
    f'{len(texts)} texts, {usage.tokens / len(texts):.1f} tokens each, {100 * usage.padding:.0f}% padding in buckets'
  )
  print('| | texts/s | real tokens/s | buckets are faster by | largest difference |\n|---|---:|---:|---:|---:|')
  for name, took in seconds.items():
    difference = np.abs(outputs[name] - outputs[ours]).max()
    print(
      f'| {name} | {len(texts) / took:,.0f} | {usage.tokens / took:,.0f} | {took / seconds[ours]:.2f}x '
      f'| {difference:.0e} |'
    )
  if args.json:
    with open(args.json, 'w') as file:
      json.dump({'rows': len(texts), 'padding': usage.padding, 'seconds': seconds}, file, indent=2)


if __name__ == '__main__':
  main()
