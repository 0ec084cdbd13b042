"""How local self-attention is: the share of its mass near the diagonal.

The concentration of ConvBERT's authors (answer to reviewers, NeurIPS 2020) is

  C = sum of M_ij over |i - j| <= 4  /  sum of M_ij over |i - j| > 4

with attention probabilities M. They do not say what is averaged how. Here both sums run over all real tokens as queries
(special tokens too), all self-attention heads, all layers and all rows, and are divided at the end: each query of each
head of each layer weighs the same. A mean of quotients would be ruled by short rows and by heads that look nowhere far.
Each query's probabilities add up to 1, so C / (1 + C) is the mean share of attention within 4 positions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.encoder import encode
from compactlm_jax.ops.attention import hide_later, mask_bias
from compactlm_jax.types import QKV, Params, struct

RADIUS = 4


@struct
class AttentionMass:
  """Sums of attention probabilities over the real queries of each row.

  Attributes:
    near_NBH: over keys within the radius.
    far_NBH: over the keys beyond it.
  """

  near_NBH: Float[Array, 'N B H']
  far_NBH: Float[Array, 'N B H']


def attention_mass(
  params: Params,
  config: EncoderConfig,
  input_ids: Int[Array, 'B T'],
  attention_mask: Int[Array, 'B T'] | None = None,
  token_type_ids: Int[Array, 'B T'] | None = None,
  *,
  radius: int = RADIUS,
) -> AttentionMass:
  """Attention near and far of every layer, row and head. Pure; under `jax.jit`, `config` and `radius` are static.

  Args:
    params: a tree with 'encoder'.
    config: the encoder's configuration; of mixed attention, the self-attention heads are measured.
    input_ids: token ids.
    attention_mask: 1 for real tokens; None means that all are. Padding is neither query nor key.
    token_type_ids: segments; None means 0.
    radius: largest distance that counts as near.

  Returns:
    The sums; near + far is the number of real tokens of the row. Sums over several batches may be added up.

  Raises:
    ConfigError: the encoder has no self-attention, or a negative radius.
  """
  require_attention(config)
  if radius < 0:
    raise ConfigError(f'radius: {radius} must not be negative')
  mask_BT = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
  layers = tuple(range(1, config.num_layers + 1))
  out = encode(params, config, input_ids, mask_BT, token_type_ids, qkv_layers=layers, skip_above=True)
  probs = (attention_probabilities(qkv, mask_BT, causal=config.causal) for qkv in out.qkv)
  near, far = zip(*(near_and_far(probs_BHTS, mask_BT, radius) for probs_BHTS in probs))
  return AttentionMass(jnp.stack(near), jnp.stack(far))


def near_and_far(
  probs_BHTS: Float[Array, 'B H T S'], mask_BT: Int[Array, 'B T'], radius: int
) -> tuple[Float[Array, 'B H'], Float[Array, 'B H']]:
  """Sums of one layer's attention over real queries: (over keys within the radius, over the keys beyond it)."""
  real_BHTS = probs_BHTS * mask_BT[:, None, :, None]
  position_T = jnp.arange(mask_BT.shape[1])
  near_TS = (jnp.abs(position_T[:, None] - position_T[None]) <= radius)[None, None]
  return jnp.where(near_TS, real_BHTS, 0.0).sum((2, 3)), jnp.where(near_TS, 0.0, real_BHTS).sum((2, 3))


def require_attention(config: EncoderConfig) -> None:
  """Raises ConfigError if the encoder has no self-attention."""
  if not config.self_attention:
    raise ConfigError('config.encoder.self_attention: a model without self-attention has no attention to analyse')


def concentration(mass: AttentionMass) -> Float[Array, '']:
  """C: attention near over attention far, summed over layers, rows and heads; infinite if nothing is far."""
  return mass.near_NBH.sum() / mass.far_NBH.sum()


def attention_probabilities(qkv: QKV, mask_BS: Int[Array, 'B S'], *, causal: bool = False) -> Float[Array, 'B H T S']:
  """softmax(q k^T / sqrt(K)) over real keys, in float32, before dropout.

  Args:
    qkv: queries, keys and values of a layer, from `encode`.
    mask_BS: 1 for real keys; a row without any is uniform.
    causal: keys behind the query get probability 0.
  """
  q_BTHK, k_BSHK = qkv.q_BTHK.astype(jnp.float32), qkv.k_BTHK.astype(jnp.float32)
  logits_BHTS = jnp.einsum('bthk,bshk->bhts', q_BTHK, k_BSHK) / jnp.sqrt(jnp.float32(q_BTHK.shape[-1]))
  logits_BHTS += mask_bias(mask_BS)
  return jax.nn.softmax(hide_later(logits_BHTS) if causal else logits_BHTS, axis=-1)
