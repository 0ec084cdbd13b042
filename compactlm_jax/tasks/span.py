"""Fine-tuning for answers that are spans of a context (SQuAD)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from compactlm_jax.config import EncoderConfig, FinetuneConfig, SpanConfig, to_json
from compactlm_jax.errors import ConfigError
from compactlm_jax.losses.reduce import masked_mean, masked_sum
from compactlm_jax.losses.span import impossible_loss, span_cross_entropy, span_soft_kl
from compactlm_jax.nn.encoder import encode, init_encoder
from compactlm_jax.nn.span import JointSpanHead, SpanHead
from compactlm_jax.tasks.finetune import kept_layers, remaining
from compactlm_jax.tasks.mlm import ALL_BUT_POOLER
from compactlm_jax.types import Batch, Metrics, Params, Task

_NEVER = -1e9

Losses = Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
"""(head parameters, batch, hidden states [B, T, D]) -> (loss [B], further values [B] for the log)."""


@dataclasses.dataclass(frozen=True)
class _Head:
  """What differs between the heads."""

  init: Callable[[jax.Array], Params]
  losses: Losses
  outputs: Callable[[Params, Batch, jax.Array], dict[str, jax.Array]]


def make_span_task(
  encoder: EncoderConfig,
  span: SpanConfig,
  config: FinetuneConfig,
  *,
  version: int = 1,
  start: Params | None = None,
  teacher: tuple[Params, EncoderConfig] | None = None,
) -> Task:
  """A task that trains the whole encoder and a fresh head for start and end of the answer.

  Rows are [CLS] question [SEP] window [SEP], with labels [B, 3]: start place, end place (0 and 0 for none in the
  window), and whether the question has no answer. No dropout stands before the head, as in BERT and ELECTRA.

  Outputs of evaluation, in the same shape for every row length, are those of `scoring.nbest.answer_questions`: the best
  starts and ends among the tokens of the context (place 0 stands for none), and the null scores. The joint head's
  logits are log probabilities.

  Args:
    encoder: the encoder's configuration.
    span: which head, and its settings.
    config: weights of both losses, temperature.
    version: of SQuAD, 1 or 2; with 2, the joint head also learns whether there is an answer.
    start: parameters that hold a trained 'encoder'; None starts at random.
    teacher: (parameters with 'encoder' and the independent head 'span', configuration) of a fine-tuned model.

  Raises:
    ConfigError: a teacher for the joint head, or one without an independent span head.
  """
  if teacher is not None:
    _check_teacher(teacher[0], span)
  shallow, finished = kept_layers(encoder, config)
  head = _joint_head(encoder, span, version) if span.head == 'joint' else _independent_head(encoder, span)

  def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Metrics]:
    x_BTD = _hidden(params, encoder, batch, key)
    losses_B, logged = head.losses(params['span'], batch, x_BTD)
    weights_B = jnp.ones_like(losses_B) if batch.weights is None else batch.weights
    metrics = {name: masked_mean(values_B, weights_B) for name, values_B in logged.items()}
    if teacher is not None:
      soft_B = _distil_losses(encoder, teacher[1], config.temperature, params, frozen, batch, x_BTD)
      metrics |= {'task_loss': masked_mean(losses_B, weights_B), 'distil_loss': masked_mean(soft_B, weights_B)}
      losses_B = config.ce_weight * losses_B + config.distil_weight * soft_B
    return masked_mean(losses_B, weights_B), {**metrics, 'weight': weights_B.sum()}

  def evaluate(params: Params, frozen: Any, batch: Batch) -> dict[str, Any]:
    return _evaluate(shallow, head, params, batch)

  return Task(
    name='finetune',
    init=lambda key: _init(encoder, head, start, key),
    loss=loss,
    evaluate=evaluate,
    frozen=None if teacher is None else {name: teacher[0][name] for name in ('encoder', 'span')},
    trainable=ALL_BUT_POOLER,
    finished=finished,
    results=lambda params: remaining(params, shallow, encoder.num_layers),
    model={'encoder': to_json(encoder), 'span': to_json(span), 'finetune': to_json(config), 'version': version},
  )


def _init(encoder: EncoderConfig, head: _Head, start: Params | None, key: jax.Array) -> Params:
  encoder_key, head_key = jax.random.split(key)
  base = start['encoder'] if start else init_encoder(encoder, encoder_key)['encoder']
  return {'encoder': jax.tree.map(jnp.asarray, base), 'span': head.init(head_key)}


def _hidden(params: Params, encoder: EncoderConfig, batch: Batch, key: jax.Array | None = None) -> jax.Array:
  ids, mask, types = batch.input_ids, batch.attention_mask, batch.token_type_ids
  return encode(params, encoder, ids, mask, types, dropout_key=key).last_BTD


def _evaluate(encoder: EncoderConfig, head: _Head, params: Params, batch: Batch) -> dict[str, Any]:
  x_BTD = _hidden(params, encoder, batch)
  found: dict[str, Any] = dict(head.outputs(params['span'], batch, x_BTD))
  if batch.labels is not None:
    losses_B, logged = head.losses(params['span'], batch, x_BTD)
    found |= {name: masked_sum(values, batch.weights) for name, values in {'loss': losses_B, **logged}.items()}
  return found


def _distil_losses(
  encoder: EncoderConfig,
  taught_by: EncoderConfig,
  temperature: float,
  params: Params,
  frozen: Params,
  batch: Batch,
  x_BTD: jax.Array,
) -> jax.Array:
  target = jax.lax.stop_gradient(span_logits(frozen, taught_by, batch))
  student = _apply(SpanHead(encoder), params['span'], x_BTD)
  return span_soft_kl(target, student, temperature, batch.attention_mask.astype(jnp.float32))


def span_logits(params: Params, encoder: EncoderConfig, batch: Batch) -> tuple[Array, Array]:
  """Start and end logits [B, T] of a finished model with the independent head, without dropout."""
  start_BT, end_BT = _apply(SpanHead(encoder), params['span'], _hidden(params, encoder, batch))
  return start_BT, end_BT


def context_mask(batch: Batch) -> Bool[Array, 'B T']:
  """True for the tokens of the context: those of segment 1 before the last [SEP]."""
  length_B1 = batch.attention_mask.sum(-1, keepdims=True)
  place_1T = jnp.arange(batch.input_ids.shape[1])[None]
  return (batch.token_type_ids == 1) & (place_1T < length_B1 - 1)


def best_places(
  scores: Float[Array, '*b T'], allowed: Bool[Array, '*b T'], count: int
) -> tuple[Float[Array, '*b K'], Int[Array, '*b K']]:
  """The `count` best allowed places and their scores, best first; what is missing has place 0 and score -1e9."""
  found = min(count, scores.shape[-1])
  best, places = jax.lax.top_k(jnp.where(allowed, scores, _NEVER), found)
  places = jnp.where(best > _NEVER, places, 0)
  missing = [(0, 0)] * (scores.ndim - 1) + [(0, count - found)]
  return jnp.pad(best, missing, constant_values=_NEVER), jnp.pad(places, missing)


def _apply(head: Any, params: Params, *args: jax.Array, method: str | None = None) -> Any:
  return head.apply({'params': params}, *args, method=method)


def _check_teacher(params: Params, span: SpanConfig) -> None:
  if span.head == 'joint':
    raise ConfigError(
      "config.teacher: distillation compares start and end logits, and the joint head's ends depend on a start; "
      "leave the teacher out or set config.span.head='independent'"
    )
  if 'kernel' not in params.get('span', {}):
    raise ConfigError(
      "config.teacher: this model has no trained span head of the kind 'independent'; fine-tune it on SQuAD first, "
      'with config.span.head=independent'
    )


def _independent_head(encoder: EncoderConfig, span: SpanConfig) -> _Head:
  head = SpanHead(encoder)

  def logits(params: Params, batch: Batch, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of real tokens; BERT lets padding compete too, and then depends on how long rows are padded."""
    start_BT, end_BT = _apply(head, params, x_BTD)
    real_BT = batch.attention_mask > 0
    return jnp.where(real_BT, start_BT, _NEVER), jnp.where(real_BT, end_BT, _NEVER)

  def losses(params: Params, batch: Batch, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return span_cross_entropy(*logits(params, batch, x_BTD), jnp.asarray(batch.labels)), {}

  def outputs(params: Params, batch: Batch, x_BTD: jax.Array) -> dict[str, jax.Array]:
    start_BT, end_BT = logits(params, batch, x_BTD)
    context_BT = context_mask(batch)
    start_scores, starts = best_places(start_BT, context_BT, span.n_best)
    end_scores, ends = best_places(end_BT, context_BT, span.n_best)
    null_B2 = jnp.stack([start_BT[:, 0], end_BT[:, 0]], axis=-1)
    return {
      'starts': starts,
      'start_logits': start_scores,
      'ends': ends[:, None],
      'end_logits': end_scores[:, None],
      'null': null_B2,
    }

  def init(key: jax.Array) -> Params:
    return dict(head.init(key, jnp.zeros((1, 1, encoder.hidden_size)))['params'])

  return _Head(init, losses, outputs)


def _joint_head(encoder: EncoderConfig, span: SpanConfig, version: int) -> _Head:
  head = JointSpanHead(encoder, answerable=version == 2)

  def open_tokens(batch: Batch) -> jax.Array:
    """The first token and all of segment 1, the last [SEP] included (ELECTRA's `answer_mask`)."""
    place_1T = jnp.arange(batch.input_ids.shape[1])[None]
    return ((batch.token_type_ids == 1) & (batch.attention_mask > 0)) | (place_1T == 0)

  def losses(params: Params, batch: Batch, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    labels, tokens = jnp.asarray(batch.labels), open_tokens(batch)
    start_BT = _apply(head, params, x_BTD, tokens, method='starts')
    end_BT = _apply(head, params, x_BTD, tokens, labels[:, :1], method='ends')[:, 0]
    spans_B = span_cross_entropy(start_BT, end_BT, labels)
    if version == 1:
      return spans_B, {}
    impossible_B = impossible_loss(_apply(head, params, x_BTD, start_BT, method='impossible'), labels[:, 2])
    return spans_B + span.answerable_weight * impossible_B, {'span_loss': spans_B, 'answerable_loss': impossible_B}

  def outputs(params: Params, batch: Batch, x_BTD: jax.Array) -> dict[str, jax.Array]:
    tokens, context_BT = open_tokens(batch), context_mask(batch)
    start_BT = _apply(head, params, x_BTD, tokens, method='starts')
    start_scores, starts = best_places(jax.nn.log_softmax(start_BT), context_BT, span.beam)
    end_BKT = jax.nn.log_softmax(_apply(head, params, x_BTD, tokens, starts, method='ends'))
    end_scores, ends = best_places(end_BKT, jnp.broadcast_to(context_BT[:, None], end_BKT.shape), span.beam)
    found = {'starts': starts, 'start_logits': start_scores, 'ends': ends, 'end_logits': end_scores}
    if version == 2:
      found['impossible'] = _apply(head, params, x_BTD, start_BT, method='impossible')
    return found

  def init(key: jax.Array) -> Params:
    x_BTD = jnp.zeros((1, 1, encoder.hidden_size))
    return dict(head.init(key, x_BTD, jnp.ones((1, 1), bool))['params'])

  return _Head(init, losses, outputs)
