"""Fine-tuning for classification of sentences or sentence pairs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from compactlm_jax.config import EncoderConfig, FinetuneConfig, to_json
from compactlm_jax.errors import ConfigError
from compactlm_jax.losses.classification import cross_entropy
from compactlm_jax.losses.reduce import masked_mean, masked_sum
from compactlm_jax.nn.encoder import encode, init_encoder
from compactlm_jax.nn.heads import Classifier
from compactlm_jax.types import Batch, Metrics, Params, Task


def make_finetune_task(
  encoder: EncoderConfig, classes: tuple[str, ...], config: FinetuneConfig, start: Params | None = None
) -> Task:
  """A task that trains the whole encoder and a fresh head on the first token.

  Args:
    encoder: the encoder's configuration.
    classes: class names, in the order of their indices.
    config: head and dropout.
    start: parameters that hold a trained 'encoder'; None starts at random.

  Raises:
    ConfigError: fewer than two classes, or `pooled` without a pooler.
  """
  if len(classes) < 2:
    raise ConfigError(f'config.data.label_column: found {len(classes)} class(es) {classes}; at least two are needed')
  if config.pooled and not encoder.pooler:
    raise ConfigError('config.finetune.pooled: this encoder has no pooler; set it to False')
  head = Classifier(len(classes), encoder, config.dropout)

  def init(key: jax.Array) -> Params:
    encoder_key, head_key = jax.random.split(key)
    base = start['encoder'] if start else init_encoder(encoder, encoder_key)['encoder']
    fresh = head.init(head_key, jnp.zeros((1, encoder.hidden_size)))['params']
    return {'encoder': jax.tree.map(jnp.asarray, base), 'classifier': fresh}

  def logits(params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
    encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
    out = encode(params, encoder, batch.input_ids, batch.attention_mask, batch.token_type_ids, dropout_key=encoder_key)
    vector_BD = out.pooled_BD if config.pooled else out.last_BTD[:, 0]
    return jnp.asarray(head.apply({'params': params['classifier']}, vector_BD, head_key))

  def losses_and_hits(logits_BC: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    labels_B = jnp.asarray(batch.labels)
    return cross_entropy(logits_BC, labels_B), jnp.equal(logits_BC.argmax(-1), labels_B).astype(jnp.float32)

  def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Metrics]:
    losses_B, hits_B = losses_and_hits(logits(params, batch, key), batch)
    weights_B = jnp.ones_like(losses_B) if batch.weights is None else batch.weights
    metrics = {'accuracy': masked_mean(hits_B, weights_B), 'weight': weights_B.sum()}
    return masked_mean(losses_B, weights_B), metrics

  def evaluate(params: Params, frozen: Any, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    losses_B, hits_B = losses_and_hits(logits(params, batch, None), batch)
    return {'loss': masked_sum(losses_B, batch.weights), 'accuracy': masked_sum(hits_B, batch.weights)}

  unused = r'encoder/pooler/.*' if encoder.pooler and not config.pooled else r'(?!)'
  return Task(
    name='finetune',
    init=init,
    loss=loss,
    evaluate=evaluate,
    trainable=((unused, False), (rf'(?!{unused}).*', True)),
    model={'encoder': to_json(encoder), 'classes': list(classes), 'finetune': dataclasses.asdict(config)},
  )
