"""What remains of an encoder: counted from the zeros of its maskable kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from compactlm_jax.compress.structure import covered_kernels, kernel_shapes, score_shapes
from compactlm_jax.config import EncoderConfig, PruneConfig, runs, stack_names
from compactlm_jax.tree import named_leaves
from compactlm_jax.types import Params


def densities(params: Params, encoder: EncoderConfig) -> dict[str, Any]:
  """The remaining fraction of the maskable weights, in all, per matrix and per layer.

  What a ragged encoder lost counts as zeros of the stock sizes (`num_heads`, `intermediate_size`), so that shrinking
  never raises a density.

  Args:
    params: a tree with 'encoder', its masks baked.
    encoder: its configuration.

  Returns:
    JSON-able: 'density', a fraction; 'nonzero' and 'weights', the numbers that it divides; 'by_matrix',
    {'attention/query': [one for each layer], ...}; 'by_layer', a list.
  """
  stock = dataclasses.replace(encoder, heads_per_layer=(), neurons_per_layer=())
  (stack,), leaves = stack_names(stock), named_leaves(params)
  prefix = f'encoder/{stack}/'
  sizes = {name.removeprefix(prefix): int(np.prod(shape[1:])) for name, shape in kernel_shapes(stock).items()}
  counts = {name: np.zeros(encoder.num_layers) for name in sizes}
  for own, (start, stop, _) in zip(stack_names(encoder), runs(encoder)):
    for name in sizes:
      leaf = leaves.get(f'encoder/{own}/{name}')
      if leaf is not None:
        counts[name][start:stop] = _nonzero(leaf)
  whole = sum(sizes.values())
  layers = sum(counts.values(), np.zeros(encoder.num_layers))
  return {
    'density': float(layers.sum() / (whole * encoder.num_layers)),
    'nonzero': int(layers.sum()),
    'weights': whole * encoder.num_layers,
    'by_matrix': {name.removesuffix('/kernel'): (counts[name] / size).tolist() for name, size in sizes.items()},
    'by_layer': (layers / whole).tolist(),
  }


def covered_density(params: Params, encoder: EncoderConfig, config: PruneConfig) -> float:
  """The remaining fraction of the weights that a structure masks: what `prune.density` asks for.

  Of an encoder that is not ragged and a structure that masks all of it, the 'density' of `densities`.

  Args:
    params: a tree with 'encoder', its masks baked.
    encoder: its configuration.
    config: whose structure it is.
  """
  leaves, nonzero, weights = named_leaves(params), 0, 0
  for name, shape in score_shapes(encoder, config.structure, config.block).items():
    for kernel in covered_kernels(encoder, name, shape):
      nonzero, weights = nonzero + int(_nonzero(leaves[kernel]).sum()), weights + leaves[kernel].size
  return nonzero / weights


def _nonzero(leaf: Any) -> np.ndarray:
  """How many weights of each layer are not zero, counted where the leaf lies."""
  counts = jnp.sum(jnp.asarray(leaf) != 0, axis=tuple(range(1, leaf.ndim)), dtype=jnp.int32)
  return np.asarray(counts, np.int64)
