"""Pruning while fine-tuning: any task, with masks on the weights that its forward pass reads (Sanh et al. 2020).

Hard movement: W' = W * Top_v(S). Soft movement: W' = W * (sigma(S) > tau), plus lambda_t * mean sigma(S). L0: hard
concrete gates, plus lambda * expected L0 norm. For all three dL/dS comes through the mask; for movement it is
dL/dW' * W exactly. Magnitude: W' = W * Top_v(|W|). RPP: a proximal step of a reweighted l1 norm after each update.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from compactlm_jax.compress.control import MISSED, Controller, make_controller, solved_strength
from compactlm_jax.compress.density import covered_density, densities
from compactlm_jax.compress.masks import (
  OWN,
  Leaves,
  Masks,
  final_masks,
  has_scores,
  make_masks,
  on_slices,
  share,
  without_own,
)
from compactlm_jax.config import EncoderConfig, PruneConfig, to_json
from compactlm_jax.config.prune import SCORED
from compactlm_jax.errors import ConfigError
from compactlm_jax.losses.prune import l0_penalty, soft_penalty
from compactlm_jax.ops.masks import prox_reweighted_l1
from compactlm_jax.tree import named_leaves, nested, overlaid
from compactlm_jax.types import Group, Metrics, Params, Spread, Task, Trainable

log = logging.getLogger(__name__)

_LOWEST = -1e2
"""A threshold that keeps everything (the original's)."""

_CONTROL = 'control_'
"""Before the names of its state in the metrics, through which a step hands it on."""


def make_prune_task(
  base: Task,
  encoder: EncoderConfig,
  config: PruneConfig,
  *,
  total_steps: int,
  warmup: int,
  learning_rate: Callable[[jax.Array], jax.Array],
) -> Task:
  """`base` with pruning: the same loss and evaluation, on masked weights.

  Parameters are those of `base`, with 'scores' beside them (hard and soft movement, L0, random) and 'control' (a
  cached threshold, the controller's weight). Metrics of a step have the density that it trained with, of the weights
  that are masked.

  Args:
    base: a task whose parameters have an 'encoder'.
    encoder: its configuration.
    config: method and schedule.
    total_steps: optimiser steps of the run.
    warmup: warm-up steps of the learning rate, which the schedule counts in.
    learning_rate: step -> learning rate of the weights (the proximal step is scaled by it).

  Raises:
    ConfigError: a schedule that the run is too short for, a structure that the encoder's sizes do not allow, a density
      that keeps nothing or cannot be reached, a penalty without weight, or a base task that removes layers.
  """
  config.require_weight()
  if base.finished is not None:
    raise ConfigError('config.finetune.keep_layers: layers are not removed while weights are pruned; leave it empty')
  masks = make_masks(encoder, config, total_steps, warmup)
  steered = config.control == 'density' and config.method != 'rpp'
  controller = make_controller(masks, learning_rate, warmup) if steered else None
  pruning = _Pruning(masks, learning_rate, controller)

  def init(key: jax.Array) -> Params:
    params = base.init(key)
    return {**params, **pruning.init(params, jax.random.fold_in(key, 1))}

  return dataclasses.replace(
    base,
    name='prune',
    init=init,
    trainable=_trainable(base.trainable, config),
    groups={'scores': Group(r'scores/.*', config.scores_learning_rate)} if config.method in SCORED else {},
    view=pruning.view,
    after=pruning.after if pruning.follows else None,
    finished=lambda params: bake(params, encoder, config),
    results=lambda params: _results(params, encoder, config),
    model={**base.model, 'prune': to_json(config)},
  )


def bake(params: Params, encoder: EncoderConfig, config: PruneConfig) -> Params:
  """The finished model: its weights multiplied by the final masks, without scores.

  Args:
    params: parameters of a run of `make_prune_task`.
    encoder: configuration of the encoder.
    config: of the run.
  """
  masks = final_masks(encoder, config)
  final = masks.final(params)
  return without_own(params) if final is None else masks.apply(params, final, straight_through=False, baked=True)


def _results(params: Params, encoder: EncoderConfig, config: PruneConfig) -> Mapping[str, Any]:
  """What remains of a finished model; a controlled run that missed its density says so."""
  if config.control == 'density':
    found = covered_density(params, encoder, config)
    if abs(found - config.density) > MISSED:
      log.warning(
        'config.prune.density: %g was asked for, and %.4f of the masked weights remain; set another '
        'prune.regularization (the weight to begin with), or train for more steps',
        config.density,
        found,
      )
  return densities(params, encoder)


def _trainable(base: Trainable, config: PruneConfig) -> Trainable:
  """The base task's rows without what pruning adds or freezes, and rows for that."""
  frozen = r'encoder/embeddings/(?!projection/).*'
  others = '|'.join((*(f'{name}/' for name in OWN), *([frozen] if config.freeze_embeddings else [])))
  rows: Trainable = tuple((rf'(?!{others})(?:{pattern})', value) for pattern, value in base)
  rows += ((r'scores/.*', config.method in SCORED), (r'control/.*', False))
  return (*rows, (frozen, False)) if config.freeze_embeddings else rows


@dataclasses.dataclass(frozen=True)
class _Pruning:
  """What a run does beside its base task."""

  masks: Masks
  learning_rate: Callable[[jax.Array], jax.Array]
  controller: Controller | None = None

  @property
  def config(self) -> PruneConfig:
    return self.masks.config

  @property
  def cached(self) -> bool:
    """Whether a global threshold is kept for several steps."""
    return self.config.threshold_every > 1

  @property
  def follows(self) -> bool:
    return self.cached or self.config.control == 'density' or self.config.method == 'rpp'

  def init(self, params: Params, key: jax.Array) -> Params:
    """'scores' and 'control', where there are any."""
    out: Params = {'scores': nested(self.masks.init_scores(key))} if has_scores(self.config) else {}
    control: Params = {'threshold': jnp.float32(_LOWEST)} if self.cached else {}
    if self.config.control == 'density':
      control['regularization'] = jnp.float32(0.0)
    if self.controller is not None:
      control |= self.controller.init(named_leaves(out.get('scores', {})))
    return {**out, 'control': control} if control else out

  def view(self, params: Params, key: jax.Array, step: jax.Array, spread: Spread) -> tuple[Params, jax.Array, Metrics]:
    """See `types.View`."""
    method, masks = self.config.method, self.masks
    penalty, metrics = jnp.float32(0.0), {}
    if method in ('rpp', 'post_hoc_magnitude'):
      if method == 'rpp':
        weight = self.weight(params.get('control', {}), step)
        metrics = {'density': share(on_slices(masks.kernels(params), spread)), 'regularization': weight}
      return without_own(params), penalty, metrics
    values, slices = masks.ranked(params), masks.ranked(params, spread)
    control = jax.lax.stop_gradient(self._steered(params.get('control', {}), slices, step))
    metrics, weight = {_CONTROL + name: value for name, value in control.items()}, self.weight(control, step)
    if method == 'l0':
      found = masks.gates(values, key)
      penalty = self._penalty(l0_penalty, values, slices, control, weight)
      open_gates = {name: jnp.sum(gate != 0, dtype=jnp.int32) for name, gate in masks.gates(slices, None).items()}
      metrics['density'] = masks.fraction(open_gates)
    elif method == 'soft_movement':
      cuts, metrics['density'] = masks.cuts_over(slices, masks.tau(step), self.config.threshold_on)
      found = masks.over(values, cuts)
      metrics['threshold'] = masks.tau(step)
      if self.config.penalised:
        penalty = self._penalty(soft_penalty, values, slices, control, weight)
    elif self.cached:
      cuts, metrics['density'] = masks.cuts_over(slices, control['threshold'], 'scores')
      found = masks.over(values, cuts)
    else:
      found = masks.top(values, step, slices)
      metrics['density'] = masks.kept_fraction(step)
    if self.config.penalised:
      metrics |= {'penalty': penalty, 'regularization': weight}
    read = masks.apply(params, found, straight_through=method in ('hard_movement', 'soft_movement'))
    return read, penalty, jax.lax.stop_gradient(metrics)

  def _penalty(
    self, function: Callable[..., jax.Array], values: Leaves, slices: Leaves, control: Params, weight: jax.Array
  ) -> jax.Array:
    """The penalty at its weight, or each kind of pieces at its own."""
    if self.controller is None:
      return weight * self._at_one(function, values, slices)
    return self.controller.penalty(
      control, values, lambda own: self._at_one(function, own, {name: slices[name] for name in own})
    )

  def _at_one(self, function: Callable[..., jax.Array], values: Leaves, slices: Leaves) -> jax.Array:
    """A penalty whose value is added up on slices, while every device makes the gradient of the scores that it holds.

    Differentiated through slices, gradients would have to be gathered.
    """

    @jax.custom_vjp
    def penalty(values: Leaves, slices: Leaves) -> jax.Array:
      return function(slices, self.config.penalty)

    def backward(values: Leaves, g: jax.Array) -> tuple[Leaves, Leaves]:
      return jax.grad(lambda leaves: g * function(leaves, self.config.penalty))(values), jax.tree.map(
        jnp.zeros_like, values
      )

    penalty.defvjp(lambda values, slices: (function(slices, self.config.penalty), values), backward)
    return penalty(values, jax.lax.stop_gradient(slices))

  def weight(self, control: Params, step: jax.Array) -> jax.Array:
    """lambda_t: coupled to the threshold for soft movement (lambda * tau_t / tau), constant otherwise."""
    if self.config.control == 'density':
      return control['regularization']
    if self.config.method == 'soft_movement' and self.config.regularization:
      table = self.config.regularization * self.masks.thresholds / self.config.threshold
      return jnp.asarray(table, jnp.float32)[step]
    return jnp.float32(self.config.regularization)

  def _steered(self, control: Params, slices: Leaves, step: jax.Array) -> Params:
    """'control' of this step from that of the step before, and the scores.

    Here and not after the update: slices of what was just computed would have the compiler cut that computation.
    """
    if self.cached:
      return {'threshold': self._threshold(control['threshold'], slices, step)}
    return control if self.controller is None else self.controller.update(control, slices, step)

  def after(self, old: Params, new: Params, metrics: Metrics, step: jax.Array, spread: Spread) -> Params:
    """See `types.Task`."""
    control = {name: metrics.get(_CONTROL + name, value) for name, value in new.get('control', {}).items()}
    if self.config.method == 'rpp':
      before, kernels, rate = self.masks.kernels(old), self.masks.kernels(new), self.learning_rate(step - 1)
      if self.config.control == 'fixed':
        strength = rate * self.config.regularization
      else:
        strength = solved_strength(self.masks, kernels, before, step - 1, spread)
        control['regularization'] = jnp.where(rate > 0, strength / jnp.where(rate > 0, rate, 1.0), 0.0)
      shrunk = {
        name: prox_reweighted_l1(leaf, before[name], strength, self.config.rpp_epsilon)
        for name, leaf in kernels.items()
      }
      new = overlaid(new, nested(shrunk))
    return {**new, 'control': control} if control else new

  def _threshold(self, known: jax.Array, slices: Leaves, step: jax.Array) -> jax.Array:
    """The global threshold of this step: found anew when it is due, and when pruning begins."""
    config = self.config
    due = ((step + config.first_step) % config.threshold_every == 0) | (known == _LOWEST)
    found = self.masks.global_threshold(slices, step)
    whole = jnp.asarray(self.masks.densities == 1)[step]
    return jnp.where(whole, _LOWEST, jnp.where(due, found, known))
