"""Masks of a parameter tree: what is ranked, what is kept at a step, and the tree with the masks applied.

Everything here is a function of trees. Scores stand in 'scores' under the names of what they belong to
(`compress.structure`), beside the trees of the model; a mask has the shape of its scores and is expanded to the kernels
and biases that it covers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compactlm_jax.compress.schedule import cubic_schedule, kept, least_density
from compactlm_jax.compress.structure import acting_masks, expand, maskable, piece_weights, score_shapes
from compactlm_jax.config import EncoderConfig, PruneConfig
from compactlm_jax.config.prune import PENALISED, SCORED
from compactlm_jax.errors import ConfigError
from compactlm_jax.ops.masks import hard_concrete, masked_weight, soft_cuts
from compactlm_jax.ops.threshold import Cut, global_cut, keep_mask, local_cuts
from compactlm_jax.tree import named_leaves, nested, overlaid
from compactlm_jax.types import Params, Spread

OWN = ('scores', 'control')
"""Parts of a tree that only pruning reads."""

Leaves = dict[str, jax.Array]
"""Name of scores -> array [N, ...]."""


@dataclasses.dataclass(frozen=True)
class Masks:
  """The masks of a run, by step.

  Attributes:
    encoder: whose kernels are masked.
    config: method, structure and schedule.
    densities: float64 [steps + 1], fraction that remains; the last entry is the final one.
    thresholds: float64 [steps + 1], tau of soft movement.
  """

  encoder: EncoderConfig
  config: PruneConfig
  densities: np.ndarray
  thresholds: np.ndarray

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Name of scores -> their shape [N, ...]."""
    return score_shapes(self.encoder, self.config.structure, self.config.block)

  @property
  def kinds(self) -> dict[str, list[str]]:
    """'heads', 'neurons', 'blocks' or 'kernel' -> names of its scores."""
    kinds: dict[str, list[str]] = {}
    for name in self.shapes:
      kinds.setdefault(name.rpartition('/')[2], []).append(name)
    return kinds

  @property
  def weights(self) -> dict[str, int]:
    """Name of scores -> what one of them covers, see `structure.piece_weights`."""
    return piece_weights(self.encoder, self.shapes)

  @property
  def last(self) -> int:
    """The index of the final values."""
    return len(self.densities) - 1

  def init_scores(self, key: jax.Array) -> Leaves:
    """Fresh scores; of 'random' pruning a fixed draw."""
    method, how, scale = self.config.method, self.config.scores_init, self.config.scores_scale
    out: Leaves = {}
    for index, (name, shape) in enumerate(self.shapes.items()):
      draw = jax.random.uniform(jax.random.fold_in(key, index), shape, minval=-1.0)
      # PyTorch's kaiming_uniform_ with a = sqrt(5), as the original calls it, is uniform within 1 / sqrt(inputs).
      bound = 1.0 if method == 'random' else scale if how == 'uniform' else _inputs(shape) ** -0.5
      out[name] = jnp.full(shape, scale, jnp.float32) if how == 'constant' and method != 'random' else bound * draw
    return out

  def ranked(self, params: Params, spread: Spread | None = None) -> Leaves:
    """What entries are kept by: their scores, or for magnitude the mean absolute weight, without a gradient.

    Args:
      params: the whole tree.
      spread: to have it in slices over all devices, for counting. Slices are made of the parameters themselves: of
        anything computed from them the compiler would cut the computation too, and gather its other uses.
    """
    leaves = named_leaves(params['scores']) if 'scores' in params else self.kernels(params)
    leaves = on_slices(leaves, spread) if spread else leaves
    if 'scores' in params:
      return leaves
    out = {}
    for name, shape in self.shapes.items():
      spec = jax.ShapeDtypeStruct(shape, jnp.float32)

      def spread_over(leaf: jax.Array, name: str = name) -> Leaves:
        return {own: array for own, array in expand(self.encoder, name, leaf).items() if own.endswith('/kernel')}

      if name in leaves:
        out[name] = jnp.abs(leaves[name])
        continue
      covered = jax.eval_shape(spread_over, spec)
      (sums,) = jax.linear_transpose(spread_over, spec)({own: jnp.abs(leaves[own]) for own in covered})
      (sizes,) = jax.linear_transpose(spread_over, spec)(jax.tree.map(lambda s: jnp.ones(s.shape), covered))
      out[name] = sums / sizes
    return jax.lax.stop_gradient(out)

  def kernels(self, params: Params) -> Leaves:
    """The kernels that can be masked, by name."""
    leaves = named_leaves(params)
    return {name: leaves[name] for name in maskable(self.encoder)}

  def kept_fraction(self, step: jax.Array | int) -> jax.Array:
    """Exact share of the covered weights that ranking keeps at a step (floors included).

    With scope 'global' a piece counts as the mean of its kind, which differs from it in a ragged ConvBERT alone.
    """
    weights = self.weights
    sizes = {name: math.prod(shape) * weights[name] for name, shape in self.shapes.items()}
    groups = []
    for names in self.kinds.values():
      size = sum(math.prod(self.shapes[name]) for name in names)
      if self.config.scope == 'global':
        groups.append((sum(sizes[name] for name in names) / size, size))
      else:
        groups += [(weights[name] * self.shapes[name][0], math.prod(self.shapes[name][1:])) for name in names]
    counts = [number * kept(self.densities, size).astype(np.float64) for number, size in groups]
    return jnp.asarray(np.sum(counts, axis=0) / sum(sizes.values()), jnp.float32)[step]

  def fraction(self, counts: Mapping[str, jax.Array]) -> jax.Array:
    """Share of the covered weights that remains.

    Args:
      counts: int32, how many pieces of each name remain, of all layers together.
    """
    weights, sizes = self.weights, {name: math.prod(shape) for name, shape in self.shapes.items()}
    if set(weights.values()) == {1}:
      return jnp.asarray(jnp.stack(list(counts.values())).sum() / sum(sizes.values()), jnp.float32)
    parts = [counts[name].astype(jnp.float32) * weight for name, weight in weights.items()]
    return jnp.stack(parts).sum() / sum(weights[name] * size for name, size in sizes.items())

  def top(self, values: Leaves, step: jax.Array | int, slices: Leaves | None = None) -> Leaves:
    """Masks (0 or 1) of the highest entries at a step, exact counts; `slices` are the values to count, if others."""
    values = jax.lax.stop_gradient(values)
    slices = values if slices is None else jax.lax.stop_gradient(slices)
    if self.config.scope == 'local':
      keeps = {
        name: jnp.full(leaf.shape[0], jnp.asarray(kept(self.densities, leaf[0].size))[step])
        for name, leaf in values.items()
      }
      cuts = local_cuts(slices, keeps)
    else:
      cuts = {}
      for names in self.kinds.values():
        size = sum(values[name].size for name in names)
        cuts |= global_cut({name: slices[name] for name in names}, jnp.asarray(kept(self.densities, size))[step])
    return {name: keep_mask(leaf, cuts[name]).astype(leaf.dtype) for name, leaf in values.items()}

  def global_threshold(self, values: Leaves, step: jax.Array | int) -> jax.Array:
    """The highest score below those that the original's `--global_topk` keeps: the int(density * size) + 1 highest.

    It is a score itself, not any number below those that are kept: scores move on while the threshold stays.
    """
    values, size = jax.lax.stop_gradient(values), sum(leaf.size for leaf in values.values())
    keep = np.minimum(kept(self.densities, size) + 1, size - 1)
    cuts = global_cut(values, jnp.asarray(keep)[step])
    rest = [jnp.where(keep_mask(leaf, cuts[name]), -jnp.inf, leaf).max() for name, leaf in values.items()]
    return jnp.stack(rest).max()

  def tau(self, step: jax.Array | int) -> jax.Array:
    """The threshold of soft movement at a step."""
    return jnp.asarray(self.thresholds, jnp.float32)[step]

  def above(self, values: Leaves, step: jax.Array | int) -> Leaves:
    """Masks of soft movement at a step's threshold."""
    return self.over(values, self.cuts_over(values, self.tau(step), self.config.threshold_on)[0])

  def cuts_over(self, slices: Leaves, tau: jax.Array, on: str) -> tuple[dict[str, Cut], jax.Array]:
    """Cuts that keep what is above a threshold, and never less of a matrix than the floor; and the share of weights."""
    cuts, kept = soft_cuts(jax.lax.stop_gradient(slices), tau, on=on, floor=self.config.floor)
    return cuts, self.fraction({name: number.sum() for name, number in kept.items()})

  def over(self, values: Leaves, cuts: Mapping[str, Cut]) -> Leaves:
    """Masks (0 or 1) of what is above the thresholds of `cuts_over`, which never keep a tie."""
    # Without the index of each entry, as `keep_mask` has it: made for slices, it would be cut for whole masks too.
    return {
      name: (leaf > cuts[name].threshold.reshape(-1, *(1,) * (leaf.ndim - 1))).astype(leaf.dtype)
      for name, leaf in values.items()
    }

  def gates(self, values: Leaves, key: jax.Array | None) -> Leaves:
    """L0's gates: drawn with a key, as evaluated without."""
    keys = {name: None if key is None else jax.random.fold_in(key, i) for i, name in enumerate(values)}
    return {name: hard_concrete(leaf, keys[name]) for name, leaf in values.items()}

  def final(self, params: Params) -> Leaves | None:
    """The masks that the finished model is baked with; None if its zeros are in its weights already (RPP)."""
    method = self.config.method
    if method == 'rpp':
      return None
    values = self.ranked(params)
    if method == 'l0':
      return self.gates(values, None)
    if method == 'soft_movement':
      return self.above(values, self.last)
    if self.config.threshold_every > 1 and self.densities[-1] < 1:
      return self.over(values, self.cuts_over(values, self.global_threshold(values, self.last), 'scores')[0])
    return self.top(values, self.last)

  def apply(
    self, params: Params, masks: Mapping[str, jax.Array], *, straight_through: bool, baked: bool = False
  ) -> Params:
    """The tree without what only pruning reads, its weights multiplied by the masks.

    Args:
      params: the whole tree.
      masks: by name of scores.
      straight_through: pass dL/dW' * W on to the scores (`ops.masks.masked_weight`); else masks are differentiated.
      baked: of the finished model, see `structure.acting_masks`.
    """
    leaves = {name: leaf for name, leaf in named_leaves(params).items() if name.split('/')[0] not in OWN}
    scores = named_leaves(params.get('scores', {}))
    for name, mask in masks.items():
      wide = acting_masks(self.encoder, name, mask, baked=baked)
      own = expand(self.encoder, name, scores[name]) if straight_through else {}
      for covered, array in wide.items():
        if straight_through:
          leaves[covered] = masked_weight(leaves[covered], own[covered], array)
        else:
          leaves[covered] = leaves[covered] * array
        if not baked and covered.endswith('/kernel'):
          # The model would cast kernels itself; here they are written, and their gradient is read, at half the size.
          leaves[covered] = leaves[covered].astype(self.encoder.dtype)
    return overlaid(without_own(params), nested(leaves))


def _inputs(shape: tuple[int, ...]) -> int:
  """Of a stack of scores: rows of a kernel (of one group's, if it has groups), or the heads or neurons of a layer."""
  return shape[-2] if len(shape) > 2 else shape[1]


def on_slices(values: Leaves, spread: Spread) -> Leaves:
  """Leaves in slices over all devices, for counting."""
  placed = named_leaves(spread(nested({f'scores/{name}': leaf for name, leaf in values.items()})))
  return {name.removeprefix('scores/'): leaf for name, leaf in placed.items()}


def without_own(params: Params) -> Params:
  """The trees of the model alone."""
  return {name: tree for name, tree in params.items() if name not in OWN}


def share(masks: Mapping[str, Any]) -> jax.Array:
  """Fraction of entries that are not zero, over all leaves."""
  count = sum(jnp.sum(leaf != 0, dtype=jnp.int32) for leaf in masks.values())
  return jnp.asarray(count / sum(leaf.size for leaf in masks.values()), jnp.float32)


def make_masks(encoder: EncoderConfig, config: PruneConfig, total_steps: int, warmup: int) -> Masks:
  """The masks of a run of so many steps.

  Raises:
    ConfigError: a schedule that the run is too short for, a structure that the encoder's sizes do not allow or that
      masks nothing of it, or a density that keeps nothing.
  """
  if not score_shapes(encoder, config.structure, config.block):
    raise ConfigError(
      f'config.model: its encoder has nothing left that prune.structure={config.structure!r} masks; use another '
      'structure, or a model that has something of it'
    )
  _check_density(final_masks(encoder, config))
  if config.method == 'post_hoc_magnitude' or (config.method in ('l0', 'rpp') and config.control == 'fixed'):
    return Masks(encoder, config, np.full(total_steps + 1, config.density), np.full(total_steps + 1, config.threshold))
  densities = cubic_schedule(config.initial_density, config.density, total_steps, warmup, config)
  thresholds = cubic_schedule(config.initial_threshold, config.threshold, total_steps, warmup, config)
  return Masks(encoder, config, densities, thresholds)


def _check_density(masks: Masks) -> None:
  """Refuses a final density of which ranking keeps nothing in a layer's matrix, or with scope 'global' in all."""
  config, shapes = masks.config, masks.shapes
  if config.method in PENALISED or config.threshold_every > 1:  # a threshold that stays keeps one more
    return
  whole = config.scope == 'global'
  for kind, names in masks.kinds.items():
    sizes = {name: math.prod(shapes[name][1:]) for name in names}
    size = sum(shapes[name][0] * sizes[name] for name in names) if whole else min(sizes.values())
    if not kept(masks.densities, size)[-1]:
      pieces, where = {'kernel': 'weights'}.get(kind, kind), 'in all' if whole else 'per layer'
      if kind in ('kernel', 'blocks') and not whole:
        where = f'of {min(sizes, key=lambda name: sizes[name]).rpartition("/")[0]}'
      raise ConfigError(
        f'config.prune.density: {config.density:g} of {size} {pieces} {where} keeps none; use at least '
        f'{least_density(size):g}' + ('' if whole else ", or prune.scope='global'")
      )


def final_masks(encoder: EncoderConfig, config: PruneConfig) -> Masks:
  """The masks of a finished run: final values only."""
  return Masks(encoder, config, np.array([config.density]), np.array([config.threshold]))


def has_scores(config: PruneConfig) -> bool:
  """Whether a run has scores, trained or drawn."""
  return config.method in (*SCORED, 'random')
