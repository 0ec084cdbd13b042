"""Penalties on scores: what drives them down in soft movement pruning and L0 (Sanh et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_SHIFT = -2 / 3 * math.log(0.1 / 1.1)
"""-b log(-l / r) of the hard concrete distribution: sigma(S + _SHIFT) is the probability of a gate above 0."""


def soft_penalty(scores: Mapping[str, Float[Array, 'N ...']], reduction: str = 'mean') -> Float[Array, '']:
  """sigma(S), of soft movement pruning.

  Args:
    scores: each layer of each leaf is one matrix.
    reduction: 'mean' is the mean over matrices of their means, whatever their sizes (the original's `l1`); 'sum' is the
      sum over all entries (the paper).
  """
  return _reduced({name: jax.nn.sigmoid(leaf) for name, leaf in scores.items()}, reduction)


def l0_penalty(scores: Mapping[str, Float[Array, 'N ...']], reduction: str = 'mean') -> Float[Array, '']:
  """sigma(S - b log(-l / r)): the probability that a hard concrete gate is not 0 (the code's `l0`, S where the paper's
  formula has log S).

  Args:
    scores: each layer of each leaf is one matrix.
    reduction: as in `soft_penalty`.
  """
  return _reduced({name: jax.nn.sigmoid(leaf + _SHIFT) for name, leaf in scores.items()}, reduction)


def _reduced(values: Mapping[str, Array], reduction: str) -> Array:
  # Rows first: a plain float32 sum of millions loses digits.
  rows = {name: leaf.sum(-1) if leaf.ndim > 1 else leaf for name, leaf in values.items()}
  if reduction == 'sum':
    return jnp.stack([row.sum() for row in rows.values()]).sum()
  layers = sum(leaf.shape[0] for leaf in values.values())
  return jnp.stack([rows[name].sum() * (leaf.shape[0] / leaf.size) for name, leaf in values.items()]).sum() / layers
