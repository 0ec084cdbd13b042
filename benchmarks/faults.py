"""Injects faults by the hundred and prints what became of them: the slow tier of the fault matrix, as a Markdown table.

Sections: `kills` (SIGKILL at random moments, all tasks), `long` (2,000 steps of every task, alone and under kills:
memory, open files, disk), `damage` (see fault_damage.py) and `fuzz` (see fuzz.py). Figures also go to
benchmarks/results/faults.json, by the command that makes them again; those of commands that are not run stay. The exit
code is 1, and nothing from that section on is kept, if a run differs or needs repair, or memory, open files or disk
grow.

Usage: python benchmarks/faults.py [--only=kills,long,damage,fuzz] [--seed=0] [--kills=50] [--steps=2000]
  [--tasks=NAME,...] [--cases=100000]
Takes hours on two cores; `--only=kills --kills=10` takes minutes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the code that the killed runs execute

import fault_damage
import fault_kills
import fuzz

RESULTS = pathlib.Path(__file__).parent / 'results' / 'faults.json'


def sections(args: argparse.Namespace) -> dict[str, Callable[[int], fault_kills.Found]]:
  """Name -> seed -> figures and problems."""
  options = {'kills': args.kills, 'tasks': tuple(args.tasks.split(','))}
  return {
    'kills': functools.partial(fault_kills.kill_figures, **options),
    'long': functools.partial(fault_kills.long_figures, steps=args.steps, **options),
    'damage': lambda seed: (fault_damage.figures(seed), []),
    'fuzz': functools.partial(fuzz.figures, cases=args.cases),
  }


def options_of(args: argparse.Namespace, name: str) -> list[str]:
  """The flags of a section that are not the usual ones, to be given again."""
  flags = [f'--only={name}', f'--seed={args.seed}']
  flags += [f'--steps={args.steps}'] if name == 'long' and args.steps != 2000 else []
  flags += [f'--cases={args.cases}'] if name == 'fuzz' and args.cases != 100_000 else []
  if name in ('kills', 'long'):
    flags += [f'--kills={args.kills}'] if args.kills != 50 else []
    flags += [f'--tasks={args.tasks}'] if args.tasks != ','.join(fault_kills.runs.TASKS) else []
  return flags


def table(record: dict[str, dict]) -> str:
  """The figures of all commands that have run."""
  lines = ['| fault | figure | command |', '|---|---|---|']
  for command, found in record.items():
    lines += [f'| {what} | {figure} | `{command}` |' for what, figure in found['figures']]
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='kills,long,damage,fuzz')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--steps', type=int, default=2000)
  parser.add_argument('--cases', type=int, default=100_000)
  parser.add_argument('--tasks', default=','.join(fault_kills.runs.TASKS))
  args = parser.parse_args()
  known = sections(args)
  if unknown := set(args.only.split(',')) - set(known):
    parser.error(f'--only: {", ".join(sorted(unknown))}; the sections are {", ".join(known)}')
  record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  wrong = []
  for name in args.only.split(','):
    started = time.monotonic()
    figures, problems = known[name](args.seed)
    command = f'python benchmarks/faults.py {" ".join(options_of(args, name))}'
    record[command] = {
      'seconds': round(time.monotonic() - started),
      'python': platform.python_version(),
      'cores': os.cpu_count(),
      'figures': figures,
    }
    wrong += [f'{name}: {problem}' for problem in problems]
    if not wrong:
      RESULTS.parent.mkdir(exist_ok=True)
      RESULTS.write_text(json.dumps(record, indent=1) + '\n')
  print(table(record))
  if wrong:
    sys.exit('\n'.join(['WRONG', *wrong]))


if __name__ == '__main__':
  main()
