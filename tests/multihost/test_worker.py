"""How a process joins a job of several: flags, what a machine says about itself, and the process that watches."""

import contextlib
import io
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error

import pytest

from compactlm_jax import distributed
from compactlm_jax.cli import worker
from compactlm_jax.cli.commands import COMMANDS
from compactlm_jax.distributed import JOINING, TOLD, Launch
from compactlm_jax.errors import ConfigError


def launch(*flags):
  values = COMMANDS['train'].flag_values()
  values(['train', *flags])
  return worker.launch_of(values)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
  """No cluster: as on a laptop."""
  for name in ('JAX_PLATFORMS', 'TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES', 'MEGASCALE_NUM_SLICES'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.delenv('TPU_SKIP_MDS_QUERY', raising=False)  # JAX sets it where it finds no TPU
  monkeypatch.setattr(worker, '_on_google_cloud', lambda: False)


def test_flags():
  assert launch() is None and launch('--num_processes=1') is None
  assert launch('--coordinator=auto', '--heartbeat_timeout=9') == Launch(heartbeat_timeout=9)
  given = launch('--coordinator=h:1234', '--num_processes=2', '--process_id=1', '--join_timeout=7')
  assert given == Launch('h:1234', 2, 1, join_timeout=7)
  for wrong, text in [
    (['--num_processes=2', '--process_id=0'], '--coordinator'),
    (['--coordinator=h', '--num_processes=2', '--process_id=0'], 'HOST:PORT'),
    (['--coordinator=h:1', '--num_processes=2'], '--process_id'),
    (['--coordinator=h:1', '--num_processes=2', '--process_id=2'], '--process_id: 2'),
    (['--coordinator=h:1', '--num_processes=2', '--process_id=0', '--heartbeat_timeout=0'], '--heartbeat_timeout'),
  ]:
    with pytest.raises(ConfigError, match=text):
      launch(*wrong)


def test_workers_of_a_pod_find_each_other_and_nothing_else_asks(monkeypatch):
  """A v3-8 is one host, a v3-32 four. Mutation: ask the metadata server everywhere."""
  asked = []

  def answer(text):
    def urlopen(request, timeout):
      asked.append(request.full_url)
      if text is None:
        raise urllib.error.URLError('no such entry')
      return contextlib.closing(io.BytesIO(text.encode()))

    return urlopen

  monkeypatch.setattr('urllib.request.urlopen', answer('unknown:unknown:10.0.0.2'))
  assert launch() is None and not asked  # a laptop
  monkeypatch.setattr(worker, '_on_google_cloud', lambda: True)
  assert launch() is None and len(asked) == 1  # v3-8
  monkeypatch.setattr('urllib.request.urlopen', answer(','.join(f'a:b:10.0.0.{i}' for i in range(4))))
  assert launch() == Launch() and worker.pod_workers() == 4
  with pytest.raises(ConfigError, match='one of 4 workers.*export.*JAX_PLATFORMS=cpu'):
    worker.refuse_pod('export')
  assert launch('--num_processes=1') is None
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert launch() is None
  monkeypatch.delenv('JAX_PLATFORMS')
  monkeypatch.setattr('urllib.request.urlopen', answer(None))
  assert launch() is None  # a virtual machine without a TPU
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a,b')
  assert launch() == Launch()
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a')
  assert launch() is None


@pytest.mark.parametrize(
  'ends, code',
  [
    ('sys.exit(65)', 65),
    ('os.abort()', 75),  # JAX lost another process
    ('os.kill(os.getpid(), 9)', 75),
    ('os.kill(os.getpid(), 11)', 70),
    (f'os.write(int(os.environ["{TOLD}"]), bytes([78])); os.abort()', 78),  # on its way out already
  ],
)
def test_what_whoever_started_a_worker_sees(ends, code):
  """Mutation: return what the process returned."""
  assert worker.watched('train', ['-c', f'import os, sys\n{ends}'], Launch()) == code


@pytest.mark.parametrize(
  'said, ends, shown, why',
  [
    ('W1122 a warning\nF1122 fatal. absl::Status: ALREADY_EXISTS: twice\n\n@ 0x7f\n', 6, 'W1122 a warning\n', 'twice'),
    ('F1122 fatal\n@ 0x7f\n', 6, '', 'fatal'),
    ('free(): invalid pointer\n', 6, 'free(): invalid pointer\n', 'ended by SIGABRT'),
    ('W1122 a warning\n', 11, 'W1122 a warning\n', 'ended by SIGSEGV'),
    ('', 6, '', 'ended by SIGABRT'),
  ],
)
def test_what_a_worker_said_before_it_had_joined(capfd, said, ends, shown, why):
  """All but the C++ stack. Mutations: show none of it, or all; every SIGABRT comes from the start."""
  code = f'import os\nos.write(int(os.environ["{JOINING}"]), {said.encode()!r})\nos.kill(os.getpid(), {ends})'
  worker.watched('train', ['-c', code], Launch('h:1', 2, 1))
  before, _, message = capfd.readouterr().err.rpartition('compactlm train: ')
  assert before == shown and why in message and '0x7f' not in message
  assert ('--coordinator=h:1' in message) == ('F1122' in said)


def test_what_is_said_while_joining_is_shown_afterwards(capfd, monkeypatch):
  """Also if that fails. Mutations: it stays in the file; the file keeps it."""
  with tempfile.TemporaryFile() as file:
    monkeypatch.setenv(JOINING, str(file.fileno()))
    with pytest.raises(RuntimeError), distributed._aside():
      os.write(2, b'first')
      assert capfd.readouterr().err == ''
      raise RuntimeError
    assert capfd.readouterr().err == 'first' and os.fstat(file.fileno()).st_size == 0
    os.write(2, b'second')
    assert capfd.readouterr().err == 'second'


@pytest.mark.multihost
@pytest.mark.parametrize('index', [0, 1])
def test_a_process_whose_others_do_not_come(tmp_path, index):
  """Process 0 alone, and one that finds no process 0. Mutation: join without `_aside`."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    flags = [f'--coordinator=127.0.0.1:{free.getsockname()[1]}', '--num_processes=2', '--join_timeout=3']
  config = pathlib.Path(__file__).parents[2] / 'configs' / 'tiny.py'
  command = ['train', f'--config={config}:finetune', f'--workdir={tmp_path}/run', f'--process_id={index}', *flags]
  result = subprocess.run(
    [sys.executable, '-m', 'compactlm_jax', *command],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 75, result.stderr
  assert f'2 processes did not meet at {flags[0]} within --join_timeout=3 s (DEADLINE' in result.stderr
  assert 'stack trace' not in result.stderr and 'Traceback' not in result.stderr


WATCH = """
import sys
from compactlm_jax.cli import worker
code = 'import signal, sys, time; signal.signal(15, lambda *a: sys.exit(75)); print("ready", flush=True)'
sys.exit(worker.watched('train', ['-c', code + '; time.sleep(99)'], None))
"""


@pytest.mark.multihost
def test_signals_reach_the_worker():
  """Mutation: do not forward."""
  with subprocess.Popen([sys.executable, '-c', WATCH], stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75


@pytest.mark.multihost
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='a service of Linux')
def test_a_worker_dies_with_whoever_watches_it(monkeypatch, tmp_path):
  """Mutation: leave out prctl; a worker that nobody watches would hold its directory."""
  code = f"""
import os, pathlib, time
from compactlm_jax.cli import worker
worker.join = lambda launch: pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))
worker.start_worker(None)
print('ready', flush=True)
time.sleep(99)
"""
  outer = f"import sys\nfrom compactlm_jax.cli import worker\nsys.exit(worker.watched('train', ['-c', {code!r}], None))"
  with subprocess.Popen([sys.executable, '-c', outer], stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == 'ready\n'
    pid = int((tmp_path / 'pid').read_text())
    os.kill(pid, 0)
    process.kill()
    process.wait(60)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
      with contextlib.suppress(OSError):
        if pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z':
          time.sleep(0.05)
          continue
      break
    else:
      raise AssertionError('still there')
