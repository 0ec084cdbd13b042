"""Compression that removes nothing is the dense model, bit for bit: row 17 of the fault matrix.

Gradients of masked weights are exactly 0: tasks/test_prune.py. The full sub-network is the tree itself:
compress/test_subnet.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_task import config_of, same_bits

from compactlm_jax.config import PruneConfig
from compactlm_jax.jobs import build_job
from compactlm_jax.train.step import make_gradient
from compactlm_jax.tree import named_leaves

NOTHING = {
  'hard_movement': {'density': 1.0},
  'magnitude': {'density': 1.0},
  'random': {'density': 1.0},
  'soft_movement': {'threshold_on': 'scores', 'scores_scale': 5.0},  # scores far above the threshold
  'heads and neurons': {'method': 'hard_movement', 'structure': 'heads+neurons', 'density': 1.0},
}


@pytest.mark.parametrize(
  'name', [pytest.param(name, marks=() if name == 'hard_movement' else pytest.mark.slow) for name in NOTHING]
)
def test_a_mask_of_ones_is_no_mask(name):
  """Parameters, loss and gradients of a task that prunes nothing are those of its loss without a view.

  Mutation: a factor beside the mask in `ops.masks.masked_weight`.
  """
  prune = PruneConfig(**{'method': name, **NOTHING[name]})
  task = (job := build_job(dataclasses.replace(config_of('prune'), prune=prune))).task
  params, batch, key, step = task.init(jax.random.key(0)), job.batches.batch(0), jax.random.key(1), jnp.int32(30)
  read, penalty, metrics = jax.jit(lambda p: task.view(p, key, step, lambda tree: tree))(params)
  dense = {n: x for n, x in named_leaves(params).items() if not n.startswith('scores/')}
  assert same_bits({n: x for n, x in named_leaves(read).items() if n in dense}, dense)
  assert float(penalty) == 0 and float(metrics['density']) == 1

  def gradient(view):
    run = make_gradient(dataclasses.replace(task, view=view), 1, None, lambda tree: tree)
    (loss, _), grads = jax.jit(run)(params, task.frozen, batch, key, step)
    found = {n: np.asarray(g) for n, g in named_leaves(grads).items() if n in dense}
    return float(loss), found

  (loss, grads), (expected, expected_grads) = gradient(task.view), gradient(None)
  assert loss == expected
  for leaf in dense:
    np.testing.assert_array_equal(grads[leaf], expected_grads[leaf], err_msg=leaf)
