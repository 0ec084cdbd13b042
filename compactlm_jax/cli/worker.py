"""Several processes on the command line: their flags, and the process that watches over a worker.

`compactlm train` of a job of several processes starts itself again as a worker and waits for it, because JAX ends a
worker by SIGABRT when another one is gone or does not come: whoever started the command sees 75 then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from typing import IO, Any

from absl import flags

from compactlm_jax.cli.flags import all_of, number, text
from compactlm_jax.distributed import JOINING, TOLD, Launch, join, not_met
from compactlm_jax.errors import ConfigError, PeerError

_METADATA = 'http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints'
_WATCHER = 'COMPACTLM_WATCHER'  # environment variable: the process that started this worker
_RESTART = (signal.SIGABRT, signal.SIGTERM, signal.SIGKILL)

define_processes: Callable[[flags.FlagValues], Any] = all_of(
  text(
    'coordinator',
    '',
    "HOST:PORT of process 0, for a job of several processes; 'auto' asks JAX (Slurm, Open MPI). On TPU pods leave it "
    'out: the workers find each other.',
  ),
  number('num_processes', None, 'Processes of the job; 1 is this one alone, whatever machine it is on.'),
  number('process_id', None, 'Which of them this one is, from 0.'),
  number('join_timeout', 300, 'Seconds to wait for the other processes at the start.'),
  number('heartbeat_timeout', 60, 'Seconds of silence after which a process counts as dead, and the job ends with 75.'),
)
"""Flags of the commands that several processes can run together."""


def launch_of(values: flags.FlagValues) -> Launch | None:
  """How to join a job of several processes; None for one process.

  Raises:
    ConfigError: flags that do not belong together.
  """
  coordinator, count, index = values.coordinator, values.num_processes, values.process_id
  timeouts = {'join_timeout': values.join_timeout, 'heartbeat_timeout': values.heartbeat_timeout}
  for flag, seconds in timeouts.items():
    if seconds < 1:
      raise ConfigError(f'--{flag}: {seconds} must be at least 1 second')
  if count == 1 and not index:
    return None
  if coordinator == 'auto' and count is None and index is None:
    return Launch(**timeouts)
  if not coordinator and count is None and index is None:
    return Launch(**timeouts) if pod_workers() > 1 else None
  host, _, port = coordinator.rpartition(':')
  if not host or not re.fullmatch('[0-9]{1,5}', port) or not 1 <= int(port) <= 65535:
    raise ConfigError(
      f'--coordinator: {coordinator!r} must be HOST:PORT of process 0, with a port from 1 to 65535 and --num_processes'
    )
  if count is None or index is None or not 0 <= index < count:
    raise ConfigError(
      f'--num_processes: {count} and --process_id: {index} must both be given, the second from 0 to the first - 1'
    )
  return Launch(coordinator, count, index, **timeouts)


def pod_workers() -> int:
  """How many TPU hosts run this job together; 1 on a single one, without a TPU, and where nobody knows.

  Kubernetes tells by environment variables, Cloud TPU VMs by their metadata server, which only they are asked for.
  """
  platforms = os.environ.get('JAX_PLATFORMS', '')
  if platforms and 'tpu' not in platforms.split(','):
    return 1
  slices = int(os.environ.get('MEGASCALE_NUM_SLICES') or 1)
  hosts = os.environ.get('TPU_PROCESS_ADDRESSES') or os.environ.get('TPU_WORKER_HOSTNAMES')
  if hosts is not None:
    return slices * len(hosts.split(','))
  if 'TPU_SKIP_MDS_QUERY' in os.environ or not _on_google_cloud():
    return slices
  request = urllib.request.Request(_METADATA, headers={'Metadata-Flavor': 'Google'})
  with contextlib.suppress(OSError, ValueError):  # an ordinary virtual machine has no such entry
    with urllib.request.urlopen(request, timeout=3) as answer:
      return slices * len(answer.read().decode().split(','))
  return slices


def refuse_pod(command: str) -> None:
  """Raises ConfigError for a command of one process on a worker of a TPU pod, where JAX would wait for the others."""
  if (count := pod_workers()) > 1:
    raise ConfigError(
      f'this is one of {count} workers of a TPU pod, and {command} runs in one process: start it on one worker with '
      f'JAX_PLATFORMS=cpu in the environment, or on another machine'
    )


def _on_google_cloud() -> bool:
  with contextlib.suppress(OSError):
    return 'Google' in pathlib.Path('/sys/class/dmi/id/product_name').read_text()
  return False


def is_worker() -> bool:
  """Whether this process was started by `watched`."""
  return TOLD in os.environ


def start_worker(launch: Launch) -> Any:
  """Joins the job as its worker; returns the `Group`."""
  if sys.platform.startswith('linux'):  # whoever kills the watching process means the worker
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
  if os.getppid() != int(os.environ[_WATCHER]):  # already gone; in a container it may be process 1 itself
    os._exit(PeerError.exit_code)
  return join(launch)


def watched(name: str, arguments: Sequence[str], launch: Launch) -> int:
  """Runs this command again as a worker, hands signals on to it, and returns the exit code of the job.

  Args:
    name: of the command, for messages.
    arguments: of the interpreter.
    launch: how the worker joins the others, for messages.
  """
  told, tell = os.pipe()
  worker: subprocess.Popen[bytes] | None = None
  early: list[int] = []

  def forward(number: int, frame: Any) -> None:
    if worker is None:
      early.append(number)
    else:
      worker.send_signal(number)

  previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
  aside = tempfile.TemporaryFile()
  ours = {TOLD: str(tell), JOINING: str(aside.fileno()), _WATCHER: str(os.getpid())}
  try:
    # In a session of its own: a Ctrl-C of the terminal reaches it once, by this process.
    worker = subprocess.Popen(
      [sys.executable, *arguments],
      env={**os.environ, **ours},
      pass_fds=[tell, aside.fileno()],
      start_new_session=True,
    )
    os.close(tell)
    for number in early:
      worker.send_signal(number)
    code = worker.wait()
    os.set_blocking(told, False)
    with contextlib.suppress(BlockingIOError):
      if said := os.read(told, 16):
        return said[-1]
    return code if code >= 0 else _translated(name, -code, _while_joining(aside), launch)
  finally:
    aside.close()
    for number, handler in previous.items():
      signal.signal(number, handler)
    os.close(told)


def _while_joining(aside: IO[bytes]) -> str:
  """Hands on what a worker said while it joined; why JAX ended it then, or ''. The C++ stack stays behind."""
  aside.seek(0)
  said, fatal, rest = re.split(r'^(F\d{4} |\Z)', aside.read().decode(errors='replace'), maxsplit=1, flags=re.M)
  sys.stderr.write(said)
  reason = re.search(r'absl::Status: (.+)', rest)
  return (reason[1] if reason else rest.partition('\n')[0])[:300] if fatal else ''


def _translated(name: str, number: int, unmet: str, launch: Launch) -> int:
  by = signal.Signals(number).name
  if number == signal.SIGABRT and unmet:
    print(f'compactlm {name}: {not_met(launch, unmet)}', file=sys.stderr)
    return PeerError.exit_code
  if number in _RESTART:
    why = 'another process of the job is gone, or this one was killed'
    if number == signal.SIGKILL:
      why = 'from outside, or by the system because memory ran out; see its log before it happens again'
    print(f'compactlm {name}: ended by {by} ({why}); a restart continues from the last checkpoint', file=sys.stderr)
    return PeerError.exit_code
  print(f'compactlm {name}: ended by {by}; this is a bug, here or in a library', file=sys.stderr)
  return 70
