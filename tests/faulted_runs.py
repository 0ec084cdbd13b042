"""Runs of every task that tests interrupt, and what must not depend on that.

Each run is `compactlm train` with a variant of configs/tiny.py, made as small as it goes, in a process of its own (see
`processes`), with dropout, on one device. Starting takes nearly all of the time; runs that are started again share a
compile cache, which is filled by the run that nobody interrupts.
"""

import json
import re
import signal
import time

import processes
from etils import epath

from compactlm_jax.jobs import load_model, params_digest
from compactlm_jax.metrics import read_metrics
from compactlm_jax.stepdir import StepDirectory, read_manifest

TASKS = ('electra', 'mlm', 'lm', 'distill', 'finetune', 'prune', 'adapt')
SMALL = {
  'steps': 24,
  'checkpoint_every': 5,
  'log_every': 1,
  'keep': 2,
  'eval_every': 8,
  'seed': 5,
  'batch_size': 8,
  'data.seq_len': 16,
  'data.eval_rows': 16,
  'encoder.vocab_size': 64,
  'encoder.hidden_size': 16,
  'encoder.num_layers': 1,
  'encoder.intermediate_size': 32,
  'encoder.embedding_size': 16,
}
OWN = {
  'distill': {'encoder.head_size': 4},
  'finetune': {'encoder.head_size': 4},
  'adapt': {
    'steps': 12,  # of each stage
    'adapt.stages': 'width,depth',
    'adapt.depths': '1',
    'adapt.importance_batches': 2,
    'encoder.head_size': 4,
  },
}


def start(workdir, task, cache=None, **changes):
  """The process of a run; `changes` to fields are written with __ for dots."""
  env = {}
  if cache:  # of programs of one device
    env = {'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    env['JAX_ENABLE_COMPILATION_CACHE'] = 'true'
  changes = {name.replace('__', '.'): value for name, value in changes.items()}
  fields = {**SMALL, **OWN.get(task, {}), **changes}
  (process,) = processes.start(workdir, 1, devices=1, variant=task, fields=fields, env={0: env})
  return process


def finish(process, code=0):
  """What a process said that ends with this exit code."""
  return processes.finish([process], code)[0]


def runs(workdir):
  """Name -> run directory: of the stages, and of the run itself ('')."""
  return {**{p.name: p for p in sorted((workdir / 'stages').glob('*'))}, '': workdir}


def losses(workdir):
  """(stage, step) -> loss in hex, of every logged step."""
  lines = [(name, line) for name, run in runs(workdir).items() for line in read_metrics(run)]
  return {(name, line['step']): line['loss'].hex() for name, line in lines if 'loss' in line}


def saved(run):
  """The newest committed step of a run directory; 0 if there is none."""
  return max(StepDirectory(epath.Path(run) / 'checkpoints', commit_file=False).steps(), default=0)


def outcome(workdir):
  """What must not depend on interruptions, of every stage.

  Every loss and every evaluation in hex, the SHA-256 of every leaf of the last state (parameters and optimiser), of the
  parameters as they are read back, what results.json holds except for the time, and what the run kept as its best.
  """
  found = {}
  for name, run in runs(workdir).items():
    lines = [(line['step'], key, line[key].hex()) for line in read_metrics(run) for key in line if 'loss' in key]
    assert len(lines) == len({line[:2] for line in lines}), f'{run}: a step is logged twice'
    results = json.loads((run / 'results.json').read_text())
    manifest = read_manifest(epath.Path(run) / 'checkpoints' / str(results['steps']), results['steps'])
    state = {leaf: entry['sha256'] for leaf, entry in manifest['leaves'].items()}
    folders = [run, *sorted(run.glob('best'))]
    digests = [params_digest(load_model(str(folder)).params) for folder in folders]
    kept = {str(p.relative_to(run)): p.read_bytes() for p in [*run.glob('best.json'), *run.glob('best/cells/*/*')]}
    found[name] = {
      'lines': lines,
      'state': state,
      'digests': digests,
      'results': {key: value for key, value in results.items() if key != 'seconds'},
      'kept': kept,
    }
  return found


def kill(process):
  """SIGKILL; whether the process was still there."""
  process.popen.kill()
  return process.popen.wait() == -signal.SIGKILL


def wait_for(process, workdir, done, patience=processes.PATIENCE):
  """Until the run has logged `done` lines of training, over all stages; False if it ended before."""
  deadline = time.monotonic() + patience
  while process.popen.poll() is None:
    if len(losses(workdir)) >= done:
      return True
    assert time.monotonic() < deadline, process.text()[-3000:]
    time.sleep(0.002)
  return False


def lost(workdir):
  """(stage, last committed step, steps logged after it) of a run directory that a kill has left."""
  stages = [(name, run) for name, run in runs(workdir).items() if (run / 'metrics.jsonl').exists()]
  if not stages:
    return '', 0, 0
  name, run = stages[-1]
  logged = max((line['step'] for line in read_metrics(run) if 'loss' in line), default=0)
  return name, saved(run), max(0, logged - saved(run))


def resumed(said):
  """The step that a process says it resumed at in its last stage; 0 if it says none."""
  return int((re.findall(r'resuming at step (\d+) of', said) or ['0'])[-1])
