"""Layers with parameters: masked and grouped Dense, embeddings, LayerNorm."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from compactlm_jax.config import EncoderConfig
from compactlm_jax.ops.dense import add_bias, dense, grouped_matmul, layer_norm
from compactlm_jax.ops.dropout import dropout
from compactlm_jax.ops.masks import masked_weight

MaskFn = Callable[[Array], Array]
"""scores -> mask of the same shape."""


def kernel_init(stddev: float) -> nn.initializers.Initializer:
  """Normal truncated at two standard deviations, as TensorFlow's: its deviation is 0.88 `stddev`, not rescaled."""

  def init(key, shape, dtype=jnp.float32):
    return stddev * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)

  return init


class MaskedDense(nn.Module):
  """A Dense layer; given a 'scores' collection, its kernel is masked by `mask_fn` of the scores.

  Without that collection it is the Dense layer bit for bit.
  """

  features: int
  config: EncoderConfig
  mask_fn: MaskFn | None = None
  glorot: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, '*b i']) -> Float[Array, '*b o']:
    shape = (x.shape[-1], self.features)
    init = nn.initializers.glorot_uniform() if self.glorot else kernel_init(self.config.initializer_range)
    kernel = self.param('kernel', init, shape)
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    return dense(x, _masked(self, kernel, self.mask_fn), bias)


def _masked(layer: nn.Module, kernel: Array, mask_fn: MaskFn | None) -> Array:
  """The kernel times the mask of the layer's scores, if it has any."""
  if mask_fn is None or not layer.has_variable('scores', 'kernel'):
    return kernel
  scores: Array = layer.get_variable('scores', 'kernel')
  return masked_weight(kernel, scores, mask_fn(scores))


class Bias(nn.Module):
  """What is left of a Dense layer whose inputs were all removed: its bias, of the named layer's parameter tree."""

  features: int

  @nn.compact
  def __call__(self, like: Float[Array, '*b d']) -> Float[Array, '*b o']:
    """The bias at every position of `like`, in its dtype."""
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    return jnp.broadcast_to(bias.astype(like.dtype), (*like.shape[:-1], self.features))


class GroupedDense(nn.Module):
  """Dense on `groups` contiguous slices of the features, concatenated; no shuffle (ConvBERT)."""

  features: int
  groups: int
  config: EncoderConfig
  mask_fn: MaskFn | None = None

  @nn.compact
  def __call__(self, x: Float[Array, '*b i']) -> Float[Array, '*b o']:
    size = x.shape[-1] // self.groups
    shape = (self.groups, size, self.features // self.groups)
    kernel = self.param('kernel', kernel_init(self.config.initializer_range), shape)
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    kernel = _masked(self, kernel, self.mask_fn)
    return add_bias(grouped_matmul(x, kernel.astype(x.dtype)), bias.astype(x.dtype))


class LayerNorm(nn.Module):
  """LayerNorm over the last axis with float32 statistics (two passes: no cancellation), result in x's dtype."""

  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, '*b d']) -> Float[Array, '*b d']:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    return layer_norm(x, scale, bias, self.epsilon)


class Embedding(nn.Module):
  """A table of `rows` vectors. An id outside the table gives NaN, never another row."""

  rows: int
  features: int
  config: EncoderConfig

  def setup(self) -> None:
    self.embedding = self.param('embedding', kernel_init(self.config.initializer_range), (self.rows, self.features))

  def __call__(self, ids_BT: Int[Array, 'B T']) -> Float[Array, 'B T E']:
    # As unsigned, -1 is out of range too; JAX would wrap it to the last row.
    return self.embedding.at[ids_BT.astype(jnp.uint32)].get(mode='fill', fill_value=jnp.nan)


class Embeddings(nn.Module):
  """word + position + token type -> LayerNorm -> dropout -> projection if the sizes differ (ConvBERT)."""

  config: EncoderConfig

  @nn.compact
  def __call__(
    self,
    input_ids_BT: Int[Array, 'B T'],
    token_type_ids_BT: Int[Array, 'B T'],
    key: jax.Array | None,
    site: int,
    word_BTE: Float[Array, 'B T E'] | None = None,
  ) -> Float[Array, 'B T D']:
    cfg, size = self.config, self.config.embedding_size
    if word_BTE is None:
      word_BTE = Embedding(cfg.vocab_size, size, cfg, name='word')(input_ids_BT)
    positions = jnp.arange(input_ids_BT.shape[1])[None]
    position_1TE = Embedding(cfg.max_positions, size, cfg, name='position')(positions)
    type_BTE = Embedding(cfg.type_vocab_size, size, cfg, name='token_type')(token_type_ids_BT)
    x_BTE = LayerNorm(cfg.layer_norm_epsilon, name='norm')(word_BTE + position_1TE + type_BTE)
    x_BTE = dropout(x_BTE.astype(cfg.dtype), cfg.hidden_dropout, key, site)
    if size == cfg.hidden_size:
      return x_BTE
    return MaskedDense(cfg.hidden_size, cfg, glorot=cfg.glorot_projections, name='projection')(x_BTE)
