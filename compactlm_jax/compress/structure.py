"""What of an encoder can be masked, in which pieces, and which parameters a piece covers.

Pieces: single weights ('none'), heads, neurons of the feed-forward, rectangles of a matrix ('block'). Each kind has
scores under a name of its own, with a leading axis of layers:

  encoder/layers/attention/query/kernel   [N, in, out]          'none', one for each maskable kernel
  encoder/layers/attention/heads          [N, H]
  encoder/layers/neurons                  [N, F]
  encoder/layers/attention/query/blocks   [N, in / rows, out / columns]

Everything is linear in the scores (broadcast and repeat), so that gradients of parameters are summed over a piece.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compactlm_jax.config import EncoderConfig, runs, stack_names
from compactlm_jax.errors import ConfigError

Shapes = dict[str, tuple[int, ...]]

_PIECES = {
  'none': (),
  'heads': ('heads',),
  'neurons': ('neurons',),
  'heads+neurons': ('heads', 'neurons'),
  'block': ('blocks', 'feed-forward blocks'),
  'block+neurons': ('blocks', 'neurons'),
}
"""Structure -> kinds of pieces; 'none' has single weights."""


def maskable(encoder: EncoderConfig) -> tuple[str, ...]:
  """Names of the kernels that are masked: the attention's and the feed-forward's, of the convolution all but depthwise.

  Args:
    encoder: its configuration; a ragged one has names for each stack.
  """
  return tuple(kernel_shapes(encoder))


def kernel_shapes(encoder: EncoderConfig) -> Shapes:
  """Name -> shape [N, in, out] of the maskable kernels; [N, G, in / G, out / G] of a grouped feed-forward.

  Args:
    encoder: its configuration.
  """
  out: Shapes = {}
  for stack, (start, stop, run) in zip(stack_names(encoder), runs(encoder)):
    for name, shape in {**_attention_shapes(run), **_feed_forward_shapes(run)}.items():
      out[f'encoder/{stack}/{name}/kernel'] = (stop - start, *shape)
  return out


def _attention_shapes(config: EncoderConfig) -> Shapes:
  width, heads, out = config.hidden_size, config.num_heads, {}
  inner = heads * config.head_size
  if not heads:
    return {}
  reads = ['query', *(('key', 'value') if config.self_attention else ())]
  if config.conv_kernel_size:
    reads += [*(('conv/pointwise',) if config.conv_kind == 'span' else ()), 'conv/value']
    out['attention/conv/taps'] = (inner, heads * config.conv_kernel_size)
  out |= {f'attention/{name}': (width, inner) for name in reads}
  return {**out, 'attention/output': (inner * config.branches, width)}


def _feed_forward_shapes(config: EncoderConfig) -> Shapes:
  groups, width, neurons = config.num_groups, config.hidden_size, config.intermediate_size
  if not neurons:
    return {}
  if groups == 1:
    return {'ffn_in': (width, neurons), 'ffn_out': (neurons, width)}
  return {
    'ffn_in': (groups, width // groups, neurons // groups),
    'ffn_out': (groups, neurons // groups, width // groups),
  }


def score_shapes(encoder: EncoderConfig, structure: str, block: tuple[int, ...] = (32, 32)) -> Shapes:
  """Name under 'scores' -> shape, for every piece of a structure.

  The kernels of the convolution's taps have no blocks: they are small, and heads * taps wide.

  Args:
    encoder: whose layers are pruned.
    structure: 'none', 'heads', 'neurons', 'heads+neurons', 'block' or 'block+neurons'.
    block: rows (inputs) and columns (outputs) of a rectangle.

  Raises:
    ConfigError: an unknown structure, or a block that does not divide a matrix.
  """
  if structure not in _PIECES:
    raise ConfigError(f'config.prune.structure: {structure!r} is unknown; use one of {", ".join(map(repr, _PIECES))}')
  kernels, pieces = kernel_shapes(encoder), _PIECES[structure]
  if not pieces:
    return kernels
  out: Shapes = {}
  for stack, (start, stop, run) in zip(stack_names(encoder), runs(encoder)):
    prefix = f'encoder/{stack}'
    if 'heads' in pieces and run.num_heads:
      out[f'{prefix}/attention/heads'] = (stop - start, run.num_heads)
    for name in (name for name in kernels if name.startswith(prefix + '/') and not name.endswith('taps/kernel')):
      if ('blocks' if '/attention/' in name else 'feed-forward blocks') in pieces:
        out[name.removesuffix('kernel') + 'blocks'] = _blocks(name, kernels[name], block)
    if 'neurons' in pieces and run.intermediate_size:
      out[f'{prefix}/neurons'] = (stop - start, run.intermediate_size)
  return out


def _blocks(name: str, shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
  """Number of blocks along the last two axes."""
  if len(block) != 2 or min(block) < 1:
    raise ConfigError(f'config.prune.block: {block} must be two positive numbers, rows (inputs) and columns (outputs)')
  for what, size, part in zip(('rows', 'columns'), shape[-2:], block):
    if size % part:
      divisors = ', '.join(str(n) for n in range(1, size + 1) if size % n == 0)
      raise ConfigError(
        f'config.prune.block: blocks of {part} {what} do not divide {name}, which has {size}; use one of {divisors}'
      )
  return (*shape[:-2], shape[-2] // block[0], shape[-1] // block[1])


def expand(encoder: EncoderConfig, name: str, leaf: Float[Array, 'N ...']) -> dict[str, Float[Array, '...']]:
  """A value per piece as a value per parameter that the piece covers.

  Of single weights and of blocks that is the kernel alone. A neuron covers its column of `ffn_in`, the bias there and
  its row of `ffn_out` (of a grouped feed-forward too). A head covers its columns and biases in query, key and value and
  its rows of the output.

  ConvBERT's head h stands in both branches and is one piece: its query serves both. It covers query, key, value and
  output rows of both halves as above, and of the convolution its columns and biases in `pointwise`, `taps` (the kernel
  that mixes head h's own values) and `value`. The rows of `taps` that read head h's channels are not covered, since an
  entry there belongs to two heads: with those channels at zero they have no effect, and `shrink` removes them. So
  without head h the kernels of the other heads change: they are what a model without it would compute.

  Biases are covered (huggingface/nn_pruning: `bias_mask`, which its first versions did not have): with its bias a
  masked neuron would still add gelu(bias) times its row wherever that row is kept, and removing it would not be exact.
  Consequently they count in the gradient of the piece's score too, as everything that its mask multiplies.

  Args:
    encoder: whose parameters they are.
    name: a name of `score_shapes`.
    leaf: scores, masks or anything else of that shape.

  Returns:
    Parameter name -> array of exactly its shape.

  Raises:
    ConfigError: a name that is not one of the encoder's.
  """
  kernels = kernel_shapes(encoder)
  prefix, _, kind = name.rpartition('/')
  if name in kernels:
    return {name: leaf}
  if kind == 'blocks' and f'{prefix}/kernel' in kernels:
    return {f'{prefix}/kernel': _tiled(leaf, kernels[f'{prefix}/kernel'])}
  for stack, (_, _, run) in zip(stack_names(encoder), runs(encoder)):
    if name == f'encoder/{stack}/attention/heads':
      return _of_heads(run, prefix, leaf, kernels)
    if name == f'encoder/{stack}/neurons':
      return _of_neurons(run, prefix, leaf, kernels)
  raise ConfigError(f'scores/{name}: the encoder has nothing of this name to mask; take names from score_shapes')


def covered_kernels(encoder: EncoderConfig, name: str, shape: tuple[int, ...]) -> Shapes:
  """The kernels that pieces of a name cover, every weight of theirs: parameter name -> shape.

  Args:
    encoder: whose parameters they are.
    name: a name of `score_shapes`.
    shape: its shape there.

  Raises:
    ConfigError: as `expand`.
  """
  covered = jax.eval_shape(lambda leaf: expand(encoder, name, leaf), jax.ShapeDtypeStruct(shape, jnp.float32))
  return {own: tuple(spec.shape) for own, spec in covered.items() if own.endswith('/kernel')}


def piece_weights(encoder: EncoderConfig, shapes: Shapes) -> dict[str, int]:
  """Name of `score_shapes` -> how many weights of kernels one piece covers, in units of what divides all of them.

  Args:
    encoder: whose parameters they are.
    shapes: of `score_shapes`.
  """
  covered = {
    name: sum(map(math.prod, covered_kernels(encoder, name, shape).values())) for name, shape in shapes.items()
  }
  weights = {name: covered[name] // math.prod(shape) for name, shape in shapes.items()}
  unit = math.gcd(*weights.values())
  return {name: weight // unit for name, weight in weights.items()}


def acting_masks(encoder: EncoderConfig, name: str, mask: Float[Array, 'N ...'], *, baked: bool) -> dict[str, Array]:
  """The masks of `expand` so that a masked piece can come back, and that a gate between 0 and 1 acts once.

  A head or neuron is gone if the matrices that carry its result further are masked: its rows of the output, in
  ConvBERT also what makes its channels of the taps' input (`pointwise`, or the query if there is none). If everything
  that it covers were zero in training, its gradients were exactly zero too (its input times its output), and its score
  could never rise again. So masks of training leave the reading side as it is (ones), which changes no output and lets
  dL/dW' * W of the masked rows reach the score. Baked masks clear the reading side wherever the mask is zero.

  Args:
    encoder: whose parameters they are.
    name: a name of `score_shapes`.
    mask: one value per piece, 0 where it is removed.
    baked: for the finished model; False in training.

  Returns:
    Parameter name -> array of exactly its shape, for the names of `expand`.

  Raises:
    ConfigError: as `expand`.
  """
  wide, kind = expand(encoder, name, mask), name.rpartition('/')[2]
  if kind not in ('heads', 'neurons'):
    return wide
  ends = ['attention/output/kernel', 'ffn_out/kernel']
  if encoder.conv_kernel_size:
    cut = 'attention/conv/pointwise' if encoder.conv_kind == 'span' else 'attention/query'
    ends += [f'{cut}/kernel', f'{cut}/bias']
  out = {}
  for covered, array in wide.items():
    if not covered.endswith(tuple(ends)):
      array = (array != 0).astype(array.dtype) if baked else jnp.ones_like(array)
    out[covered] = array
  return out


def _of_heads(run: EncoderConfig, attention: str, leaf: Array, kernels: Shapes) -> dict[str, Array]:
  out = {}
  for name, shape in kernels.items():
    if not name.startswith(attention + '/'):
      continue
    if name == f'{attention}/output/kernel':
      rows_NA = _repeated(leaf, run.head_size)
      rows = jnp.concatenate([rows_NA] * run.branches, axis=1)
      out[name] = jnp.broadcast_to(rows[:, :, None], shape)
      continue
    columns = _repeated(leaf, shape[-1] // run.num_heads)
    out[name] = jnp.broadcast_to(columns[:, None], shape)
    out[name.removesuffix('kernel') + 'bias'] = columns
  return out


def _of_neurons(run: EncoderConfig, stack: str, leaf: Array, kernels: Shapes) -> dict[str, Array]:
  into, onto = kernels[f'{stack}/ffn_in/kernel'], kernels[f'{stack}/ffn_out/kernel']
  parts = leaf.reshape(into[:-2] + (1, into[-1]))  # [N, 1, F], or [N, G, 1, F / G]
  return {
    f'{stack}/ffn_in/kernel': jnp.broadcast_to(parts, into),
    f'{stack}/ffn_in/bias': leaf,
    f'{stack}/ffn_out/kernel': jnp.broadcast_to(parts.swapaxes(-1, -2), onto),
  }


def _repeated(leaf_NH: Array, times: int) -> Array:
  """[N, H] -> [N, H * times], each entry `times` times in a row."""
  layers, heads = leaf_NH.shape
  return jnp.broadcast_to(leaf_NH[:, :, None], (layers, heads, times)).reshape(layers, heads * times)


def _tiled(leaf: Array, shape: tuple[int, ...]) -> Array:
  """Each entry of the last two axes as a rectangle, to fill `shape`."""
  *batch, rows, columns = leaf.shape
  wide = jnp.broadcast_to(leaf[..., :, None, :, None], (*batch, rows, shape[-2] // rows, columns, shape[-1] // columns))
  assert math.prod(wide.shape) == math.prod(shape)
  return wide.reshape(shape)
