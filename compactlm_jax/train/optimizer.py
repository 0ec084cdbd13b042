"""AdamW and its schedule, with the options of the original systems."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from compactlm_jax.config import OptimizerConfig
from compactlm_jax.tree import leaf_name, map_named, match_one, named_leaves
from compactlm_jax.types import Group, Trainable


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
  """step -> learning rate.

  Linear warm-up, then linear decay to zero at `total_steps`. With `decay_from='start'` the decay factor
  1 - step / total_steps multiplies the warm-up too, so the peak stays below `learning_rate` (ELECTRA).

  Args:
    config: the schedule's options.
    total_steps: optimiser steps of the run.
  """
  warmup = config.warmup(total_steps)

  def schedule(step: jax.Array) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    rate = jnp.float32(config.learning_rate)
    if warmup:
      rate *= jnp.minimum(1.0, step / warmup)
    if config.decay == 'linear' and config.decay_from == 'start':
      rate *= jnp.maximum(0.0, 1.0 - step / total_steps)
    elif config.decay == 'linear':
      left = (total_steps - step) / max(1, total_steps - warmup)
      rate *= jnp.clip(left, 0.0, 1.0)
    return rate

  return schedule


class AdamState(NamedTuple):
  """Step count and the two moments, float32, shaped like the parameters."""

  count: jax.Array  # type: ignore[assignment]  # as optax names it; tuples have a method of that name
  mu: Any
  nu: Any


def scale_by_adam(b1: float, b2: float, eps: float, bias_correction: bool) -> optax.GradientTransformation:
  """Adam's direction; optax's own has no form without bias correction, which BERT and ELECTRA train with."""

  def init(params: Any) -> AdamState:
    zeros = jax.tree.map(jnp.zeros_like, params)
    return AdamState(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

  def update(grads: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
    del params
    count = optax.safe_increment(state.count)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
    c1, c2 = (1 - b1**count, 1 - b2**count) if bias_correction else (1.0, 1.0)
    direction = jax.tree.map(lambda m, v: (m / c1) / (jnp.sqrt(v / c2) + eps), mu, nu)
    return direction, AdamState(count, mu, nu)

  return optax.GradientTransformation(init, update)


def decay_weights(config: OptimizerConfig, trainable: Trainable) -> optax.GradientTransformation:
  """Adds weight_decay * p where p decays: not to names that match `no_decay`, nor to layers that are not trained."""

  def decayed(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
    if re.fullmatch(config.no_decay, name):
      return update
    trained = match_one(trainable, name, 'trainable')
    if isinstance(trained, tuple):  # of the stacked layers
      layers = jnp.asarray(trained, param.dtype).reshape((-1,) + (1,) * (param.ndim - 1))
      return update + config.weight_decay * layers * param
    return update + config.weight_decay * param

  def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
    return jax.tree_util.tree_map_with_path(lambda path, u, p: decayed(leaf_name(path), u, p), updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_layers(config: OptimizerConfig) -> optax.GradientTransformation:
  """Layer-wise learning rates: updates are multiplied by layer_decay^(distance from the head).

  Embeddings have depth 0, encoder layer i (from 0) depth i + 1, the head depth L + 2. 'published' multiplies by
  decay^(L + 2 - depth), so that the top layer gets decay^2 (google-research/electra:model/optimization.py);
  'corrected' by decay^(L + 1 - depth), the head excepted.
  """

  def scale(updates: Any) -> Any:
    leaves = named_leaves(updates)
    depths = {_part(name): leaf.shape[0] for name, leaf in leaves.items() if _part(name).startswith('layers')}
    top = sum(depths.values()) + (2 if config.layer_decay_rule == 'published' else 1)
    order = sorted(depths, key=lambda stack: int('0' + stack.removeprefix('layers').removeprefix('_')))
    below = {stack: sum(depths[other] for other in order[:i]) for i, stack in enumerate(order)}

    def scaled(name: str, update: jax.Array) -> jax.Array:
      if (stack := _part(name)) in below:
        powers = top - 1 - jnp.arange(below[stack], below[stack] + depths[stack])
        rates = jnp.asarray(config.layer_decay**powers, update.dtype)
        return update * rates.reshape((-1,) + (1,) * (update.ndim - 1))
      return update * (config.layer_decay**top if _part(name) == 'embeddings' else 1.0)

    return map_named(scaled, updates)

  return optax.stateless(lambda updates, params: scale(updates))


def _part(name: str) -> str:
  """'layers' (a run's: 'layers_0', ...) or 'embeddings'; '' for heads and the pooler, which learn at the full rate."""
  owner, part, *_ = [*name.split('/'), '']
  return part if owner == 'encoder' and re.fullmatch(r'layers(_\d+)?|embeddings', part) else ''


def make_optimizer(
  config: OptimizerConfig, total_steps: int, trainable: Trainable, groups: Mapping[str, Group] | None = None
) -> optax.GradientTransformation:
  """Clip by global norm, Adam, decoupled weight decay, layer-wise rates, schedule.

  Untrained parameters have no state and stay put.

  Args:
    config: the optimiser's options.
    total_steps: optimiser steps of the run.
    trainable: `Task.trainable`; every name must match exactly one row.
    groups: `Task.groups`; they have Adam's constants, the schedule and the clipping in common with the rest.

  Raises:
    ConfigError: at init, a parameter that matches no row or several.
  """

  groups = groups or {}

  def label(name: str) -> str:
    if not match_one(trainable, name, 'trainable'):
      return 'hold'
    return next((group for group, each in groups.items() if re.fullmatch(each.pattern, name)), 'train')

  def rated(learning_rate: float) -> optax.GradientTransformation:
    schedule = learning_rate_schedule(dataclasses.replace(config, learning_rate=learning_rate), total_steps)
    return optax.scale_by_learning_rate(schedule)

  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  adam = scale_by_adam(config.beta1, config.beta2, config.epsilon, config.bias_correction)
  parts = [
    adam,
    decay_weights(config, trainable) if config.weight_decay else optax.identity(),
    *([scale_layers(config)] if config.layer_decay < 1 else []),  # no place in the state of runs without it
    rated(config.learning_rate),
  ]
  hold = optax.set_to_zero()

  def labels(params: Any) -> Any:
    return map_named(lambda name, _: label(name), params)

  if not groups:
    return optax.partition({'train': optax.chain(clip, *parts), 'hold': hold}, labels)
  # One norm over all groups: clipping comes before they part.
  own = {name: optax.chain(adam, rated(group.learning_rate)) for name, group in groups.items()}
  return optax.chain(clip, optax.partition({'train': optax.chain(*parts), 'hold': hold, **own}, labels))
