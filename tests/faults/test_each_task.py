"""What must hold for every task alike: bad updates, repetition, another number of devices.

Rows 6, 9 and 15 of the fault matrix (docs/reliability.md). One compiled program per task serves all tests here.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from every_task import (
  MESHES,
  POISONED_LEAF,
  TASKS,
  compiled,
  config_of,
  deviation,
  host,
  poison,
  poisoned,
  same_bits,
  state_on,
)
from tiny import place_job

from compactlm_jax.checkpoint import Checkpoints, load_params
from compactlm_jax.config import MeshConfig
from compactlm_jax.errors import NumericsError
from compactlm_jax.jobs import build_job
from compactlm_jax.metrics import read_metrics
from compactlm_jax.parallel import make_mesh, to_global
from compactlm_jax.train.loop import train
from compactlm_jax.tree import named_leaves


def only(*fast):
  """All tasks, of which these are fast. (test_cli.py stops a run of finetune in the fast tier.)"""
  return [pytest.param(task, marks=() if task in fast else pytest.mark.slow) for task in TASKS]


@pytest.mark.parametrize('task', only('electra', 'finetune', 'prune', 'adapt'))
def test_a_bad_update_is_as_if_it_had_not_been(task):
  """At step 7, and at steps 7 and 8: bits of a run that leaves these updates out, with whatever comes after.

  Mutation: `good = jnp.isfinite(norm)` in train_step (loss); no jnp.where there, or the old schedule too (all).
  """
  run = compiled(task)
  before = run.steps(run.initial, range(6))[1]
  for bad in ({6: 'loss'}, {6: 'gradient'}, {6: 'batch'}, {6: 'gradient', 7: 'batch'}):
    losses, state = run.steps(before, range(6, 10), kinds=bad)
    expected_losses, expected = run.steps(before, range(6, 10), skip=bad)
    assert same_bits(state, expected), bad
    assert [losses[number - 6].hex() for number in range(6, 10) if number not in bad] == [
      x.hex() for x in expected_losses
    ]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
  assert not same_bits(state, run.steps(before, range(6, 10))[1])


class Poisoned:
  """Rows of which steps 7 to 10 make their updates non-finite."""

  def __init__(self, batches):
    self._batches = batches

  def prefetch(self, start_step):
    """See `train.loop.BatchSource`."""
    for step, batch in self._batches.prefetch(start_step):
      yield step, poison(batch, 'gradient') if 6 <= step < 10 else batch


@pytest.mark.parametrize('task', only())
def test_bad_updates_without_end_stop_the_run(task, tmp_path):
  """Steps 7 to 10: exit 70 at the third in a row, with steps and leaves; what is on disk is finite.

  Mutation: `>` in place of `>=` where the reporter counts, or save before it reports.
  """
  config = config_of(task, steps=20, checkpoint_every=1, mesh=MeshConfig(data=4, fsdp=2))
  job = build_job(config)
  assert config.optimizer.max_bad_steps == 3
  job = dataclasses.replace(job, task=poisoned(job.task), batches=Poisoned(job.batches))
  with pytest.raises(NumericsError, match=f'3 non-finite .* at step 9 .first leaf: {POISONED_LEAF}') as refused:
    train(job, str(tmp_path))
  assert refused.value.exit_code == 70
  report = json.loads((tmp_path / 'failure.json').read_text())
  assert report['steps'] == [7, 8, 9] and POISONED_LEAF in report['bad_gradients']
  assert [line['step'] for line in read_metrics(tmp_path) if line.get('bad_step')] == [7, 8, 9]
  params, metadata = load_params(tmp_path)
  assert metadata['step'] == 8 and all(np.isfinite(x).all() for x in named_leaves(params).values())


@pytest.mark.parametrize('task', TASKS)
def test_the_same_configuration_twice(task):
  """Job, weights and rows made anew: the same losses in hex, the same parameters. Mutation: weights by the clock."""
  run, config = compiled(task), config_of(task)
  job, mesh, state, frozen, _ = place_job(config, jax.devices()[:4])
  again = dataclasses.replace(run, job=job, mesh=mesh, initial=host(state), frozen=frozen)
  assert same_bits(again.initial, run.initial)
  (losses, end), (expected, expected_end) = (r.steps(r.initial, range(10)) for r in (again, run))
  assert [x.hex() for x in losses] == [x.hex() for x in expected] and same_bits(end, expected_end)
  assert len(set(losses)) == 10


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """task -> (folder of a checkpoint that 4 devices wrote at step 5, its state on the host)."""
  made = {}

  def of(task):
    if task not in made:
      run, folder = compiled(task), tmp_path_factory.mktemp(task)
      state = run.steps(run.initial, range(5))[1]
      with Checkpoints(folder, 2) as checkpoints:
        checkpoints.save(5, run.place(state), {}, wait=True)
      made[task] = folder, state
    return made[task]

  return of


@pytest.mark.parametrize('task', TASKS)
def test_leaves_and_rows_are_the_same_on_any_devices(task, saved):
  """Saved on 4 devices. Mutation: return `host` unsliced from the callback of `place_leaf`."""
  folder, state = saved(task)
  batch = compiled(task).job.batches.batch(5)
  for data, fsdp, model in MESHES.values():
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, model=model), jax.devices()[: data * fsdp * model])
    like = state_on(mesh, state)
    with Checkpoints(folder, 2) as checkpoints:
      restored, _ = checkpoints.restore(like)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)
    assert same_bits(jax.tree.map(np.asarray, restored), state)
    assert same_bits(jax.tree.map(np.asarray, to_global(mesh, batch)), batch)


@pytest.mark.parametrize('task', only('finetune'))
def test_losses_go_on_on_one_device(task, saved):
  """Mutation: fold the device into the key of the step."""
  assert deviation(task, saved(task)[1], *MESHES['1']) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [name for name in MESHES if name not in ('1', '2 x 2')])
@pytest.mark.parametrize('task', [*TASKS, 'sandwich'])
def test_losses_go_on_on_any_devices(task, mesh, saved):
  """Mutation: as on one device."""
  assert deviation(task, saved(task)[1], *MESHES[mesh]) < 1e-5
