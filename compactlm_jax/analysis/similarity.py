"""How alike the layers of two models are: linear CKA of hidden states, KL divergence of relations.

Both are made of sums over tokens, so that batches of a long text are added up, and tokens of weight 0 (padding) are
left out exactly. Layers and width of the first model are N and D, of the second M and E; P counts tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compactlm_jax.types import struct

_TINY = float(jnp.finfo(jnp.float32).tiny)


@struct
class Moments:
  """Sums over tokens of two models' hidden states, less a constant shift, and of their products.

  Attributes:
    count: tokens (sum of weights).
    x_ND: sum of the first model's states, one row per layer.
    y_ME: of the second model.
    xx_NDD: sum of x x^T, layer by layer.
    yy_MEE: sum of y y^T.
    xy_NDME: sum of x y^T, every layer of the first with every layer of the second.
  """

  count: Float[Array, '']
  x_ND: Float[Array, 'N D']
  y_ME: Float[Array, 'M E']
  xx_NDD: Float[Array, 'N D D']
  yy_MEE: Float[Array, 'M E E']
  xy_NDME: Float[Array, 'N D M E']


def moments(
  x_NPD: Float[Array, 'N P D'],
  y_MPE: Float[Array, 'M P E'],
  weight_P: Float[Array, ' P'],
  shift_ND: Float[Array, 'N D'],
  shift_ME: Float[Array, 'M E'],
) -> Moments:
  """What `linear_cka` needs of P tokens; moments of several batches with the same shifts may be added up.

  Args:
    x_NPD: hidden states of the first model's layers.
    y_MPE: of the second model's, for the same tokens.
    weight_P: 1 for tokens that count, 0 for the others.
    shift_ND: about the mean of x. CKA does not depend on it, but float32 does: a few features of a Transformer are
      large and nearly constant, and their variance would be lost in a difference of large sums.
    shift_ME: about the mean of y.
  """
  x_NPD = (x_NPD.astype(jnp.float32) - shift_ND[:, None]) * weight_P[None, :, None]
  y_MPE = (y_MPE.astype(jnp.float32) - shift_ME[:, None]) * weight_P[None, :, None]
  # Weights are 0 or 1, so that products of weighted states carry the weight.
  return Moments(
    weight_P.sum(),
    x_NPD.sum(1),
    y_MPE.sum(1),
    jnp.einsum('npd,npe->nde', x_NPD, x_NPD),
    jnp.einsum('mpd,mpe->mde', y_MPE, y_MPE),
    jnp.einsum('npd,mpe->ndme', x_NPD, y_MPE),
  )


def linear_cka(sums: Moments) -> Float[Array, 'N M']:
  """Linear centred kernel alignment of every layer of the first model with every layer of the second, in [0, 1].

  ||Yc^T Xc||_F^2 / (||Xc^T Xc||_F ||Yc^T Yc||_F) with centred features: 1 if one is a rotated and scaled copy of the
  other. Every token is one example, whatever row it stands in.

  Args:
    sums: of at least two tokens.

  Returns:
    One number per pair; NaN for a layer whose states are all equal.

  Source: Kornblith et al. 2019, Similarity of Neural Network Representations Revisited, equation 5.
  """
  x_ND, y_ME = sums.x_ND, sums.y_ME
  xx_NDD = sums.xx_NDD - x_ND[:, :, None] * x_ND[:, None] / sums.count
  yy_MEE = sums.yy_MEE - y_ME[:, :, None] * y_ME[:, None] / sums.count
  xy_NDME = sums.xy_NDME - x_ND[:, :, None, None] * y_ME[None, None] / sums.count
  # Scaled to about 1 first: fourth powers of states leave float32 early.
  x_N, y_M = (jnp.sqrt(jnp.trace(c, axis1=1, axis2=2)) for c in (xx_NDD, yy_MEE))
  cross_NM = ((xy_NDME / x_N[:, None, None, None] / y_M[None, None, :, None]) ** 2).sum((1, 3))
  own_N = jnp.sqrt(((xx_NDD / x_N[:, None, None] ** 2) ** 2).sum((1, 2)))
  own_M = jnp.sqrt(((yy_MEE / y_M[:, None, None] ** 2) ** 2).sum((1, 2)))
  return cross_NM / (own_N[:, None] * own_M[None])


def pairwise_kl(
  p_NBTS: Float[Array, 'N B T S'], q_MBTS: Float[Array, 'M B T S'], weight_BT: Float[Array, 'B T']
) -> Float[Array, 'N M']:
  """Sum over queries of weight * KL(p || q) for every pair of layers, in nats.

  A probability below the smallest normal float32 counts as that: a divergence is at most 87 nats, never infinite.

  Args:
    p_NBTS: distributions over keys of the first model's layers (the teacher's).
    q_MBTS: of the second model's.
    weight_BT: weight of each query; 0 leaves it out.

  Returns:
    One sum per pair; divide by the sum of weights for the mean. Sums of several batches may be added up.
  """
  weighted_NBTS = p_NBTS * weight_BT[None, :, :, None]
  own_N = (weighted_NBTS * _log(p_NBTS)).sum((1, 2, 3))
  return own_N[:, None] - jnp.einsum('nbts,mbts->nm', weighted_NBTS, _log(q_MBTS))


def entropy(p_BHTS: Float[Array, 'B H T S'], weight_BT: Float[Array, 'B T']) -> Float[Array, ' H']:
  """Sum over queries of weight * entropy of each head's distributions, in nats: log n for n keys alike, 0 for one."""
  return -(p_BHTS * _log(p_BHTS) * weight_BT[:, None, :, None]).sum((0, 2, 3))


def _log(p: Array) -> Array:
  return jnp.log(jax.lax.max(p, jnp.full_like(p, _TINY)))
