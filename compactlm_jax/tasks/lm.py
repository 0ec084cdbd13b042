"""Causal language modelling: each token from those before it in its row, on the blocks of the encoder.

What is predicted is every real token but the first of each row: the row's [CLS] is context only, each [SEP] (the end
of a document, and the end of the row) is a token like any other, padding counts nothing. A row starts without memory
of the row before. In packed rows the last [SEP] stands where the row ends and costs almost nothing, so perplexity per
token comes out lower than without it, by a factor of about exp(loss / (T - 1)). Perplexity per word adds up the nats of
all tokens, special ones included, and divides them by the number of words, so it does not depend on the vocabulary;
but what a tokenizer loses (case, unknown characters) is not paid for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compactlm_jax.config import EncoderConfig, to_json
from compactlm_jax.errors import ConfigError
from compactlm_jax.losses.reduce import masked_mean, masked_sum
from compactlm_jax.losses.tokens import token_cross_entropy, token_hits
from compactlm_jax.nn.encoder import encode
from compactlm_jax.nn.heads import MlmHead
from compactlm_jax.tasks.mlm import ALL_BUT_POOLER, init_mlm
from compactlm_jax.tree import overlaid
from compactlm_jax.types import Batch, Metrics, Params, Task


def make_lm_task(encoder: EncoderConfig, *, words_per_token: float = 0.0, start: Params | None = None) -> Task:
  """A task that trains a causal encoder and a tied output layer to predict the next token.

  Args:
    encoder: the encoder's configuration, with `causal`.
    words_per_token: whitespace-separated words per predicted token of the held-out rows, as their manifest counts them
      (`RowSource.words_per_token`); 0 if that is unknown.
    start: parameters to continue from: 'encoder', and 'mlm_head' if they have one; None starts at random.

  Returns:
    A Task. Metrics of training are 'accuracy' (share of tokens than which no other is likelier) and 'weight' (number of
    predicted tokens); evaluation gives 'loss' (nats per token), 'accuracy', 'perplexity_token' and, unless
    `words_per_token` is 0, 'perplexity_word' = exp(nats of all predicted tokens / words).

  Raises:
    ConfigError: the encoder is not causal; in tracing, rows that are longer than its positions.
  """
  if not encoder.causal:
    raise ConfigError("config.encoder.causal: task 'lm' predicts the next token and must not read it; set it to True")

  def init(key: jax.Array) -> Params:
    return jax.tree.map(jnp.asarray, overlaid(init_mlm(encoder, key), start or {}))

  def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Metrics]:
    losses_BT, hits_BT, weights_BT = token_losses(params, encoder, batch, key)
    return masked_mean(losses_BT, weights_BT), {
      'accuracy': masked_mean(hits_BT, weights_BT),
      'weight': weights_BT.sum(),
    }

  def evaluate(params: Params, frozen: Any, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    losses_BT, hits_BT, weights_BT = token_losses(params, encoder, batch)
    return {'loss': masked_sum(losses_BT, weights_BT), 'accuracy': masked_sum(hits_BT, weights_BT)}

  def summarize(means: Mapping[str, float]) -> dict[str, float]:
    found = {'perplexity_token': _exp(means['loss'])}
    return {**found, 'perplexity_word': _exp(means['loss'] / words_per_token)} if words_per_token else found

  return Task(
    name='lm',
    init=init,
    loss=loss,
    evaluate=evaluate,
    trainable=ALL_BUT_POOLER,
    summarize=summarize,
    model={'encoder': to_json(encoder)},
  )


def token_losses(
  params: Params, encoder: EncoderConfig, batch: Batch, dropout_key: jax.Array | None = None
) -> tuple[Float[Array, 'B T-1'], Float[Array, 'B T-1'], Float[Array, 'B T-1']]:
  """What each token but the first of its row costs.

  Args:
    params: 'encoder' and 'mlm_head'.
    encoder: the encoder's configuration.
    batch: rows.
    dropout_key: a key for training; None for evaluation.

  Returns:
    (cross-entropy in nats; 1 where no other token is likelier; weight: 0 for padding and for filling rows).

  Raises:
    ConfigError: rows that are longer than the encoder's positions.
  """
  length = batch.input_ids.shape[1]
  if length > encoder.max_positions:
    raise ConfigError(
      f'config.data.seq_len: rows have {length} tokens, the model has positions for {encoder.max_positions}; prepare '
      'shorter rows or raise encoder.max_positions'
    )
  inputs = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
  out = encode(params, encoder, *inputs, dropout_key=dropout_key)
  word_VE = params['encoder']['embeddings']['word']['embedding']
  logits_BTV = jnp.asarray(MlmHead(encoder).apply({'params': params['mlm_head']}, out.last_BTD[:, :-1], word_VE))
  targets_BT, weights_BT = batch.input_ids[:, 1:], batch.attention_mask[:, 1:].astype(jnp.float32)
  if batch.weights is not None:
    weights_BT *= batch.weights[:, None]
  return token_cross_entropy(logits_BTV, targets_BT), token_hits(logits_BTV, targets_BT), weights_BT


def _exp(nats: float) -> float:
  return math.inf if nats > 700 else math.exp(nats)
