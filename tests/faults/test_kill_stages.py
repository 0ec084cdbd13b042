"""A network made adaptive in stages, killed in two of them: it ends with the bits of an uninterrupted run."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from compactlm_jax.jobs import load_model, params_digest
from compactlm_jax.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = {
  'steps': 12,
  'batch_size': 8,
  'checkpoint_every': 3,
  'eval_every': 4,
  'log_every': 1,
  'seed': 3,
  'adapt.stages': 'width,depth',
  'adapt.depths': '1',
  'adapt.importance_batches': 2,
  'data.seq_len': 16,
  'encoder.vocab_size': 64,
  'encoder.hidden_size': 16,
  'encoder.num_layers': 1,
  'encoder.intermediate_size': 32,
  'encoder.embedding_size': 16,
  'encoder.head_size': 4,
}


def start(workdir, cache):
  env = {
    **os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', 'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }  # fmt: skip
  command = [sys.executable, '-m', 'compactlm_jax', 'train', '--config=configs/tiny.py:adapt', f'--workdir={workdir}']
  fields = [f'--config.{name}={value}' for name, value in FIELDS.items()]
  return subprocess.Popen(
    command + fields, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
  )


def finish(process):
  errors = process.communicate(timeout=300)[1]
  assert process.returncode == 0, errors[-3000:]
  return errors


def killed_after(process, folder, step):
  """SIGKILL once the run in `folder` has logged `step`; False if it ended before."""
  while process.poll() is None:
    if (folder / 'metrics.jsonl').exists() and any(line['step'] >= step for line in read_metrics(folder)[-1:]):
      process.send_signal(signal.SIGKILL)
      break
    time.sleep(0.002)
  process.communicate()
  return process.returncode == -signal.SIGKILL


def outcome(workdir):
  """What must not depend on interruptions, of both stages."""
  found = {}
  for run in (workdir / 'stages' / 'width', workdir):
    results = json.loads((run / 'results.json').read_text())
    losses = [(line['step'], line['loss'].hex()) for line in read_metrics(run) if 'loss' in line]
    digests = [params_digest(load_model(str(path)).params) for path in (run, run / 'best')]
    cells = {p.name: (p / 'model.safetensors').read_bytes() for p in (run / 'best' / 'cells').iterdir()}
    kept = json.loads((run / 'best.json').read_text())
    found[run.name if run != workdir else ''] = (results['metrics'], results['grid'], losses, digests, cells, kept)
  return found


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory, cache):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  finish(start(workdir, cache))
  return outcome(workdir)


@pytest.mark.slow
def test_killed_in_two_stages_it_ends_with_the_same_bits(tmp_path, uninterrupted, cache):
  """Mutations: start the second stage from the teacher after a kill; measure importance on what was trained."""
  assert killed_after(start(tmp_path, cache), tmp_path / 'stages' / 'width', 5)
  assert not (tmp_path / 'stages' / 'width' / 'results.json').exists() and not (tmp_path / 'config.json').exists()
  assert killed_after(start(tmp_path, cache), tmp_path, 7)
  assert (tmp_path / 'stages' / 'width' / 'results.json').exists() and not (tmp_path / 'results.json').exists()
  said = finish(start(tmp_path, cache))
  assert 'stages/width is finished and kept' in said and 'resuming at step ' in said
  assert outcome(tmp_path) == uninterrupted
