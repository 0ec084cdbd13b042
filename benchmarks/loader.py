"""Tokens/s that the loader sustains from files, against what a v3-8 needs, and the wait for input in a training loop.

Writes rows of 128 random tokens (Zipf's law, vocabulary 30522) in the format of `compactlm prepare` to a temporary
folder, and reads them back as training does: shuffled, checked, batched, read ahead. What a v3-8 needs is
batch * length / step_seconds of `compactlm plan --config=configs/convbert.py:base --topology=v3-8` (256 x 128, 450,000
tokens/s by the compiler's estimate) and `:small` (128 x 128, 1,200,000 tokens/s); pass other numbers with --needs. The
base line is the plain pipeline of Grain on the data source of TFDS, row by row and without checks, on the same files
and in turn; the best round of each counts. Tokens per second of CPU time, in all threads together, hold on a busy
machine too. Files are in the page cache. The last line trains configs/tiny.py:convbert (16 x 64) from files: how long
the loop waits for a batch, and how long the transfer of one takes, per step. All of it takes under a minute.

Command, on an otherwise idle machine:
JAX_PLATFORMS=cpu python benchmarks/loader.py [--rows=200000 --files=4 --threads=1,2 --rounds=3 --steps=100]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import runpy
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compactlm_jax.config import RunConfig, from_config_dict
from compactlm_jax.data import shards
from compactlm_jax.data.batches import Batches
from compactlm_jax.data.manifest import Manifest, Shard
from compactlm_jax.data.source import RowSource, open_dataset
from compactlm_jax.data.text import file_sha256
from compactlm_jax.types import Batch

SECONDS = 0.8  # of one measurement


def write(folder: Path, rows: int, seq_len: int, vocab_size: int, files: int) -> RowSource:
  """A dataset of random rows, opened."""
  rng = np.random.default_rng(0)
  weights = 1 / np.arange(1, vocab_size + 1)
  words = rng.choice(vocab_size, 1 << 22, p=weights / weights.sum()).astype(np.int32)

  def examples() -> Iterator[tuple[str, shards.Example]]:
    for start in rng.integers(0, len(words) - seq_len, rows):
      ids, length = words[start : start + seq_len], np.int32(seq_len)
      yield 'train', {'input_ids': ids, 'token_type_ids': np.zeros(seq_len, np.uint8), 'length': length}

  folder.mkdir()
  per_file = -(-rows // files)
  shards.write_dataset(folder, examples(), seq_len, per_file, vocab_size)
  written = [
    Shard(path.name, min(per_file, rows - i * per_file), path.stat().st_size, file_sha256(path))
    for i, path in enumerate(sorted(folder.glob('*array_record*')))
  ]
  settings = {'seq_len': seq_len, 'tokenizer': 'none'}
  manifest = Manifest(settings, vocab_size, counts={}, splits={'train': tuple(written)}, versions={})
  (folder / 'manifest.json').write_text(manifest.dumps())
  return open_dataset(folder)


def plain_pipeline(folder: Path, batch_size: int, threads: int) -> Iterator[Any]:
  """Grain on TFDS as both document it: each row read, parsed, then stacked."""
  import grain
  import tensorflow_datasets as tfds

  rows = tfds.builder_from_directory(str(folder)).as_data_source('train')
  batches = grain.MapDataset.source(rows).shuffle(1).repeat(1000).batch(batch_size)
  return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16)))


def rate(batches: Iterator[Any], batch_size: int, seq_len: int) -> tuple[float, float]:
  """(tokens/s of the consumer, tokens per second of CPU time in all threads), after the first few batches."""
  for _ in itertools.islice(batches, 5):
    pass
  start, cpu, number = time.perf_counter(), time.process_time(), 0
  while (passed := time.perf_counter() - start) < SECONDS:
    next(batches)
    number += 1
  tokens = number * batch_size * seq_len
  return tokens / passed, tokens / (time.process_time() - cpu)


def measure(cases: dict[str, Callable[[], tuple[float, float]]], rounds: int) -> dict[str, tuple[float, float]]:
  """The best of each, all in turn."""
  best = dict.fromkeys(cases, (0.0, 0.0))
  for _ in range(rounds):
    for name, run in cases.items():
      wall, cpu = run()
      best[name] = max(best[name][0], wall), max(best[name][1], cpu)
  return best


@dataclasses.dataclass
class Watched:
  """A source of batches that adds up the time for which its reader waits."""

  batches: Batches
  waited: float = 0.0
  began: float = 0.0
  ended: float = 0.0
  steps: int = 0

  def prefetch(self, start_step: int) -> Iterator[tuple[int, Batch]]:
    """The pairs of `Batches.prefetch`; the first two steps, which compile, do not count."""
    ahead = self.batches.prefetch(start_step)
    for number in itertools.count():
      start = time.perf_counter()
      pair = next(ahead)
      self.ended = time.perf_counter()
      if number == 2:
        self.began = start
      if number >= 2:
        self.waited += self.ended - start
        self.steps += 1
      yield pair


def wait_in_training(folder: Path, steps: int) -> str:
  """Trains a tiny model from files and says how long each step waited."""
  import jax

  from compactlm_jax.jobs import build_job
  from compactlm_jax.parallel import make_mesh, to_global
  from compactlm_jax.train.loop import train

  tiny = runpy.run_path(str(Path(__file__).parents[1] / 'configs' / 'tiny.py'))
  config = from_config_dict(RunConfig, tiny['get_config']('convbert'))
  config = dataclasses.replace(config, steps=steps, checkpoint_every=steps, eval_every=0)
  rows = write(folder / 'short', 20_000, config.data.seq_len, config.encoder.vocab_size, 1)
  watched = Watched(Batches(rows, config.batch_size, config.seed))
  job = dataclasses.replace(build_job(config), batches=watched, evals=())
  with contextlib.redirect_stderr(open(os.devnull, 'w')):
    train(job, str(folder / 'run'))
  mesh, batch = make_mesh(config.mesh), watched.batches.batch(0)
  transfers = []
  for _ in range(100):
    start = time.perf_counter()
    jax.block_until_ready(to_global(mesh, batch))
    transfers.append(time.perf_counter() - start)
  step, wait, transfer = (watched.ended - watched.began) / watched.steps, watched.waited / watched.steps, min(transfers)
  return (
    f'tiny:convbert on {jax.devices()[0].platform}: step {step * 1e3:.2f} ms, waiting for its batch '
    f'{wait * 1e3:.3f} ms ({wait / step:.1%}), transfer {transfer * 1e3:.3f} ms ({transfer / step:.1%})'
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rows', type=int, default=200_000)
  parser.add_argument('--files', type=int, default=4)
  parser.add_argument('--threads', default='1,2')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=100, help='of the tiny model')
  parser.add_argument('--needs', default='256:450000,128:1200000', help='BATCH:TOKENS_PER_SECOND of each plan')
  args = parser.parse_args()
  length = 128
  with tempfile.TemporaryDirectory() as name:
    start = time.perf_counter()
    folder = Path(name) / 'rows'
    source = write(folder, args.rows, length, 30522, args.files)
    size = sum(path.stat().st_size for path in folder.iterdir()) / args.rows
    seconds = time.perf_counter() - start
    print(f'{args.rows} rows in {args.files} files: {seconds:.1f} s, {size:.0f} bytes each; {os.cpu_count()} cores')
    for batch, need in ((int(b), float(n)) for b, n in (pair.split(':') for pair in args.needs.split(','))):
      cases: dict[str, Callable[[], tuple[float, float]]] = {}
      for threads in map(int, args.threads.split(',')):

        def loader(batch: int = batch, threads: int = threads) -> tuple[float, float]:
          pairs = Batches(source, batch, 0).prefetch(threads=threads)
          return rate(iter(pairs), batch, length)

        cases[f'{threads} threads'] = loader
      cases['plain pipeline, 2 threads'] = lambda batch=batch: rate(plain_pipeline(folder, batch, 2), batch, length)
      for case, (wall, cpu) in measure(cases, args.rounds).items():
        print(
          f'{batch} x {length}, {case}: {wall / 1e6:.2f} M tokens/s, {wall / need:.1f} x what the plan needs; '
          f'{cpu / 1e6:.2f} M per second of CPU time'
        )
    print(wait_in_training(Path(name), args.steps))


if __name__ == '__main__':
  main()
