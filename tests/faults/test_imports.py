"""Row 20 of the fault matrix: training and export need no other framework and warn of nothing."""

import os
import subprocess
import sys

import pytest
from every_task import ROOT
from faulted_runs import OWN, TASKS
from processes import FIELDS

CODE = """
import sys, warnings
ABSENT = ('torch', 'tensorflow', 'tensorboard', 'tensorboardX', 'wandb')
class Without:
  def __init__(self, finder):
    self._finder = finder
  def __getattr__(self, name):
    return getattr(self._finder, name)
  def find_spec(self, name, *args):
    return None if name.partition('.')[0] in ABSENT else self._finder.find_spec(name, *args)
sys.meta_path[:] = map(Without, sys.meta_path)
warnings.simplefilter('error')
warnings.filterwarnings('ignore', '.*load_module.*', DeprecationWarning)  # of ml_collections
warnings.filterwarnings('ignore', 'label.. is deprecated', DeprecationWarning)  # of protobuf 6, about TFDS
from compactlm_jax import cli
run, output, *train = sys.argv[1:]
code = cli.main(['train', f'--workdir={run}', *train])
if output and not code:
  code = cli.main(['export', f'--checkpoint={run}', f'--output={output}'])
assert not set(ABSENT) & set(sys.modules)
sys.exit(code)
"""


OTHERS = [task for task in TASKS if task != 'finetune']


@pytest.mark.parametrize('task', ['finetune', *(pytest.param(task, marks=pytest.mark.slow) for task in OTHERS)])
def test_training_and_export_need_no_other_framework_and_warn_of_nothing(tmp_path, task):
  """Mutation: `import torch` in jobs/export.py, or warnings.warn('old') in train/loop.py."""
  given = {**FIELDS, **OWN.get(task, {}), 'steps': 2, 'encoder.head_size': 4}
  fields = [f'--config.{name}={value}' for name, value in given.items()]
  output = '' if task == 'lm' else f'{tmp_path}/out'  # there is no export of it, a causal ConvBERT
  argv = [f'{tmp_path}/run', output, f'--config={ROOT}/configs/tiny.py:{task}', *fields]
  env = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1'}
  done = subprocess.run([sys.executable, '-c', CODE, *argv], cwd=ROOT, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'Warning' not in done.stderr and (not output or (tmp_path / 'out' / 'model.safetensors').exists())
