"""One training step: pure, and compiled once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from compactlm_jax.parallel import (
  batch_sharding,
  gathered,
  param_shardings,
  replicated,
  spread_out,
  state_shardings,
)
from compactlm_jax.tree import map_named, match_one, named_leaves
from compactlm_jax.types import Batch, Metrics, Spread, Task, TrainState

_VIEW = 2**31 - 1
"""Folded into the key of a step for its view; micro-batches fold in their index."""

StepFn = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


def make_train_step(
  task: Task, tx: optax.GradientTransformation, seed: int, accumulate: int = 1, mesh: Mesh | None = None
) -> StepFn:
  """train_step(state, frozen, batch) -> (state, metrics).

  The key of a step is fold_in(seed, step), so a resumed run draws what an uninterrupted one draws. An update with a
  non-finite loss or gradient is not applied (metrics['bad_step'] is 1); the step counter and the schedule move on.

  Args:
    task: its loss is differentiated with respect to its parameters.
    tx: the optimiser.
    seed: of the run.
    accumulate: micro-batches that the rows are split into, weighed by `metrics['weight']`.
    mesh: where the step will run; None for one device.
  """

  spread = _spread(mesh)
  gradient = make_gradient(task, accumulate, mesh, spread)

  def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    (loss, metrics), grads = gradient(state.params, frozen, batch, key, state.step)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if task.after is not None:
      params = task.after(state.params, params, metrics, state.step + 1, spread)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    params, opt_state = _chosen(good, (params, opt_state), (state.params, state.opt_state))
    metrics = {'loss': loss, **metrics, 'gradient_norm': norm, 'bad_step': 1 - good.astype(jnp.int32)}
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


def _spread(mesh: Mesh | None) -> Spread:
  return lambda tree: tree if mesh is None else spread_out(mesh, tree)


def _chosen(good: jax.Array, new: Any, old: Any) -> Any:
  """`new` if `good`, else `old`, in which the step of the learning rate's schedule is the new one all the same."""

  def counts(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)

  def choose(new: Any, old: Any) -> Any:
    return new if counts(new) else jnp.where(good, new, old)

  return jax.tree.map(choose, new, old, is_leaf=counts)


def make_gradient(task: Task, accumulate: int, mesh: Mesh | None, spread: Spread) -> Callable:
  """gradient(params, frozen, batch, key, step) -> ((loss, metrics), gradient of all parameters).

  Args:
    task: its loss and its view.
    accumulate: micro-batches.
    mesh: where the step will run; None for one device.
    spread: what the view is given.
  """

  def held(params: Any) -> Any:
    # Without a gradient to held parameters the compiler drops what only they would need.
    return map_named(
      lambda name, leaf: leaf if match_one(task.trainable, name, 'trainable') else jax.lax.stop_gradient(leaf), params
    )

  def whole(params: Any) -> Any:
    return params if mesh is None else gathered(mesh, params)

  def loss(params: Any, frozen: Any, *args: Any) -> tuple[jax.Array, Metrics]:
    return task.loss(held(whole(params)), whole(frozen), *args)

  direct = accumulated(jax.value_and_grad(loss, has_aux=True), accumulate)
  view = task.view
  if view is None:
    return direct

  def through_view(params: Any, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array) -> Any:
    def seen(params: Any) -> tuple[tuple[Any, jax.Array], Metrics]:
      read, penalty, found = view(held(params), jax.random.fold_in(key, _VIEW), step, spread)
      return (read, penalty), found

    (read, penalty), pull_back, found = jax.vjp(seen, params, has_aux=True)
    (value, metrics), grads = direct(read, frozen, batch, key, step)
    grads = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, read)
    (grads,) = pull_back((grads, jnp.ones_like(penalty)))
    return (value + penalty, {**metrics, **found}), grads

  return through_view


def accumulated(gradient: Callable, parts: int) -> Callable:
  """`gradient` over `parts` micro-batches, one after another; their weighted mean.

  Exact for losses that are a mean over metrics['weight'] units. Rows are dealt out so that each device splits its own.
  """
  if parts == 1:
    return gradient

  def run(params: Any, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array) -> Any:
    split = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, part: Any) -> tuple[Any, None]:
      index, rows = part
      out = gradient(params, frozen, rows, jax.random.fold_in(key, index), step)
      weight = out[0][1]['weight']
      return jax.tree.map(lambda t, x: t + weight * x, total, (out, 1.0)), None

    shapes = jax.eval_shape(gradient, params, frozen, jax.tree.map(lambda x: x[0], split), key, step)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), (shapes, jax.ShapeDtypeStruct((), jnp.float32)))
    (total, weight), _ = jax.lax.scan(add, zeros, (jnp.arange(parts), split))
    (loss, metrics), grads = jax.tree.map(lambda x: x / weight, total)
    return (loss, {**metrics, 'weight': weight}), grads

  return run


def init_state(task: Task, tx: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
  """A fresh state, where it will live. Given weights pass through `task.init` as they are, not as constants of jit."""
  params = task.init(jax.random.key(seed))
  params = jax.device_put(params, param_shardings(mesh, params))

  def rest(params: Any) -> TrainState:
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))

  return jax.jit(rest, out_shardings=state_shardings(mesh, jax.eval_shape(rest, params)))(params)


def compile_step(step: StepFn, mesh: Mesh, state: TrainState, frozen: Any) -> Any:
  """`step` under jit with its placements; the old state's buffers are reused."""
  placed = state_shardings(mesh, state)
  frozen_placed = jax.tree.map(lambda x: x.sharding, frozen)
  return jax.jit(
    step,
    in_shardings=(placed, frozen_placed, batch_sharding(mesh)),
    out_shardings=(placed, replicated(mesh)),
    donate_argnums=0,
  )


def bad_leaves(
  task: Task, seed: int, state: TrainState, frozen: Any, batch: Batch, step: int, accumulate: int, mesh: Mesh | None
) -> list[str]:
  """Names of the parameters whose gradient at `step` is not finite (non-finite updates left `state.params` as it was).

  Args:
    task: of the run.
    seed: of the run.
    state: any state with the parameters of that step.
    frozen: the task's frozen weights.
    batch: the rows of that step, placed as for the step.
    step: 0-based.
    accumulate: as of the step, which has the memory for no more.
    mesh: as of the step.
  """
  key = jax.random.fold_in(jax.random.key(seed), step)
  gradient = make_gradient(task, accumulate, mesh, _spread(mesh))

  def finite(*args: Any) -> Any:
    return jax.tree.map(lambda g: jnp.isfinite(g).all(), gradient(*args)[1])

  found = jax.jit(finite)(state.params, frozen, batch, key, jnp.int32(step))
  return [name for name, ok in named_leaves(found).items() if not ok]
