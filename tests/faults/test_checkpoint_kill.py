"""SIGKILL inside a save, and saves by two processes."""

import os
import pathlib
import subprocess
import sys

import pytest
from checkpointing import METADATA, abstract, equal, make_state, restore
from etils import epath

from compactlm_jax.checkpoint import Checkpoints
from compactlm_jax.stepdir import StepDirectory

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[4])
import jax
from checkpointing import METADATA, make_state, place
from compactlm_jax.checkpoint import Checkpoints

started = []

def event(name, step):
  started.extend([step] if name == 'start' else [])
  if (name, step) == (point, 3):
    os.kill(os.getpid(), signal.SIGKILL)
  if (name, step) == ('deleting', 1) and point == 'half deleted':
    os.unlink(f'{sys.argv[1]}/1/state/_METADATA')
    os.kill(os.getpid(), signal.SIGKILL)

directory, point, commit_file = sys.argv[1], sys.argv[2], sys.argv[3] == 'True'
if point == 'commit':
  from orbax.checkpoint.experimental.v1._src.saving import execution
  real_commit = execution.atomicity.on_commit_callback
  async def commit(path, **kwargs):
    if path.get_final().name == '3':
      os.kill(os.getpid(), signal.SIGKILL)
    await real_commit(path, **kwargs)
  execution.atomicity.on_commit_callback = commit
if point == 'between shards':  # after two arrays, or parts of them, before the others
  from orbax.checkpoint._src.serialization import serialization
  write, arrays = serialization.async_serialize_from_host, []
  async def dying(*args, **kwargs):
    arrays.append(started[-1] == 3)
    if sum(arrays) == 3:
      os.kill(os.getpid(), signal.SIGKILL)
    await write(*args, **kwargs)
  serialization.async_serialize_from_host = dying
with Checkpoints(directory, 2, commit_file=commit_file, on_event=event) as checkpoints:
  for step in (1, 2, 3):
    checkpoints.save(step, place(make_state(step), 2), METADATA, wait=True)
"""

KILL_POINTS = [('between shards', 2), ('digest', 2), ('manifest', 2), ('commit', 2), ('committed', 3), ('verified', 3),
               ('half deleted', 3)]  # fmt: skip
QUICK = ('digest', 'commit', 'half deleted')  # of the commit by a file; the others differ less from a rename


@pytest.mark.parametrize(
  ('commit_file', 'point', 'latest'),
  [(False, *p) for p in KILL_POINTS]
  + [pytest.param(True, *p, marks=() if p[0] in QUICK else pytest.mark.slow) for p in KILL_POINTS]
  + [pytest.param(mode, 'start', 2, marks=pytest.mark.slow) for mode in (False, True)],
)
def test_kill_inside_the_save_window(tmp_path, commit_file, point, latest):
  """A step that was written whole, and lacked only its commit file, counts when it is looked at again.

  Mutations: drop `clean` (leftovers stay), or `_adopt`; write no mark in `delete` (a half deleted step counts).
  """
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'}
  args = [
    sys.executable,
    '-c',
    KILLED,
    str(tmp_path / 'c'),
    point,
    str(commit_file),
    str(pathlib.Path(__file__).parents[1]),
  ]
  result = subprocess.run(args, env=env, capture_output=True, text=True)
  assert result.returncode == -9, result.stderr[-2000:]
  left = sorted(p.name for p in (tmp_path / 'c').iterdir())
  steps = [1, 2] if latest == 2 else [2, 3] if point == 'half deleted' else [1, 2, 3]
  assert StepDirectory(epath.Path(tmp_path / 'c'), commit_file).steps() == steps, left  # before anything is cleaned
  with Checkpoints(tmp_path / 'c', 2, commit_file=commit_file) as checkpoints:
    if commit_file and (point == 'commit' or (point == 'manifest' and 3 in checkpoints.all_steps())):
      steps, latest = [1, 2, 3], 3  # the arrays may have been whole before the manifest, or not
    assert checkpoints.all_steps() == steps, left
    assert sorted(p.name for p in (tmp_path / 'c').iterdir()) == [str(s) for s in steps]  # nothing is left over
    restored, metadata = checkpoints.restore(abstract(make_state(0)))
    assert metadata['step'] == latest and equal(restored, make_state(latest))
    checkpoints.save(latest + 1, make_state(latest + 1), METADATA, wait=True)
    assert checkpoints.all_steps() == [latest, latest + 1]


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[3])
import jax
index, directory = int(sys.argv[1]), sys.argv[2]
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(f'127.0.0.1:{sys.argv[4]}', 2, index)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from checkpointing import METADATA, abstract, make_state
from compactlm_jax.checkpoint import Checkpoints
mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))
def put(x):
  host, spec = np.asarray(x), P('fsdp') if x.ndim == 2 else P()
  return jax.make_array_from_callback(host.shape, NamedSharding(mesh, spec), lambda i: host[i])
def same(a, b):
  return all(np.array_equal(np.asarray(s.data), np.asarray(y)[s.index])
             for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)) for s in x.addressable_shards)
with Checkpoints(directory, 2) as checkpoints:
  for step in (1, 2, 3):
    checkpoints.save(step, jax.tree.map(put, make_state(step)), METADATA)
  checkpoints.wait()
  assert checkpoints.all_steps() == [2, 3], checkpoints.all_steps()
  restored, metadata = checkpoints.restore(abstract(jax.tree.map(put, make_state(0))))
  assert metadata['step'] == 3 and same(restored, make_state(3))
  jax.experimental.multihost_utils.sync_global_devices('before damage')
  from compactlm_jax import checkpoint, stepdir
  real = checkpoint._read
  def read(path, leaves):
    arrays = real(path, leaves)
    if index == 1 and path.name == '3':
      raise stepdir.DamagedError('seen by one process only')
    return arrays
  checkpoint._read = read
  restored, metadata = checkpoints.restore(abstract(jax.tree.map(put, make_state(0))))
  assert metadata['step'] == 2 and same(restored, make_state(2))
print('ok', index)
"""


@pytest.mark.multihost
def test_two_processes_save_restore_and_fall_back_together(tmp_path):
  """Mutation: digest only the addressable part in `host_copies`, or ask only this process in `restore`."""
  import socket

  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'}
  here = str(pathlib.Path(__file__).parents[1])
  runs = [
    subprocess.Popen(
      [sys.executable, '-c', TWO_PROCESSES, str(i), str(tmp_path / 'c'), here, str(port)],
      env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  outputs = [r.communicate(timeout=120)[0] for r in runs]
  assert [r.returncode for r in runs] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
  # ... and one process reads what two have written.
  restored, metadata = restore(tmp_path / 'c')
  assert metadata['step'] == 2 and equal(restored, make_state(2)) and (tmp_path / 'c' / '3.bad').is_dir()
