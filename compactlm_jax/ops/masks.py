"""Weight masks from scores, and the straight-through estimator (Sanh et al. 2020, movement pruning).

Masks of the highest scores are in `ops.threshold`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from compactlm_jax.ops.dropout import random_bits, site_words
from compactlm_jax.ops.threshold import Cut, local_cuts

_LEFT, _RIGHT, _BETA = -0.1, 1.1, 2 / 3
"""Ends and temperature of the hard concrete distribution (Louizos et al. 2018; emmental/modules/masked_nn.py)."""


@jax.custom_vjp
def masked_weight(
  weight: Float[Array, '*s'], scores: Float[Array, '*s'], mask: Float[Array, '*s']
) -> Float[Array, '*s']:
  """weight * mask, with the mask treated as the identity of the scores in the backward pass.

  With W' = W * M: dL/dW = dL/dW' * M and dL/dS = dL/dW' * W exactly, masked entries included, whatever function of
  the scores the mask is (no derivative of a sigmoid). The mask itself gets no gradient.

  Args:
    weight: W.
    scores: S, of W's shape; read by the backward pass only.
    mask: M(S), of W's shape.

  Returns:
    W'.
  """
  del scores
  return weight * mask


def _masked_weight_fwd(weight, scores, mask):
  return masked_weight(weight, scores, mask), (weight, mask)


def _masked_weight_bwd(saved, g):
  weight, mask = saved
  return g * mask, g * weight, jnp.zeros_like(mask)


masked_weight.defvjp(_masked_weight_fwd, _masked_weight_bwd)


def soft_cuts(
  leaves: Mapping[str, Float[Array, 'N ...']], tau: float | Float[Array, ''], on: str = 'sigmoid', floor: float = 0.005
) -> tuple[dict[str, Cut], dict[str, Int[Array, ' N']]]:
  """The cuts of soft movement pruning: what lies strictly above tau is kept, but never too little of a layer.

  A layer of n elements of which fewer than int(floor * n) + 1 pass keeps, as published, what is strictly above its
  k-th smallest element, k = max(n - int(floor * n) - 1, 1): that many if no others are equal to the next one, and none
  if all are equal. Only then are order statistics searched for; else each score is read once.

  Args:
    leaves: scores, each layer a matrix of its own; lay them in slices over the devices so that each counts its own.
    tau: the threshold, static or traced.
    on: compare tau with 'sigmoid' of the scores (through the logit of tau), or with the 'scores' themselves.
    floor: smallest fraction.

  Returns:
    The cuts, and how many elements of each layer they keep (where the floor acts, ties that it drops are counted too).
    Counting once more what lies above the cuts would make the compiler lay out whole masks as these slices.

  Source: emmental/modules/binarizer.py, ThresholdBinarizer.
  """
  tau = jnp.asarray(tau, jnp.float32)
  if on == 'sigmoid':
    inside = jnp.clip(tau, 0.0, 1.0)
    tau = jnp.log(inside) - jnp.log1p(-inside)
  few, wanted, kept = {}, {}, {}
  for name, leaf in leaves.items():
    size = leaf[0].size
    least = int(floor * size) + 1
    kept[name] = (leaf > tau).sum(range(1, leaf.ndim), dtype=jnp.int32)
    few[name] = kept[name] < least
    wanted[name] = jnp.where(few[name], size - max(size - least, 1), size)

  # Where all is kept the search makes no pass; under a `cond` instead, the compiler would lay out what else reads the
  # scores as this search does.
  found = local_cuts(leaves, wanted)
  for name, cut in found.items():
    # Ties at the end of what may be kept are dropped, all of them.
    last = jnp.where(cut.last < leaves[name][0].size - 1, -1, cut.last)
    plain = Cut(jnp.full(last.shape, tau), jnp.full(last.shape, -1))
    found[name] = jax.tree.map(functools.partial(jnp.where, few[name]), Cut(cut.threshold, last), plain)
    kept[name] = jnp.where(few[name], wanted[name], kept[name])
  return found, kept


def hard_concrete(scores: Float[Array, '*s'], key: jax.Array | None = None) -> Float[Array, '*s']:
  """L0's gates in [0, 1]: clip(s * (r - l) + l), r = 1.1, l = -0.1. Gradients are those of the formula.

  With a key s = sigma((log u - log(1 - u) + S) / b), b = 2/3, u uniform, clamped to [1e-4, .9999]. Without one (in
  evaluation) s = sigma(S), as published: not divided by b.

  Args:
    scores: S, float32, of rank one or more.
    key: draws u; the same key gives the same noise, however the scores are spread over devices.

  Source: emmental/modules/masked_nn.py; Louizos et al. 2018.
  """
  if key is None:
    return jnp.clip(jax.nn.sigmoid(scores) * (_RIGHT - _LEFT) + _LEFT, 0.0, 1.0)
  return _gates(scores, site_words(key, 0))


def uniform_noise(words: UInt32[Array, '2'], shape: tuple[int, ...]) -> Float[Array, '...']:
  """u of the hard concrete gates: uniform, clamped to [1e-4, .9999]."""
  return jnp.clip((random_bits(words, shape).astype(jnp.float32) + 0.5) * np.float32(2**-31), 1e-4, 0.9999)


def _concrete(scores: Array, words: Array) -> Array:
  """sigma((log u - log(1 - u) + S) / b), with one exponential and no logarithm: ((1 - u) / u)^(1/b) is a root."""
  u = uniform_noise(words, scores.shape)
  odds = (1 - u) / u
  return 1 / (1 + odds * jnp.sqrt(odds) * jnp.exp(scores * np.float32(-1 / _BETA)))


@jax.custom_vjp
def _gates(scores: Array, words: Array) -> Array:
  return jnp.clip(_concrete(scores, words) * (_RIGHT - _LEFT) + _LEFT, 0.0, 1.0)


def _gates_fwd(scores: Array, words: Array) -> tuple[Array, tuple[Array, Array]]:
  return _gates(scores, words), (scores, words)


def _gates_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, np.ndarray]:
  scores, words = saved
  s = _concrete(scores, words)  # drawn again: cheaper than memory for it
  gate = s * (_RIGHT - _LEFT) + _LEFT
  slope = jnp.where((gate >= 0) & (gate <= 1), s * (1 - s) * np.float32((_RIGHT - _LEFT) / _BETA), 0.0)
  return g * slope, np.zeros(words.shape, jax.dtypes.float0)


_gates.defvjp(_gates_fwd, _gates_bwd)


def prox_reweighted_l1(
  new: Float[Array, '*s'], old: Float[Array, '*s'], strength: float | Float[Array, ''], epsilon: float
) -> Float[Array, '*s']:
  """The proximal step of reweighted l1, after an optimiser's step that knows nothing of the penalty.

  sign(w) * max(|w| - strength * alpha, 0) with alpha = 1 / (|w_old| + epsilon): the minimiser of
  (x - w)^2 / 2 + strength * alpha * |x|.

  Args:
    new: w, weights after the optimiser's step.
    old: weights that alpha is made from, before the step.
    strength: step size times lambda, >= 0.
    epsilon: > 0; bounds alpha where weights are zero already.

  Source: Guo et al. 2019, Reweighted Proximal Pruning, section 3.
  """
  reach = strength / (jnp.abs(old) + epsilon)
  return jnp.sign(new) * jnp.maximum(jnp.abs(new) - reach, 0.0)
