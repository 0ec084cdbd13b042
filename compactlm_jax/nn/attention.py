"""Self-attention, and ConvBERT's mixed attention: self-attention beside a span-based dynamic convolution."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from compactlm_jax.config import EncoderConfig
from compactlm_jax.nn.layers import MaskedDense, MaskFn, kernel_init
from compactlm_jax.ops.attention import attention, mask_bias
from compactlm_jax.ops.dynamic_conv import depthwise_conv, dynamic_conv
from compactlm_jax.ops.fusion import materialize
from compactlm_jax.types import QKV


class DepthwiseConv(nn.Module):
  """Depthwise convolution over time, no bias; initialised with deviation 1 / taps (ConvBERT)."""

  taps: int

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    kernel_WD = self.param('kernel', kernel_init(1.0 / self.taps), (self.taps, x_BTD.shape[-1]))
    return depthwise_conv(x_BTD, kernel_WD.astype(x_BTD.dtype))


class SpanDynamicConv(nn.Module):
  """Span-based dynamic convolution: each position's kernel comes from its query and its neighbourhood.

  K_s = separable convolution of x; taps = softmax(Dense(K_s * q)); out = taps applied to the values (ConvBERT).
  """

  config: EncoderConfig
  mask_fn: MaskFn | None = None

  @nn.compact
  def __call__(
    self, x_BTD: Float[Array, 'B T D'], q_BTHK: Float[Array, 'B T H K'], mask_BT: Int[Array, 'B T']
  ) -> Float[Array, 'B T H K']:
    """Mixes neighbouring values.

    Args:
      x_BTD: the layer's input.
      q_BTHK: the unscaled queries of self-attention.
      mask_BT: 1 for real tokens; read unless `config.conv_sees_padding`.

    Returns:
      One vector per position and head.
    """
    cfg = self.config
    heads, size, taps = cfg.num_heads, cfg.head_size, cfg.conv_kernel_size
    real_BT1 = mask_BT[..., None].astype(x_BTD.dtype)
    seen_BTD = x_BTD if cfg.conv_sees_padding else x_BTD * real_BT1
    span = DepthwiseConv(taps, name='depthwise')(seen_BTD)
    span = MaskedDense(heads * size, cfg, self.mask_fn, name='pointwise')(span)
    merged = span * q_BTHK.reshape(span.shape)
    logits = MaskedDense(heads * taps, cfg, self.mask_fn, name='taps')(merged)
    logits_BTHW = logits.reshape(*logits.shape[:2], heads, taps).astype(jnp.float32)
    # Taps first: the softmax and the sums over taps then run over long rows.
    taps_WBTH = jax.nn.softmax(materialize(jnp.moveaxis(logits_BTHW, -1, 0)), axis=0).astype(x_BTD.dtype)
    v = MaskedDense(heads * size, cfg, self.mask_fn, name='value')(x_BTD)
    v = v if cfg.conv_sees_padding else v * real_BT1
    return dynamic_conv(v.reshape(*v.shape[:2], heads, size), taps_WBTH)


class MixedAttention(nn.Module):
  """Multi-head attention; with `conv_kernel_size` > 0 as many convolution heads stand behind the attention heads."""

  config: EncoderConfig
  mask_fn: MaskFn | None = None

  @nn.compact
  def __call__(
    self, x_BTD: Float[Array, 'B T D'], mask_BT: Int[Array, 'B T'], key: jax.Array | None, site: int | Array
  ) -> tuple[Float[Array, 'B T D'], QKV]:
    """Returns the projected output (before dropout and residual) and the queries, keys and values."""
    cfg = self.config

    def project(name: str) -> Float[Array, 'B T H K']:
      out = MaskedDense(cfg.num_heads * cfg.head_size, cfg, self.mask_fn, name=name)(x_BTD)
      return out.reshape(*out.shape[:2], cfg.num_heads, cfg.head_size)

    qkv = QKV(project('query'), project('key'), project('value'))
    bias_B11S = mask_bias(mask_BT)
    heads = attention(qkv.q_BTHK, qkv.k_BTHK, qkv.v_BTHK, bias_B11S, rate=cfg.attention_dropout, key=key, site=site)
    if cfg.conv_kernel_size:
      conv = SpanDynamicConv(cfg, self.mask_fn, name='conv')(x_BTD, qkv.q_BTHK, mask_BT)
      heads = jnp.concatenate([heads, conv], axis=2)
    merged = heads.reshape(*heads.shape[:2], -1)
    return MaskedDense(cfg.hidden_size, cfg, self.mask_fn, name='output')(merged), qkv
