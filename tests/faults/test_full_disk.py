"""A disk that is full while a run trains: row 10 of the fault matrix. (Saves alone: test_checkpoint_damage.py.)"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from damaging import FullDisk, Watched
from every_task import ROOT, config_of

from compactlm_jax.config import MeshConfig
from compactlm_jax.errors import StorageError
from compactlm_jax.jobs import build_job, load_model, params_digest
from compactlm_jax.metrics import read_metrics
from compactlm_jax.train.loop import train

CONFIG = config_of('finetune', steps=20, checkpoint_every=2, keep=20, mesh=MeshConfig(data=4, fsdp=2))


LONGER = {'steps': 32, 'checkpoint_every': 4}


def job(tell=lambda step: None, **changes):
  made = build_job(dataclasses.replace(CONFIG, **changes))
  return dataclasses.replace(made, batches=Watched(made.batches, tell))


def outcome(workdir):
  """Every loss in hex and the digest of the parameters."""
  losses = [(line['step'], line['loss'].hex()) for line in read_metrics(workdir) if 'loss' in line]
  return losses, params_digest(load_model(str(workdir)).params)


def steps(workdir):
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())


@pytest.mark.parametrize(
  'what',
  [
    {'lines': True},
    pytest.param({'late': False}, marks=pytest.mark.slow),
    pytest.param({'late': True}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_a_run_survives_a_full_disk_or_ends_with_74(what, tmp_path, monkeypatch):
  """Full from step 5, for checkpoints or for everything; at step 11 there is space, or the fourth save ends the run.

  Older steps stay, none is half there, no checkpoint is ahead of the lines on disk, and the same command goes on to the
  bits of a run with space enough.
  Mutations: raise at once in `Checkpoints._failed`, or do not clean there; leave out `before` in the loop.
  """
  train(job(), str(tmp_path / 'space'))
  expected = outcome(tmp_path / 'space')
  assert steps(tmp_path / 'space') == list(range(2, 21, 2))

  with monkeypatch.context() as patch:
    disk = FullDisk(patch, **what)
    disk.full = False

    def freed(step):
      disk.full = 5 <= step < 11

    train(job(freed), str(tmp_path / 'freed'))
  assert outcome(tmp_path / 'freed') == expected
  assert steps(tmp_path / 'freed') == [2, 4, *range(12, 21, 2)]

  with monkeypatch.context() as patch:
    disk = FullDisk(patch, **what)

    def full(step):
      disk.full = step >= 5

    with pytest.raises(StorageError, match=r'step 12 could not be saved .*the last good step is 4.*same comm') as e:
      train(job(full), str(tmp_path / 'full'))
  assert e.value.exit_code == 74 and not (tmp_path / 'full' / 'results.json').exists()
  assert steps(tmp_path / 'full') == [2, 4]
  last = read_metrics(tmp_path / 'full')[-1]['step']
  assert last == 4 and 'metrics.jsonl' in str(e.value) if 'lines' in what else last >= 12
  train(job(), str(tmp_path / 'full'))
  assert outcome(tmp_path / 'full') == expected


def on_a_real_disk(folder):
  """Runs in a file system of 4 MB at `folder`, which something else fills at step 9; prints what became of them.

  Until step 24, with the fourth save that fails, lines take more than a page.
  """
  folder, expected = pathlib.Path(folder), None
  for name, until in (('space', 9), ('freed', 23), ('full', 1000)):

    def tell(step, name=name, until=until):
      if step == 9 < until:
        while not (folder / name / 'checkpoints' / '8').exists():  # step 8 is saved in the background
          time.sleep(0.01)
        with contextlib.suppress(OSError), (folder / 'other').open('wb', buffering=0) as other:
          while other.write(bytes(512)):
            pass
      if step == until:
        (folder / 'other').unlink(missing_ok=True)

    said, kept, lines = '', None, 0
    try:
      train(job(tell, **LONGER), str(folder / name))
    except StorageError as e:
      said, kept, lines = str(e), steps(folder / name), read_metrics(folder / name)[-1]['step']
      (folder / 'other').unlink()
      train(job(**LONGER), str(folder / name))
    expected = expected or outcome(folder / name)
    print(json.dumps([name, outcome(folder / name) == expected, said, kept, lines]))
    shutil.rmtree(folder / name)


@pytest.mark.slow
def test_on_a_real_disk(tmp_path):
  """A small file system of its own, where the system grants one. Mutation: raise OSError in `GrowingFile.write`."""
  code = 'import sys, test_full_disk; test_full_disk.on_a_real_disk(sys.argv[1])'
  mount = f'mount -t tmpfs -o size=4m none "$1" && exec "$0" -c "{code}" "$1"'
  command = ['unshare', '-rm', 'sh', '-c']
  try:
    if subprocess.run([*command, 'mount -t tmpfs none "$0"', tmp_path]).returncode:
      pytest.skip('no file system may be mounted here')
  except FileNotFoundError:
    pytest.skip('there is no unshare')
  path = os.pathsep.join([str(ROOT), str(ROOT / 'tests'), str(ROOT / 'tests' / 'faults')])
  env = {**os.environ, 'PYTHONPATH': path, 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  ran = subprocess.run([*command, mount, sys.executable, tmp_path], env=env, capture_output=True, text=True)
  assert ran.returncode == 0, ran.stderr[-3000:]
  space, freed, full = (json.loads(line) for line in ran.stdout.splitlines())
  assert space[:3] == ['space', True, ''] and freed[:3] == ['freed', True, '']
  assert full[1] and 'step 24 could not be saved' in full[2] and 'the last good step is 8' in full[2]
  assert full[3] == [4, 8] and 8 <= full[4] < 24  # training went on when lines could not be written
