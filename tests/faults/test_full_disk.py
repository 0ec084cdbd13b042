"""A disk that is full while a run trains: row 10 of the fault matrix. (Saves alone: test_checkpoint_damage.py.)"""

import dataclasses

import pytest
from damaging import FullDisk, Watched
from every_task import config_of

from compactlm_jax.config import MeshConfig
from compactlm_jax.errors import StorageError
from compactlm_jax.jobs import build_job, load_model, params_digest
from compactlm_jax.metrics import read_metrics
from compactlm_jax.train.loop import train

CONFIG = config_of('finetune', steps=20, checkpoint_every=2, keep=20, mesh=MeshConfig(data=4, fsdp=2))


def job(tell=lambda step: None):
  made = build_job(CONFIG)
  return dataclasses.replace(made, batches=Watched(made.batches, tell))


def outcome(workdir):
  """Every loss in hex and the digest of the parameters."""
  losses = [(line['step'], line['loss'].hex()) for line in read_metrics(workdir) if 'loss' in line]
  return losses, params_digest(load_model(str(workdir)).params)


def steps(workdir):
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())


@pytest.mark.parametrize('late', [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_survives_a_full_disk_or_ends_with_74(late, tmp_path, monkeypatch):
  """Full from step 5: at step 11 there is space again; without, the fourth failed save ends the run.

  Older steps stay, none is half there, and the same command goes on to the bits of a run with space enough.
  Mutation: raise at once in `Checkpoints._failed`, or do not clean there.
  """
  train(job(), str(tmp_path / 'space'))
  expected = outcome(tmp_path / 'space')
  assert steps(tmp_path / 'space') == list(range(2, 21, 2))

  with monkeypatch.context() as patch:
    disk = FullDisk(patch, late)
    disk.full = False

    def freed(step):
      disk.full = 5 <= step < 11

    train(job(freed), str(tmp_path / 'freed'))
  assert outcome(tmp_path / 'freed') == expected
  assert steps(tmp_path / 'freed') == [2, 4, *range(12, 21, 2)]

  with monkeypatch.context() as patch:
    disk = FullDisk(patch, late)

    def full(step):
      disk.full = step >= 5

    with pytest.raises(StorageError, match=r'step 12 could not be saved .*the last good step is 4.*same comm') as e:
      train(job(full), str(tmp_path / 'full'))
  assert e.value.exit_code == 74 and not (tmp_path / 'full' / 'results.json').exists()
  assert steps(tmp_path / 'full') == [2, 4]
  assert read_metrics(tmp_path / 'full')[-1]['step'] >= 12
  train(job(), str(tmp_path / 'full'))
  assert outcome(tmp_path / 'full') == expected
