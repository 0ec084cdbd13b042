"""Rewiring: heads and neurons sorted by importance, so that the leftmost, which every sub-network has, are the best."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compactlm_jax.compress.layout import LAYERS, checked_leaves, folded, layer_axes, places, unfolded
from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError, NumericsError
from compactlm_jax.tree import map_named
from compactlm_jax.types import Params


def rewire(
  params: Params,
  encoder: EncoderConfig,
  head_importance_NH: Float[Array, 'N H'] | np.ndarray,
  neuron_importance_NF: Float[Array, 'N F'] | np.ndarray,
) -> Params:
  """The same network with the heads and neurons of each layer in descending order of importance, equals as they were.

  Whole heads change places, in ConvBERT in both branches at once; neurons of a grouped feed-forward within their group,
  each of which sub-networks cut alike. Only sums over heads and neurons run in another order, so that outputs stay what
  they were up to rounding (huawei-noah/Pretrained-Language-Model `DynaBERT/run_glue.py: reorder_neuron_head`).

  Args:
    params: a tree with 'encoder', in JAX or NumPy arrays; other parts are passed on as they are.
    encoder: its configuration.
    head_importance_NH: importance of each head; known numbers, not traced.
    neuron_importance_NF: importance of each neuron; known numbers, not traced.

  Raises:
    ConfigError: an encoder whose layers differ in size, scores in the tree, or shapes that are not the encoder's.
    NumericsError: importance that is not finite.
  """
  if encoder.ragged:
    raise ConfigError('config.adapt.rewire: the layers of the encoder differ in size; take the padded export of it')
  checked_leaves(params, encoder)
  layers, groups = encoder.num_layers, encoder.num_groups
  heads_NH = _order('heads', head_importance_NH, (layers, encoder.num_heads))
  neurons_NF = _order('neurons', neuron_importance_NF, (layers, encoder.intermediate_size), groups)

  def sort(name: str, leaf: Any) -> Any:
    if not name.startswith(LAYERS):
      return leaf
    axes = layer_axes(name.removeprefix(LAYERS), encoder)
    heads, neurons = (places(axes, letter, stacked=True) for letter in 'HF')
    if not heads and not neurons:
      return leaf
    parts = folded(leaf, axes, encoder, stacked=True)
    for axis in heads:
      parts = _taken(parts, heads_NH, (0, axis))
    for axis in neurons:
      parts = _taken(parts, neurons_NF.reshape(layers, groups, -1), (0, *places(axes, 'G', stacked=True), axis))
    return unfolded(parts, axes, stacked=True)

  return {**params, 'encoder': map_named(lambda name, leaf: sort(f'encoder/{name}', leaf), params['encoder'])}


def _order(what: str, importance: Any, shape: tuple[int, int], groups: int = 1) -> np.ndarray:
  """Numbers of the pieces within their group, the most important first; [N, groups * pieces]."""
  values = np.asarray(importance)
  if values.shape != shape:
    raise ConfigError(f'importance of {what}: shape {values.shape}, expected {shape} from the encoder')
  if not np.isfinite(values).all():
    raise NumericsError(
      f'importance of {what}: not finite, so that nothing can be sorted by it; look at the loss of the model on the '
      'rows of config.adapt.importance_rows'
    )
  return np.argsort(-values.reshape(shape[0], groups, -1), axis=-1, kind='stable').reshape(shape)


def _taken(parts: Any, order: np.ndarray, axes: tuple[int, ...]) -> Any:
  """Entries along the last of `axes` in an order of their own for each index of the others."""
  index = order.reshape([parts.shape[axis] if axis in axes else 1 for axis in range(parts.ndim)])
  take = jnp.take_along_axis if isinstance(parts, jax.Array) else np.take_along_axis
  return take(parts, index, axis=axes[-1])
