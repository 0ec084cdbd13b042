"""A long run: memory, open files and disk stay flat. Of 2,000 steps, and under kills: benchmarks/faults.py."""

import importlib.util
import sys

import pytest
from faulted_runs import SMALL, TASKS
from processes import ROOT

_SPEC = importlib.util.spec_from_file_location('fault_kills', ROOT / 'benchmarks' / 'fault_kills.py')
fault_kills = importlib.util.module_from_spec(_SPEC)
sys.modules['fault_kills'] = fault_kills  # dataclasses look there
_SPEC.loader.exec_module(fault_kills)

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
