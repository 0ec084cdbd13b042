"""Development scores of GLUE tasks with a small real encoder on a CPU, several seeds each, as a table.

Usage: python benchmarks/glue.py --model=FOLDER --data=GLUE --workdir=RUNS [--tasks=sst2,cola,mrpc,rte,stsb] [--seeds=3]
FOLDER is a BERT-like encoder with its tokenizer, GLUE the official folder of all tasks. Runs that are over are not run
again. The README's numbers are for the encoder of `compactlm demo` (6 layers, 384 wide).

The recipe is `minilm-cpu` of configs/glue.py with what is listed in CHANGES: sentence encoders were trained to be read
by their mean, so that a pooler is of no use, and 1e-4 suits so small a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import learning

from compactlm_jax.config import RunConfig
from compactlm_jax.cpu import keep_memory
from compactlm_jax.jobs.seeds import run_seeds

CHANGES = {'sst2': (1e-4, 1), 'cola': (1e-4, 3), 'mrpc': (1e-4, 4), 'rte': (1e-4, 3), 'stsb': (1e-4, 3)}
"""Task -> (learning rate, epochs)."""
MAIN = {'sst2': 'accuracy', 'cola': 'matthews', 'mrpc': 'f1', 'rte': 'accuracy', 'stsb': 'pearson'}


def config(task: str, model: str, data: str, rows: int = 0) -> RunConfig:
  """The run of a task, on all or on `rows` of its training rows."""
  base = learning.published('glue.py', f'minilm-cpu-{task}')
  rate, epochs = CHANGES[task]
  return dataclasses.replace(
    base,
    model=model,
    epochs=float(epochs),
    data=dataclasses.replace(base.data, path=data, train_rows=rows),
    finetune=dataclasses.replace(base.finetune, pooled=False, score_scale=5.0 if task == 'stsb' else 1.0),
    optimizer=dataclasses.replace(base.optimizer, learning_rate=rate),
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name in ('model', 'data', 'workdir'):
    parser.add_argument(f'--{name}', required=True)
  parser.add_argument('--tasks', default=','.join(CHANGES))
  parser.add_argument('--seeds', type=int, default=3)
  args = parser.parse_args()
  keep_memory()
  print('| task | metric | mean | standard deviation | seeds | seconds per run |\n|---|---|---:|---:|---|---:|')
  for task in args.tasks.split(','):
    started = time.monotonic()
    series = run_seeds(config(task, args.model, args.data), f'{args.workdir}/{task}', range(args.seeds))
    found = [result['metrics'][MAIN[task]] for result in series.results.values()]
    seconds = statistics.mean(result['seconds'] for result in series.results.values())
    spread = statistics.stdev(found) if len(found) > 1 else float('nan')
    each = ' '.join(f'{value:.3f}' for value in found)
    print(
      f'| {task} | {MAIN[task]} | {statistics.mean(found):.4f} | {spread:.4f} | {each} | {seconds:.0f} |', flush=True
    )
    if series.failures:
      print(f'failed: {series.failures} after {time.monotonic() - started:.0f} s')


if __name__ == '__main__':
  main()
