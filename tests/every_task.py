"""A small run of every task, compiled once per process, whose updates can be made non-finite from outside.

One layer, 16 channels, rows of 16 tokens, dropout on. A batch whose first mask entry is `LOSS` or `GRADIENT` instead of
1 makes the loss, or one gradient alone, non-finite: so one compiled program serves all cases, and a run with a bad
update differs from one without in that update only.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny import configured, place_job

from compactlm_jax.config import MeshConfig
from compactlm_jax.parallel import state_shardings, to_global
from compactlm_jax.tree import named_leaves
from compactlm_jax.types import TrainState

ROOT = pathlib.Path(__file__).parents[1]
TASKS = ('electra', 'lm', 'distill', 'finetune', 'prune', 'adapt')
LOSS, GRADIENT = 2, 3
POISONED_LEAF = 'encoder/layers/ffn_out/bias'
MESHES = {'1': (1, 1, 1), '2': (2, 1, 1), '8': (8, 1, 1), '1 x 4': (1, 4, 1), '2 x 2': (2, 2, 1), '4 x 1': (4, 1, 1)}
MESHES |= {'2 x 2 x 2': (2, 2, 2), '1 x 1 x 4': (1, 1, 4)}
"""Name -> (data, fsdp, model)."""


def config_of(task, **changes):
  """configs/tiny.py:TASK, smaller; of the stages of adapt the one with a teacher and all terms.

  'sandwich' is 'adapt' with some of its sub-networks at each step.
  """
  sampling = 'sandwich' if task == 'sandwich' else 'all'
  task = 'adapt' if task == 'sandwich' else task
  config = configured(task)
  sizes = {'vocab_size': 64, 'hidden_size': 16, 'num_layers': 1, 'intermediate_size': 32, 'embedding_size': 16}
  fields = {
    'encoder': dataclasses.replace(config.encoder, max_positions=16, **sizes),
    'data': dataclasses.replace(config.data, seq_len=16, eval_rows=16),
    'mesh': MeshConfig(data=2, fsdp=2),
    'steps': 60,
    'log_every': 1,
    'seed': 3,
  }
  if task == 'adapt':
    fields['adapt'] = dataclasses.replace(config.adapt, stages=('depth',), depths=(1.0,), sampling=sampling)
  return dataclasses.replace(config, **{**fields, **changes})


def poisoned(task):
  """The task with a loss that a batch can make non-finite."""

  def loss(params, frozen, batch, key, step):
    asked = batch.attention_mask[0, 0]
    clean = dataclasses.replace(batch, attention_mask=jnp.minimum(batch.attention_mask, 1))
    value, metrics = task.loss(params, frozen, clean, key, step)
    x = named_leaves(params)[POISONED_LEAF].reshape(-1)[0]
    # sqrt(0) is 0, its derivative infinite; sqrt(1) - 1 changes nothing.
    value += jnp.sqrt(jnp.where(asked == GRADIENT, 0 * x, 1.0)) - 1.0
    return jnp.where(asked == LOSS, jnp.nan, value), metrics

  return dataclasses.replace(task, loss=loss)


def poison(batch, kind):
  """The batch with what makes its update non-finite: 'loss', 'gradient', or 'batch', an id outside the vocabulary."""
  ids, mask = np.array(batch.input_ids), np.array(batch.attention_mask)
  if kind == 'batch':
    ids[0, 1] = 64 + 7
  else:
    mask[0, 0] = {'loss': LOSS, 'gradient': GRADIENT}[kind]
  return dataclasses.replace(batch, input_ids=ids, attention_mask=mask)


def host(tree):
  """Copies of all leaves, which no later step reuses."""
  return jax.tree.map(lambda x: np.array(x), tree)


def same_bits(a, b):
  """Whether two trees have the same structure, dtypes and bits; NaN equals NaN."""
  leaves = [jax.tree.leaves(tree) for tree in (a, b)]
  same = all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*leaves))
  return same and jax.tree.structure(a) == jax.tree.structure(b)


@dataclasses.dataclass(frozen=True)
class Run:
  """A placed job and its compiled step."""

  job: Any
  mesh: Any
  initial: TrainState
  frozen: Any
  step: Any

  def place(self, state):
    """A state on the mesh, in buffers of its own, which a step may reuse."""
    return jax.tree.map(lambda x, s: jax.device_put(np.array(x), s), state, state_shardings(self.mesh, state))

  def steps(self, state, numbers, skip=(), kinds=None):
    """(losses, state on the host) after the given steps.

    Args:
      state: on the host.
      numbers: 0-based.
      skip: steps whose update is left out; the counter and the schedule of the learning rate move on.
      kinds: step -> what makes its update non-finite.
    """
    state, losses = self.place(state), []
    for number in numbers:
      if number in skip:
        state = dataclasses.replace(state, step=state.step + 1, opt_state=later(state.opt_state))
        continue
      batch = self.job.batches.batch(number)
      if kind := (kinds or {}).get(number):
        batch = poison(batch, kind)
      state, metrics = self.step(state, self.frozen, to_global(self.mesh, batch))
      assert int(metrics['bad_step']) == (number in (kinds or {}))
      losses.append(float(metrics['loss']))
    return losses, host(state)


def later(opt_state):
  """The state of an optimiser whose schedules are one step further."""

  def counts(node):
    return isinstance(node, optax.ScaleByScheduleState)

  def counted(node):
    return optax.ScaleByScheduleState(node.count + 1) if counts(node) else node

  return jax.tree.map(counted, opt_state, is_leaf=counts)


@functools.cache
def compiled(task, data=2, fsdp=2, model=1):
  """The `Run` of a task on data x fsdp x model devices; its task is `poisoned`."""
  config = config_of(task, mesh=MeshConfig(data=data, fsdp=fsdp, model=model))
  job, mesh, state, frozen, step = place_job(config, jax.devices()[: data * fsdp * model], poisoned)
  return Run(job, mesh, host(state), frozen, step)


def state_on(mesh, state):
  """Shapes of a state with their places on a mesh."""
  placed = state_shardings(mesh, state)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)


def deviation(task, state, data, fsdp, model=1, steps=20):
  """Largest relative difference of the losses after a move from 4 devices to data x fsdp x model.

  Args:
    task: of TASKS.
    state: on the host, after five steps.
    data: devices that split rows alone.
    fsdp: devices that split rows and parameters.
    model: devices that split hidden sizes.
    steps: how many are compared.
  """
  numbers = range(5, 5 + steps)
  expected, found = (run.steps(state, numbers)[0] for run in (compiled(task), compiled(task, data, fsdp, model)))
  assert len(set(expected)) == steps
  return max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True))
