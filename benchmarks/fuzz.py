"""Reads damaged files by the hundred thousand, with every reader of foreign bytes (tests/foreign_readers.py).

Each case changes one of a few small valid files: bits, bytes, ranges, members of JSON, headers of safetensors, gzip
streams. A reader may return or raise one of our own errors; it may open no file outside the folder, start nothing,
call no network, and has to end, in bounded memory. A case that breaks this is named with its number, and the exit code
is 1: the same seed makes the same cases.

Usage: python benchmarks/fuzz.py [--cases=100000] [--seed=0] [--readers=NAME,...] [--case=READER:NUMBER] [--shard=I/N]
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import pathlib
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests'))

import foreign
from foreign_readers import READERS

OTHER = 'OTHER'
MOST_TOLD = 5


def case(reader: foreign.Reader, valid: foreign.Files, seed: int, number: int) -> foreign.Change:
  """The damage of one case: a function of seed, reader and number."""
  return foreign.damaged(random.Random(f'{seed}:{reader.name}:{number}').randrange, valid)


def read_cases(reader: foreign.Reader, numbers: range, seed: int) -> tuple[collections.Counter, float, int]:
  """(results by name, seconds of the longest case, its number); what broke the rules counts as 'OTHER'."""
  results: collections.Counter[str] = collections.Counter()
  longest, slowest = 0.0, -1
  memory = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
  with tempfile.TemporaryDirectory(dir=memory) as folder:
    cases = foreign.Cases(reader, pathlib.Path(folder))
    if (found := foreign.check(reader, cases.folder)) != 'read':
      raise SystemExit(f'{reader.name}: the valid files are refused with {found}')
    for number in numbers:
      start = time.perf_counter()
      try:
        results[cases.run(case(reader, cases.valid, seed, number))] += 1
      except foreign.OtherError as e:
        results[OTHER] += 1
        if results[OTHER] <= MOST_TOLD:
          print(f'{e}\n  again with: --seed={seed} --case="{reader.name}:{number}"', file=sys.stderr, flush=True)
      if (took := time.perf_counter() - start) > longest:
        longest, slowest = took, number
  return results, longest, slowest


def read_all(
  cases: int, seed: int, only: Sequence[str] = (), index: int = 0, shards: int = 1
) -> collections.Counter[str]:
  """Results by name, of all readers or some; prints a line for each."""
  totals: collections.Counter[str] = collections.Counter()
  readers = [r for r in READERS if not only or r.name in only]
  print('| reader | cases | read | refused, by class | longest case |\n|---|---:|---:|---|---:|')
  for reader in readers:
    numbers = range(index, -(-cases // len(readers)), shards)
    results, longest, number = read_cases(reader, numbers, seed)
    totals += results
    refused = ', '.join(f'{name} {count}' for name, count in sorted(results.items()) if name != 'read')
    took = f'{1000 * longest:.0f} ms (number {number})'
    print(f'| {reader.name} | {len(numbers)} | {results["read"]} | {refused} | {took} |', flush=True)
  return totals


def summary(totals: collections.Counter[str]) -> str:
  """One line: cases, how many broke the rules, memory."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  return f'{sum(totals.values())} cases, {totals[OTHER]} broke the rules; peak memory {peak:.0f} MB'


def figures(seed: int, cases: int) -> tuple[list[tuple[str, str]], list[str]]:
  """Section `fuzz` of faults.py: figures and problems."""
  level = logging.root.manager.disable
  logging.disable(logging.CRITICAL)
  try:
    totals = read_all(cases, seed)
  finally:
    logging.disable(level)
  broken = [f'{totals[OTHER]} cases broke the rules'] if totals[OTHER] else []
  return [(f'damaged files read or refused by {len(READERS)} readers', summary(totals))], broken


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--cases', type=int, default=100_000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--readers', default='')
  parser.add_argument('--case', default='')
  parser.add_argument('--shard', default='0/1')
  args = parser.parse_args()
  logging.disable(logging.CRITICAL)
  if args.case:
    name, _, number = args.case.rpartition(':')
    (reader,) = (r for r in READERS if r.name == name)
    print(read_cases(reader, range(int(number), int(number) + 1), args.seed)[0])
    return
  index, shards = map(int, args.shard.split('/'))
  totals = read_all(args.cases, args.seed, args.readers.split(',') if args.readers else (), index, shards)
  print(f'{summary(totals)}: {dict(totals)}')
  sys.exit(bool(totals[OTHER]))


if __name__ == '__main__':
  main()
