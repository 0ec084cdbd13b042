"""Heads on the encoder's hidden states."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compactlm_jax.config import EncoderConfig
from compactlm_jax.nn.layers import LayerNorm, MaskedDense, kernel_init
from compactlm_jax.ops.dense import as_row, gelu, tied_logits
from compactlm_jax.ops.dropout import dropout


class MlmHead(nn.Module):
  """Dense, GELU, LayerNorm, then the transposed word table and a bias (ELECTRA)."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: Float[Array, '*b D'], word_VE: Float[Array, 'V E']) -> Float[Array, '*b V']:
    cfg = self.config
    h = gelu(MaskedDense(cfg.embedding_size, cfg, name='dense')(x))
    h = LayerNorm(cfg.layer_norm_epsilon, name='norm')(h)
    bias_V = self.param('output_bias', nn.initializers.zeros, (cfg.vocab_size,))
    logits = tied_logits(h, word_VE)
    return logits + as_row(bias_V, logits)


class RtdHead(nn.Module):
  """Replaced-token detection: Dense, GELU, Dense to one logit per token (ELECTRA)."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T']:
    h = gelu(MaskedDense(self.config.hidden_size, self.config, name='dense')(x_BTD))
    output = MaskedDense(1, self.config, glorot=self.config.glorot_projections, name='output')
    return output(h.astype(jnp.float32))[..., 0]


class Classifier(nn.Module):
  """Dropout, then one Dense layer, on a vector per row."""

  num_classes: int
  config: EncoderConfig
  dropout: float = 0.1

  @nn.compact
  def __call__(self, x_BD: Float[Array, 'B D'], key: jax.Array | None = None) -> Float[Array, 'B C']:
    kernel = self.param('kernel', kernel_init(self.config.initializer_range), (x_BD.shape[-1], self.num_classes))
    bias = self.param('bias', nn.initializers.zeros, (self.num_classes,))
    return dropout(x_BD.astype(jnp.float32), self.dropout, key) @ kernel + bias[None]
