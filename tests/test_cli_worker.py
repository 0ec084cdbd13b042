"""A worker and the process that watches over it."""

import os
import pathlib
import subprocess
import sys

import pytest

from compactlm_jax import cli
from compactlm_jax.errors import ConfigError, PeerError


@pytest.mark.parametrize('watcher,code,said', [('us', 0, 'joined\n'), ('process 1', PeerError.exit_code, '')])
def test_a_worker_ends_without_its_watcher(watcher, code, said):
  """Whatever its number: in a container the watching process is number 1. Mutation: `os.getppid() == 1`."""
  lines = 'import compactlm_jax.cli.worker as w', 'w.join = lambda launch: "joined"', 'print(w.start_worker(None))'
  result = subprocess.run(
    [sys.executable, '-c', '\n'.join(lines)],
    env=os.environ | {'COMPACTLM_WATCHER': str(os.getpid()) if watcher == 'us' else '1'},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert (result.returncode, result.stdout) == (code, said), result.stderr


@pytest.mark.parametrize('address', ['h:0', 'h:65536', 'h:123456', 'h:-1', 'h:', ':8476', 'h'])
def test_an_address_that_is_none(address, tmp_path, capsys):
  """Mutation: any number is a port."""
  config = pathlib.Path(__file__).parents[1] / 'configs' / 'tiny.py'
  words = [f'--config={config}:finetune', f'--workdir={tmp_path}/run', '--num_processes=2', '--process_id=0']
  assert cli.main(['train', *words, f'--coordinator={address}']) == ConfigError.exit_code
  assert f'--coordinator: {address!r} must be HOST:PORT' in capsys.readouterr().err
