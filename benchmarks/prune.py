"""Pruning methods on sentence polarity with a small real encoder: accuracy at 10 % and 3 % of the encoder's weights.

Usage: python benchmarks/prune.py --model=FOLDER --table=TSV --workdir=RUNS [--seeds=0] [--rows=4000] [--epochs=8]
  [--methods=...] [--densities=.1,.03] [--teacher=0,1] [--initial_warmup=1] [--final_warmup=2]
FOLDER is a BERT-like encoder with its tokenizer, TSV a table with the columns label and text (.gz is read), for example
the 10,662 sentences of MR polarity; a tenth of it is held out, by a shuffle that is always the same. Runs that are over
are not run again; the table is printed after each, and written to RUNS/prune.json.

All runs have equal steps, batches and learning rates (weights 1e-4, scores 1e-2, L0's scores 1e-1 as published). Hard
movement and magnitude end at the asked density; of soft movement and L0 the weight of the penalty is controlled so that
they do (prune.control='density'). `--methods='heads and neurons' --densities=.2` prunes those, `--methods=random` keeps
weights by chance. The dense run has the same steps; with `--teacher=1` it teaches (weights .1 and .9).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gzip
import io
import itertools
import json
import pathlib
import random
import statistics
from typing import Any

from compactlm_jax.config import DataConfig, EncoderConfig, FinetuneConfig, OptimizerConfig, PruneConfig, RunConfig
from compactlm_jax.cpu import keep_memory
from compactlm_jax.jobs.commands import run_train

METHODS: dict[str, dict[str, Any]] = {
  'magnitude': {'method': 'magnitude'},
  'post-hoc magnitude': {'method': 'post_hoc_magnitude'},
  'l0': {'method': 'l0', 'control': 'density', 'scores_scale': 2.197, 'scores_learning_rate': 1e-1},
  'hard movement': {'method': 'hard_movement'},
  'soft movement': {'method': 'soft_movement', 'control': 'density'},
}
ASKED: dict[str, dict[str, Any]] = {
  'heads and neurons': {'method': 'hard_movement', 'structure': 'heads+neurons'},
  'random': {'method': 'random'},
}
"""Run only if asked for; the density of the first is one of heads and neurons."""


def split(table: pathlib.Path, folder: pathlib.Path) -> tuple[str, str]:
  """Writes train.tsv and dev.tsv, a fixed tenth, and returns their names."""
  files = folder / 'train.tsv', folder / 'dev.tsv'
  if not all(file.exists() for file in files):
    raw = table.read_bytes()
    text = (gzip.decompress(raw) if table.suffix == '.gz' else raw).decode()
    rows = list(csv.reader(io.StringIO(text), delimiter='\t', quoting=csv.QUOTE_NONE))
    header, rows = rows[0], rows[1:]
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    held = len(rows) // 10
    for file, part in zip(files, (rows[held:], rows[:held])):
      file.write_text('\n'.join('\t'.join(row) for row in [header, *part]) + '\n')
  return str(files[0]), str(files[1])


def numbers(text: str) -> list[int]:
  """'0,2' -> [0, 2]."""
  return [int(part) for part in text.split(',') if part]


def dense(args: argparse.Namespace, train: str, dev: str) -> RunConfig:
  """The run without pruning."""
  return RunConfig(
    task='finetune',
    epochs=args.epochs,
    batch_size=32,
    model=args.model,
    log_every=25,
    checkpoint_every=100_000,
    encoder=EncoderConfig(hidden_dropout=0.1, attention_dropout=0.1),
    data=DataConfig(
      seq_len=64, train=train, dev=dev, train_rows=args.rows, buckets=(16, 24, 32, 48, 64), group_by_length=True
    ),
    finetune=FinetuneConfig(ce_weight=0.1, distil_weight=0.9),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_fraction=0.1, weight_decay=0.0, epsilon=1e-8),
  )


def pruned(base: RunConfig, method: str, density: float, teacher: str, **given: Any) -> RunConfig:
  """The run of a method; given: other fields of `config.prune`."""
  fields = {'density': density, **{**METHODS, **ASKED}[method], **given}
  return dataclasses.replace(base, task='prune', teacher=teacher, prune=PruneConfig(**fields))


def table(found: dict[str, list[dict[str, Any]]]) -> str:
  """Results as a table: accuracy (mean, spread over seeds) and what remains."""
  lines = ['| run | accuracy | standard deviation | seeds | remaining | seconds |', '|---|---:|---:|---:|---:|---:|']
  for name, results in found.items():
    scores = [each['metrics']['accuracy'] for each in results]
    spread = f'{statistics.stdev(scores):.3f}' if len(scores) > 1 else ''
    kept = statistics.mean(each.get('density', 1.0) for each in results)
    seconds = statistics.mean(each['seconds'] for each in results)
    lines.append(f'| {name} | {statistics.mean(scores):.3f} | {spread} | {len(scores)} | {kept:.2%} | {seconds:.0f} |')
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name in ('model', 'table', 'workdir'):
    parser.add_argument(f'--{name}', required=True)
  parser.add_argument('--seeds', default='0', help='for example 0,1,2; the dense run of the first teaches')
  parser.add_argument('--rows', type=int, default=4000)
  parser.add_argument('--epochs', type=float, default=8.0)
  parser.add_argument('--methods', default=','.join(['dense', *METHODS]))
  parser.add_argument('--densities', default='.1,.03')
  parser.add_argument(
    '--initial_warmup', type=float, default=1.0, help='prune.initial_warmup; the warm-up is a tenth of the run'
  )
  parser.add_argument('--final_warmup', type=float, default=2.0, help='prune.final_warmup')
  parser.add_argument('--teacher', default='0,1', help='0 without, 1 with distillation from the dense run')
  args = parser.parse_args()
  if unknown := set(args.methods.split(',')) - {'dense', *METHODS, *ASKED}:
    known = ', '.join(['dense', *METHODS, *ASKED])
    parser.error(f'--methods: {", ".join(sorted(unknown))} is unknown; use some of {known}')
  keep_memory()
  workdir = pathlib.Path(args.workdir)
  seeds = numbers(args.seeds)
  base = dense(args, *split(pathlib.Path(args.table), workdir / 'data'))
  found: dict[str, list[dict[str, Any]]] = {}

  def run(name: str, config: RunConfig, seed: int) -> None:
    folder = workdir / name.replace(' ', '_').replace('%', '') / f'seed-{seed}'
    found.setdefault(name, []).append(run_train(dataclasses.replace(config, seed=seed), str(folder)))
    print(f'\n{table(found)}', flush=True)
    (workdir / 'prune.json').write_text(json.dumps(found, indent=2) + '\n')

  methods = [method for method in args.methods.split(',') if method != 'dense']
  if 'dense' in args.methods.split(',') or '1' in args.teacher:
    for seed in seeds:
      run('dense', base, seed)
  warmups = {'initial_warmup': args.initial_warmup, 'final_warmup': args.final_warmup}
  grid = itertools.product(seeds, args.teacher.split(','), map(float, args.densities.split(',')), methods)
  for seed, taught, density, method in grid:
    teacher = str(workdir / 'dense' / f'seed-{seeds[0]}') if int(taught) else ''
    name = f'{method} {density:.0%}{" distilled" if teacher else ""}'
    run(name, pruned(base, method, density, teacher, **warmups), seed)


if __name__ == '__main__':
  main()
