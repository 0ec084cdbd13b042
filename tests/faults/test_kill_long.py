"""A long run: memory, open files and disk stay flat. Of 2,000 steps, and under kills: benchmarks/faults.py."""

import contextlib
import importlib.util
import sys
import types

import pytest
from faulted_runs import SMALL, TASKS
from processes import ROOT


def load(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / 'benchmarks' / f'{name}.py')
  sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
  spec.loader.exec_module(module)
  return module


fault_kills = load('fault_kills')

STEPS = 1000
CHANGES = {'steps': STEPS, 'checkpoint_every': 50, 'eval_every': 100}


@pytest.mark.slow
@pytest.mark.parametrize('task', TASKS)
def test_memory_files_and_disk_stay_flat(tmp_path, task):
  """From step 200 on, when all is compiled. Mutations: keep every checkpoint; keep every batch; open a file a step."""
  changes = {**CHANGES, **({'adapt.stages': 'depth'} if task == 'adapt' else {})}
  samples = fault_kills.watched(tmp_path / 'run', task, tmp_path / 'cache', **changes)
  size = fault_kills.bytes_in(tmp_path / 'run' / 'checkpoints' / str(STEPS))
  growth, files_early, files_late, checkpoints = fault_kills.flatness(samples, STEPS, size)
  assert growth < 5 and files_late <= files_early + 1
  assert checkpoints < SMALL['keep'] + 1.1  # the new one is whole before the oldest goes; sizes differ by a few bytes


@pytest.mark.parametrize(
  ('change', 'problem'),
  [
    ({}, None),
    ({'equal': 1}, '1 of 2 runs end with other bits'),
    ({'finished': 0, 'equal': 0}, 'no run came to its end'),
    ({'differing': 3}, '3 of 9 losses logged before a kill differ'),
    ({'repairs': 1}, '1 runs needed repair by hand'),
    ({'disk': 3.2}, 'checkpoints take the disk of 3.20 of them after a restart'),
    ({'left': 2.2}, 'checkpoints take the disk of 2.20 of them at the end'),
  ],
  ids=str,
)
def test_what_should_not_be_ends_the_script_with_1(change, problem, tmp_path, monkeypatch, capsys):
  """And its figures are not kept. Mutations: leave out a line of `Tally.problems`; exit before the table is printed."""
  tally = fault_kills.Tally(
    **{'kills': 4, 'redone': [1], 'finished': 2, 'equal': 2, 'replayed': 9, 'left': 2.0, **change}
  )
  monkeypatch.setattr(sys, 'path', [*sys.path])
  for section in ('fault_damage', 'fuzz'):
    monkeypatch.setitem(sys.modules, section, types.SimpleNamespace(figures=print))
  faults = load('faults')
  monkeypatch.setattr(faults, 'RESULTS', tmp_path / 'faults.json')
  monkeypatch.setattr(
    faults.fault_kills, 'kill_figures', lambda seed, **_: (fault_kills.summary(tally, 5), tally.problems())
  )
  monkeypatch.setattr(sys, 'argv', ['faults.py', '--only=kills'])
  with pytest.raises(SystemExit, match=f'^WRONG\nkills: {problem}$') if problem else contextlib.nullcontext():
    faults.main()
  assert 'losses logged before a kill' in capsys.readouterr().out and (tmp_path / 'faults.json').exists() != bool(
    problem
  )
