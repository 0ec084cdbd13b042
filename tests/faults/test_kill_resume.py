"""Runs that are killed, asked to stop, or started twice: they end with the bits of an uninterrupted run.

`compactlm train` in processes of their own (see `faulted_runs`), with dropout. Of the run that is killed three times
must hold, for every task:

- every loss, every evaluation, the parameters and the state of the optimiser are in hex those of a run left alone;
- so are the losses that were logged before a kill and were computed again after it;
- it resumes at the newest committed checkpoint. With a save every 5 steps at most 4 are done again, and at most 10
  where the kill came before the last save was committed: saves run in the background, one waits for the one before;
- the same command goes on, and nobody repairs anything: the lock and what a save left half done included.

Distillation also shows that the compile cache does not matter: its uninterrupted run has none. Adaptive networks, which
train in stages, are in test_kill_stages.py; more kills, at any moment, in benchmarks/faults.py.
"""

import random
import signal
import time

import pytest
from faulted_runs import finish, kill, losses, lost, outcome, resumed, start, wait_for

from compactlm_jax.metrics import read_metrics

STEPS, EVERY = 24, 5
KILLED_AT = (range(2, 8), range(10, 16), range(18, 23))  # lines logged


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory, cache):
  """Task -> (outcome, losses) of a run that nobody interrupts."""
  made = {}

  def of(task):
    if task not in made:
      workdir = tmp_path_factory.mktemp(task)
      said = finish(start(workdir, task, None if task == 'distill' else cache))
      assert f'step {STEPS}/{STEPS}, ' in said and not (workdir / 'lock').exists()  # plain lines in a log
      found = outcome(workdir)
      steps = [step for step, name, _ in found['']['lines'] if name == 'loss']
      assert steps == list(range(1, STEPS + 1)) and len(set(losses(workdir).values())) == STEPS
      assert [step for step, name, _ in found['']['lines'] if name == 'eval_loss'] == [8, 16]
      assert any('/mu/' in leaf for leaf in found['']['state']), sorted(found['']['state'])
      made[task] = found, losses(workdir)
    return made[task]

  return of


FAST = ('electra', 'prune')  # starting costs seconds; the others share their rows and losses
OTHERS = [pytest.param(task, marks=pytest.mark.slow) for task in ('distill', 'mlm', 'lm', 'finetune')]


@pytest.mark.parametrize('task', [*FAST, *OTHERS])
def test_killed_runs_end_with_the_same_bits(tmp_path, uninterrupted, cache, task):
  """Three SIGKILLs at random moments. Mutations: draw the key or the batch from the steps of this process."""
  (whole, whole_losses), moments, committed = uninterrupted(task), random.Random(task), 0
  for lines in KILLED_AT:
    process = start(tmp_path, task, cache)
    assert wait_for(process, tmp_path, moments.choice(lines)), process.text()[-3000:]
    time.sleep(moments.random() / 50)
    assert kill(process), f'the run ended before it was killed:\n{process.text()[-3000:]}'
    assert resumed(process.text()) in (0, committed)  # 0: it was killed before it said so
    _, committed, again = lost(tmp_path)
    assert again <= 2 * EVERY, (committed, again)
    assert losses(tmp_path).items() <= whole_losses.items()
  assert not (tmp_path / 'results.json').exists()
  assert resumed(finish(start(tmp_path, task, cache))) == committed > 0
  assert outcome(tmp_path) == whole


def test_a_stopped_run_saves_and_continues_with_the_same_bits(tmp_path, uninterrupted, cache):
  """SIGTERM: exit 75 at that step; meanwhile a second run is refused. In ten seconds.

  Mutations: leave without saving, or no lock; look at signals after evaluations only.
  """
  first = start(tmp_path, 'distill', cache)
  assert wait_for(first, tmp_path, 6), first.text()[-3000:]
  first.popen.send_signal(signal.SIGSTOP)  # holds the directory for as long as the second needs
  started = time.monotonic()
  refused = finish(start(tmp_path, 'distill', cache), 77)
  assert time.monotonic() - started < 60 and f'process {first.popen.pid} on host' in refused
  assert 'Traceback' not in refused
  first.popen.send_signal(signal.SIGTERM)
  first.popen.send_signal(signal.SIGCONT)
  asked = time.monotonic()
  said = finish(first, 75)
  assert time.monotonic() - asked < 10
  done = read_metrics(tmp_path)[-1]['step']
  assert 6 <= done < STEPS and f'step {done} is saved' in said and 'Traceback' not in said
  assert (tmp_path / 'checkpoints' / str(done)).is_dir() and not (tmp_path / 'results.json').exists()
  assert resumed(finish(start(tmp_path, 'distill', cache))) == done
  assert outcome(tmp_path) == uninterrupted('distill')[0]
