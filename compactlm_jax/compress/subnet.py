"""Sub-networks of an encoder: a cell of DynaBERT as a slice of the full network's parameters, and its configuration.

Both are static functions: the ordinary encoder runs on what they return, and gradients flow back through the slices.
Width takes the leftmost heads and feed-forward neurons of each layer, depth drops layers evenly, and a hidden size is
that of the leftmost channels of the residual stream (Hou et al. 2020, huawei-noah/Pretrained-Language-Model
`DynaBERT/transformers/modeling_bert.py`).

Of a grouped feed-forward each group keeps its own leftmost neurons, and its own leftmost channels of the residual
stream: elsewhere in the model, too, a hidden size is the first channels of each group, so that a group goes on reading
the channels that it was trained on. In ConvBERT head h of both branches is one head, as its query serves both: it
stays or goes in query, key, value, the convolution's pointwise and value, the rows and columns of its taps and the
output's rows of both branches. The depthwise kernel runs over the layer's input and changes with the hidden size alone.
"""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from compactlm_jax.compress.layout import LAYERS, Axes, checked_leaves, folded, layer_axes, outer_axes, places, unfolded
from compactlm_jax.config import Cell, EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.tree import map_named
from compactlm_jax.types import Params

_CUT = ('encoder', 'classifier', 'span', 'mlm_head', 'rtd_head')
"""Parts of a tree that depend on the hidden size of the encoder."""


def kept_layers(num_layers: int, depth: float) -> tuple[int, ...]:
  """Numbers, from 0, of the layers of a sub-network: floor(i / depth) for i < round(depth * layers), as published.

  12 layers at .75 keep 0, 1, 2, 4, 5, 6, 8, 9, 10; the last layer goes at every depth below 1, unless the count is
  rounded up. The numbers take the share as the nearest fraction of small numbers (.6667 is 2/3) and are exact; the
  count takes it as it is, and rounds a half to the even number.

  Args:
    num_layers: layers of the full network.
    depth: share of them.

  Raises:
    ConfigError: a share that keeps no layer, or more than there are.
  """
  if not 0 < depth <= 1:
    raise ConfigError(
      f'config.adapt.depths: {depth:g} of {num_layers} layers: a sub-network cannot have more layers than there are, '
      'nor none; use shares in (0, 1]'
    )
  count = round(depth * num_layers)
  if not count:
    raise ConfigError(f'config.adapt.depths: {depth:g} of {num_layers} layers is none; use a larger share')
  share = Fraction(depth).limit_denominator(max(100, 2 * num_layers))  # off by < .5 / num_layers, and not 0
  return tuple(i * share.denominator // share.numerator for i in range(count))


def cut(encoder: EncoderConfig, cell: Cell) -> tuple[EncoderConfig, tuple[int, ...]]:
  """(configuration, layers that are kept): equal for two cells that are the same network, whatever their shares.

  Raises:
    ConfigError: see `subnet_config`.
  """
  return subnet_config(encoder, cell), kept_layers(encoder.num_layers, cell.depth)


def subnet_config(encoder: EncoderConfig, cell: Cell) -> EncoderConfig:
  """The configuration of a sub-network.

  It has round(width * heads) heads, a half rounded to the even number, and the same share of the neurons (12 heads at
  .25 are 3, with a quarter of the neurons). The size of a head stays. An embedding as wide as the residual stream
  follows its hidden size; a factorised one stays.

  Args:
    encoder: the full network.
    cell: the sub-network; its hidden size leaves heads and neurons to its width.

  Raises:
    ConfigError: an encoder whose layers differ in size, or a cell without heads, neurons or layers, or larger than the
      encoder, or with a size that the groups of the feed-forward do not divide.
  """
  groups, (hidden, embedding) = encoder.num_groups, _stream_sizes(encoder, cell.hidden)
  field, share = 'config.adapt.widths', f'{cell.width:g}'
  if cell.hidden:
    field, share = 'config.adapt.hidden_sizes', f'{cell.hidden}: its share {cell.width:g}'
  if encoder.ragged:
    raise ConfigError(f'{field}: the layers of the encoder differ in size; take the padded export of this model')
  if not 0 < cell.width <= 1:
    raise ConfigError(f'{field}: {share} is no share of the heads and neurons; use shares in (0, 1]')
  heads = round(encoder.num_heads * cell.width)
  neurons = heads * encoder.intermediate_size // encoder.num_heads
  for what, count, all_of_them in (
    ('heads', heads, encoder.num_heads),
    ('neurons', neurons, encoder.intermediate_size),
  ):
    if not count:
      raise ConfigError(f'{field}: {share} of {all_of_them} {what} is none; use a larger one')
  if neurons % groups:
    raise ConfigError(
      f'{field}: {share} leaves {neurons} neurons, which do not divide over the {groups} groups of the '
      'feed-forward; use another'
    )
  return dataclasses.replace(
    encoder,
    num_layers=len(kept_layers(encoder.num_layers, cell.depth)),
    num_heads=heads,
    intermediate_size=neurons,
    hidden_size=hidden,
    embedding_size=embedding,
  )


def _stream_sizes(encoder: EncoderConfig, hidden: int) -> tuple[int, int]:
  """Hidden size and embedding size of a cell."""
  field = f'config.adapt.hidden_sizes: {hidden}'
  if hidden in (0, encoder.hidden_size):
    return encoder.hidden_size, encoder.embedding_size
  if not 0 < hidden < encoder.hidden_size:
    raise ConfigError(f'{field} must be between 1 and {encoder.hidden_size}, the hidden size of the full network')
  if hidden % encoder.num_groups:
    raise ConfigError(f'{field} does not divide over the {encoder.num_groups} groups of the feed-forward')
  if encoder.embedding_size == encoder.hidden_size:
    return hidden, hidden
  if encoder.embedding_size == hidden:
    raise ConfigError(
      f'{field} is the size of the factorised embeddings, and an encoder of equal sizes has no projection, which the '
      'full network has; use another hidden size'
    )
  return hidden, encoder.embedding_size


def subnet(params: Params, encoder: EncoderConfig, cell: Cell) -> Params:
  """The parameters of a sub-network, sliced out of the full network's.

  Works under `jax.jit` (all slices are static), is differentiable, and slices NumPy arrays on the host too. With a
  smaller hidden size the heads on the encoder are sliced with it ('classifier', 'span', 'mlm_head', 'rtd_head'; a tied
  word table is the encoder's). 'generator' (ELECTRA's) passes as it is: it belongs to the full network, of which it
  shares the embeddings.

  Args:
    params: a tree with 'encoder'.
    encoder: the configuration of the full network.
    cell: the sub-network.

  Returns:
    The tree that `subnet_config` describes; `params` itself if that is the full network.

  Raises:
    ConfigError: a cell that cannot be cut (see `subnet_config`), a tree with 'scores' (bake their masks first), shapes
      that are not the encoder's, or, where the hidden size shrinks, a part of the tree that is none of the above.
  """
  small = subnet_config(encoder, cell)
  if small == encoder:
    return params
  checked_leaves(params, encoder)
  layers = kept_layers(encoder.num_layers, cell.depth)
  narrow = small.hidden_size < encoder.hidden_size
  for part in params if narrow else ():
    if part not in (*_CUT, 'generator'):
      raise ConfigError(f'parameter {part}: which of its axes shrink with the hidden size is not known; take it out')

  def cut(part: str, name: str, leaf: Any) -> Any:
    name = f'{part}/{name}'
    if name.startswith(LAYERS):
      axes = layer_axes(name.removeprefix(LAYERS), encoder)
      return _leftmost(_chosen(leaf, layers), axes, encoder, small, stacked=True)
    return _leftmost(leaf, outer_axes(name), encoder, small, stacked=False)

  sliced = [part for part in params if part == 'encoder' or (narrow and part in _CUT)]
  return {**params, **{part: map_named(functools.partial(cut, part), params[part]) for part in sliced}}


def _chosen(leaf: Any, layers: tuple[int, ...]) -> Any:
  """The given layers of a stack, by slices alone: their gradient is no scatter."""
  if len(layers) == leaf.shape[0]:
    return leaf
  steps = {b - a for a, b in zip(layers, layers[1:])} or {1}
  if len(steps) == 1:
    return leaf[layers[0] : layers[-1] + 1 : steps.pop()]
  starts = [i for i, layer in enumerate(layers) if i == 0 or layer != layers[i - 1] + 1]
  parts = [leaf[layers[a] : layers[b - 1] + 1] for a, b in zip(starts, [*starts[1:], len(layers)])]
  return np.concatenate(parts) if isinstance(leaf, np.ndarray) else jnp.concatenate(parts)


def _leftmost(leaf: Any, axes: Axes, encoder: EncoderConfig, small: EncoderConfig, *, stacked: bool) -> Any:
  """The sub-network's share of a parameter."""
  groups = encoder.num_groups
  sizes = {
    'H': (encoder.num_heads, small.num_heads),
    'F': (encoder.intermediate_size // groups, small.intermediate_size // groups),
    'd': (encoder.hidden_size // groups, small.hidden_size // groups),
    'D': (encoder.hidden_size, small.hidden_size),
    'E': (encoder.embedding_size, small.embedding_size),
  }
  cut = {letter: after for letter, (before, after) in sizes.items() if after < before and letter in ''.join(axes)}
  if not cut:
    return leaf
  parts = folded(leaf, axes, encoder, stacked=stacked)
  for letter, size in cut.items():
    for axis in places(axes, letter, stacked=stacked):
      parts = _first(parts, axis, size, groups if letter in 'DE' else 1)
  return unfolded(parts, axes, stacked=stacked)


def _first(parts: Any, axis: int, size: int, groups: int) -> Any:
  """The first `size` entries along an axis, an equal share of them from each of its groups."""
  shape, before = parts.shape, [slice(None)] * axis
  if groups == 1:
    return parts[(*before, slice(size))]
  split = parts.reshape(*shape[:axis], groups, -1, *shape[axis + 1 :])
  return split[(*before, slice(None), slice(size // groups))].reshape(*shape[:axis], size, *shape[axis + 1 :])
