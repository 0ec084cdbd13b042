"""Checkpoints: whole or absent, intact or refused, whatever is done to the process or to the files."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpointing import METADATA, abstract, equal, make_state, place, restore, snapshot, write

from compactlm_jax import checkpoint, stepdir
from compactlm_jax.checkpoint import Checkpoints, load_params
from compactlm_jax.errors import ConfigError, NumericsError
from compactlm_jax.types import TrainState


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  """A directory with steps 1 and 2, to be copied."""
  directory = tmp_path_factory.mktemp('two')
  write(directory, (1, 2))
  return directory


@pytest.mark.parametrize('commit_file', [False, True])
def test_round_trip_with_donation(tmp_path, commit_file):
  """Mutation: put `like.dtype` of another type in `_read`, or drop a leaf in `tree.nested`."""
  donate = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  with Checkpoints(tmp_path / 'c', 3, commit_file=commit_file) as checkpoints:
    assert checkpoints.latest_step() is None and checkpoints.restore(abstract(make_state(0))) is None
    state = place(make_state(4), 4)
    checkpoints.save(4, state, METADATA)
    for _ in range(3):
      state = donate(state)  # the buffers of step 4 are reused while it is being written
    jax.block_until_ready(state)
    checkpoints.wait()
    assert checkpoints.all_steps() == [4] and checkpoints.latest_step() == 4
    restored, metadata = checkpoints.restore(abstract(state))
  assert equal(restored, make_state(4)) and metadata == {**METADATA, 'step': 4}


def test_by_the_protocol_of_buckets_a_step_counts_with_its_commit_file_only(tmp_path):
  """What a stopped save left has none, and does not prove intact. Mutation: go by names in `StepDirectory._counts`."""
  with Checkpoints(tmp_path / 'c', 3, commit_file=True) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, place(make_state(step), 2), METADATA, wait=True)
    assert all((tmp_path / 'c' / step / 'commit_success.txt').exists() for step in ('1', '2'))
    restored, _ = checkpoints.restore(abstract(make_state(0)))
    assert equal(restored, make_state(2))
  (tmp_path / 'c' / '2' / 'commit_success.txt').unlink()
  (tmp_path / 'c' / '2' / 'state' / '_METADATA').unlink()
  with Checkpoints(tmp_path / 'c', 3, commit_file=True) as checkpoints:
    assert checkpoints.all_steps() == [1] and not (tmp_path / 'c' / '2').exists()
    restored, metadata = checkpoints.restore(abstract(make_state(0)))
  assert equal(restored, make_state(1)) and metadata['step'] == 1


def test_steps_that_lack_only_their_commit_file_count(tmp_path, caplog):
  """A copy to a bucket without them, or stopped before it made them. Mutation: remove whatever has none."""
  with Checkpoints(tmp_path / 'c', 3, commit_file=True) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, place(make_state(step), 2), METADATA, wait=True)
  for step in '12':
    (tmp_path / 'c' / step / 'commit_success.txt').unlink()
  with Checkpoints(tmp_path / 'c', 3, commit_file=True) as checkpoints:
    restored, metadata = checkpoints.restore(abstract(make_state(0)))
    assert checkpoints.all_steps() == [1, 2]
  assert equal(restored, make_state(2)) and metadata['step'] == 2
  assert 'step 2 had no commit file, but is intact and counts' in caplog.text


def test_an_old_step_that_cannot_be_deleted_fails_no_save(tmp_path, monkeypatch, caplog):
  """Mutation: count it as a failure of the save, which is committed and verified by then."""

  def refuse(self, step, event):
    raise PermissionError(13, 'Permission denied', f'{self.path}/{step}/DELETING')

  with Checkpoints(tmp_path, 2) as checkpoints:
    with monkeypatch.context() as patched:
      patched.setattr(stepdir.StepDirectory, 'delete', refuse)
      for step in range(1, 8):  # more often than failures of saves are suffered
        checkpoints.save(step, make_state(step), METADATA, wait=True)
    assert 'an old checkpoint could not be deleted' in caplog.text and checkpoints.all_steps() == list(range(1, 8))
    checkpoints.save(8, make_state(8), METADATA, wait=True)
    assert checkpoints.all_steps() == [7, 8]


def test_steps_that_a_kill_left_go_when_the_newest_has_proved_intact(tmp_path):
  """A run killed at the end of its last save saves no more. Mutation: delete older steps after saves only."""
  write(tmp_path, (1, 2, 3))
  with Checkpoints(tmp_path, 2) as checkpoints:
    assert checkpoints.all_steps() == [1, 2, 3]  # nothing is known of the newest
    checkpoints.restore(abstract(make_state(0)), 1)
    assert checkpoints.all_steps() == [1, 2, 3]
    checkpoints.restore(abstract(make_state(0)))
    assert checkpoints.all_steps() == [2, 3]


def test_only_numbers_are_steps(tmp_path):
  """Mutation: `str.isdigit`, which knows digits that `int` does not, and takes 02 for 2."""
  write(tmp_path, (1,))
  for name in ('02', '²', '٣', '3.bad'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'DELETING').write_text('')
  with Checkpoints(tmp_path, 2) as checkpoints:
    assert checkpoints.all_steps() == [1] and restore(tmp_path)[1]['step'] == 1
  assert {p.name for p in tmp_path.iterdir()} == {'1', '02', '²', '٣', '3.bad'}


def test_a_relative_directory(tmp_path, monkeypatch):
  """Mutation: take `epath.Path(directory)` as it is; Orbax then fails in the background."""
  monkeypatch.chdir(tmp_path)
  with Checkpoints('runs/checkpoints', 3) as checkpoints:
    checkpoints.save(1, place(make_state(1), 1), METADATA, wait=True)
  assert load_params('runs')[1]['step'] == 1


@pytest.mark.parametrize(('saved', 'read'), [(4, 1), (4, 8), (1, 8), (8, 2)])
def test_restores_onto_another_device_count(tmp_path, saved, read):
  """Mutation: return `host` unsliced from the callback in `place_leaf`."""
  with Checkpoints(tmp_path, 3) as checkpoints:
    checkpoints.save(1, place(make_state(1), saved), METADATA, wait=True)
    like = place(make_state(0), read)
    restored, _ = checkpoints.restore(abstract(like))
  assert equal(restored, make_state(1))
  assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)


def test_sync_part_does_not_wait_for_the_disk(tmp_path):
  """Mutation: call `_finish` directly instead of in a thread."""
  import threading

  gate, seen = threading.Event(), []

  def event(name, step):
    seen.append(name)
    if name == 'digest':
      gate.wait(10)

  with Checkpoints(tmp_path, 3, on_event=event) as checkpoints:
    checkpoints.save(1, make_state(1), METADATA)
    assert 'committed' not in seen and checkpoints.all_steps() == []
    gate.set()
  assert seen == ['start', 'digest', 'manifest', 'committed', 'verified']


@pytest.mark.parametrize(('keep', 'left'), [(1, [4, 5]), (3, [3, 4, 5])])
def test_retention_deletes_only_after_a_newer_step_is_verified(tmp_path, keep, left):
  """Mutation: delete before `_read` in `_finish` (the order of events changes), or drop `max(keep, 2)`."""
  counts, events = [], []

  def event(name, step):
    events.append((name, step))
    counts.append(len([p for p in tmp_path.iterdir() if p.name.isdigit() and not (p / 'DELETING').exists()]))

  with Checkpoints(tmp_path, keep, on_event=event) as checkpoints:
    for step in range(1, 6):
      checkpoints.save(step, make_state(step), METADATA)
    checkpoints.wait()
    assert checkpoints.all_steps() == left
  assert min(counts[events.index(('committed', 2)) :]) >= 2
  for i, (name, step) in enumerate(events):
    if name == 'deleting':
      assert ('verified', step + len(left)) in events[:i]


def test_saving_a_saved_step_again_does_nothing_and_a_foreign_one_is_refused(tmp_path):
  """Mutation: drop `if step != self._last_good`, or the check of `all_steps`."""
  events = []
  with Checkpoints(tmp_path, 3, on_event=lambda *e: events.append(e)) as checkpoints:
    checkpoints.save(1, make_state(1), METADATA)
    checkpoints.save(1, make_state(1), METADATA, wait=True)
  assert [e for e in events if e[0] == 'start'] == [('start', 1)]
  with Checkpoints(tmp_path, 3) as checkpoints, pytest.raises(ConfigError, match='1 exists already'):
    checkpoints.save(1, make_state(1), METADATA)


def test_non_finite_parameters_are_never_saved(tmp_path):
  """Mutation: drop the call of `not_finite`."""
  state = make_state(1)
  bad = TrainState(
    state.step, {**state.params, 'classifier': {'bias': jnp.array([0.0, jnp.nan, 1.0])}}, state.opt_state
  )
  with Checkpoints(tmp_path, 3) as checkpoints:
    checkpoints.save(1, state, METADATA, wait=True)
    with pytest.raises(NumericsError, match='classifier/bias is not finite'):
      checkpoints.save(2, bad, METADATA)
    assert checkpoints.all_steps() == [1]


@pytest.mark.parametrize(
  ('case', 'named'),
  [
    ('bf16', 'params/encoder/kernel: checkpoint float32[32, 32], run bfloat16[32, 32]'),
    ('f32', 'params/encoder/half: checkpoint bfloat16[4], run float32[4]'),
    ('i32', 'params/encoder/kernel: checkpoint float32[32, 32], run int32[32, 32]'),
    ('shape', 'params/classifier/bias: checkpoint float32[3], run float32[4]'),
    ('extra', 'params/classifier/new: checkpoint absent, run float32[2]'),
    ('missing', 'params/classifier/bias: checkpoint float32[3], run absent'),
    ('renamed', 'params/classifier/bias: checkpoint float32[3], run absent'),
  ],
)
def test_mismatch_is_refused_before_reading(two_steps, tmp_path, monkeypatch, case, named):
  """Mutation: drop the call of `check_same_leaves` (Orbax casts, or fails without naming the leaf)."""
  shutil.copytree(two_steps, tmp_path / 'c')
  before = snapshot(tmp_path)
  like = abstract(make_state(0))
  encoder, classifier = dict(like.params['encoder']), dict(like.params['classifier'])
  struct = jax.ShapeDtypeStruct
  if case in ('bf16', 'i32'):
    encoder['kernel'] = struct((32, 32), jnp.bfloat16 if case == 'bf16' else jnp.int32)
  elif case == 'f32':
    encoder['half'] = struct((4,), jnp.float32)
  elif case == 'shape':
    classifier['bias'] = struct((4,), jnp.float32)
  elif case == 'extra':
    classifier['new'] = struct((2,), jnp.float32)
  else:
    bias = classifier.pop('bias')
    if case == 'renamed':
      classifier['offset'] = bias
  like = TrainState(like.step, {'encoder': encoder, 'classifier': classifier}, like.opt_state)
  monkeypatch.setattr(checkpoint, '_read', lambda *a: pytest.fail('read arrays'))
  with Checkpoints(tmp_path / 'c', 3) as checkpoints, pytest.raises(ConfigError) as refused:
    checkpoints.restore(like)
  assert named in str(refused.value) and '--workdir' in str(refused.value)
  assert snapshot(tmp_path) == before


def test_load_params_reads_no_optimiser(two_steps, tmp_path, monkeypatch):
  """Mutation: leave `startswith('params/')` out."""
  asked, real = [], checkpoint._read
  monkeypatch.setattr(checkpoint, '_read', lambda path, leaves: (asked.extend(leaves), real(path, leaves))[1])
  shutil.copytree(two_steps, tmp_path / 'run' / 'checkpoints')
  for folder in (two_steps, tmp_path / 'run'):
    params, metadata = load_params(folder)
    assert equal(params, make_state(2).params) and metadata == {**METADATA, 'step': 2}
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
  assert asked and all(name.startswith('params/') for name in asked)
  with pytest.raises(ConfigError, match='no checkpoint'):
    load_params(tmp_path / 'empty')


def test_manifest_lists_every_leaf(two_steps):
  """Mutation: leave the optimiser out of `nested(named_leaves(state))`."""
  leaves = json.loads((two_steps / '2' / 'manifest' / 'manifest.json').read_text())['leaves']
  assert len(leaves) == len(jax.tree.leaves(make_state(0)))
  assert {'step', 'params/encoder/kernel', 'opt_state/0/mu/encoder/kernel', 'opt_state/0/count'} <= set(leaves)
