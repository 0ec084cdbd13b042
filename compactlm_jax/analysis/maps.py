"""What a model does with one sentence: attention, value relations and convolution kernels, token by token.

And what heads that are left of a larger network do, beside those that it had.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compactlm_jax.analysis.concentration import attention_probabilities
from compactlm_jax.analysis.statistics import Model, value_relation
from compactlm_jax.compress.subnet import kept_layers, subnet_config
from compactlm_jax.config import Cell, EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.attention import SpanDynamicConv
from compactlm_jax.nn.encoder import encode
from compactlm_jax.ops.dynamic_conv import tap_reads
from compactlm_jax.types import Params, struct


@struct
class Maps:
  """One sentence of T tokens seen by a model of N layers.

  Attributes:
    attention_NHTT: attention probabilities, query by key.
    values_NTT: value relations, heads averaged.
    taps_NHTW: kernel of the dynamic convolution at each position; NaN where a tap reads beyond the sentence. None for
      models without a convolution.
  """

  attention_NHTT: Float[Array, 'N H T T']
  values_NTT: Float[Array, 'N T T']
  taps_NHTW: Float[Array, 'N H T W'] | None = None


def sentence_maps(model: Model, ids: list[int]) -> Maps:
  """The maps of one sentence, as NumPy arrays.

  Args:
    model: from `statistics.analysed`.
    ids: its token ids, special tokens included.
  """
  return jax.tree.map(np.asarray, _maps(model.config, model.params, jnp.asarray(ids, jnp.int32)[None]))


@functools.partial(jax.jit, static_argnums=0)
def _maps(config: EncoderConfig, params: Params, ids_1T: Array) -> Maps:
  mask_1T, everything = jnp.ones_like(ids_1T), tuple(range(1, config.num_layers + 1))
  out = encode(params, config, ids_1T, mask_1T, all_hidden=True, qkv_layers=everything)
  attention = [attention_probabilities(qkv, mask_1T, causal=config.causal)[0] for qkv in out.qkv]
  values = [value_relation(qkv, mask_1T, causal=config.causal)[0].mean(0) for qkv in out.qkv]
  if not config.conv_kernel_size:
    return Maps(jnp.stack(attention), jnp.stack(values))
  assert out.hidden_NBTD is not None
  kernels = params['encoder']['layers']['attention']['conv']
  taps = [_taps(config, _at(kernels, i), out.hidden_NBTD[i], qkv.q_BTHK) for i, qkv in enumerate(out.qkv)]
  return Maps(jnp.stack(attention), jnp.stack(values), jnp.stack(taps))


@dataclasses.dataclass(frozen=True)
class HeadMatch:
  """A layer of a network before heads were cut, and the layer that was left of it.

  Attributes:
    layer: 1-based, in the larger network.
    small_layer: 1-based, in the smaller one.
    overlap_gH: attention that a remaining head (row) and a head of the larger network (column) have in common:
      sum over keys of the smaller probability, mean over queries; 1 is the same map.
  """

  layer: int
  small_layer: int
  overlap_gH: np.ndarray


def cut_heads(large: EncoderConfig, small: EncoderConfig) -> bool:
  """Whether `small` could be what is left of `large` after heads were cut.

  It has heads of the same size, no more layers and neurons, in no layer more heads than the one it comes from and in
  some layer fewer, and the same hidden size or one of `compress.subnet` with its share of heads and neurons. Layers
  alone that are missing say nothing: a distilled student has the heads of its teacher and is no part of it.
  """
  if small.head_size != large.head_size or small.num_layers > large.num_layers:
    return False
  sources = kept_layers(large.num_layers, small.num_layers / large.num_layers)
  counts = [config.heads_per_layer or (config.num_heads,) * config.num_layers for config in (large, small)]
  before, after = [counts[0][source] for source in sources], counts[1]
  if any(a > b for a, b in zip(after, before, strict=True)) or sum(after) == sum(before):
    return False
  if small.intermediate_size > large.intermediate_size or small.hidden_size > large.hidden_size:
    return False
  return small.hidden_size == large.hidden_size or _narrowed(large, small)


def _narrowed(large: EncoderConfig, small: EncoderConfig) -> bool:
  """Whether `small` has the sizes of a sub-network of a smaller hidden size."""
  share = small.hidden_size / large.hidden_size
  try:
    cell = subnet_config(large, Cell(share, small.num_layers / large.num_layers, small.hidden_size))
  except ConfigError:  # no such sub-network
    return False
  sizes = ('num_layers', 'num_heads', 'head_size', 'intermediate_size', 'embedding_size', 'heads_per_layer')
  return all(getattr(cell, name) == getattr(small, name) for name in sizes)


def matched_heads(large: Maps, small: Maps) -> tuple[HeadMatch, ...]:
  """For each layer of a sub-network the layer that it was cut from (`compress.subnet.kept_layers`), head by head.

  Args:
    large: of the larger network, on the same sentence.
    small: of what is left of it (`cut_heads`).
  """
  layers, kept = len(small.attention_NHTT), len(large.attention_NHTT)
  found = []
  for number, source in enumerate(kept_layers(kept, layers / kept)):
    own_gTT, whole_HTT = np.asarray(small.attention_NHTT[number]), np.asarray(large.attention_NHTT[source])
    shared = np.minimum(own_gTT[:, None], whole_HTT[None]).sum(-1).mean(-1)
    found.append(HeadMatch(source + 1, number + 1, shared))
  return tuple(found)


def _at(params: Params, layer: int) -> Params:
  return jax.tree.map(lambda leaf: leaf[layer], params)


def _taps(config: EncoderConfig, params: Params, x_1TD: Array, q_1THK: Array) -> Float[Array, 'H T W']:
  """Kernels of one layer, NaN where they read beyond the row."""
  mask_1T = jnp.ones(x_1TD.shape[:2], jnp.float32)
  taps_W1TH = SpanDynamicConv(config).apply({'params': params}, x_1TD, q_1THK, mask_1T, only_taps=True)
  assert isinstance(taps_W1TH, jax.Array)
  reads_WT = tap_reads(mask_1T, config.conv_kernel_size, causal=config.causal)[:, 0]
  return jnp.where(reads_WT[..., None] > 0, taps_W1TH[:, 0].astype(jnp.float32), jnp.nan).transpose(2, 1, 0)
