"""Hiding tokens, sampling replacements for them and writing them back: pure functions of a key and a batch.

Everything is a comparison with an iota or a product with a one-hot matrix; there is no scatter, forward or backward,
so the work splits over rows and runs on a TPU's matrix unit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from compactlm_jax.config import MaskConfig
from compactlm_jax.types import Masked, SpecialTokens


def mask_tokens(
  key: jax.Array,
  input_ids_BT: Int[Array, 'B T'],
  attention_mask_BT: Int[Array, 'B T'],
  config: MaskConfig,
  special: SpecialTokens,
  vocab_size: int,
) -> Masked:
  """Chooses tokens to predict and hides them (google-research/electra `pretrain_helpers.mask`, BERT).

  A row has max(1, min(P, round(probability * n))) slots, n its real tokens with [CLS] and [SEP] and `round` to even,
  drawn uniformly from the real tokens that are not [CLS], [SEP] or [MASK].

  Args:
    key: of all draws; the same for any placement of the rows on devices.
    input_ids_BT: token ids.
    attention_mask_BT: 1 for real tokens.
    config: rates, and drawing with or without replacement.
    special: ids of the special tokens.
    vocab_size: random tokens are drawn below it.

  Returns:
    The hidden row and its slots, P = config.slots(T).
  """
  position_key, kind_key, token_key = jax.random.split(key, 3)
  slots = config.slots(input_ids_BT.shape[1])
  real_BT = attention_mask_BT > 0
  ordinary_BT = (input_ids_BT != special.cls) & (input_ids_BT != special.sep) & (input_ids_BT != special.mask)
  candidates_BT = real_BT & ordinary_BT
  positions_BP, on_BP = _draw(position_key, candidates_BT, slots, config.with_replacement)
  wanted_B = jnp.round(config.probability * real_BT.sum(1)).astype(jnp.int32)
  on_BP &= jnp.arange(slots)[None] < jnp.maximum(1, wanted_B)[:, None]
  positions_BP = jnp.where(on_BP, positions_BP, 0)
  ids_BP = jnp.take_along_axis(input_ids_BT, positions_BP, axis=1)

  kind_BP = jax.random.uniform(kind_key, positions_BP.shape)
  random_BP = jax.random.randint(token_key, positions_BP.shape, 0, vocab_size)
  masked_BP = kind_BP < config.mask_rate
  changed_BP = kind_BP < config.mask_rate + config.random_rate
  new_BP = jnp.where(masked_BP, special.mask, random_BP)
  hidden_BT, _ = write_tokens(input_ids_BT, positions_BP, new_BP, on_BP & changed_BP)
  return Masked(hidden_BT, positions_BP, ids_BP, on_BP.astype(jnp.float32))


def _draw(key: jax.Array, candidates_BT: Array, slots: int, with_replacement: bool) -> tuple[Array, Array]:
  """Uniform positions of candidates [B, P], and whether each is one."""
  if with_replacement:
    logits_BT = jnp.where(candidates_BT, 0.0, -jnp.inf)
    draws_PB = jax.random.categorical(key, logits_BT, shape=(slots, candidates_BT.shape[0]))
    return draws_PB.T, jnp.broadcast_to(candidates_BT.any(1)[:, None], draws_PB.T.shape)
  # The largest of independent uniforms are a draw without replacement. Not by top_k, which XLA's CPU does not split
  # over rows.
  order_BT = jnp.where(candidates_BT, -jax.random.uniform(key, candidates_BT.shape), 1.0)
  positions_BT = jax.lax.broadcasted_iota(jnp.int32, order_BT.shape, 1)
  sorted_BT, positions_BT = jax.lax.sort((order_BT, positions_BT), num_keys=1)
  missing = ((0, 0), (0, max(0, slots - order_BT.shape[1])))  # a row shorter than its slots
  positions_BP = jnp.pad(positions_BT[:, :slots], missing)
  return positions_BP, jnp.pad(sorted_BT[:, :slots], missing, constant_values=1.0) < 1


def write_tokens(
  ids_BT: Int[Array, 'B T'], positions_BP: Int[Array, 'B P'], new_BP: Int[Array, 'B P'], on_BP: Array
) -> tuple[Int[Array, 'B T'], Array]:
  """(ids with the new tokens at the positions where `on_BP`, whether each position was written).

  Where several slots name one position, the integer mean of their tokens is written, as the original does; slots drawn
  without replacement never meet.
  """
  hit_BPT = (positions_BP[..., None] == jnp.arange(ids_BT.shape[1])[None, None]) & on_BP[..., None]
  count_BT = hit_BPT.sum(1)
  total_BT = (hit_BPT * new_BP[..., None]).sum(1)
  written_BT = count_BT > 0
  return jnp.where(written_BT, total_BT // jnp.maximum(count_BT, 1), ids_BT), written_BT


def take_positions(x_BTD: Float[Array, 'B T D'], positions_BP: Int[Array, 'B P']) -> Float[Array, 'B P D']:
  """x at the positions, as a product with a one-hot matrix: its gradient is a product as well."""
  hot_BPT = jax.nn.one_hot(positions_BP, x_BTD.shape[1], dtype=x_BTD.dtype)
  # 'highest': a TPU would round float32 to bfloat16 first, and this is a copy.
  return jnp.einsum('BPT,BTD->BPD', hot_BPT, x_BTD, precision='highest')


def sample_tokens(
  key: jax.Array,
  logits_BPV: Float[Array, 'B P V'],
  *,
  temperature: float = 1.0,
  forbidden_BP: Int[Array, 'B P'] | None = None,
) -> Int[Array, 'B P']:
  """One token per slot from softmax(logits / temperature), by Gumbel noise; no gradient (ELECTRA).

  Args:
    key: of the draw.
    logits_BPV: scores.
    temperature: positive.
    forbidden_BP: a token of each slot that must not be drawn (ELECTRA's `disallow_correct`).
  """
  logits_BPV = jax.lax.stop_gradient(logits_BPV)
  if forbidden_BP is not None:
    is_it_BPV = forbidden_BP[..., None] == jnp.arange(logits_BPV.shape[-1])[None, None]
    logits_BPV = jnp.where(is_it_BPV, -jnp.inf, logits_BPV)
  return jax.random.categorical(key, logits_BPV / temperature)
