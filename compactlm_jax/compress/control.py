"""The weight of a penalty that ends a run at a given density.

Soft movement and L0 keep what lies above a fixed value, and their penalty moves all scores towards it at a speed that
Adam limits to about the learning rate. What is steered is therefore the place of one score: the one above which the
asked density lies. It is led to the fixed value along a line over the learning rate that is still to come.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from compactlm_jax.compress.masks import Leaves, Masks, on_slices
from compactlm_jax.config import PruneConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.ops.threshold import global_cut
from compactlm_jax.types import Params, Spread

_HORIZON = 10.0
"""Steps in which an error of place is to be made up: Adam's first moment remembers as many."""

_MOST = 0.95
"""The highest speed that is asked for, in learning rates per step."""

_ADAPT = 0.3
_MEMORY = 0.9
_SPARE = 1.25
"""So many times the way to go must be possible."""


@dataclasses.dataclass(frozen=True)
class Controller:
  """Steers the weight of the penalty on scores.

  Attributes:
    masks: of the run.
    rates: float64 [steps], learning rate of the scores at each step.
    start: step at which it begins.
    end: step at which the density is to be reached.
  """

  masks: Masks
  rates: np.ndarray
  start: int
  end: int

  @property
  def target(self) -> float:
    """Scores above this remain in the finished model."""
    return place_of(self.masks.config)

  def init(self, values: Leaves) -> Params:
    """The state before the first step, float32 scalars."""
    size = sum(leaf.size for leaf in values.values())
    scale = math.sqrt(size) if self.masks.config.penalty == 'mean' else 1 / math.sqrt(size)
    place = self._place(values)
    return {
      'regularization': jnp.float32(self.masks.config.regularization),
      'scale': jnp.float32(self.masks.config.regularization or scale),
      'place': place,
      'begun': place,
      'speed': jnp.float32(0.0),
      'asked': jnp.float32(0.0),
    }

  def update(self, control: Params, values: Leaves, step: jax.Array) -> Params:
    """The state for step `step`, after the scores have moved to `values`."""
    rates = np.append(self.rates, 0.0).astype(np.float32)
    ahead = np.append(np.cumsum(self.rates[::-1])[::-1], 0.0)
    whole = ahead[self.start] - ahead[self.end]
    progress = np.clip((ahead[self.start] - ahead) / whole, 0, 1).astype(np.float32)
    place = self._place(values)
    rate = jnp.asarray(rates)[step - 1]
    moved = jnp.where(rate > 0, (control['place'] - place) / jnp.maximum(rate, 1e-30), 0.0)
    speed = _MEMORY * control['speed'] + (1 - _MEMORY) * jnp.clip(moved, -3, 3)
    asked = control['asked']
    scale = control['scale'] * jnp.exp(_ADAPT * jnp.clip(asked - speed, -1, 1) * asked)
    # Of the next step.
    line = control['begun'] + (self.target - control['begun']) * jnp.asarray(progress)
    now, then = line[step], line[jnp.minimum(step + 1, len(progress) - 1)]
    following = jnp.maximum(jnp.asarray(rates)[step], 1e-30)
    command = (now - then) / following + (place - now) / (following * _HORIZON)
    command = jnp.where(step < self.start, 0.0, jnp.clip(command, -_MOST, _MOST))
    return {
      **control,
      'regularization': scale * command / jnp.sqrt(1 - command**2),
      'scale': scale,
      'place': place,
      'speed': speed,
      'asked': _MEMORY * asked + (1 - _MEMORY) * command,
    }

  def _place(self, values: Leaves) -> jax.Array:
    """The lowest score that remains if the asked density does."""
    size = sum(leaf.size for leaf in values.values())
    keep = max(1, int(self.masks.config.density * size))
    return next(iter(global_cut(jax.lax.stop_gradient(values), jnp.int32(keep)).values())).threshold[0]


def place_of(config: PruneConfig) -> float:
  """The score above which an entry remains in the finished model."""
  if config.method == 'l0':
    return -math.log(11.0)
  tau = config.threshold
  return tau if config.threshold_on == 'scores' else math.log(tau) - math.log1p(-tau)


def make_controller(masks: Masks, learning_rate: Callable[[jax.Array], jax.Array], warmup: int) -> Controller | None:
  """The controller of a run; None for a method whose weight follows from the step (RPP)."""
  config, steps = masks.config, masks.last
  if config.method == 'rpp':
    return Controller(masks, np.zeros(steps), 0, steps)
  with jax.ensure_compile_time_eval():
    shape = np.asarray(learning_rate(jnp.arange(steps)), np.float64)
  rates = config.scores_learning_rate * shape / max(shape.max(), 1e-30)
  start = min(int(config.initial_warmup * warmup), steps - 1)
  end = max(start + 1, int(steps - config.final_warmup * warmup))
  return Controller(masks, rates, start, end)


def solved_strength(masks, kernels, before, step, spread):
  """Threshold of the proximal step that leaves the density of a step."""
  reach = {name: jnp.abs(leaf) * (jnp.abs(before[name]) + masks.config.rpp_epsilon) for name, leaf in kernels.items()}
  size = sum(leaf.size for leaf in reach.values())
  keep = jnp.asarray((masks.densities * size).astype(np.int32))[step]
  drop = {name: -leaf for name, leaf in on_slices(reach, spread).items()}
  cut = global_cut(drop, size - keep)
  return jnp.maximum(0.0, -next(iter(cut.values())).threshold[0])
