"""Jobs of several processes, for tests: each an ordinary `compactlm train` with virtual CPU devices on loopback.

`start` runs the command once for each process, with --coordinator on a port that was free a moment ago, --num_processes
and --process_id; what a process says goes to a file. `finish` waits for all and checks their exit codes, and kills what
is left when it takes too long. A process that the tests start watches over a worker (see `compactlm_jax.cli.worker`),
which does the work: `worker_of` finds it, for signals to the worker itself.

Runs are as small as they can be: one layer, 16 rows of 16 tokens, a step of milliseconds. Starting Python and compiling
take nearly all of the time, so tests share what ran (fixtures of the module). No compile cache: it lets one process be
done before the other, and Gloo waits no longer than 30 seconds for its peers; see compile_cache.py, too.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import time

from compactlm_jax.distributed import TOLD
from compactlm_jax.jobs import load_model, params_digest
from compactlm_jax.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
FIELDS = {
  'steps': 60,
  'checkpoint_every': 20,
  'log_every': 1,
  'data.seq_len': 16,
  'data.eval_rows': 24,
  'encoder.vocab_size': 64,
  'encoder.hidden_size': 16,
  'encoder.num_layers': 1,
  'encoder.intermediate_size': 32,
  'encoder.embedding_size': 16,
}
PATIENCE = 900  # seconds; machines of tests may be very busy


@dataclasses.dataclass
class Process:
  """A process of a job, and the file that holds what it says."""

  popen: subprocess.Popen
  said: pathlib.Path

  def text(self):
    return self.said.read_text(errors='replace')


def start(workdir, count, *, devices=2, variant='finetune', fields=None, flags=(), own=None, env=None, cwd=None):
  """Starts the processes of a job.

  Args:
    workdir: the run directory.
    count: processes; one is started without --coordinator.
    devices: of all processes together.
    variant: of configs/tiny.py.
    fields: of the configuration, beside or instead of FIELDS.
    flags: of all processes.
    own: process -> further flags of it alone.
    env: process -> environment of it alone.
    cwd: where each process runs.
  """
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [sys.executable, '-m', 'compactlm_jax', 'train', f'--config={ROOT}/configs/tiny.py:{variant}']
  command += [f'--workdir={workdir}', *flags]
  command += [f'--config.{name}={value}' for name, value in {**FIELDS, **(fields or {})}.items()]
  shared = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices // count)}
  shared |= {'XLA_FLAGS': '--xla_backend_optimization_level=0', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  started = []
  for index in range(count):
    together = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}', f'--process_id={index}']
    mine = [*(together if count > 1 else []), *(own or {}).get(index, [])]
    said = pathlib.Path(f'{workdir}.{time.monotonic_ns()}.{index}.txt')
    said.parent.mkdir(parents=True, exist_ok=True)
    with said.open('wb') as file:
      popen = subprocess.Popen(
        command + mine,
        cwd=cwd[index] if cwd else ROOT,
        env={**shared, **(env or {}).get(index, {})},
        stdout=file,
        stderr=file,
      )
    started.append(Process(popen, said))
  return started


def finish(processes, *codes):
  """What each process said, after they ended with these exit codes (one for all, or one for each)."""
  wanted = list(codes) * (len(processes) if len(codes) == 1 else 1)
  deadline = time.monotonic() + PATIENCE
  try:
    for process in processes:
      process.popen.wait(max(1, deadline - time.monotonic()))
  finally:
    for process in processes:
      if process.popen.poll() is None:
        process.popen.kill()
        process.popen.wait()
  found = [process.popen.returncode for process in processes]
  said = [process.text() for process in processes]
  assert found == wanted, '\n'.join(f'--- process {i}: {c}\n{t[-3000:]}' for i, (c, t) in enumerate(zip(found, said)))
  return said


def run(workdir, count, **options):
  """`start`, and `finish` with exit code 0."""
  return finish(start(workdir, count, **options), 0)


def wait_for(processes, workdir, step):
  """Until the run has logged `step`."""
  deadline = time.monotonic() + PATIENCE
  while not (workdir / 'metrics.jsonl').exists() or all(line['step'] < step for line in read_metrics(workdir)[-1:]):
    ended = [process for process in processes if process.popen.poll() is not None]
    assert not ended and time.monotonic() < deadline, '\n'.join(p.text()[-3000:] for p in processes)
    time.sleep(0.02)


def worker_of(process):
  """Process id of the worker that a process watches over (Linux)."""
  for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError, IndexError):
      if int(stat.read_text().rpartition(')')[2].split()[1]) == process.popen.pid:
        return int(stat.parent.name)
  raise AssertionError('no worker')


def losses(workdir):
  """(step, loss) of every logged step; no step twice."""
  found = [(line['step'], line['loss']) for line in read_metrics(workdir) if 'loss' in line]
  assert [step for step, _ in found] == sorted({step for step, _ in found})
  return found


def results(workdir):
  return json.loads((workdir / 'results.json').read_text())


def outcome(workdir):
  """What must not depend on interruptions: every loss in hex, the digest of the parameters, the final metrics."""
  hexed = [(step, loss.hex()) for step, loss in losses(workdir)]
  return hexed, params_digest(load_model(str(workdir)).params), results(workdir)['metrics']


def faulty(folder, code):
  """Environment of a process whose worker first runs `code`, which replaces a function by a faulty one."""
  folder.mkdir()
  (folder / 'sitecustomize.py').write_text(f'import os\nif {TOLD!r} in os.environ:\n{textwrap.indent(code, "  ")}\n')
  return {'PYTHONPATH': str(folder)}
