"""What the axes of each parameter are made of: heads and their channels, groups and their neurons, branches, taps.

An axis is a string of letters, outermost first:

  B  branches (self-attention, then convolution)   H  heads            K  channels of a head      W  taps
  G  groups of the feed-forward                    F  neurons of one   d  hidden channels of one  D  hidden size
  E  embedding size                                P  a pair           .  anything else

So the rows of ConvBERT's attention output are 'BHK', and the bias of a grouped feed-forward is 'GF'. `folded` gives
each letter an axis of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np

from compactlm_jax.compress.structure import kernel_shapes
from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.tree import named_leaves
from compactlm_jax.types import Params

_Leaf = TypeVar('_Leaf', np.ndarray, jax.Array)

Axes = tuple[str, ...]

LAYERS = 'encoder/layers/'
"""What the names of the stacked layers of an encoder begin with (one that is not ragged)."""

_LAYER: Mapping[str, Axes] = {
  **{
    f'attention/{name}/{part}': axes
    for name in ('query', 'key', 'value', 'conv/pointwise', 'conv/value')
    for part, axes in (('kernel', ('D', 'HK')), ('bias', ('HK',)))
  },
  'attention/conv/depthwise/kernel': ('W', 'D'),
  'attention/conv/taps/kernel': ('HK', 'HW'),
  'attention/conv/taps/bias': ('HW',),
  'attention/output/kernel': ('BHK', 'D'),
  'attention/output/bias': ('D',),
  'ffn_in/bias': ('GF',),
  'ffn_out/bias': ('D',),
  **{f'{norm}/{part}': ('D',) for norm in ('attention_norm', 'ffn_norm') for part in ('scale', 'bias')},
}
_DENSE: Mapping[str, Axes] = {'ffn_in/kernel': ('Gd', 'F'), 'ffn_out/kernel': ('GF', 'd')}  # of one group
_GROUPED: Mapping[str, Axes] = {'ffn_in/kernel': ('G', 'd', 'F'), 'ffn_out/kernel': ('G', 'F', 'd')}
_OUTSIDE: Mapping[str, Axes] = {
  **{f'encoder/embeddings/{table}/embedding': ('.', 'E') for table in ('word', 'position', 'token_type')},
  **{f'{norm}/{part}': ('E',) for norm in ('encoder/embeddings/norm', 'mlm_head/norm') for part in ('scale', 'bias')},
  'encoder/embeddings/projection/kernel': ('E', 'D'),
  'encoder/embeddings/projection/bias': ('D',),
  'encoder/pooler/kernel': ('D', 'D'),
  'encoder/pooler/bias': ('D',),
  'classifier/kernel': ('D', '.'),
  'classifier/bias': ('.',),
  'mlm_head/dense/kernel': ('D', 'E'),
  'mlm_head/dense/bias': ('E',),
  'mlm_head/output_bias': ('.',),
  'rtd_head/dense/kernel': ('D', 'D'),
  'rtd_head/dense/bias': ('D',),
  'rtd_head/output/kernel': ('D', '.'),
  'rtd_head/output/bias': ('.',),
}


def layer_axes(name: str, config: EncoderConfig) -> Axes:
  """The axes of one layer's parameter, without the axis of layers.

  Args:
    name: as in 'attention/query/kernel'.
    config: its encoder.

  Raises:
    ConfigError: a name that no layer has.
  """
  axes = {**_LAYER, **(_DENSE if config.num_groups == 1 else _GROUPED)}.get(name)
  if axes is None:
    raise ConfigError(f'parameter {LAYERS}{name}: the layers of an encoder have nothing of this name; remove it')
  return axes


def outer_axes(name: str) -> Axes:
  """The axes of a parameter outside the layers: of embeddings, the pooler and heads.

  A head that finds spans has hidden states along its rows, of the joint head a pair of them, one behind the other. The
  units of its hidden layers are its own.

  Args:
    name: as in 'classifier/kernel'.

  Raises:
    ConfigError: a name that is none of theirs.
  """
  if name.startswith('span/'):
    wide = name in ('span/end_hidden/kernel', 'span/answerable_hidden/kernel')
    reads = wide or name in ('span/kernel', 'span/start/kernel')
    return ('PD' if wide else 'D', '.') if reads else ('.', '.') if name.endswith('/kernel') else ('.',)
  if name not in _OUTSIDE:
    raise ConfigError(f'parameter {name}: what its axes are made of is not known; take it out of the tree')
  return _OUTSIDE[name]


def folded(leaf: _Leaf, axes: Axes, config: EncoderConfig, *, stacked: bool = False) -> _Leaf:
  """A parameter with an axis for each letter; heads, neurons and hidden sizes as many as the parameter has.

  Of a query's kernel [D, H, K]; of the attention's output [B, H, K, D]; of the taps [H, K, H, W]; of the feed-forward,
  grouped or not, [G, d, F] and [G, F, d].

  Args:
    leaf: the parameter.
    axes: its axes.
    config: its encoder.
    stacked: it has the axis of layers in front.
  """
  fixed = {'B': config.branches, 'K': config.head_size, 'W': config.conv_kernel_size, 'G': config.num_groups, 'P': 2}
  shape = list(leaf.shape[:stacked])
  for size, letters in zip(leaf.shape[stacked:], axes, strict=True):
    known = math.prod(fixed.get(letter, 1) for letter in letters)
    shape += [fixed.get(letter, size // known) for letter in letters]
  return leaf.reshape(shape)


def unfolded(parts: _Leaf, axes: Axes, *, stacked: bool = False) -> _Leaf:
  """The inverse of `folded`, whatever the sizes are by now.

  Args:
    parts: what `folded` gave, perhaps cut or sorted.
    axes: the axes of the parameter.
    stacked: it has the axis of layers in front.
  """
  shape, at = list(parts.shape[:stacked]), int(stacked)
  for letters in axes:
    shape.append(math.prod(parts.shape[at : at + len(letters)]))
    at += len(letters)
  return parts.reshape(shape)


def places(axes: Axes, letter: str, *, stacked: bool = False) -> tuple[int, ...]:
  """The axes of a letter in the folded parameter.

  Args:
    axes: the axes of the parameter.
    letter: one of the module's.
    stacked: it has the axis of layers in front.
  """
  return tuple(i for i, found in enumerate(''.join(axes), start=int(stacked)) if found == letter)


def checked_leaves(params: Params, config: EncoderConfig) -> dict[str, np.ndarray | jax.Array]:
  """Name -> parameter of the tree under 'encoder', names without it, after a look at scores and shapes.

  Args:
    params: a tree with 'encoder'.
    config: its configuration.

  Raises:
    ConfigError: scores in the tree, or shapes that are not the configuration's.
  """
  if 'scores' in params:
    raise ConfigError('parameter scores: the tree still has scores of pruning; bake its masks into the weights first')
  leaves = named_leaves(params['encoder'])
  for name, shape in kernel_shapes(config).items():
    found = leaves.get(name.removeprefix('encoder/'))
    if found is None or found.shape != shape:
      what = 'it is missing' if found is None else f'found shape {found.shape}'
      raise ConfigError(f'parameter {name}: {what}, expected {shape} from the configuration of the encoder')
  return leaves
