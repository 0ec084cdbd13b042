"""What must not change a number, or hardly: row 16 of the fault matrix (docs/reliability.md).

Accumulation: train/test_step.py, tasks/test_prune.py. Rows per host: data/test_source.py. Meshes: test_each_task.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_task import TASKS, config_of, same_bits
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from compactlm_jax.config import MaskConfig
from compactlm_jax.jobs import build_job
from compactlm_jax.ops.corruption import mask_tokens
from compactlm_jax.ops.dropout import dropout
from compactlm_jax.train.step import make_gradient
from compactlm_jax.types import SpecialTokens


@functools.cache
def gradient(config, eager=False):
  """(loss, gradients) of the first step, with dropout."""
  job = build_job(config)
  run = make_gradient(job.task, 1, None, lambda tree: tree)
  args = job.task.init(jax.random.key(0)), job.task.frozen, job.batches.batch(0), jax.random.key(1), jnp.int32(5)
  with jax.disable_jit(eager):
    (loss, _), grads = (run if eager else jax.jit(run))(*args)
  return float(loss), jax.tree.map(np.asarray, grads)


def assert_close(a, b):
  """Losses within 1e-6; gradients within 1e-6 of the largest of each leaf, or within half a rounding of 1, 6e-8.

  Terms of a classifier's gradient are of order 1 and cancel: of a DynaBERT's bias 2e-3 is left, off by 6e-9.
  """
  assert abs(a[0] - b[0]) <= 1e-6 * abs(b[0])
  for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
    assert np.abs(x - y).max() <= max(1e-6 * np.abs(y).max(), 6e-8)


def deep(task, **encoder):
  """Three layers: `scan_unroll` and `remat` need some."""
  config = config_of(task)
  return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, num_layers=3, **encoder))


def only(*fast):
  return [pytest.param(task, marks=() if task in fast else pytest.mark.slow) for task in TASKS]


@pytest.mark.parametrize('task', only('finetune'))
def test_compiled_and_eager(task):
  """Mutation: `x.astype(jnp.bfloat16)` in a layer only if it is traced."""
  config = config_of(task)
  assert_close(gradient(config, eager=True), gradient(config))


@pytest.mark.slow
@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('change', [{'remat': True}, {'scan_unroll': 0}, {'scan_unroll': 2}], ids=str)
def test_remat_and_unrolling(change, task):
  """Of the whole loss of each task (the encoder alone: nn/test_encoder.py). Mutation: another key under remat."""
  assert_close(gradient(deep(task, **change)), gradient(deep(task)))


def test_draws_are_the_same_on_any_number_of_devices():
  """Dropout and hidden tokens, to the bit. Mutation: draw by `jax.lax.rng_uniform`."""
  rng = np.random.default_rng(0)
  x, ids = rng.standard_normal((16, 24), np.float32), rng.integers(5, 64, (16, 24)).astype(np.int32)
  mask = (np.arange(24) < rng.integers(3, 25, 16)[:, None]).astype(np.int32)

  @jax.jit
  def draw(x, ids, mask):
    key, special = jax.random.key(7), SpecialTokens(0, 1, 2, 3)
    hidden = [mask_tokens(key, ids, mask, MaskConfig(with_replacement=w), special, 64) for w in (False, True)]
    return dropout(x, 0.3, key, 4), hidden

  results = []
  for n in (1, 2, 8):
    mesh = jax.make_mesh((n,), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:n])
    rows = [jax.device_put(a, NamedSharding(mesh, P('data'))) for a in (x, ids, mask)]
    results.append(jax.tree.map(np.asarray, draw(*rows)))
  dropped, hidden = results[0]
  assert 0.2 < (dropped == 0).mean() < 0.4 and all((h.input_ids_BT != ids).any() for h in hidden)
  assert all(same_bits(results[0], other) for other in results[1:])
