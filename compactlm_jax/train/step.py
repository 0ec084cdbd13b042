"""One training step: pure, and compiled once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from compactlm_jax.parallel import batch_sharding, gathered, param_shardings, replicated, state_shardings
from compactlm_jax.tree import map_named, match_one, named_leaves
from compactlm_jax.types import Batch, Metrics, Task, TrainState

StepFn = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


def make_train_step(
  task: Task, tx: optax.GradientTransformation, seed: int, accumulate: int = 1, mesh: Mesh | None = None
) -> StepFn:
  """train_step(state, frozen, batch) -> (state, metrics).

  The key of a step is fold_in(seed, step), so a resumed run draws what an uninterrupted one draws. An update with a
  non-finite loss or gradient is not applied (metrics['bad_step'] is 1); the step counter moves on.

  Args:
    task: its loss is differentiated with respect to its parameters.
    tx: the optimiser.
    seed: of the run.
    accumulate: micro-batches that the rows are split into, weighed by `metrics['weight']`.
    mesh: where the step will run; None for one device.
  """

  def whole(params: Any) -> Any:
    return params if mesh is None else gathered(mesh, params)

  def loss(params: Any, frozen: Any, *args: Any) -> tuple[jax.Array, Metrics]:
    # Without a gradient to held parameters the compiler drops what only they would need.
    def held(name: str, leaf: jax.Array) -> jax.Array:
      return leaf if match_one(task.trainable, name, 'trainable') else jax.lax.stop_gradient(leaf)

    return task.loss(map_named(held, whole(params)), whole(frozen), *args)

  gradient = jax.value_and_grad(loss, has_aux=True)

  def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    (loss, metrics), grads = accumulated(gradient, accumulate)(state.params, frozen, batch, key, state.step)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(good, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    metrics = {'loss': loss, **metrics, 'gradient_norm': norm, 'bad_step': 1 - good.astype(jnp.int32)}
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


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


def bad_leaves(task: Task, seed: int, state: TrainState, frozen: Any, batch: Batch, step: int) -> list[str]:
  """Names of the parameters whose gradient at `step` is not finite (non-finite updates left `state.params` as it was).

  Args:
    task: of the run.
    seed: of the run.
    state: any state with the parameters of that step.
    frozen: the task's frozen weights.
    batch: the rows of that step.
    step: 0-based.
  """
  key = jax.random.fold_in(jax.random.key(seed), step)

  def finite(params: Any, *args: Any) -> Any:
    grads = jax.grad(lambda p: task.loss(p, *args)[0])(params)
    return jax.tree.map(lambda g: jnp.isfinite(g).all(), grads)

  found = jax.jit(finite)(state.params, frozen, batch, key, jnp.int32(step))
  return [name for name, ok in named_leaves(found).items() if not ok]
