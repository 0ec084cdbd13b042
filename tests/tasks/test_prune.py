"""Pruning as a task: gradients, groups of the optimiser, micro-batches, meshes, what must stay as it is."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import STILL, place_job, run_steps, tiny_config

from compactlm_jax.config import MeshConfig, OptimizerConfig, PruneConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.parallel import to_global
from compactlm_jax.train.optimizer import make_optimizer
from compactlm_jax.train.step import make_gradient
from compactlm_jax.tree import named_leaves
from compactlm_jax.types import TrainState

RATES = OptimizerConfig(learning_rate=2e-3, warmup_fraction=0.1, weight_decay=0.01)
HARD = PruneConfig(density=0.3, initial_density=0.8, scores_init='uniform', scores_scale=0.1, initial_warmup=0)
GATES = PruneConfig(method='l0', regularization=5.0, scores_scale=0.5, scores_learning_rate=0.1)
SOFT = PruneConfig(
  method='soft_movement', density=0.3, control='density', threshold=0.45, scores_learning_rate=0.2, initial_warmup=0
)


def prune_config(prune, **changes):
  return tiny_config('prune', **{'encoder': STILL, 'optimizer': RATES, 'prune': prune, **changes})


@functools.cache
def placed(prune):
  return place_job(prune_config(prune), jax.devices()[:1])


@pytest.mark.parametrize('prune', [PruneConfig(density=0.3), HARD, GATES, SOFT], ids=lambda prune: prune.method)
def test_a_fresh_state_has_the_types_of_a_trained_one(prune):
  """Or the second step, and the first after a resume, compiles again. Mutation: no dtype for constant scores."""
  weak = [name for name, leaf in named_leaves(placed(prune)[2]).items() if leaf.weak_type]
  assert not weak


def test_gradients_of_scores_and_weights_are_those_of_the_masked_weights():
  """dL/dS = dL/dW' * W in every entry, dL/dW = dL/dW' * M. Mutation: g * M * W for the scores, g for the weights."""
  job, mesh, state, frozen, _ = placed(HARD)
  batch, key = job.batches.batch(0), jax.random.key(0)
  whole = make_gradient(job.task, 1, None, lambda tree: tree)

  @jax.jit
  def run(params):
    read, _, metrics = job.task.view(params, key, jnp.int32(5), lambda tree: tree)
    direct = jax.grad(lambda p: job.task.loss(p, frozen, batch, key, 5)[0])(read)
    return whole(params, frozen, batch, key, jnp.int32(5))[1], direct, read, metrics

  grads, direct, read, metrics = map(named_leaves, run(state.params))
  masked = entries = 0
  for name, weight in named_leaves(state.params).items():
    if f'scores/{name}' not in grads:
      continue
    mask = read[name] != 0
    np.testing.assert_allclose(grads[f'scores/{name}'], direct[name] * weight, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(grads[name], direct[name] * mask, rtol=1e-5, atol=1e-9)
    assert np.all(np.asarray(grads[name])[~mask] == 0) and np.any(np.asarray(grads[f'scores/{name}'])[~mask] != 0)
    masked, entries = masked + int((~mask).sum()), entries + mask.size
  assert metrics['density'] == pytest.approx(1 - masked / entries) and 0 < masked < entries
  assert not any(np.any(grads[name] != 0) for name in grads if name.startswith('encoder/embeddings/'))


def test_scores_have_a_rate_of_their_own_no_decay_and_a_norm_in_common():
  """On a model's names. Mutations: decay them; clip each group by itself; another warm-up."""
  job, _, state, _, _ = placed(HARD)
  config = dataclasses.replace(RATES, clip_norm=1.0, weight_decay=0.1, epsilon=1e-12)
  tx = make_optimizer(config, 10, job.task.trainable, job.task.groups)
  params = state.params
  opt_state = jax.jit(tx.init)(params)
  ones, zeros = (jax.tree.map(lambda p, fill=fill: jnp.full_like(p, fill), params) for fill in (1.0, 0.0))
  update = jax.jit(tx.update)
  _, opt_state = update(ones, opt_state, params)  # the rate of step 0 is 0
  moments = named_leaves(opt_state)
  norm = float(np.sqrt(sum(leaf.size for leaf in jax.tree.leaves(params))))
  for name, leaf in moments.items():
    if '/mu/' in name:
      np.testing.assert_allclose(leaf, 0.1 / norm, rtol=1e-4, err_msg=name)
  moved_by, _ = update(ones, opt_state, params)
  found, weights = named_leaves(moved_by), named_leaves(params)
  query = 'encoder/layers/attention/query/kernel'
  np.testing.assert_allclose(found[f'scores/{query}'], -1e-2, rtol=1e-4)
  np.testing.assert_allclose(found[query], -2e-3 * (1 + 0.1 * weights[query]), rtol=1e-4)
  assert all(np.all(leaf == 0) for name, leaf in found.items() if name.startswith('encoder/embeddings/'))
  still, _ = update(zeros, jax.jit(tx.init)(params), params)
  assert np.all(named_leaves(still)[f'scores/{query}'] == 0)


def test_a_bad_step_leaves_scores_and_control_as_they_were():
  """A loss that is not finite. Mutation: take the new control in any case."""
  job, mesh, state, frozen, step = place_job(prune_config(SOFT), jax.devices()[:1])
  batches = [to_global(mesh, job.batches.batch(i)) for i in range(3)]
  state, _ = step(state, frozen, batches[0])
  state, _ = step(state, frozen, batches[1])
  before = jax.tree.map(np.array, state.params)
  assert before['control']['regularization'] != 0
  broken = {**state.params, 'classifier': jax.tree.map(lambda x: x + np.nan, state.params['classifier'])}
  after, metrics = step(TrainState(state.step, broken, state.opt_state), frozen, batches[2])
  assert metrics['bad_step'] == 1
  for part in ('scores', 'control'):
    jax.tree.map(np.testing.assert_array_equal, before[part], after.params[part])


@pytest.mark.parametrize('prune', [HARD, pytest.param(GATES, marks=pytest.mark.slow)], ids=['hard', 'l0'])
def test_losses_depend_neither_on_the_mesh_nor_on_micro_batches(prune):
  """Gates are drawn once for a step and the same everywhere; scores stay on their devices.

  Mutations: a key for each micro-batch; gather the scores before the masks are made.
  """
  expected, last, _, _ = run_steps(prune_config(prune), devices=jax.devices()[:1])
  assert len(set(expected)) == 10
  if prune is HARD:
    cases = {'fsdp 8': ({'mesh': MeshConfig(1, 8)}, 8), 'data 2': ({}, 2)}
  else:
    cases = {'accumulate 2': ({'optimizer': dataclasses.replace(RATES, accumulate=2)}, 1), 'data 8': ({}, 8)}
  for name, (changes, devices) in cases.items():
    losses, state, _, program = run_steps(prune_config(prune, **changes), devices=jax.devices()[:devices])
    np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=name)
    if name == 'fsdp 8':
      kernel = named_leaves(state.params)['scores/encoder/layers/ffn_in/kernel']
      assert kernel.addressable_shards[0].data.size == kernel.size // 8
      # The feed-forward's two kernels come together once each; no scores, moments or masks beside them.
      shapes = re.findall(r'= f32\[([0-9,]*)\]\S* all-gather', program)
      assert sorted(shape for shape in shapes if shape in ('2,16,32', '2,32,16')) == ['2,16,32', '2,32,16']


@pytest.mark.parametrize('method', ['magnitude', 'rpp'])
def test_masked_weights_move_by_momentum_only(method):
  """Magnitude: no gradient where masked; RPP: exact zeros that come back if their gradient is large. Embeddings too.

  Mutation: pass the whole gradient on; a proximal step without a threshold; freeze embeddings in any case.
  """
  extra = {'regularization': 0.02} if method == 'rpp' else {'initial_density': 0.5, 'density': 0.5}
  config = prune_config(PruneConfig(method=method, freeze_embeddings=False, **extra), optimizer=dataclasses.replace(
    RATES, weight_decay=0.0
  ))  # fmt: skip
  job, mesh, state, frozen, step = place_job(config, jax.devices()[:1])
  assert 'scores' not in state.params
  first = jax.tree.map(np.array, state.params)
  shares = []
  for index in range(10):
    before = jax.tree.map(np.array, state.params)
    state, metrics = step(state, frozen, to_global(mesh, job.batches.batch(index)))
    shares.append(float(metrics['density']))
  moved_by = np.asarray(state.params['encoder']['embeddings']['word']['embedding'])
  assert np.any(moved_by != first['encoder']['embeddings']['word']['embedding'])
  kernels = [n for n in named_leaves(first) if '/layers/' in n and n.endswith('kernel')]
  finished = jax.jit(job.task.finished)(state.params)
  if method == 'rpp':
    assert shares[0] == 1 and shares[-1] < 0.9 and np.all(np.diff(shares[2:]) < 0.02)
    jax.tree.map(np.testing.assert_array_equal, finished, {n: state.params[n] for n in finished})
  else:
    old, new, start = named_leaves(before), named_leaves(state.params), named_leaves(first)
    for name in kernels:
      size = old[name][0].size
      rank = np.argsort(-np.abs(old[name]).reshape(2, -1), axis=1, kind='stable')[:, size // 2 :]
      masked = np.take_along_axis((new[name] != old[name]).reshape(2, -1), rank, axis=1)
      ever = np.take_along_axis((new[name] != start[name]).reshape(2, -1), rank, axis=1)
      assert np.array_equal(masked, ever)  # what moves now has been kept before, and coasts
      assert 0 < (~masked).sum()
    assert set(shares) == {0.5}
  density = job.task.results(finished)['density']
  assert density == pytest.approx(0.5 if method == 'magnitude' else shares[-1], abs=0.1)


def test_a_task_that_removes_layers_is_refused():
  """Mutation: leave the check out."""
  config = prune_config(HARD)
  config = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, keep_layers=(1,)))
  with pytest.raises(ConfigError, match='keep_layers'):
    place_job(config, jax.devices()[:1])
