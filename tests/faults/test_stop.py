"""SIGTERM at a given moment: the run leaves with 75 within a step and loses nothing, or is over anyway and ends with 0.

In this process, so that the signal comes exactly there: a hook raises it in a step, an evaluation, a save, while the
best networks are exported, while results.json is written. With real processes: test_kill_resume.py; with several of
them: tests/multihost. `compactlm export` has no state to save and just ends; that its folders appear whole or not at
all is shown in tests/interop (test_bundle, test_sparse, test_pretrained), for a death at any file operation.
"""

import functools
import os
import signal

import pytest
from faulted_runs import TASKS, outcome, runs, saved
from killing import Kill
from tiny import tiny_config

from compactlm_jax.checkpoint import Checkpoints
from compactlm_jax.config import AdaptConfig
from compactlm_jax.errors import PreemptedError
from compactlm_jax.jobs import adapt_best, run_train
from compactlm_jax.train import loop, rundir

STEPS = 9
STAGES = AdaptConfig(
  widths=(0.5, 1.0), depths=(1.0,), stages=('width', 'depth'), width_loss='labels', importance_batches=1
)


def config(task):
  return tiny_config(task, steps=STEPS, checkpoint_every=3, eval_every=4, keep=2, adapt=STAGES)


def at_call(number, real):
  """`real`, which is asked twice to stop while it is called for that time."""
  calls = iter(range(1, 1000))

  def wrapped(*args, **kwargs):
    if next(calls) == number:
      signal.raise_signal(signal.SIGTERM)
      signal.raise_signal(signal.SIGTERM)
    return real(*args, **kwargs)

  return wrapped


def in_opening(monkeypatch, number):
  """While the run directory is taken."""
  monkeypatch.setattr(rundir, '_write_record', at_call(number, rundir._write_record))


def in_step(monkeypatch, number):
  compile_step = loop.compile_step
  monkeypatch.setattr(loop, 'compile_step', lambda *args: at_call(number, compile_step(*args)))


def in_evaluation(monkeypatch, number):
  make = loop.make_evaluate
  monkeypatch.setattr(loop, 'make_evaluate', lambda *args: at_call(number, make(*args)))


def in_save(monkeypatch, event):
  """In the background, of the save of step 6: at the digests, before the commit or while step 3 is deleted."""

  def on_event(name, step):
    if name == event:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(loop, 'Checkpoints', functools.partial(Checkpoints, on_event=on_event))


def in_export(monkeypatch, number):
  monkeypatch.setattr(adapt_best, 'save_pretrained', at_call(number, adapt_best.save_pretrained))


def in_results(monkeypatch, number):
  monkeypatch.setattr(loop, 'write_whole', at_call(number, loop.write_whole))


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  made = {}

  def of(task):
    if task not in made:
      workdir = tmp_path_factory.mktemp(task)
      run_train(config(task), str(workdir))
      made[task] = outcome(workdir)
    return made[task]

  return of


SLOW = [pytest.param(task, in_step, 4, {4}, marks=pytest.mark.slow) for task in TASKS if task != 'distill']
SLOW += [
  pytest.param('distill', in_opening, 1, {0}, marks=pytest.mark.slow),  # nothing is done yet
  pytest.param('distill', in_step, 6, {6}, marks=pytest.mark.slow),  # a step that is saved anyway
  pytest.param('distill', in_save, 'deleting', set(range(6, STEPS + 1)), marks=pytest.mark.slow),
  pytest.param('adapt', in_export, 2, {5}, marks=pytest.mark.slow),  # of the second cell, at the evaluation of step 4
]


@pytest.mark.parametrize(
  ('task', 'moment', 'which', 'steps'),
  [
    ('distill', in_step, 4, {4}),  # an evaluation is due, and made up for
    ('distill', in_evaluation, 1, {4}),  # it is broken off, and made up for
    ('distill', in_save, 'digest', {3, 4, 5, 6}),  # in the background: whatever step it is by then
    *SLOW,
  ],
  ids=lambda value: getattr(value, '__name__', None) if not isinstance(value, set) else '',
)
def test_a_stopped_run_loses_no_step(tmp_path, monkeypatch, uninterrupted, task, moment, which, steps):
  """Two SIGTERMs; what is on disk is whole, and the same call ends with the same bits.

  Mutations: open the run before a stop can be asked for (SIGTERM then ends these tests); ask for a stop only where a
  save is due, or only after steps; leave without saving; forget the evaluation that a stop came before (adaptive
  networks would keep another best one).
  """
  with monkeypatch.context() as hooked:
    moment(hooked, which)
    stopped = None
    try:
      run_train(config(task), str(tmp_path))
    except PreemptedError as e:
      stopped = e
  run = list(runs(tmp_path).values())[0]
  assert saved(run) in steps
  if moment is not in_save or saved(run) < STEPS:
    said = f'step {saved(run)} is saved' if saved(run) else 'before step 1'
    assert stopped.exit_code == 75 and said in str(stopped)
  assert not [path for path in tmp_path.rglob('*') if 'tmp' in path.name or path.name in ('lock', 'DELETING')]
  assert (run / 'results.json').exists() == (stopped is None)
  run_train(config(task), str(tmp_path))
  assert outcome(tmp_path) == uninterrupted(task)


@pytest.mark.parametrize(
  ('moment', 'number'), [(in_step, STEPS), (in_evaluation, 3)], ids=lambda v: getattr(v, '__name__', '')
)
def test_the_last_evaluation_is_not_waited_for(tmp_path, monkeypatch, uninterrupted, moment, number):
  """SIGTERM in the last step or the last evaluation: every step is saved. Mutation: evaluate without a look at it."""
  with monkeypatch.context() as hooked, pytest.raises(PreemptedError, match='the same command evaluates again'):
    moment(hooked, number)
    run_train(config('distill'), str(tmp_path))
  assert saved(tmp_path) == STEPS and not (tmp_path / 'results.json').exists() and not (tmp_path / 'lock').exists()
  run_train(config('distill'), str(tmp_path))
  assert outcome(tmp_path) == uninterrupted('distill')


def test_what_is_over_is_finished(tmp_path, monkeypatch, uninterrupted):
  """SIGTERM while results.json is written. Mutation: raise at the very end too."""
  in_results(monkeypatch, 1)
  assert run_train(config('distill'), str(tmp_path))['steps'] == STEPS
  assert not (tmp_path / 'lock').exists() and outcome(tmp_path) == uninterrupted('distill')


def test_an_evaluation_that_was_missed_is_made_up_for_once(tmp_path, monkeypatch, uninterrupted):
  """Stopped where one was due, killed right after it was made up for. Mutation: write its line whenever it is made."""

  def dying(*args):
    raise Kill

  for moment, ends in ((lambda hooked: in_step(hooked, 4), PreemptedError), (None, Kill)):
    with monkeypatch.context() as hooked, pytest.raises(ends):
      moment(hooked) if moment else hooked.setattr(loop, 'compile_step', lambda *args: dying)
      run_train(config('distill'), str(tmp_path))
  run_train(config('distill'), str(tmp_path))
  assert outcome(tmp_path) == uninterrupted('distill')
