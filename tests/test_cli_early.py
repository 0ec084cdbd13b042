"""SIGTERM before a run has begun: the command ends with 75 within moments, and nothing is left."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from compactlm_jax.cli.early import leaves_early
from compactlm_jax.train.signals import StopRequest

ROOT = pathlib.Path(__file__).parents[1]
BUSY = {
  'python': 'while True: time.sleep(.01)',
  'a call that no signal interrupts': "hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 30)",
}


@pytest.mark.parametrize('busy', BUSY)
def test_a_command_that_has_done_nothing_ends_with_75(busy, tmp_path):
  """As configuration is read, before JAX is imported. Mutations: no handler; no thread beside it."""
  (tmp_path / 'mine.py').write_text(f"""
import hashlib, os, signal, threading, time

def get_config():
  threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
  {BUSY[busy]}
""")
  started = time.monotonic()
  command = ['train', f'--config={tmp_path}/mine.py', f'--workdir={tmp_path}/w', '--num_processes=1']
  ran = subprocess.run(
    [sys.executable, '-m', 'compactlm_jax', *command], cwd=ROOT, capture_output=True, text=True, timeout=60
  )
  assert ran.returncode == 75 and 'nothing is lost, and the same command goes on' in ran.stderr
  assert ran.stderr.count('\n') == 1 and not (tmp_path / 'w').exists() and time.monotonic() - started < 30


def test_a_run_that_has_begun_is_left_to_its_loop():
  """Mutations: do not ask in the thread whose handler is in place; do not put back what was there before."""
  with leaves_early('train'):
    with StopRequest() as stop:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.1)
      assert stop.requested()
    assert callable(signal.getsignal(signal.SIGTERM))
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1
