"""Masked language modelling (BERT), and the parts that ELECTRA's generator shares with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compactlm_jax.config import EncoderConfig, MaskConfig, to_json
from compactlm_jax.errors import ConfigError
from compactlm_jax.losses.reduce import masked_mean, masked_sum
from compactlm_jax.losses.tokens import token_cross_entropy, token_hits
from compactlm_jax.nn.encoder import encode, init_encoder
from compactlm_jax.nn.heads import MlmHead
from compactlm_jax.ops.corruption import mask_tokens, take_positions
from compactlm_jax.tree import overlaid
from compactlm_jax.types import Batch, Masked, Metrics, Params, SpecialTokens, Task, Trainable

ALL_BUT_POOLER: Trainable = ((r'encoder/pooler/.*', False), (r'(?!encoder/pooler/).*', True))
"""No pre-training loss reads the pooler."""


def make_mlm_task(
  encoder: EncoderConfig, mask: MaskConfig, special: SpecialTokens, start: Params | None = None
) -> Task:
  """A task that trains an encoder to predict hidden tokens; logits are computed at the hidden positions only.

  Args:
    encoder: the encoder's configuration.
    mask: which tokens are hidden; BERT's 80/10/10 is mask_rate=.8, random_rate=.1.
    special: ids of the special tokens.
    start: parameters to continue from: 'encoder', and 'mlm_head' if they have one; None starts at random.

  Raises:
    ConfigError: special tokens that the vocabulary lacks, or a causal encoder.
  """
  check_masked_model(encoder, special)

  def init(key: jax.Array) -> Params:
    return jax.tree.map(jnp.asarray, overlaid(init_mlm(encoder, key), start or {}))

  def slots(params: Params, batch: Batch, key: jax.Array, train: bool) -> tuple[jax.Array, jax.Array, Masked]:
    mask_key, dropout_key = jax.random.split(key)
    masked = mask_tokens(mask_key, batch.input_ids, batch.attention_mask, mask, special, encoder.vocab_size)
    logits_BPV = mlm_logits(params, encoder, masked, batch, dropout_key if train else None)
    return *slot_values(logits_BPV, masked), with_row_weights(masked, batch)

  def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Metrics]:
    losses_BP, hits_BP, masked = slots(params, batch, key, True)
    value = masked_mean(losses_BP, masked.weights_BP)
    accuracy = masked_mean(hits_BP, masked.weights_BP)
    return value, {'mlm_loss': value, 'mlm_accuracy': accuracy, 'weight': masked.weights_BP.sum()}

  def evaluate(params: Params, frozen: Any, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    losses_BP, hits_BP, masked = slots(params, batch, evaluation_key(batch), False)
    found = masked_sum(losses_BP, masked.weights_BP)
    return {'loss': found, 'mlm_loss': found, 'mlm_accuracy': masked_sum(hits_BP, masked.weights_BP)}

  return Task(
    name='mlm',
    init=init,
    loss=loss,
    evaluate=evaluate,
    trainable=ALL_BUT_POOLER,
    model={'encoder': to_json(encoder), 'mask': dataclasses.asdict(mask)},
  )


def check_masked_model(encoder: EncoderConfig, special: SpecialTokens) -> None:
  """Raises ConfigError unless the encoder reads both directions and has rows for the special tokens."""
  if encoder.causal:
    raise ConfigError("config.encoder.causal: a masked model reads both directions; set it to False, or use task 'lm'")
  for name, token in dataclasses.asdict(special).items():
    if not 0 <= token < encoder.vocab_size:
      raise ConfigError(
        f'config.encoder.vocab_size: {encoder.vocab_size}, but [{name.upper()}] of the data has id {token}; the model '
        'and the data need one vocabulary'
      )


def init_mlm(encoder: EncoderConfig, key: jax.Array) -> Params:
  """Random {'encoder', 'mlm_head'}."""
  encoder_key, head_key = jax.random.split(key)
  hidden = jnp.zeros((1, encoder.hidden_size))
  table = jnp.zeros((encoder.vocab_size, encoder.embedding_size))
  head = MlmHead(encoder).init(head_key, hidden, table)['params']
  return {**init_encoder(encoder, encoder_key), 'mlm_head': head}


def mlm_logits(
  params: Params, encoder: EncoderConfig, masked: Masked, batch: Batch, dropout_key: jax.Array | None
) -> Float[Array, 'B P V']:
  """Scores of every token at the slots only: the head never sees another position."""
  out = encode(
    params, encoder, masked.input_ids_BT, batch.attention_mask, batch.token_type_ids, dropout_key=dropout_key
  )
  slots_BPD = take_positions(out.last_BTD, masked.positions_BP)
  word_VE = params['encoder']['embeddings']['word']['embedding']
  return jnp.asarray(MlmHead(encoder).apply({'params': params['mlm_head']}, slots_BPD, word_VE))


def slot_values(logits_BPV: jax.Array, masked: Masked) -> tuple[jax.Array, jax.Array]:
  """(cross-entropy, 1 where the likeliest token is the right one) of each slot."""
  return token_cross_entropy(logits_BPV, masked.ids_BP), token_hits(logits_BPV, masked.ids_BP)


def with_row_weights(masked: Masked, batch: Batch) -> Masked:
  """The slots of filling rows count nothing."""
  if batch.weights is None:
    return masked
  return dataclasses.replace(masked, weights_BP=masked.weights_BP * batch.weights[:, None])


def evaluation_key(batch: Batch) -> jax.Array:
  """A key that depends on the rows alone: every evaluation hides the same tokens."""
  return jax.random.fold_in(jax.random.key(0), batch.input_ids.sum())
