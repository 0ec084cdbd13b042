"""What is done to files, and what comes of it: figures of docs/reliability.md (kills are in fault_kills.py).

Damaged checkpoints of every task, damaged records, hostile model folders, checkpoints that do not fit, another number
of devices, a full disk, and exports against torch transformers. Nothing may be silently wrong; the exit code is 1 if
something is. The same seed damages the same bits.

Usage: python benchmarks/fault_damage.py [--seed=0] [--only=NAME,...]     (with 8 virtual CPU devices)
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parents[1] / '.cache/jax'))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests'))

import damaging
import every_task
import exporting
import hostile
import jax
import numpy as np
import pytest
from compile_cache import only_of_one_device
from foreign import watched
from stored_rows import V, example, write

from compactlm_jax.checkpoint import Checkpoints
from compactlm_jax.config import MeshConfig
from compactlm_jax.data.manifest import read_manifest
from compactlm_jax.data.source import open_dataset
from compactlm_jax.errors import CompactLMError, ConfigError, DataError, StorageError
from compactlm_jax.interop.bundle import from_pretrained
from compactlm_jax.jobs import build_job
from compactlm_jax.metrics import read_metrics
from compactlm_jax.train.loop import train

Figures = list[tuple[str, str]]


class WrongError(Exception):
  """Something was silently wrong."""


def _require(ok: bool, what: str) -> None:
  if not ok:
    raise WrongError(what)


def _like(run: every_task.Run, state: object) -> object:
  return every_task.state_on(run.mesh, state)


def _saved(task: str, folder: pathlib.Path) -> dict[int, object]:
  """Steps 5 and 6 of a run, saved; step -> state on the host."""
  run, states = every_task.compiled(task), {}
  state = run.steps(run.initial, range(5))[1]
  with Checkpoints(folder, 2) as checkpoints:
    for step in (5, 6):
      checkpoints.save(step, run.place(state), {'task': task}, wait=True)
      states[step], state = state, run.steps(state, range(step, step + 1))[1]
  return states


def checkpoints(seed: int, folder: pathlib.Path) -> Figures:
  """Every file of the newest checkpoint of every task, truncated, deleted, flipped in three places."""
  total, detected, files = 0, 0, 0
  for task in every_task.TASKS:
    whole, work, run = folder / task, folder / 'damaged', every_task.compiled(task)
    states, places = _saved(task, whole), random.Random(f'{seed}:{task}')
    cases = list(damaging.damages(whole, 6, lambda size, places=places: places.sample(range(size), min(3, size))))
    files += len({str(name) for name, _, _ in cases})
    for name, how, offset in cases:
      shutil.rmtree(work, ignore_errors=True)
      shutil.copytree(whole, work)
      damaging.inflict(work, name, how, offset)
      with Checkpoints(work, 2) as opened:
        restored, metadata = opened.restore(_like(run, states[6]))  # type: ignore[misc]
      step = metadata['step']
      _require(every_task.same_bits(every_task.host(restored), states[step]), f'{task}: {name} {how} {offset}')
      _require((work / '6.bad').exists() == (step == 5), f'{task}: {name} {how} {offset}: not set aside')
      detected += step == 5
      total += 1
  return [
    ('files of checkpoints damaged (truncated, deleted, one bit flipped at 3 places)', f'{total} of {files} files'),
    ('... found and answered by the step before', str(detected)),
    ('... of no consequence: restored with the bits that were saved', str(total - detected)),
    ('... silently wrong', f'0 of {total}'),
  ]


def records(seed: int, folder: pathlib.Path) -> Figures:
  """Kinds of damage, and bits flipped all over a file of rows."""
  for name, (make, message) in damaging.RECORDS.items():
    rows = folder / name.replace(' ', '_')
    make(rows)
    with pytest.raises(DataError, match=message):
      open_dataset(rows).fetch(np.arange(25))
  places, rows = random.Random(seed), write(folder / 'rows', [example(i) for i in range(25)])
  file = rows / read_manifest(rows).splits['train'][1].file
  content, named, harmless = file.read_bytes(), 0, 0
  used = [offset for offset, byte in enumerate(content) if byte]  # the rest fills up blocks
  flips = places.sample(used, min(200, len(used)))
  for offset in flips:
    file.write_bytes(content[:offset] + bytes([content[offset] ^ 1 << places.randrange(8)]) + content[offset + 1 :])
    wrong = 0
    for row in range(25):
      try:
        wrong += open_dataset(rows)[row]['input_ids'].tolist() != [row % V] * 8
      except DataError as e:
        _require(file.name in str(e), f'bit at {offset}: {e}')
        named += 1
        break
    else:
      harmless += 1
    _require(not wrong, f'bit at {offset}: wrong rows')
  return [
    ('kinds of damaged rows refused, with file and record', f'{len(damaging.RECORDS)} of {len(damaging.RECORDS)}'),
    (
      'bits flipped in a file of rows: named, of no consequence, silently wrong',
      f'{named}, {harmless}, 0 of {len(flips)}',
    ),
  ]


def folders(seed: int, folder: pathlib.Path) -> Figures:
  """Hostile model folders."""
  refused = 0
  for number, name in enumerate(hostile.CASES):
    made, canary = folder / str(number) / 'm', folder / str(number) / 'canary'
    made.mkdir(parents=True)
    hostile.make(name, made, canary)
    try:
      with watched(made):
        from_pretrained(made)
    except CompactLMError:
      refused += 1
    _require(not canary.exists(), f'{name}: code was run')
  _require(refused == len(hostile.CASES), f'{refused} hostile folders refused')
  return [('hostile model folders refused, nothing run', f'{refused} of {len(hostile.CASES)}')]


def misfits(seed: int, folder: pathlib.Path) -> Figures:
  """States that a checkpoint does not fit."""
  refused = total = 0
  for task in every_task.TASKS:
    state = _saved(task, folder / task)[6]
    for asked, leaf in damaging.misfits(state).values():
      total += 1
      with Checkpoints(folder / task, 2) as opened:
        try:
          opened.restore(asked)
        except ConfigError as e:
          refused += leaf in str(e)
  _require(refused == total, f'{refused} of {total} misfits refused')
  return [('types, shapes and names of leaves that differ, refused with the leaf', f'{refused} of {total}')]


def devices(seed: int, folder: pathlib.Path) -> Figures:
  """Runs that go on with another number of devices."""
  largest, moves = 0.0, 0
  for task in every_task.TASKS:
    state = _saved(task, folder / task)[5]
    for name, mesh in every_task.MESHES.items():
      if name != '2 x 2' and mesh[2] == 1:  # hidden sizes split: tests/faults/test_each_task.py
        largest, moves = max(largest, every_task.deviation(task, state, *mesh)), moves + 1
  _require(largest < 1e-5, f'losses deviate by {largest}')
  return [(f'largest relative difference of 20 losses after {moves} moves to other devices', f'{largest:.1e}')]


def exports(seed: int, folder: pathlib.Path) -> Figures:
  """Logits of exported models."""
  found = [exporting.deviation(kind, folder / kind, seed) for kind in exporting.KINDS]
  largest = max(difference for difference, _ in found)
  _require(largest < 1e-4, f'logits deviate by {largest}')
  size = max(logit for _, logit in found)
  what = f'largest difference of a logit from torch, {len(found)} models x 100 inputs with padding'
  return [(what, f'{largest:.1e} (logits up to {size:.1f})')]


def full_disk(seed: int, folder: pathlib.Path) -> Figures:
  """Disks that become full at step 5 and stay so."""
  job = build_job(every_task.config_of('finetune', steps=20, checkpoint_every=2, mesh=MeshConfig(data=4, fsdp=2)))
  for what in ('early', 'late', 'lines'):
    workdir = folder / what
    with pytest.MonkeyPatch.context() as patch:
      disk = damaging.FullDisk(patch, late=what == 'late', lines=what == 'lines')
      watched_rows = damaging.Watched(job.batches, lambda step, disk=disk: setattr(disk, 'full', step >= 5))
      try:
        train(dataclasses.replace(job, batches=watched_rows), str(workdir))
        raise WrongError('a run without space came to its end')
      except StorageError as e:
        said = str(e)
        _require(e.exit_code == 74 and 'step 12 could not' in said and 'the last good step is 4' in said, said)
    last = read_metrics(workdir)[-1]['step']
    left = sorted(p.name for p in (workdir / 'checkpoints').iterdir())
    _require(left == ['2', '4'] and (last == 4 if what == 'lines' else last >= 12), f'{left}, {last}')
    results = train(job, str(workdir))
    _require(results['steps'] == 20, 'not continued')
  return [
    ('disk full from step 5 on, saves every 2 steps', '3 saves tried again while training went on to step 12, then 74'),
    ('... checkpoints afterwards', 'steps 2 and 4 whole, none half there; continued when there was space'),
  ]


PARTS: dict[str, Callable[[int, pathlib.Path], Figures]] = {
  f.__name__: f for f in (checkpoints, records, folders, misfits, devices, exports, full_disk)
}


def figures(seed: int, only: tuple[str, ...] = tuple(PARTS)) -> Figures:
  """(what, figure) of every part.

  Args:
    seed: of bits, weights and inputs.
    only: names of PARTS.

  Raises:
    WrongError: something was silently wrong.
  """
  found: Figures = []
  for name in only:
    with tempfile.TemporaryDirectory() as folder:
      found += PARTS[name](seed, pathlib.Path(folder))
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', default=','.join(PARTS))
  args = parser.parse_args()
  logging.disable(logging.CRITICAL)
  only_of_one_device()
  print(f'JAX {jax.__version__}, {jax.device_count()} devices, seed {args.seed}')
  print('| what | figure | part |\n|---|---:|---|')
  for name in args.only.split(','):
    for what, figure in figures(args.seed, (name,)):
      print(f'| {what} | {figure} | {name} |', flush=True)


if __name__ == '__main__':
  main()
