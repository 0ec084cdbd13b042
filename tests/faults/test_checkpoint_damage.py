"""Damaged checkpoints and full disks: detected, named, and answered by the step before."""

import shutil
import sys
import types

import pytest
from checkpointing import METADATA, abstract, equal, flip_weight, make_state, restore, snapshot, write
from damaging import FullDisk, damages, inflict

from compactlm_jax import checkpoint
from compactlm_jax.checkpoint import Checkpoints, load_params
from compactlm_jax.errors import ConfigError, StorageError


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  """A directory with steps 1 and 2, to be copied."""
  directory = tmp_path_factory.mktemp('two')
  write(directory, (1, 2))
  return directory


@pytest.fixture(scope='module')
def two_of_a_bucket(tmp_path_factory):
  """The same, with commit files."""
  directory = tmp_path_factory.mktemp('bucket')
  write(directory, (1, 2), commit_file=True)
  return directory


def check_damage(two_steps, work, name, how, offset, **kwargs):
  """Restores a damaged copy; True if the damage was detected."""
  shutil.rmtree(work, ignore_errors=True)
  shutil.copytree(two_steps, work)
  inflict(work, name, how, offset)
  restored, metadata = restore(work, **kwargs)
  step = int(metadata['step'])
  assert equal(restored, make_state(step)), f'{name} {how} {offset}: silently wrong'
  assert metadata == {**METADATA, 'step': step}
  assert [p.name for p in sorted(work.iterdir())] == (['1', '2'] if step == 2 else ['1', '2.bad'])
  return step == 1


def is_data(name):
  return '/d/' in str(name)


def test_damage_to_the_newest_step_is_detected_sample(two_steps, two_of_a_bucket, tmp_path):
  """Mutation: drop the comparison of `sha256` in `_read` (a flipped weight restores silently)."""
  cases = [c for i, c in enumerate(damages(two_steps, 2)) if i % 6 == 0 or (is_data(c[0]) and c[1] == 'flip')]
  found = [check_damage(two_steps, tmp_path / 'w', *case) for case in cases]
  assert sum(found) >= 3
  assert {str(name) for name, how, _ in cases if how == 'flip' and is_data(name)}
  for name, how, offset in list(damages(two_of_a_bucket, 2))[::12]:
    check_damage(two_of_a_bucket, tmp_path / 'w', name, how, offset, commit_file=True)


@pytest.mark.slow
@pytest.mark.parametrize('commit_file', [False, True])
def test_damage_to_the_newest_step_is_detected_everywhere(two_steps, two_of_a_bucket, tmp_path, commit_file):
  """Mutation: as in the sample."""
  steps = two_of_a_bucket if commit_file else two_steps
  cases = list(damages(steps, 2))
  found = [check_damage(steps, tmp_path / 'w', *case, commit_file=commit_file) for case in cases]
  print(f'\n{len(cases)} damages: {sum(found)} detected, {len(cases) - sum(found)} harmless, 0 silently wrong')


def test_a_flipped_weight_is_named_and_the_older_step_restored(two_steps, tmp_path, caplog):
  """Mutation: drop the comparison of `sha256` in `_read`; or do not call `_set_aside`."""
  work = tmp_path / 'w'
  shutil.copytree(two_steps, work)
  flip_weight(work, 2)
  weights, metadata = load_params(work)  # reads only
  assert metadata['step'] == 1 and equal(weights, make_state(1).params) and (work / '2').exists()
  restored, _ = restore(work)
  assert equal(restored, make_state(1))
  assert 'params/encoder/kernel: digest differs' in caplog.text and f'{work}/2' in caplog.text
  assert (work / '2.bad').is_dir() and not (work / '2').exists()
  write_again = make_state(2)
  with Checkpoints(work, 9) as checkpoints:
    checkpoints.save(2, write_again, METADATA, wait=True)
    flip_weight(work, 2)
    restored, _ = checkpoints.restore(abstract(write_again))
  assert equal(restored, make_state(1)) and (work / '2.bad2').is_dir()


def test_reads_that_orbax_abandons_are_not_heard(two_steps, monkeypatch):
  """Where several leaves fail at once, it closes its event loop under the other reads. Mutation: drop the hook."""
  heard = []
  monkeypatch.setattr(sys, 'unraisablehook', lambda unraisable: heard.append(unraisable.exc_value))
  for _ in range(2):
    restore(two_steps)
  chained = sys.unraisablehook
  for error in (RuntimeError('Event loop is closed'), RuntimeError('other'), ValueError('Event loop is closed')):
    chained(types.SimpleNamespace(exc_value=error))
  assert [str(error) for error in heard] == ['other', 'Event loop is closed']


def test_metadata_is_protected_as_well(two_steps, tmp_path):
  """Mutation: drop the digest over the manifest itself."""
  work = tmp_path / 'w'
  shutil.copytree(two_steps, work)
  path = work / '2' / 'manifest' / 'manifest.json'
  path.write_text(path.read_text().replace('aaaa', 'aaab'))
  assert restore(work)[1] == {**METADATA, 'step': 1}


def test_all_damaged_is_an_error_and_touches_nothing(two_steps, tmp_path):
  """Mutation: call `_set_aside` as soon as damage is found (the next start would see no steps and start afresh)."""
  work = tmp_path / 'w'
  shutil.copytree(two_steps, work)
  flip_weight(work, 1)
  (work / '2' / 'manifest' / 'manifest.json').unlink()
  before = snapshot(work)
  for _ in range(2):
    with pytest.raises(StorageError, match=r'none of the checkpoints \[1, 2\] is intact') as refused:
      restore(work)
    assert refused.value.exit_code == 74 and snapshot(work) == before
  with pytest.raises(StorageError, match='none of the checkpoints'):
    load_params(work)
  shutil.rmtree(work / '1')
  (work / '2').rename(work / '2.bad')
  with pytest.raises(StorageError, match='damaged checkpoints only'):  # never a silent fresh start
    restore(work)


def test_an_explicit_step_does_not_fall_back(two_steps, tmp_path):
  """Mutation: `steps = all_steps()` whatever `step` is."""
  work = tmp_path / 'w'
  shutil.copytree(two_steps, work)
  assert equal(restore(work, step=1)[0], make_state(1))
  flip_weight(work, 2)
  with pytest.raises(StorageError):
    restore(work, step=2)
  with pytest.raises(StorageError):
    load_params(work, step=2)
  for call in (restore, load_params):
    with pytest.raises(ConfigError, match='step'):
      call(work, step=7)


@pytest.mark.parametrize('late', [False, True])
def test_full_disk_is_retried_then_ends_the_run(tmp_path, monkeypatch, caplog, late):
  """Mutation: raise at once in `_failed` (no retry), or never (`final or False`)."""
  write(tmp_path, (1, 2))
  disk = FullDisk(monkeypatch, late)
  with pytest.raises(StorageError, match=r'step 9 .*No space left.*the last good step is 7') as refused:
    with Checkpoints(tmp_path, 9) as checkpoints:
      for step in (3, 4, 5):
        checkpoints.save(step, make_state(step), METADATA)  # training goes on
      disk.full = False
      checkpoints.save(7, make_state(7), METADATA, wait=True)
      assert checkpoints.all_steps() == [1, 2, 7]
      disk.full = True
      for step in (8, 8, 9, 9, 9):  # the same number of steps and retries, whenever the error shows
        checkpoints.save(step, make_state(step), METADATA)
  assert refused.value.exit_code == 74 and 'the next interval tries again' in caplog.text
  assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2', '7']
  assert equal(restore(tmp_path)[0], make_state(7))


def test_a_final_save_that_fails_is_an_error_at_once(tmp_path, monkeypatch):
  """Mutation: `settle()` in `save` (a preempted run would claim that its state is saved)."""
  monkeypatch.setattr(checkpoint.storage, 'free_bytes', lambda path: 100)
  with Checkpoints(tmp_path, 9) as checkpoints:
    checkpoints.save(1, make_state(1), METADATA)
    with pytest.raises(StorageError, match=r'100 bytes free, \d+ wanted.*no older one'):
      checkpoints.save(2, make_state(2), METADATA, wait=True)
  assert list(tmp_path.iterdir()) == []


def test_a_write_that_reads_back_differently_does_not_count(tmp_path, monkeypatch):
  """Mutation: drop `_read` in `_finish`."""
  write(tmp_path, (1,))

  def event(name, step):
    if name == 'committed':
      flip_weight(tmp_path, step)

  with Checkpoints(tmp_path, 2, on_event=event) as checkpoints:
    with pytest.raises(StorageError, match='read back differently.*kernel.*last good step is 1'):
      checkpoints.save(2, make_state(2), METADATA, wait=True)
    assert checkpoints.all_steps() == [1] and (tmp_path / '2.bad').is_dir()
