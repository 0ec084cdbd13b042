"""Evaluation: each row counts once, however batches are cut and padded."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from compactlm_jax import checkpoint
from compactlm_jax.config import MeshConfig
from compactlm_jax.data.batches import eval_batches
from compactlm_jax.data.synthetic import synthetic_rows
from compactlm_jax.jobs import build_job
from compactlm_jax.parallel import make_mesh
from compactlm_jax.train.evaluate import Evaluation, make_evaluate
from compactlm_jax.train.loop import train
from compactlm_jax.types import Task

ROWS = synthetic_rows(rows=21, seq_len=8, vocab_size=64)


def evaluate(params, frozen, batch):
  """Means over rows and over tokens, from ids alone."""
  value_B = batch.input_ids.sum(-1) * params['scale'] + (0.0 if frozen is None else frozen)
  tokens_BT = batch.attention_mask * batch.weights[:, None]
  return {
    'per_row': ((value_B * batch.weights).sum(), batch.weights.sum()),
    'per_token': ((batch.input_ids * tokens_BT).sum(), tokens_BT.sum()),
    'nothing': (jnp.float32(0), jnp.float32(0)),
  }


def task(fn=evaluate):
  return Task('toy', lambda key: {}, lambda *args: (jnp.float32(0), {}), fn)


def expected(rows):
  ids = np.stack([ROWS[i]['input_ids'] for i in range(rows)]).astype(np.float64)
  real = sum(int(ROWS[i]['length']) for i in range(rows))
  return {'per_row': 2 * ids.sum() / rows, 'per_token': ids.sum() / real}


@pytest.mark.parametrize(('batch_size', 'devices'), [(8, 1), (8, 8), (24, 8), (16, 2)])
def test_each_row_counts_once(batch_size, devices):
  """21 rows in padded batches. Mutation: average the means of batches, or ignore weights."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
  found = make_evaluate(task(), mesh)(
    {'scale': jnp.float32(2)}, None, Evaluation(lambda: eval_batches(ROWS, batch_size))
  )
  for name, value in expected(21).items():
    np.testing.assert_allclose(found[name], value, rtol=1e-6)
  assert np.isnan(found['nothing'])  # no unit at all: nothing to average, and no error


def test_long_sums_are_added_in_float64():
  """Mutation: keep the totals in float32: after 2^24 each further 1 is lost."""
  big = task(lambda params, frozen, batch: {'x': (jnp.float32(1) + batch.weights[0] * 2**24, jnp.float32(1))})
  row = dataclasses.replace(next(iter(eval_batches(ROWS, 8))))
  heavy = dataclasses.replace(row, weights=np.ones(8, np.float32))
  light = dataclasses.replace(row, weights=np.zeros(8, np.float32))
  run = make_evaluate(big, make_mesh(MeshConfig(), jax.devices()[:1]))
  found = run({}, None, Evaluation(lambda: [heavy, *[light] * 9]))
  assert found['x'] == (2**24 + 9) / 10


def test_evaluation_is_compiled_once_for_all_calls():
  """Mutation: jit inside `evaluate`."""
  traces = []

  def counted(params, frozen, batch):
    traces.append(batch.input_ids.shape)
    return evaluate(params, frozen, batch)

  run = make_evaluate(task(counted), make_mesh(MeshConfig(), jax.devices()[:1]))
  for scale in (1, 2):
    run({'scale': jnp.float32(scale)}, jnp.float32(1), Evaluation(lambda: eval_batches(ROWS, 8)))
  assert traces == [(8, 8)]


def test_no_batches_give_no_metrics():
  assert make_evaluate(task(), make_mesh(MeshConfig()))({}, None, Evaluation(lambda: [])) == {}


@pytest.mark.parametrize(('batch_size', 'devices', 'hosts'), [(8, 1, 1), (8, 8, 1), (16, 2, 2), (24, 8, 4)])
def test_rows_are_gathered_once_each_and_in_order(batch_size, devices, hosts):
  """What hosts read, put together, is each row once. Mutation: keep the rows of weight 0."""
  parts = [list(eval_batches(ROWS, batch_size, host_rows=mine)) for mine in np.split(np.arange(batch_size), hosts)]
  batches = [jax.tree.map(lambda *xs: np.concatenate(xs), *group) for group in zip(*parts, strict=True)]
  rowwise = task(lambda params, frozen, batch: {'first': batch.input_ids[:, 1], 'ids': batch.input_ids})
  seen = {}

  def score(rows):
    seen.update(rows)
    return {'rows': len(rows['first'])}

  mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
  found = make_evaluate(rowwise, mesh)({}, None, Evaluation(lambda: batches, score, 'held_'))
  assert found == {'held_rows': 21.0}
  np.testing.assert_array_equal(seen['ids'], ROWS.fetch(np.arange(21))['input_ids'])
  np.testing.assert_array_equal(seen['first'], seen['ids'][:, 1])


def test_no_save_runs_while_a_keeper_is_asked(tmp_path, monkeypatch):
  """It may save too, and Orbax's barriers between hosts bear the number of saves. Mutation: drop `settle`."""
  finish, saving, asked = checkpoint.Checkpoints._finish, [], []

  def slow(self, *args, **kwargs):
    saving.append(1)
    time.sleep(0.3)
    finish(self, *args, **kwargs)
    saving.pop()

  class Keeper:
    def start(self, workdir, first):
      pass

    def offer(self, state, scores, metadata):
      asked.append(len(saving))

    def results(self, params, scores):
      return {}

  monkeypatch.setattr(checkpoint.Checkpoints, '_finish', slow)
  job = build_job(tiny_config('finetune', steps=4, checkpoint_every=1, eval_every=1))
  train(dataclasses.replace(job, keeper=Keeper()), str(tmp_path))
  assert asked == [0, 0, 0, 0]
