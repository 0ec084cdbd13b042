"""Heads and neurons that contribute a constant are removed from a tree, exactly; and put back as zeros.

All of it runs on the host, on NumPy arrays, layer by layer. The function of the encoder stays what it was in
evaluation, up to rounding. In training attention dropout tells the two apart: a head whose values are a constant gives
that constant only while its probabilities add up to one.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from compactlm_jax.compress.layout import checked_leaves, folded, layer_axes, places, unfolded
from compactlm_jax.compress.structure import kernel_shapes
from compactlm_jax.config import EncoderConfig, runs, stack_names
from compactlm_jax.ops.dense import gelu
from compactlm_jax.tree import nested
from compactlm_jax.types import Params

_Layer = dict[str, np.ndarray]
"""Parameters of one layer: 'attention/query/kernel' -> array without the layer axis."""


def shrink(params: Params, config: EncoderConfig) -> tuple[Params, EncoderConfig]:
  """Removes every head and neuron whose contribution does not depend on the input.

  A neuron goes if its row of `ffn_out` is zero, or its column of `ffn_in` is: then gelu(bias) times its row joins the
  output bias. A grouped feed-forward needs as many neurons in every group, so that the group with the most decides and
  the others keep some of their dead ones.

  A head goes if each of its channels has a zero row in the output or a zero column in `value`: then the value's bias
  times that row joins the output bias, since attention probabilities add up to one (in rows that are all padding too).
  Head h of a ConvBERT goes from both branches or not at all. Its convolution must have, for each channel, a zero row in
  the output, or a zero column and a zero bias in `conv/value`: taps that reach over the row's end, or read padding, do
  not add up to one, so that no other constant exists. And its query feeds the kernels of all heads: each of its
  channels of the taps' input must be constant (the query's or `pointwise`'s column and bias are zero, or both columns
  are), which then joins the taps' bias, or have zero rows in `conv/taps` for every head that stays.

  Args:
    params: a tree with 'encoder', masks baked; other parts are passed on as they are.
    config: the encoder's configuration, ragged or not.

  Returns:
    The smaller tree, and its configuration: uniform if all layers have the same sizes, none of them 0; otherwise with
    `heads_per_layer` or `neurons_per_layer` beside the sizes before. A tree that has nothing to remove comes back
    itself.

  Raises:
    ConfigError: scores in the tree, or shapes that are not the configuration's.
  """
  layers = _layers(params, config)
  layers = [_without_neurons(_without_heads(layer, config), config) for layer in layers]
  sizes = [_sizes(layer, config) for layer in layers]
  smaller = _with_sizes(config, sizes)
  if smaller == config:
    return params, config
  return _tree(params, layers, smaller), smaller


def padded(params: Params, config: EncoderConfig) -> tuple[Params, EncoderConfig]:
  """The same function in the stock sizes, with zeros: what classes that know one size for all layers can load.

  Args:
    params: a tree with 'encoder'.
    config: its configuration.

  Returns:
    The tree, and a configuration without per-layer sizes. Heads are filled up to `num_heads`, and so far that heads
    times their size (times branches) is the hidden size, where that is possible; neurons to `intermediate_size`.

  Raises:
    ConfigError: scores in the tree, or shapes that are not the configuration's.
  """
  width = config.branches * config.head_size
  whole = config.hidden_size // width if config.hidden_size % width == 0 else 0
  stock = dataclasses.replace(config, num_heads=max(config.num_heads, whole), heads_per_layer=(), neurons_per_layer=())
  layers = [_filled(layer, config, stock) for layer in _layers(params, config)]
  return (params, config) if stock == config else (_tree(params, layers, stock), stock)


def _without_heads(layer: _Layer, config: EncoderConfig) -> _Layer:
  """The layer without the heads that `shrink` removes, their constants in the biases."""
  heads, _ = _sizes(layer, config)
  if not heads:
    return layer
  rows = _folded(layer, 'attention/output/kernel', config)  # [branch, H, K, D]
  gone, added = np.ones(heads, bool), np.zeros((heads, config.hidden_size))
  if config.self_attention:
    value, bias = (_folded(layer, f'attention/value/{part}', config) for part in ('kernel', 'bias'))
    gone &= (_zero(rows[0], 2) | _zero(value, 0)).all(1)
    added = np.einsum('hk,hkd->hd', bias.astype(np.float64), rows[0])
  layer = dict(layer)
  if config.conv_kernel_size:
    value, bias = (_folded(layer, f'attention/conv/value/{part}', config) for part in ('kernel', 'bias'))
    gone &= (_zero(rows[-1], 2) | (_zero(value, 0) & (bias == 0))).all(1)
    gone, layer['attention/conv/taps/bias'] = _without_queries(layer, config, gone)
  if not gone.any():
    return layer
  layer['attention/output/bias'] = _plus(layer['attention/output/bias'], added[gone].sum(0))
  if gone.all():
    return {n: leaf for n, leaf in layer.items() if n == 'attention/output/bias' or not n.startswith('attention/')}
  out = dict(layer)
  for name, leaf in layer.items():
    axes = layer_axes(name, config)
    parts = folded(leaf, axes, config)
    for axis in places(axes, 'H'):
      parts = np.compress(~gone, parts, axis)
    out[name] = unfolded(parts, axes)
  return out


def _without_queries(layer: _Layer, config: EncoderConfig, gone: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Those of the heads whose channels no other head's taps need, and the taps' bias with their constants."""
  query, constant = (_folded(layer, f'attention/query/{part}', config) for part in ('kernel', 'bias'))
  fixed = _zero(query, 0)
  if config.conv_kind == 'span':
    span, offset = (_folded(layer, f'attention/conv/pointwise/{part}', config) for part in ('kernel', 'bias'))
    nothing = (fixed & (constant == 0)) | (_zero(span, 0) & (offset == 0))
    fixed, constant = nothing | (fixed & _zero(span, 0)), np.where(nothing, 0, constant * offset)
  kernel = _folded(layer, 'attention/conv/taps/kernel', config)  # [H, K, H, W]: what the second head reads of the first
  reads = (~_zero(kernel, 3) & ~fixed[..., None]).any(1)
  while (needed := gone & reads[:, ~gone].any(1)).any():  # a head that stays may need others in turn
    gone = gone & ~needed
  added = np.einsum('hk,hkgw->gw', np.where(fixed, constant, 0)[gone].astype(np.float64), kernel[gone])
  return gone, _plus(layer['attention/conv/taps/bias'], added.reshape(-1))


def _without_neurons(layer: _Layer, config: EncoderConfig) -> _Layer:
  """The layer without the neurons that `shrink` removes, their constants in the output bias."""
  if not _sizes(layer, config)[1]:
    return layer
  into, bias, onto = (_folded(layer, n, config) for n in ('ffn_in/kernel', 'ffn_in/bias', 'ffn_out/kernel'))
  dead = _zero(into, 1) | _zero(onto, 2)  # [G, F / G]
  most = int((~dead).sum(1).max())
  # The living first, each kind in its order: the first `most` of each group stay, in the order of before.
  keep = np.sort(np.argsort(dead, axis=1, kind='stable')[:, :most], axis=1)
  gone = np.ones_like(dead)
  np.put_along_axis(gone, keep, False, axis=1)
  if not gone.any():
    return layer
  active = np.where(gone, np.asarray(gelu(jnp.asarray(bias))), 0).astype(np.float64)
  out = {**layer, 'ffn_out/bias': _plus(layer['ffn_out/bias'], np.einsum('gf,gfd->gd', active, onto).reshape(-1))}
  if not most:
    return {name: leaf for name, leaf in out.items() if not name.startswith(('ffn_in/', 'ffn_out/kernel'))}
  for name, parts in (
    ('ffn_in/kernel', np.take_along_axis(into, keep[:, None], 2)),
    ('ffn_in/bias', np.take_along_axis(bias, keep, 1)),
    ('ffn_out/kernel', np.take_along_axis(onto, keep[..., None], 1)),
  ):
    out[name] = unfolded(parts, layer_axes(name, config))
  return out


def _filled(layer: _Layer, config: EncoderConfig, stock: EncoderConfig) -> _Layer:
  """The layer with zeros up to the stock sizes."""
  out = {}
  for name, shape in _shapes(stock).items():
    empty = {name: np.zeros(shape, np.float32)}
    parts = _folded(empty, name, stock)
    if name in layer:
      small = _folded(layer, name, config)
      parts[tuple(slice(0, n) for n in small.shape)] = small
    out[name] = parts.reshape(shape)
  return {**layer, **out}


def _shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
  """Name -> shape of what depends on heads or neurons in one layer of a uniform encoder."""
  out: dict[str, tuple[int, ...]] = {}
  for name, (_, *shape) in kernel_shapes(config).items():
    short = name.removeprefix('encoder/layers/').removesuffix('kernel')
    width = {'ffn_in/': config.intermediate_size, 'ffn_out/': config.hidden_size}.get(short, shape[-1])
    out |= {short + 'kernel': tuple(shape), short + 'bias': (width,)}
  if config.conv_kernel_size and config.conv_kind == 'span':
    out['attention/conv/depthwise/kernel'] = (config.conv_kernel_size, config.hidden_size)
  return out


def _folded(layer: _Layer, name: str, config: EncoderConfig) -> np.ndarray:
  return folded(layer[name], layer_axes(name, config), config)


def _zero(x: np.ndarray, axis: int) -> np.ndarray:
  return (x == 0).all(axis)


def _plus(bias: np.ndarray, added: np.ndarray) -> np.ndarray:
  return (bias + added).astype(np.float32)


def _sizes(layer: _Layer, config: EncoderConfig) -> tuple[int, int]:
  """Heads and neurons of a layer, by its parameters."""
  query, bias = layer.get('attention/query/bias', ()), layer.get('ffn_in/bias', ())
  return len(query) // config.head_size, len(bias)


def _with_sizes(config: EncoderConfig, sizes: list[tuple[int, int]]) -> EncoderConfig:
  """The configuration of layers of (heads, neurons); `config` has the stock sizes."""
  heads, neurons = zip(*sizes)
  if len(set(sizes)) == 1 and all(sizes[0]):
    return dataclasses.replace(
      config, num_heads=heads[0], intermediate_size=neurons[0], heads_per_layer=(), neurons_per_layer=()
    )
  return dataclasses.replace(
    config,
    heads_per_layer=() if set(heads) == {config.num_heads} else heads,
    neurons_per_layer=() if set(neurons) == {config.intermediate_size} else neurons,
  )


def _layers(params: Params, config: EncoderConfig) -> list[_Layer]:
  """The parameters of each layer, on the host, shapes checked."""
  leaves, out = checked_leaves(params, config), []
  for stack, (start, stop, _) in zip(stack_names(config), runs(config)):
    own = {n.removeprefix(f'{stack}/'): np.asarray(leaf) for n, leaf in leaves.items() if n.startswith(f'{stack}/')}
    out += [{name: leaf[i] for name, leaf in own.items()} for i in range(stop - start)]
  return out


def _tree(params: Params, layers: list[_Layer], config: EncoderConfig) -> Params:
  """`params` with these layers in the stacks of `config`; JAX arrays if they were."""
  encoder = {name: tree for name, tree in params['encoder'].items() if not name.startswith('layers')}
  xp = jnp if isinstance(jax.tree.leaves(params['encoder'])[0], jax.Array) else np
  for stack, (start, stop, _) in zip(stack_names(config), runs(config)):
    names = layers[start]
    encoder[stack] = nested({name: xp.stack([layer[name] for layer in layers[start:stop]]) for name in names})
  return {**params, 'encoder': encoder}
