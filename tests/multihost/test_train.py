"""One job in several processes: `compactlm train` on loopback, each process with CPU devices of its own.

How they are started: tests/processes.py.
"""

import json
import os
import re
import shutil
import signal
import time

import numpy as np
import processes
import pytest

from compactlm_jax.checkpoint import load_params

pytestmark = pytest.mark.multihost


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An uninterrupted run of two processes: (directory, what each said)."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  return workdir, processes.run(workdir, 2)


def close(found, wanted):
  """Losses of equal steps within 1e-5."""
  assert [step for step, _ in found] == [step for step, _ in wanted] and len(found) > 1
  np.testing.assert_allclose([loss for _, loss in found], [loss for _, loss in wanted], rtol=1e-5)


def test_two_processes_train_as_one(tmp_path, whole):
  """The same losses, each file written once. Mutations: let host 1 read the rows of host 0; write metrics in both."""
  workdir, said = whole
  processes.run(tmp_path / 'run', 1)
  close(processes.losses(workdir), processes.losses(tmp_path / 'run'))
  mine, other = processes.results(workdir), processes.results(tmp_path / 'run')
  assert mine['metrics'] == pytest.approx(other['metrics'], rel=1e-5) and mine['steps'] == 60
  assert [step for step, _ in processes.losses(workdir)] == list(range(1, 61))
  assert sorted(p.name for p in workdir.iterdir()) == ['checkpoints', 'config.json', 'metrics.jsonl', 'results.json']
  assert 'step 60/60, ' in said[0] and 'results.json: {' in said[0]
  assert 'step ' not in said[1] and 'results.json' not in said[1]
  assert load_params(workdir, 60)[1]['step'] == 60  # digests hold
  assert json.loads((workdir / 'config.json').read_text())['jax']['processes'] == 2


def test_sigterm_on_one_process_stops_all_at_one_step(tmp_path):
  """They save together and leave with 75. Mutations: ask only the own signal; publish no request."""
  run = tmp_path / 'run'
  job = processes.start(run, 2, fields={'steps': 5000, 'checkpoint_every': 5000})
  processes.wait_for(job, run, 5)
  job[1].popen.send_signal(signal.SIGTERM)
  said = processes.finish(job, 75)
  steps = [int(re.search(r'asked to stop: step (\d+) is saved', text)[1]) for text in said]
  assert steps[0] == steps[1] == processes.losses(run)[-1][0] and 5 <= steps[0] < 5000
  assert [p.name for p in (run / 'checkpoints').iterdir()] == [str(steps[0])] and not (run / 'lock').exists()
  assert 'Traceback' not in said[0] + said[1]


def test_processes_that_differ_are_refused_before_anything_is_written(tmp_path):
  """Another configuration and another source file on process 1. Mutations: compare no configuration, or no sources."""
  code = tmp_path / 'other'
  ignored = shutil.ignore_patterns('__pycache__')
  shutil.copytree(processes.ROOT / 'compactlm_jax', code / 'compactlm_jax', ignore=ignored)
  with (code / 'compactlm_jax' / 'errors.py').open('a') as file:
    file.write('# another version\n')
  elsewhere = {'PYTHONPATH': str(code), 'PYTHONSAFEPATH': '1'}
  own = {1: ['--config.optimizer.learning_rate=9.0']}
  said = processes.finish(processes.start(tmp_path / 'run', 2, own=own, env={1: elsewhere}), 78)
  for text in said:
    assert re.search(r'config.optimizer.learning_rate: [\d.e-]+ on process 0, 9.0 on process 1', text), text
    assert re.search(r'code.sources: "\w+" on process 0, "\w+" on process 1', text), text
    assert 'Traceback' not in text
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_stopped_and_killed_jobs_end_with_the_same_bits(tmp_path, whole):
  """SIGTERM to one process, then SIGKILL of each in turn; the same command goes on.

  Mutation: draw keys from the steps of this process.
  """
  run = tmp_path / 'run'
  for number, index, at, codes in [
    (signal.SIGTERM, 1, 4, (75, 75)),
    (signal.SIGKILL, 1, 30, (75, -signal.SIGKILL)),
    (signal.SIGKILL, 0, 45, (-signal.SIGKILL, 75)),
  ]:
    job = processes.start(run, 2, flags=['--heartbeat_timeout=20'])
    processes.wait_for(job, run, at)
    since = time.monotonic()
    job[index].popen.send_signal(number)
    said = processes.finish(job, *codes)
    assert time.monotonic() - since < 300, said  # the heartbeat, on a busy machine
  processes.run(run, 2)
  assert processes.outcome(run) == processes.outcome(whole[0])


@pytest.mark.slow
def test_a_worker_that_is_ended_by_jax_asks_for_a_restart(tmp_path):
  """Mutation: return what the worker returned; a launcher would see 134."""
  run = tmp_path / 'run'
  job = processes.start(run, 2, fields={'steps': 5000}, flags=['--heartbeat_timeout=20'])
  processes.wait_for(job, run, 3)
  os.kill(processes.worker_of(job[1]), signal.SIGABRT)
  said = processes.finish(job, 75)
  assert 'ended by SIGABRT' in said[1] and 'restart continues' in said[0]


@pytest.mark.slow
@pytest.mark.parametrize('before, after', [(2, 1), (1, 2), (2, 4)])
def test_another_number_of_processes_goes_on(tmp_path, whole, before, after):
  """Losses within 1e-5 of the uninterrupted run. Mutation: restore only the rows of the own process."""
  run = tmp_path / 'run'
  job = processes.start(run, before, devices=2)
  processes.wait_for(job, run, 3)
  job[0].popen.send_signal(signal.SIGTERM)
  processes.finish(job, 75)
  said = processes.run(run, after, devices=max(2, after))
  assert 'resuming at step ' in said[0] and 'will not be identical in bits' in said[0]
  close(processes.losses(run), processes.losses(whole[0]))


@pytest.mark.slow
@pytest.mark.parametrize('task', ['electra', 'mlm', 'lm', 'distill', 'prune', 'adapt'])
def test_every_task_goes_on_in_two_processes_of_two_devices(tmp_path, task):
  """Stopped on four devices of one process; the next 20 losses within 1e-5. Mutation: restore the own rows only."""
  fields = {'encoder.head_size': 4, 'adapt.depths': '1', 'adapt.importance_batches': 2, 'adapt.stages': 'depth'}
  fields = {name: value for name, value in fields.items() if task == 'adapt' or 'adapt' not in name}
  processes.run(tmp_path / 'whole', 1, devices=4, variant=task, fields=fields)
  run = tmp_path / 'run'
  job = processes.start(run, 1, devices=4, variant=task, fields=fields)
  processes.wait_for(job, run, 3)
  job[0].popen.send_signal(signal.SIGTERM)
  processes.finish(job, 75)
  stopped = processes.losses(run)[-1][0]
  said = processes.run(run, 2, devices=4, variant=task, fields=fields)
  assert f'resuming at step {stopped} ' in said[0]
  assert stopped <= 40
  close(processes.losses(run)[: stopped + 20], processes.losses(tmp_path / 'whole')[: stopped + 20])


@pytest.mark.slow
def test_four_processes_pre_train_as_one(tmp_path):
  """Replaced-token detection, and parameters in slices over the hosts. Mutation: gather no leaf before a save."""
  fields = {'steps': 6, 'checkpoint_every': 3, 'encoder.head_size': 4}
  processes.run(tmp_path / 'one', 1, devices=4, variant='electra', fields=fields)
  for name, mesh in {'rows': {}, 'slices': {'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.model': 2}}.items():
    processes.run(tmp_path / name, 4, devices=4, variant='electra', fields={**fields, **mesh})
    close(processes.losses(tmp_path / name), processes.losses(tmp_path / 'one'))
    assert load_params(tmp_path / name, 6)[1]['step'] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
  'fields, says',
  [
    ({'batch_size': 6}, 'config.batch_size: 6 rows do not divide over 4 devices'),
    ({'mesh.data': 3}, 'do not multiply to the 4 devices'),
  ],
)
def test_what_does_not_divide_is_refused_by_all(tmp_path, fields, says):
  """Mutation: check it on process 0 only: the other one waits."""
  said = processes.finish(processes.start(tmp_path / 'run', 2, devices=4, fields=fields), 78)
  assert all(says in text and 'Traceback' not in text for text in said)


DAMAGED = """
from compactlm_jax.data.batches import Batches
from compactlm_jax.errors import DataError
real = Batches.batch
def batch(self, step):
  if step == 7:
    raise DataError('rows.tsv: row 7 is damaged')
  return real(self, step)
Batches.batch = batch
"""
FULL = """
import errno
from compactlm_jax import stepdir
def full(*args):
  raise OSError(errno.ENOSPC, 'No space left on device')
stepdir.build_manifest = full
"""


@pytest.mark.slow
@pytest.mark.parametrize('fault, index, code, says', [(DAMAGED, 1, 65, 'row 7 is damaged'), (FULL, 0, 74, 'No space')])
def test_a_failure_of_one_process_ends_all(tmp_path, fault, index, code, says):
  """With its exit code, in bounded time. Mutation: publish no failure; then the others wait for ever."""
  env = {index: processes.faulty(tmp_path / 'site', fault)}
  said = processes.finish(processes.start(tmp_path / 'run', 2, fields={'checkpoint_every': 10}, env=env), code)
  assert says in said[index]
  assert index == 0 or f'process {index} ended with {code}: ' in said[1 - index]
  assert not (tmp_path / 'run' / 'lock').exists()


@pytest.mark.slow
def test_a_directory_that_is_not_shared_is_refused(tmp_path):
  """Each host on a disk of its own. Mutation: do not compare the token of the lock."""
  disks = [tmp_path / str(i) for i in range(2)]
  for disk in disks:
    disk.mkdir()
  said = processes.finish(processes.start(tmp_path / 'run', 2, flags=['--workdir=run'], cwd=disks), 78)
  assert all('--workdir: process 1 of 2 does not see the directory run of process 0' in text for text in said)
  assert not (disks[0] / 'run' / 'lock').exists()


@pytest.mark.slow
def test_seeds_and_stages(tmp_path):
  """A series of seeds, and an adaptive network in two stages. Mutation: let only process 0 begin the second."""
  small = {'steps': 4, 'checkpoint_every': 4}
  processes.run(tmp_path / 'seeds', 2, fields=small, flags=['--seeds=2'])
  assert [processes.results(tmp_path / 'seeds' / f'seed-{i}')['steps'] for i in range(2)] == [4, 4]
  adapt = {**small, 'adapt.depths': '1', 'adapt.importance_batches': 2, 'encoder.head_size': 4}
  processes.run(tmp_path / 'adapt', 2, variant='adapt', fields=adapt)
  processes.run(tmp_path / 'one', 1, variant='adapt', fields=adapt)
  for folder in ('.', 'stages/width'):
    close(processes.losses(tmp_path / 'adapt' / folder), processes.losses(tmp_path / 'one' / folder))
  mine, other = processes.results(tmp_path / 'adapt'), processes.results(tmp_path / 'one')
  assert mine['metrics'] == pytest.approx(other['metrics'], rel=1e-4) and len(mine['grid']) == len(other['grid'])
