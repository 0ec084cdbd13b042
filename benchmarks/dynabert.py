"""An adaptive network on real text: its grid after each stage, beside cells as cut and models trained separately.

Usage: python benchmarks/dynabert.py --model=FOLDER --workdir=RUNS (--table=TSV | --glue=FOLDER --task=mrpc) [--seeds=0]
  [--rows=4000] [--epochs=3] [--separate=1x1,0.25x1,1x0.5,0.25x0.5] [--separate_seeds=0,1,2]
  [--sampling=all]
FOLDER is a BERT-like encoder with its tokenizer; TSV a table with the columns label and text (.gz is read), of which a
fixed tenth is held out; --glue a folder in GLUE's official layout. Runs and evaluations that are over
are not repeated. With --sampling=sandwich a step trains the largest sub-network, the smallest and two others in place
of all.

What is compared, all on the same rows with the same learning rate (1e-4, batches of 32):
  as cut       the fine-tuned model (the teacher), leftmost heads and neurons, without further training
  rewired      the same after heads and neurons were sorted by importance
  width, depth, final  after each of the three stages of `--epochs` epochs
  separate     a model of the cell's size, cut from the pre-trained encoder and fine-tuned on labels, for as many steps
               as the teacher and the three stages together
The tables are printed after each part and kept in RUNS/dynabert.json; RUNS/dynabert.png shows the grids.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from prune import dense, numbers, split

from compactlm_jax.config import (
  AdaptConfig,
  Cell,
  FinetuneConfig,
  RunConfig,
)
from compactlm_jax.cpu import keep_memory
from compactlm_jax.interop.bundle import save_pretrained
from compactlm_jax.jobs.commands import run_train
from compactlm_jax.jobs.evaluate import run_evaluate
from compactlm_jax.jobs.grid_rows import cell_bundle
from compactlm_jax.jobs.models import load_model
from compactlm_jax.report.grid import over_runs, read_rows
from compactlm_jax.report.grid_plot import draw_grid

STAGES = ('width', 'depth', 'final')
Found = dict[str, dict[str, list[float]]]
"""What -> cell -> accuracy of each seed."""


def fine_tuning(args: argparse.Namespace) -> RunConfig:
  """The teacher's run."""
  if args.table:
    base = dense(args, *split(pathlib.Path(args.table), pathlib.Path(args.workdir) / 'data'))
  else:
    base = dense(args, '', '')
    rows = dataclasses.replace(base.data, path=args.glue, train_rows=0)
    base = dataclasses.replace(base, data=rows, finetune=FinetuneConfig(benchmark=args.task))
  # Few lengths: a step of twelve sub-networks takes its time to compile.
  return dataclasses.replace(base, data=dataclasses.replace(base.data, seq_len=128, buckets=(32, 64, 128)))


def adapted(base: RunConfig, teacher: str, sampling: str) -> RunConfig:
  """The three stages, from a teacher's run."""
  return dataclasses.replace(base, task='adapt', model='', teacher=teacher, adapt=AdaptConfig(sampling=sampling))


def separate(base: RunConfig, cell: Cell, folder: pathlib.Path, epochs: float) -> RunConfig:
  """A run of the cell's size, from that part of the pre-trained encoder."""
  if not folder.exists():
    whole = load_model(base.model)
    save_pretrained(cell_bundle(dataclasses.replace(whole, params={'encoder': whole.params['encoder']}), cell), folder)
  return dataclasses.replace(base, model=str(folder), epochs=epochs)


def scores(results: dict[str, Any]) -> dict[str, float]:
  """Cell -> accuracy, of a grid."""
  return {Cell(row['width'], row['depth']).name: row['metrics']['accuracy'] for row in results['grid']}


def table(found: Found) -> str:
  """Cells as columns; mean, and the deviation over seeds."""
  names = [cell for cell in dict.fromkeys(cell for row in found.values() for cell in row)]
  lines = [f'| width x depth | {" | ".join(names)} |', f'|---|{"---:|" * len(names)}']
  for what, row in found.items():
    cells = []
    for name in names:
      values = row.get(name, [])
      spread = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
      cells.append(f'{statistics.mean(values):.3f}{spread}' if values else '')
    lines.append(f'| {what} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def evaluated(config: RunConfig, path: pathlib.Path, output: pathlib.Path) -> dict[str, Any]:
  """The results of a run's grid, written to a folder."""
  if not (output / 'results.json').exists():
    run_evaluate(config, str(path), output=str(output))
  results: dict[str, Any] = json.loads((output / 'results.json').read_text())
  return results


def run_seed(args: argparse.Namespace, seed: int, add: Callable[[str, dict[str, Any]], None]) -> None:
  """Teacher, cuts and stages of one seed."""
  base = dataclasses.replace(fine_tuning(args), seed=seed)
  folder = pathlib.Path(args.workdir) / f'seed-{seed}'
  teacher = folder / 'teacher'
  run_train(base, str(teacher))
  whole = adapted(base, str(teacher), args.sampling)

  def score(what: str, path: pathlib.Path) -> None:
    add(what, evaluated(whole, path, folder / 'grids' / what.replace(' ', '_')))

  score('as cut', teacher)
  # One step at a rate of 0: what is left of the first stage is its rewiring.
  still = dataclasses.replace(base.optimizer, learning_rate=0.0, warmup_fraction=0.0)
  only = dataclasses.replace(whole.adapt, stages=('width',), keep_best=False)
  rewired = dataclasses.replace(whole, adapt=only, optimizer=still, steps=1, epochs=0.0, eval_every=0)
  run_train(rewired, str(folder / 'rewired'))
  score('rewired', folder / 'rewired')
  run_train(whole, str(folder / 'adapted'))
  for stage in STAGES:
    score(stage, folder / 'adapted' if stage == STAGES[-1] else folder / 'adapted' / 'stages' / stage)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name in ('model', 'workdir'):
    parser.add_argument(f'--{name}', required=True)
  for name, default in (('table', ''), ('glue', ''), ('task', 'mrpc'), ('separate', '1x1,0.25x1,1x0.5,0.25x0.5')):
    parser.add_argument(f'--{name}', default=default)
  for name, default in (('seeds', '0'), ('separate_seeds', '0,1,2')):
    parser.add_argument(f'--{name}', default=default, help='a list, which may be empty')
  parser.add_argument('--rows', type=int, default=4000)
  parser.add_argument('--epochs', type=float, default=3.0)
  parser.add_argument('--sampling', choices=('all', 'sandwich'), default='all')
  args = parser.parse_args()
  keep_memory()
  workdir = pathlib.Path(args.workdir)
  found: Found = {}
  grids: dict[str, list[Sequence[Any]]] = {}

  def keep(what: str, values: dict[str, float]) -> None:
    for cell, value in values.items():
      found.setdefault(what, {}).setdefault(cell, []).append(value)
    (workdir / 'dynabert.json').write_text(json.dumps(found, indent=2) + '\n')
    print(f'\n{table(found)}', flush=True)

  def add(what: str, results: dict[str, Any]) -> None:
    keep(what, scores(results))
    grids.setdefault(what, []).append(read_rows(results['grid'], what))
    draw_grid({name: over_runs(runs) for name, runs in grids.items()}).savefig(workdir / 'dynabert.png', dpi=120)

  for seed in numbers(args.seeds):
    run_seed(args, seed, add)
  for name in filter(None, args.separate.split(',')):
    cell = Cell(*map(float, name.split('x')))
    for seed in numbers(args.separate_seeds):
      base = separate(fine_tuning(args), cell, workdir / 'cut' / cell.name, 4 * args.epochs)
      folder = workdir / 'separate' / cell.name / f'seed-{seed}'
      results = run_train(dataclasses.replace(base, seed=seed), str(folder))
      keep('separate', {cell.name: results['metrics']['accuracy']})


if __name__ == '__main__':
  main()
