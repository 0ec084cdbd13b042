"""A worker and the process that watches over it."""

import os
import subprocess
import sys

import pytest

from compactlm_jax.errors import PeerError


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
