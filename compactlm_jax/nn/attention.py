"""Self-attention, and ConvBERT's mixed attention: self-attention beside a span-based dynamic convolution."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from compactlm_jax.config import EncoderConfig
from compactlm_jax.nn.layers import Bias, MaskedDense, MaskFn, kernel_init
from compactlm_jax.ops.attention import attention, mask_bias
from compactlm_jax.ops.dynamic_conv import depthwise_conv, dynamic_conv, tap_reads
from compactlm_jax.ops.fusion import materialize
from compactlm_jax.types import QKV


class DepthwiseConv(nn.Module):
  """Depthwise convolution over time, no bias; initialised with deviation 1 / taps (ConvBERT)."""

  taps: int
  causal: bool = False

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    kernel_WD = self.param('kernel', kernel_init(1.0 / self.taps), (self.taps, x_BTD.shape[-1]))
    return depthwise_conv(x_BTD, kernel_WD.astype(x_BTD.dtype), causal=self.causal)


class SpanDynamicConv(nn.Module):
  """Span-based dynamic convolution: each position's kernel comes from its query and its neighbourhood.

  K_s = separable convolution of x; taps = softmax(Dense(K_s * q)); out = taps applied to the values (ConvBERT). With
  `conv_kind` 'dynamic' K_s is left out: taps = softmax(Dense(q)) (Wu et al. 2019; ConvBERT's ablation).
  """

  config: EncoderConfig
  mask_fn: MaskFn | None = None

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    q_BTHK: Float[Array, 'B T H K'],
    mask_BT: Int[Array, 'B T'],
    *,
    only_taps: bool = False,
  ) -> Float[Array, 'B T H K'] | Float[Array, 'W B T H']:
    """Mixes neighbouring values.

    Args:
      x_BTD: the layer's input.
      q_BTHK: the unscaled queries of self-attention.
      mask_BT: 1 for real tokens; read unless `config.conv_sees_padding`.
      only_taps: stop at the kernels, which are then returned, to look at them.

    Returns:
      One vector per position and head; with `only_taps` one kernel, which adds up to 1.
    """
    cfg = self.config
    heads, size, taps = cfg.num_heads, cfg.head_size, cfg.conv_kernel_size
    real_BT = mask_BT.astype(x_BTD.dtype)
    merged = q_BTHK.reshape(*q_BTHK.shape[:2], heads * size)
    if cfg.conv_kind == 'span':
      seen_BTD = x_BTD if cfg.conv_sees_padding else x_BTD * real_BT[..., None]
      span = DepthwiseConv(taps, cfg.causal, name='depthwise')(seen_BTD)
      merged = MaskedDense(heads * size, cfg, self.mask_fn, name='pointwise')(span) * merged
    logits = MaskedDense(heads * taps, cfg, self.mask_fn, name='taps')(merged)
    logits_BTHW = logits.reshape(*logits.shape[:2], heads, taps).astype(jnp.float32)
    # Taps first: the softmax and the sums over taps then run over long rows.
    taps_WBTH = jax.nn.softmax(materialize(jnp.moveaxis(logits_BTHW, -1, 0)), axis=0).astype(x_BTD.dtype)
    if only_taps:
      return taps_WBTH
    v = MaskedDense(heads * size, cfg, self.mask_fn, name='value')(x_BTD)
    if not cfg.conv_sees_padding:
      taps_WBTH *= tap_reads(real_BT, taps, causal=cfg.causal)[..., None]
    return dynamic_conv(v.reshape(*v.shape[:2], heads, size), taps_WBTH, causal=cfg.causal)


class MixedAttention(nn.Module):
  """Multi-head attention; with `conv_kernel_size` > 0 as many convolution heads stand behind the attention heads.

  Without `self_attention` the convolution heads stand alone, and only the queries are left of the three projections.
  Without heads (a layer that lost them all) the bias of the output is all that there is.
  """

  config: EncoderConfig
  mask_fn: MaskFn | None = None

  @nn.compact
  def __call__(
    self, x_BTD: Float[Array, 'B T D'], mask_BT: Int[Array, 'B T'], key: jax.Array | None, site: int | Array
  ) -> tuple[Float[Array, 'B T D'], QKV | None]:
    """Returns the projected output (before dropout and residual) and the queries, keys and values, if there are."""
    cfg = self.config
    if not cfg.num_heads:
      none_BTHK = jnp.zeros((*x_BTD.shape[:2], 0, cfg.head_size), x_BTD.dtype)
      qkv = QKV(none_BTHK, none_BTHK, none_BTHK) if cfg.self_attention else None
      return Bias(cfg.hidden_size, name='output')(x_BTD), qkv

    def project(name: str) -> Float[Array, 'B T H K']:
      out = MaskedDense(cfg.num_heads * cfg.head_size, cfg, self.mask_fn, name=name)(x_BTD)
      return out.reshape(*out.shape[:2], cfg.num_heads, cfg.head_size)

    q_BTHK, qkv, heads = project('query'), None, []
    if cfg.self_attention:
      qkv = QKV(q_BTHK, project('key'), project('value'))
      run = functools.partial(attention, causal=cfg.causal, rate=cfg.attention_dropout, key=key, site=site)
      heads.append(run(q_BTHK, qkv.k_BTHK, qkv.v_BTHK, mask_bias(mask_BT)))
    if cfg.conv_kernel_size:
      heads.append(SpanDynamicConv(cfg, self.mask_fn, name='conv')(x_BTD, q_BTHK, mask_BT))
    merged = jnp.concatenate(heads, axis=2).reshape(*x_BTD.shape[:2], -1)
    return MaskedDense(cfg.hidden_size, cfg, self.mask_fn, name='output')(merged), qkv
