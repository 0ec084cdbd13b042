"""One loss over many sub-networks: value, gradient, sampling, memory and the number of programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import toy_task

from compactlm_jax.config import AdaptConfig, Cell
from compactlm_jax.tasks.elastic import over_cells
from compactlm_jax.train.step import make_gradient
from compactlm_jax.types import Batch

CELLS = tuple(Cell(1.0, depth) for depth in (1.0, 0.8, 0.6, 0.4, 0.2))
PARAMS = {'a': jnp.array([1.0, -2.0, 0.5]), 'b': {'c': jnp.array([[0.3, 2.0]])}}
IDS = np.arange(8).reshape(4, 2)
BATCH = Batch(IDS, np.ones_like(IDS), np.zeros_like(IDS))
KEY = jax.random.key(3)
ALL = AdaptConfig(sampling='all')


def cell_loss(index):
  """A loss of its own for each cell."""

  def loss(read, shared, frozen, batch, key, step):
    value = (index + 1) * jnp.sin(read['a'] * (index + 1)).sum() * read['b']['c'].prod() + batch.input_ids.mean()
    if shared is not None:
      value = value * shared
    return value, {'weight': jnp.float32(len(batch.input_ids)), 'index': jnp.float32(index)}

  return loss


LOSSES = {cell: cell_loss(i) for i, cell in enumerate(CELLS)}


def plain(params, indices, shared=None, read=lambda params: params):
  """The sum over cells as JAX differentiates it."""
  fixed = None if shared is None else jax.lax.stop_gradient(shared(params))
  return sum(cell_loss(i)(read(params), fixed, None, BATCH, KEY, 0)[0] for i in indices)


def run(loss, params=PARAMS, key=KEY):
  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, None, BATCH, key, jnp.int32(0))


def assert_same(found, wanted):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.parametrize('combine', ['sum', 'mean'])
def test_the_gradient_of_all_cells_is_that_of_their_sum(combine):
  """Mutation: leave the last cell out of the total, or out of the mean's count."""
  (value, metrics), grads = run(over_cells(LOSSES, dataclasses.replace(ALL, combine=combine)))
  scale = 1.0 if combine == 'sum' else 0.2
  wanted, wanted_grads = jax.value_and_grad(lambda p: scale * plain(p, range(5)))(PARAMS)
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  assert_same(grads, wanted_grads)
  np.testing.assert_allclose(metrics['loss_full'], plain(PARAMS, [0]), rtol=1e-5)
  np.testing.assert_allclose(metrics['loss_smallest'], plain(PARAMS, [4]), rtol=1e-5)
  assert metrics['weight'] == 4 and metrics['index'] == 2


def test_what_is_shared_is_computed_once_and_has_a_loss_of_its_own():
  """Its loss is added whole under 'mean' too. Mutation: forget the gradient of its own loss."""
  count = {'read': 0, 'share': 0}

  def read(params, batch, shared):
    count['read'] += 1
    return {**params, 'a': jnp.square(params['a'])}

  def share(params, frozen, batch, key, step):
    count['share'] += 1
    return 3.0 * params['a'].sum(), {'own': params['a'][0]}, jnp.exp(params['a'][1])

  (value, metrics), grads = run(over_cells(LOSSES, dataclasses.replace(ALL, combine='mean'), read=read, share=share))

  def wanted(params):
    cells = plain(params, range(5), lambda p: jnp.exp(p['a'][1]), lambda p: {**p, 'a': jnp.square(p['a'])})
    return 3.0 * params['a'].sum() + cells / 5

  expected, expected_grads = jax.value_and_grad(wanted)(PARAMS)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert_same(grads, expected_grads)
  assert metrics['own'] == 1 and count == {'read': 1, 'share': 1}


def test_a_sandwich_has_the_first_the_last_and_others_drawn_by_the_key():
  """Another key draws others, none twice; one program serves all. Mutation: draw with replacement."""
  loss = over_cells(LOSSES, AdaptConfig(sampling='sandwich', random_cells=2))
  program, drawn = jax.jit(jax.value_and_grad(loss, has_aux=True)), set()
  for seed in range(12):
    (value, metrics), grads = program(PARAMS, None, BATCH, jax.random.key(seed), jnp.int32(seed))
    pairs = [(i, j) for i in (1, 2, 3) for j in range(i + 1, 4)]
    fits = [pair for pair in pairs if np.allclose(value, plain(PARAMS, [0, *pair, 4]), rtol=1e-5)]
    assert len(fits) == 1
    wanted = jax.grad(lambda p, pair=fits[0]: plain(p, [0, *pair, 4]))(PARAMS)
    assert_same(grads, wanted)
    np.testing.assert_allclose(metrics['index'], np.mean([0, *fits[0], 4]), rtol=1e-6)
    np.testing.assert_allclose(metrics['loss_smallest'], plain(PARAMS, [4]), rtol=1e-5)
    drawn.add(fits[0])
  assert len(drawn) == 3 and program._cache_size() == 1


@pytest.mark.parametrize('random_cells', [0, 3, 9])
def test_sandwiches_of_no_others_and_of_all(random_cells):
  """Mutation: take all cells where none are to be drawn."""
  (value, _), _ = run(over_cells(LOSSES, AdaptConfig(sampling='sandwich', random_cells=random_cells)))
  np.testing.assert_allclose(value, plain(PARAMS, range(5) if random_cells else (0, 4)), rtol=1e-5)


@pytest.mark.parametrize('count', [1, 2])
def test_one_or_two_cells(count):
  """The first is the last. Mutation: count it twice."""
  losses = {cell: LOSSES[cell] for cell in CELLS[:count]}
  for sampling in ('all', 'sandwich'):
    (value, metrics), _ = run(over_cells(losses, AdaptConfig(sampling=sampling, random_cells=1)))
    np.testing.assert_allclose(value, plain(PARAMS, range(count)), rtol=1e-5)
    np.testing.assert_allclose(metrics['loss_smallest'], plain(PARAMS, [count - 1]), rtol=1e-5)


def test_it_is_differentiated_as_any_loss_by_the_step():
  """Micro-batches, parameters that are held, a factor on the loss. Mutation: forget the factor g."""
  loss = over_cells(LOSSES, ALL)
  task = toy_task(
    lambda p, batch, key, step: loss(p, None, batch, key, step), PARAMS, trainable=(('a', True), ('b/.*', False))
  )
  (value, _), grads = jax.jit(make_gradient(task, 2, None, lambda tree: tree))(PARAMS, None, BATCH, KEY, jnp.int32(0))
  np.testing.assert_allclose(value, plain(PARAMS, range(5)), rtol=1e-5)
  wanted = jax.grad(lambda p: plain(p, range(5)))(PARAMS)
  np.testing.assert_allclose(grads['a'], wanted['a'], rtol=1e-5)
  assert not np.asarray(grads['b']['c']).any()
  halved = jax.grad(lambda p: 0.5 * loss(p, None, BATCH, KEY, jnp.int32(0))[0])(PARAMS)
  assert_same(halved, jax.tree.map(lambda leaf: 0.5 * leaf, wanted))


def test_memory_is_that_of_one_cell():
  """Activations of cells are not alive together. Mutation: unroll the loop, with barriers between the cells."""

  def cell(index):
    def loss(read, shared, frozen, batch, key, step):
      x = jnp.ones((4096, 64)) * (index + 1)
      for _ in range(6):
        x = jnp.tanh(x @ read['w'])
      return x.mean(), {'weight': jnp.float32(1)}

    return loss

  def temporaries(count):
    losses = {cell_: cell(i) for i, cell_ in enumerate(CELLS[:count])}
    step = jax.jit(jax.grad(lambda p: over_cells(losses, ALL)(p, None, BATCH, KEY, jnp.int32(0))[0]))
    return step.lower({'w': jnp.eye(64)}).compile().memory_analysis().temp_size_in_bytes

  assert temporaries(5) < 1.3 * temporaries(1)
