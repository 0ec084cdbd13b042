"""Traces of some steps of a run."""

import contextlib

import jax
import pytest
from tiny import tiny_config

from compactlm_jax.errors import ConfigError
from compactlm_jax.jobs import run_train
from compactlm_jax.metrics import read_metrics
from compactlm_jax.train.profile import Profile, parse_steps


def traced_steps(folder):
  """Step numbers of the annotations in the traces of a run."""
  steps = []
  for file in folder.glob('profile/plugins/profile/*/*.xplane.pb'):
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
      for line in plane.lines:
        steps += [dict(event.stats)['step_num'] for event in line.events if event.name == 'train']
  return sorted(steps)


def test_the_asked_steps_are_traced_and_the_losses_stay(tmp_path):
  """What xprof reads holds just these steps. Mutations: trace from the first step on; never stop."""
  config = tiny_config(steps=4, log_every=1)
  run_train(config, str(tmp_path / 'plain'))
  run_train(config, str(tmp_path / 'traced'), profile='1:3')
  assert traced_steps(tmp_path / 'traced') == [1, 2]
  assert not (tmp_path / 'plain' / 'profile').exists()
  losses = [[line['loss'] for line in read_metrics(tmp_path / name)] for name in ('plain', 'traced')]
  assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize('when', ['start', 'stop', 'ends'])
def test_a_trace_that_cannot_be_written_costs_no_step(tmp_path, monkeypatch, caplog, when):
  """Mutations: leave out one of the two `try`; do not end the steps in `_warn`."""
  folder = tmp_path / 'profile'
  if when == 'start':
    folder.write_text('a file')
  trace, done = Profile('1:3', folder, 9), []

  def step(number):
    if number == 2 and when == 'ends':
      raise KeyError('of the step')
    done.append(number)

  if when != 'start':  # the profiler itself would call itself started for the rest of the process
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder, profiler_options: None)
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: open(folder / 'trace' / 'none'))
  with pytest.raises(KeyError, match='of the step') if when == 'ends' else contextlib.nullcontext(), trace:
    for number in range(5):
      trace.run(number, step, number)
  assert done == ([0, 1] if when == 'ends' else list(range(5)))
  assert caplog.text.count(f'no trace is written to {folder}') == 1


@pytest.mark.parametrize('text', ['3', '3:3', '5:2', '-1:2', '0:11', 'a:b', '1:2:3'])
def test_steps_that_the_run_does_not_have_are_refused(text):
  """Mutation: leave out the comparison with the steps of the run."""
  with pytest.raises(ConfigError, match=f'--profile={text}'):
    parse_steps(text, 10)


def test_steps_of_a_run():
  """Mutation: swap the two."""
  assert parse_steps('', 10) == (0, 0) and parse_steps('0:10', 10) == (0, 10)
