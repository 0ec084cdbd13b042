"""One step: non-finite updates, gradient accumulation, the key of a step, what a step hands back."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from every_task import later
from tiny import STILL, moved, place_job, run_steps, tiny_config, toy_task

from compactlm_jax.config import AdaptConfig, ElectraConfig, MeshConfig, OptimizerConfig
from compactlm_jax.parallel import make_mesh, to_global
from compactlm_jax.tasks import electra, mlm
from compactlm_jax.train.optimizer import make_optimizer
from compactlm_jax.train.step import bad_leaves, compile_step, init_state, make_train_step
from compactlm_jax.types import Batch

PARAMS = {'encoder': {'bias': np.arange(1.0, 4.0, dtype=np.float32)}, 'classifier': {'bias': np.ones(2, np.float32)}}
TRICKS = {'fine': 0, 'loss': 1, 'gradient': 2}


def trick_loss(params, batch, key, step):
  """A loss that the first label turns non-finite: itself, or only in its gradient."""
  trick, x = batch.labels[0], params['encoder']['bias']
  value = (x**2).sum() + (params['classifier']['bias'] ** 2).sum()
  value = jnp.where(trick == TRICKS['loss'], jnp.nan, value)
  # sqrt(0) is 0 and its derivative infinite.
  value += jnp.sqrt(jnp.where(trick == TRICKS['gradient'], 0 * x[1], 1.0))
  return value, {'weight': jnp.float32(1), 'draw': jax.random.uniform(key)}


def rows(trick='fine'):
  zeros = np.zeros((8, 4), np.int32)
  return Batch(zeros, zeros, zeros, np.full(8, TRICKS[trick], np.int32))


def toy(rate=0.1, decay='constant', total_steps=10, **fields):
  """(mesh, task, state, step) of the trick loss."""
  task = toy_task(trick_loss, PARAMS, **fields)
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  config = OptimizerConfig(learning_rate=rate, decay=decay)
  tx = make_optimizer(config, total_steps, task.trainable)
  state = init_state(task, tx, mesh, 0)
  return mesh, task, state, compile_step(make_train_step(task, tx, 3), mesh, state, None)


def host(tree):
  return jax.tree.map(lambda x: np.array(x), tree)


@pytest.mark.parametrize('trick', ['loss', 'gradient'])
def test_non_finite_updates_are_never_applied(trick):
  """Mutation: `good = jnp.isfinite(loss)` (gradient), or no jnp.where (both)."""
  mesh, _, state, step = toy()
  state, metrics = step(state, None, to_global(mesh, rows()))
  before = host((state.params, state.opt_state))
  assert int(metrics['bad_step']) == 0 and int(state.step) == 1
  for n in (2, 3):
    state, metrics = step(state, None, to_global(mesh, rows(trick)))
    assert int(metrics['bad_step']) == 1 and int(state.step) == n
    before = before[0], later(before[1])
    jax.tree.map(np.testing.assert_array_equal, host((state.params, state.opt_state)), before)
  state, metrics = step(state, None, to_global(mesh, rows()))
  assert int(metrics['bad_step']) == 0 and int(state.step) == 4
  assert not np.array_equal(state.params['encoder']['bias'], before[0]['encoder']['bias'])


def test_a_skipped_update_leaves_what_would_be_without_it():
  """Steps with one bad update in the middle end where the same steps without it end (constant rate, no dropout)."""
  ends = []
  for tricks in (['fine', 'loss', 'fine'], ['fine', 'fine']):
    mesh, _, state, step = toy()
    for trick in tricks:
      state, _ = step(state, None, to_global(mesh, rows(trick)))
    ends.append(host((state.params, state.opt_state)))
  (with_it, counted), (without, count) = ends
  jax.tree.map(np.testing.assert_array_equal, (with_it, counted), (without, later(count)))


def test_a_bad_update_does_not_delay_the_schedule():
  """The last of 4 steps at rates 4/4, 3/4, 2/4, 1/4 moves as far whether the second was bad or not.

  Mutation: choose the old state of the schedule after a bad update.
  """
  moved = []
  for trick in ('fine', 'loss'):
    mesh, _, state, step = toy(decay='linear', total_steps=4)
    for each in ('fine', trick, 'fine', 'fine'):
      before = np.array(state.params['encoder']['bias'])
      state, _ = step(state, None, to_global(mesh, rows(each)))
    moved.append(np.abs(state.params['encoder']['bias'] - before).max())
  np.testing.assert_allclose(moved[1], moved[0], rtol=0.2)


def test_bad_leaves_names_the_parameters_whose_gradient_is_not_finite():
  """Mutation: report every leaf."""
  mesh, task, state, _ = toy()
  for trick, names in (('gradient', ['encoder/bias']), ('fine', [])):
    assert bad_leaves(task, 0, state, None, to_global(mesh, rows(trick)), 0, 2, mesh) == names


def test_the_key_is_a_function_of_seed_and_step():
  """Mutation: drop fold_in, or keep the key of the first step."""
  mesh, task, state, step = toy()
  draws = []
  for _ in range(3):
    state, metrics = step(state, None, to_global(mesh, rows()))
    draws.append(float(metrics['draw']))
  expected = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(3), i))) for i in range(3)]
  assert draws == expected and len(set(draws)) == 3
  other = jax.jit(make_train_step(task, optax.sgd(0.1), 4))
  sgd = dataclasses.replace(state, step=jnp.int32(0), opt_state=optax.sgd(0.1).init(state.params))
  assert float(other(sgd, None, rows())[1]['draw']) != draws[0]


def test_held_parameters_get_no_gradient():
  """Mutation: no stop_gradient: the norm, and so the clipping, would count parameters that never move."""
  mesh, _, state, step = toy(trainable=(('encoder/.*', True), ('classifier/.*', False)))
  state, metrics = step(state, None, to_global(mesh, rows()))
  np.testing.assert_allclose(metrics['gradient_norm'], np.sqrt((4 * np.arange(1.0, 4.0) ** 2).sum()), rtol=1e-6)
  np.testing.assert_array_equal(state.params['classifier']['bias'], 1.0)


def weigh(batch):
  """The batch with weights: five rows count, one of them doubly; what the others hold is nonsense."""
  weights = np.array([1, 1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], np.float32)
  return dataclasses.replace(batch, weights=weights)


def hide_by_row(monkeypatch, module):
  """Lets a row alone decide which of its tokens are hidden: not its place in a batch, nor the key of a micro-batch."""
  real = module.mask_tokens

  def mask_tokens(key, ids, mask, *rest):
    rows = jax.vmap(lambda i, m: real(jax.random.key(0), i[None], m[None], *rest))(ids, mask)
    return jax.tree.map(lambda x: x[:, 0], rows)

  monkeypatch.setattr(module, 'mask_tokens', mask_tokens)


ADAPT = AdaptConfig(widths=(0.5, 1.0), depths=(0.5, 1.0), stages=('depth',), importance_batches=1)
ARGMAX = ElectraConfig(temperature=1e-6)
SLOW = [pytest.param(task, marks=pytest.mark.slow) for task in ('lm', 'mlm', 'electra', 'adapt')]


def full(batch):
  """The weighed batch with rows of 16 tokens, of which equally many are hidden."""
  return dataclasses.replace(weigh(batch), attention_mask=np.ones_like(batch.attention_mask))


@pytest.mark.parametrize('task', ['distill', 'finetune', *SLOW])
def test_accumulation_equals_one_large_batch(task, monkeypatch):
  """Within 1e-6. Mutation: average micro-batches without their weights, or the weight metric with them."""
  for module in (electra, mlm):
    hide_by_row(monkeypatch, module)
  ends = []
  for parts in (1, 4):
    optimizer = OptimizerConfig(learning_rate=1e-3, decay='constant', accumulate=parts, epsilon=1e-3)
    encoder = dataclasses.replace(STILL, causal=task == 'lm')
    config = tiny_config(task, encoder=encoder, optimizer=optimizer, adapt=ADAPT, electra=ARGMAX)
    losses, state, metrics, _ = run_steps(config, 3, jax.devices()[:1], full if task == 'electra' else weigh)
    metrics = {name: value for name, value in host(metrics).items() if 'precision' not in name and 'recall' not in name}
    ends.append((losses, metrics, host(state.params)))
  for a, b in zip(*(jax.tree.leaves(end) for end in ends), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_accumulation_draws_new_dropout_for_each_part():
  """Mutation: pass `key` instead of fold_in(key, index)."""

  def loss(params, batch, key, step):
    return (params['encoder']['bias'] ** 2).sum(), {'weight': jnp.float32(1), 'draw': jax.random.uniform(key)}

  step = jax.jit(make_train_step(toy_task(loss, PARAMS), optax.sgd(0.1), 3, accumulate=4))
  state = init_state(toy_task(loss, PARAMS), optax.sgd(0.1), make_mesh(MeshConfig(), jax.devices()[:1]), 0)
  key = jax.random.fold_in(jax.random.key(3), 0)
  expected = np.mean([jax.random.uniform(jax.random.fold_in(key, i)) for i in range(4)])
  np.testing.assert_allclose(step(state, None, rows())[1]['draw'], expected, rtol=1e-6)


def test_accumulation_keeps_rows_on_their_devices():
  """Mutation: split with reshape(parts, rows // parts): rows then move between devices."""
  optimizer = OptimizerConfig(learning_rate=1e-3, decay='constant', accumulate=2)
  config = tiny_config('finetune', encoder=STILL, optimizer=optimizer, mesh=MeshConfig(4, 1, 1))
  job, mesh, state, frozen, step = place_job(config, jax.devices()[:4])
  program = step.lower(state, frozen, to_global(mesh, job.batches.batch(0))).compile().as_text()
  assert ' all-reduce(' in program
  # Eight logits may travel (the label of each is looked up), rows of tokens may not.
  assert all(math.prod(shape) < 8 * 16 for shape in moved(program)), moved(program)
