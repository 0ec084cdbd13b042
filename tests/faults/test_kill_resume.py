"""Runs that are killed, asked to stop, or started twice: they end with the bits of an uninterrupted run.

`compactlm train` in processes of their own, with dropout, on a compile cache that the uninterrupted run does not have.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from compactlm_jax.jobs import load_model, params_digest
from compactlm_jax.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 40
FIELDS = {
  'steps': STEPS,
  'checkpoint_every': 5,
  'log_every': 1,
  'keep': 2,
  'eval_every': 10,
  'seed': 5,
  'data.seq_len': 16,
  'data.eval_rows': 16,
  'encoder.vocab_size': 64,
  'encoder.hidden_size': 16,
  'encoder.intermediate_size': 32,
  'encoder.embedding_size': 16,
  'encoder.head_size': 4,
}


def start(workdir, cache=None):
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
  env.pop('JAX_COMPILATION_CACHE_DIR', None)
  if cache:
    env |= {'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  overrides = [f'--config.{name}={value}' for name, value in FIELDS.items()]
  command = [sys.executable, '-m', 'compactlm_jax', 'train', '--config=configs/tiny.py:distill', f'--workdir={workdir}']
  return subprocess.Popen(
    command + overrides, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
  )


def finish(process, expected):
  """Standard error of a process that ends with the expected code."""
  errors = process.communicate(timeout=120)[1]
  assert process.returncode == expected, errors[-3000:]
  return errors


def wait_for(process, workdir, step):
  """Until the run has logged `step`; False if it ended before."""
  path = workdir / 'metrics.jsonl'
  while process.poll() is None:
    if path.exists() and any(line['step'] >= step for line in read_metrics(workdir)[-1:]):
      return True
    time.sleep(0.002)
  return False


def outcome(workdir):
  """What must not depend on interruptions: every loss in hex, every evaluation, the digest of the parameters."""
  lines = read_metrics(workdir)
  losses = [(line['step'], line['loss'].hex()) for line in lines if 'loss' in line]
  scores = [(line['step'], line['eval_loss'].hex()) for line in lines if 'eval_loss' in line]
  results = json.loads((workdir / 'results.json').read_text())
  digest = params_digest(load_model(workdir).params)
  return {
    'losses': losses,
    'scores': scores,
    'digest': digest,
    'metrics': results['metrics'],
    'steps': results['steps'],
  }


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  errors = finish(start(workdir), 0)
  assert {'config.json', 'metrics.jsonl', 'checkpoints', 'results.json'} <= {p.name for p in workdir.iterdir()}
  assert f'step {STEPS}/{STEPS}, ' in errors and not (workdir / 'lock').exists()  # plain lines in a log
  found = outcome(workdir)
  assert [step for step, _ in found['losses']] == list(range(1, STEPS + 1)) and found['steps'] == STEPS
  assert [step for step, _ in found['scores']] == [10, 20, 30]
  assert len(set(found['losses'])) == STEPS and set(found['metrics']) == {'loss', 'relation_qk', 'relation_vv'}
  return found


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


def test_killed_runs_end_with_the_same_bits(tmp_path, uninterrupted, cache):
  """Three SIGKILLs at random moments. Mutation: draw the key or the batch from the steps of this process."""
  moments, kills = random.Random(0), 0
  for low in (2, 14, 26):
    process = start(tmp_path, cache)
    assert wait_for(process, tmp_path, moments.randint(low, low + 8)), process.communicate()[1][-3000:]
    time.sleep(moments.random() / 50)
    process.kill()
    kills += process.wait() == -signal.SIGKILL
    process.stderr.close()
  assert kills == 3 and not (tmp_path / 'results.json').exists()
  assert 'resuming at step ' in finish(start(tmp_path, cache), 0)
  assert outcome(tmp_path) == uninterrupted


def test_a_stopped_run_saves_and_continues_with_the_same_bits(tmp_path, uninterrupted, cache):
  """SIGTERM: exit 75 at that step; meanwhile a second run is refused. Mutation: leave without saving, or no lock."""
  first = start(tmp_path, cache)
  assert wait_for(first, tmp_path, 6), first.communicate()[1][-3000:]
  first.send_signal(signal.SIGSTOP)  # holds the directory for as long as the second needs
  started = time.monotonic()
  refused = finish(start(tmp_path, cache), 77)
  assert time.monotonic() - started < 60 and f'process {first.pid} on host' in refused
  assert 'Traceback' not in refused
  first.send_signal(signal.SIGTERM)
  first.send_signal(signal.SIGCONT)
  said = finish(first, 75)
  done = read_metrics(tmp_path)[-1]['step']
  assert 6 <= done < STEPS and f'step {done} is saved' in said and 'Traceback' not in said
  assert (tmp_path / 'checkpoints' / str(done)).is_dir() and not (tmp_path / 'results.json').exists()
  assert f'resuming at step {done} of {STEPS}' in finish(start(tmp_path, cache), 0)
  assert outcome(tmp_path) == uninterrupted
