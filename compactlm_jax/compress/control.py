"""The weight of a penalty that ends a run at a given density.

Soft movement and L0 keep what lies above a fixed value. Their penalty moves all scores towards it, at a speed that Adam
limits to about the learning rate; the density stays at 1 until they are there. What is steered is therefore the place
of one score, the one above which the asked density lies: it is led to the fixed value along a line over the learning
rate that is still to come, and arrives slowly. The weight may become negative, as a multiplier of an equality may.
Where pieces of two kinds are masked (heads and neurons, blocks and neurons), each kind has a weight of its own: a head
of BERT-base covers as many weights as 128 neurons, and with one weight for both the heads all stay or all go. Of the
kind with the larger pieces the asked fraction remains, rounded; of the other as much as the asked weights leave.
RPP zeroes weights directly: there the weight that leaves the scheduled density follows from each step's weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from compactlm_jax.compress.masks import Leaves, Masks, on_slices
from compactlm_jax.config import PruneConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.ops.threshold import global_cut, keep_mask
from compactlm_jax.types import Params, Spread

_HORIZON = 6.0
"""Steps in which an error of place is to be made up."""

_DAMPING = 0.5
"""Weight of an error of speed."""

_SUSTAINED, _NEAR, _MOST = 0.05, 0.5, 0.3
"""Weight of errors of place that last, how near the line they are added up, and to what."""

_FASTEST = 0.95
"""Highest speed that is asked for, in learning rates per step; Adam's own limit is about 1."""

_ADAPT = 0.3
"""How fast the scale of the weight follows what it brings about."""

_MEMORY = 0.9
"""Of measured speeds; Adam's first moment remembers as long."""

MISSED = 0.005
"""How far from the asked density a run may end without a warning."""

_STEADY = 0.6
"""Fraction of the way's learning rate that is spent at full speed; after it the speed falls to 0."""

_USABLE = 0.9
"""Fraction of the highest speed that the line may ask for."""


@dataclasses.dataclass(frozen=True)
class Controller:
  """Steers the weight of the penalty on scores.

  Attributes:
    masks: of the run.
    rates: float64 [steps + 1], learning rate of the scores at each step, 0 at the end.
    line: float64 [steps + 1], where the steered score is to be at each step: 0 at the start of its way, 1 at the end.
    start: step at which the way begins.
    parts: what is steered by itself: a prefix for the names of its state -> names of its scores.
    asked: prefix -> how many pieces are to remain.
    coarse: the prefix of the larger pieces, of which every one counts; None where there is one kind.
  """

  masks: Masks
  rates: np.ndarray
  line: np.ndarray
  start: int
  parts: Mapping[str, tuple[str, ...]]
  asked: Mapping[str, float]
  coarse: str | None = None

  def init(self, values: Leaves) -> Params:
    """The state before the first step: float32 scalars.

    Args:
      values: the scores.
    """
    return self._joined({part: self._init(self._of(part, values), part) for part in self.parts})

  def update(self, state: Params, values: Leaves, step: jax.Array) -> Params:
    """The state for a step.

    Args:
      state: of the step before (at first that of `init`).
      values: the scores at its beginning.
      step: its number.
    """
    found = {}
    for part in self.parts:
      own = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
      found[part] = self._update(own, self._place(self._of(part, values), part), step)
    return self._joined(found)

  def penalty(self, state: Params, values: Leaves, of: Callable[[Leaves], jax.Array]) -> jax.Array:
    """The penalty on the scores, each part at its weight.

    Args:
      state: of the step.
      values: the scores.
      of: scores -> their penalty at weight 1.
    """
    total, layers = jnp.float32(0.0), sum(leaf.shape[0] for leaf in values.values())
    for part in self.parts:
      own = self._of(part, values)
      # With equal weights the penalty is that of all scores together.
      mean = self.coarse is not None and self.masks.config.penalty == 'mean'
      among = sum(leaf.shape[0] for leaf in own.values()) / layers if mean else 1
      total += state[f'{part}regularization'] * (among * of(own))
    return total

  def _of(self, part: str, values: Leaves) -> Leaves:
    return values if self.coarse is None else {name: leaf for name, leaf in values.items() if name in self.parts[part]}

  def _joined(self, states: Mapping[str, Params]) -> Params:
    """The states of all parts as one, with the mean of their weights."""
    out = {f'{part}{name}': value for part, state in states.items() for name, value in state.items()}
    if self.coarse is not None:
      out['regularization'] = jnp.stack([state['regularization'] for state in states.values()]).mean()
    return out

  def _init(self, values: Leaves, part: str) -> Params:
    size = sum(leaf.size for leaf in values.values())
    usual = math.sqrt(size) / (1 if self.masks.config.penalty == 'mean' else size)
    place = self._place(values, part)
    return {
      'regularization': jnp.float32(0.0),
      'scale': jnp.float32(self.masks.config.regularization or usual),
      'begun': place,
      'place': place,
      'speed': jnp.float32(0.0),
      'asked': jnp.float32(0.0),
      'sustained': jnp.float32(0.0),
    }

  def _update(self, state: Params, place: jax.Array, step: jax.Array) -> Params:
    rates, line = jnp.asarray(self.rates, jnp.float32), jnp.asarray(self.line, jnp.float32)
    last = rates[step - 1]
    moved = jnp.where(last > 0, (state['place'] - place) / jnp.where(last > 0, last, 1.0), 0.0)
    speed = _MEMORY * state['speed'] + (1 - _MEMORY) * jnp.clip(moved, -3.0, 3.0)
    # Where less is brought about than was asked for, the same speed needs a larger weight.
    lacking = jnp.clip(state['asked'] - speed, -1.0, 1.0)
    scale = jnp.clip(state['scale'] * jnp.exp(_ADAPT * lacking * state['asked']), 1e-12, 1e12)
    way = target_of(self.masks.config) - state['begun']
    rate = jnp.where(rates[step] > 0, rates[step], 1.0)
    planned = way * (line[step] - line[jnp.minimum(step + 1, len(self.line) - 1)]) / rate
    error = (place - state['begun'] - way * line[step]) / rate / _HORIZON
    near, begun = jnp.abs(error) < _NEAR, (step >= self.start) & (rates[step] > 0)
    longer = jnp.clip(state['sustained'] + _SUSTAINED * error, -_MOST, _MOST)
    longer = jnp.where(begun & near, longer, _MEMORY * state['sustained'])
    asked = jnp.clip(planned + error + longer - _DAMPING * (speed - planned), -_FASTEST, _FASTEST)
    asked = jnp.where(begun, asked, 0.0)
    return {
      # Adam turns a gradient g among noise of size s into a step of g / sqrt(g^2 + s^2) learning rates.
      'regularization': scale * asked / jnp.sqrt(1 - asked**2),
      'scale': scale,
      'begun': state['begun'],
      'place': place,
      'speed': speed,
      'asked': _MEMORY * state['asked'] + (1 - _MEMORY) * asked,
      'sustained': longer,
    }

  def _place(self, values: Leaves, part: str) -> jax.Array:
    """The score above which the asked density lies, less what floors keep besides.

    Of large pieces it is between two scores, so that none of them ends where it is decided by rounding.
    """
    config, target = self.masks.config, target_of(self.masks.config)
    values, size = jax.lax.stop_gradient(values), sum(leaf.size for leaf in values.values())
    if not self.asked[part]:  # none of the large pieces is to remain
      return jnp.stack([leaf.max() for leaf in values.values()]).max() + jnp.float32(self.rates.max())
    besides = jnp.float32(0.0)
    if config.method == 'soft_movement':
      for leaf in values.values():
        above = (leaf > target).sum(range(1, leaf.ndim), dtype=jnp.int32)
        besides += jnp.maximum(int(config.floor * leaf[0].size) + 1 - above, 0).sum().astype(jnp.float32)
    keep = jnp.clip(self.asked[part] - besides, 1, size).astype(jnp.int32)
    cuts = global_cut(values, keep)
    if part != self.coarse:
      return next(iter(cuts.values())).threshold[0]
    masks = {name: keep_mask(leaf, cuts[name]) for name, leaf in values.items()}
    above = jnp.stack([jnp.where(masks[name], leaf, jnp.inf).min() for name, leaf in values.items()]).min()
    below = jnp.stack([jnp.where(masks[name], -jnp.inf, leaf).max() for name, leaf in values.items()]).max()
    return (above + below) / 2


def make_controller(masks: Masks, learning_rate: Callable[[jax.Array], jax.Array], warmup: int) -> Controller:
  """The controller of a run of soft movement or L0.

  Args:
    masks: of the run.
    learning_rate: step -> learning rate of the weights, whose shape the scores' has.
    warmup: warm-up steps.

  Raises:
    ConfigError: the learning rate of all steps does not take the scores to where they are pruned, or more remains of
      every matrix than is asked for.
  """
  config, steps = masks.config, masks.last
  with jax.ensure_compile_time_eval():
    shape = np.asarray(jax.vmap(learning_rate)(jnp.arange(steps)), np.float64)  # also of a constant
  rates = np.append(config.scores_learning_rate * shape / max(shape.max(), 1e-30), 0.0)
  start = min(int(config.initial_warmup * warmup), steps - 1)
  # Also without a cool-down, time is left to correct what is off.
  end = max(start + 1, min(int(steps - config.final_warmup * warmup), int(0.85 * steps)))
  spent = np.cumsum(np.append(0.0, rates[:-1]))
  part = np.clip((spent - spent[start]) / max(spent[end] - spent[start], 1e-30), 0, 1)
  mean = (1 + _STEADY) / 2
  line = (part - np.maximum(part - _STEADY, 0) ** 2 / (2 * (1 - _STEADY))) / mean
  _check_way(config, float(spent[end] - spent[start]) * mean * _USABLE, steps)
  return Controller(masks, rates, line, start, *_parts(masks))


def _parts(masks: Masks) -> tuple[dict[str, tuple[str, ...]], dict[str, float], str | None]:
  """What is steered, how many pieces of it remain, and whose pieces are the larger ones; see `Controller`."""
  config, shapes, weights = masks.config, masks.shapes, masks.weights
  sizes = {kind: sum(math.prod(shapes[name]) for name in names) for kind, names in masks.kinds.items()}
  whole = {kind: sum(math.prod(shapes[n]) * weights[n] for n in names) for kind, names in masks.kinds.items()}
  least = dict.fromkeys(sizes, 0)
  if config.method == 'soft_movement':
    for kind, names in masks.kinds.items():
      least[kind] = sum(shapes[n][0] * (int(config.floor * math.prod(shapes[n][1:])) + 1) for n in names)
  lowest = sum(whole[kind] * least[kind] / sizes[kind] for kind in sizes) / sum(whole.values())
  if lowest > config.density + MISSED:
    raise ConfigError(
      f'config.prune.density: {config.density:g} cannot be reached, since of every matrix something remains '
      f'(prune.floor={config.floor:g}, and one piece at least); use at least {math.ceil(1e3 * lowest) / 1e3:g}'
    )
  if len(sizes) == 1:
    return {'': tuple(shapes)}, {'': config.density * sum(sizes.values())}, None
  coarse, fine = sorted(sizes, key=lambda kind: whole[kind] / sizes[kind], reverse=True)
  left = config.density * sum(whole.values())
  number = min(round(config.density * sizes[coarse]), int(left / whole[coarse] * sizes[coarse]))
  number = max(number, least[coarse])
  # Where all of them remain nothing is to move them.
  steered = [coarse, fine] if number < sizes[coarse] else [fine]
  rest = (left - number * whole[coarse] / sizes[coarse]) / (whole[fine] / sizes[fine])
  parts = {f'{kind}_': tuple(masks.kinds[kind]) for kind in steered}
  return parts, {f'{coarse}_': float(number), f'{fine}_': rest}, f'{coarse}_'


def _check_way(config: PruneConfig, possible: float, steps: int) -> None:
  begun = config.scores_scale if config.scores_init == 'constant' else 0.0
  way = abs(target_of(config) - begun)
  if possible < way:
    least = config.scores_learning_rate * way / max(possible, 1e-30)
    raise ConfigError(
      f'config.prune.scores_learning_rate: at {config.scores_learning_rate:g} the scores move {possible:.2g} at most '
      f'in {steps} steps, and are pruned {way:.2g} from where they begin; set it to at least {least:.2g}'
      if possible
      else f'config.prune.scores_learning_rate: no step of {steps} moves the scores; raise it'
    )


def target_of(config: PruneConfig) -> float:
  """The score above which an entry remains in the finished model.

  Args:
    config: of soft movement or L0.
  """
  if config.method == 'l0':  # 1.2 sigma(S) - .1 > 0
    return -math.log(11.0)
  tau = config.threshold
  return tau if config.threshold_on == 'scores' else math.log(tau) - math.log1p(-tau)


def solved_strength(masks: Masks, kernels: Leaves, before: Leaves, step: jax.Array, spread: Spread) -> jax.Array:
  """The strength of RPP's proximal step that leaves the density of a step: learning rate times lambda.

  A weight becomes zero where |w| (|w_old| + epsilon) is at most that.

  Args:
    masks: of the run.
    kernels: weights after the optimiser's step, by name.
    before: weights before it.
    step: number of the step.
    spread: see `types.Spread`.
  """
  reach = {name: jnp.abs(leaf) * (jnp.abs(before[name]) + masks.config.rpp_epsilon) for name, leaf in kernels.items()}
  size = sum(leaf.size for leaf in reach.values())
  dropped = jnp.asarray(size - (masks.densities * size).astype(np.int32))[step]
  cut = global_cut({name: -leaf for name, leaf in on_slices(reach, spread).items()}, dropped)
  return jnp.maximum(0.0, -next(iter(cut.values())).threshold[0])
