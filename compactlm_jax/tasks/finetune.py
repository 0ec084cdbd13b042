"""Fine-tuning for classes or scores of sentences and sentence pairs, alone or with a fine-tuned teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from compactlm_jax.compress.density import densities
from compactlm_jax.compress.layers import take_layers
from compactlm_jax.config import EncoderConfig, FinetuneConfig, to_json
from compactlm_jax.errors import ConfigError
from compactlm_jax.losses.classification import cross_entropy, soft_kl, squared_error
from compactlm_jax.losses.reduce import masked_mean, masked_sum
from compactlm_jax.nn.encoder import encode, init_encoder
from compactlm_jax.nn.heads import Classifier
from compactlm_jax.types import Batch, EncoderOutput, Metrics, Params, Task


def make_finetune_task(
  encoder: EncoderConfig,
  classes: tuple[str, ...],
  config: FinetuneConfig,
  start: Params | None = None,
  teacher: tuple[Params, EncoderConfig] | None = None,
) -> Task:
  """A task that trains the whole encoder and a fresh head on the first token.

  Outputs of evaluation (see `types.EvaluateFn`): 'outputs' [B, C], logits of classes or one score in the units of the
  labels, and 'labels' [B] where there are any.

  Args:
    encoder: the encoder's configuration.
    classes: class names, in the order of their indices; () for a regression.
    config: head, dropout, and the weights of both losses.
    start: parameters that hold a trained 'encoder'; None starts at random.
    teacher: (parameters with 'encoder' and 'classifier', configuration) of a model of the same classes; its head reads
      the pooler if it has one. None trains on labels alone.

  Raises:
    ConfigError: one class, `pooled` without a pooler, or a teacher without a head or with another number of outputs.
  """
  model = SentenceModel(encoder, classes, config)
  shallow, finished = kept_layers(encoder, config)
  if teacher is not None:
    check_head(teacher[0], model.width, 'config.teacher')

  def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Metrics]:
    outputs_BC = model.outputs(params, batch, key)
    losses_B = model.losses(outputs_BC, batch)
    weights_B = jnp.ones_like(losses_B) if batch.weights is None else batch.weights
    metrics = {'weight': weights_B.sum()}
    if classes:
      hits_B = jnp.equal(outputs_BC.argmax(-1), jnp.asarray(batch.labels)).astype(jnp.float32)
      metrics['accuracy'] = masked_mean(hits_B, weights_B)
    if teacher is not None:
      soft_B = model.distillation(outputs_BC, classify(frozen, teacher[1], batch))
      metrics |= {'task_loss': masked_mean(losses_B, weights_B), 'distil_loss': masked_mean(soft_B, weights_B)}
      losses_B = config.ce_weight * losses_B + config.distil_weight * soft_B
    return masked_mean(losses_B, weights_B), metrics

  def evaluate(params: Params, frozen: Any, batch: Batch) -> dict[str, Any]:
    outputs_BC = dataclasses.replace(model, encoder=shallow).outputs(params, batch, None)
    if batch.labels is None:
      return {'outputs': model.scale * outputs_BC}
    loss = masked_sum(model.losses(outputs_BC, batch), batch.weights)
    return {'loss': loss, 'outputs': model.scale * outputs_BC, 'labels': batch.labels}

  unused = r'encoder/pooler/.*' if encoder.pooler and not config.pooled else r'(?!)'
  return Task(
    name='finetune',
    init=lambda key: model.init(key, start),
    loss=loss,
    evaluate=evaluate,
    frozen=None if teacher is None else {name: teacher[0][name] for name in ('encoder', 'classifier')},
    trainable=((unused, False), (rf'(?!{unused}).*', True)),
    finished=finished,
    results=lambda params: remaining(params, shallow, encoder.num_layers),
    model={'encoder': to_json(encoder), 'classes': list(classes), 'finetune': dataclasses.asdict(config)},
  )


def kept_layers(
  encoder: EncoderConfig, config: FinetuneConfig
) -> tuple[EncoderConfig, Callable[[Params], Params] | None]:
  """The encoder of the finished model, and `Task.finished`: with `config.keep_layers` the layers that are left.

  Raises:
    ConfigError: a layer that the encoder does not have.
  """
  layers = config.keep_layers
  if not layers:
    return encoder, None
  if layers[-1] > encoder.num_layers or encoder.ragged:
    raise ConfigError(
      f'config.finetune.keep_layers: {layers} must be layers of an encoder of {encoder.num_layers} equal layers'
    )

  def finished(params: Params) -> Params:
    return {**params, 'encoder': take_layers(params['encoder'], layers)}

  return dataclasses.replace(encoder, num_layers=len(layers)), finished


def remaining(params: Params, encoder: EncoderConfig, layers: int) -> dict[str, Any]:
  """What is left of the encoder, for results.json: layers that were left out count as zeros.

  Args:
    params: of the finished model.
    encoder: its configuration.
    layers: that the encoder had in training.

  Returns:
    'density', a fraction; 'nonzero' and 'weights', the numbers that it divides (`compress.density.densities`).
  """
  found = densities(params, encoder)
  weights = found['weights'] * layers // encoder.num_layers
  return {'density': found['nonzero'] / weights, 'nonzero': found['nonzero'], 'weights': weights}


@dataclasses.dataclass(frozen=True)
class SentenceModel:
  """An encoder with a head on its first token, and the losses of its outputs.

  Attributes:
    encoder: the encoder's configuration.
    classes: class names; () for a regression.
    config: head, dropout, scale of scores.

  Raises:
    ConfigError: one class, `pooled` without a pooler, or a causal encoder.
  """

  encoder: EncoderConfig
  classes: tuple[str, ...]
  config: FinetuneConfig

  def __post_init__(self) -> None:
    if len(self.classes) == 1:
      raise ConfigError(f'config.data.label_column: found 1 class {self.classes}; at least two are needed')
    if self.config.pooled and not self.encoder.pooler:
      raise ConfigError('config.finetune.pooled: this encoder has no pooler; set it to False')
    if self.encoder.causal:
      raise ConfigError(
        'config.encoder.causal: the head reads the first token, which sees no other token of a left-to-right model; '
        'take a model that reads both directions'
      )

  @property
  def width(self) -> int:
    return max(1, len(self.classes))

  @property
  def scale(self) -> float:
    """Outputs times this are in the units of the labels."""
    return 1.0 if self.classes else self.config.score_scale

  @property
  def head(self) -> Classifier:
    return Classifier(self.width, self.encoder, self.config.dropout)

  def init(self, key: jax.Array, start: Params | None) -> Params:
    """{'encoder', 'classifier'}: the encoder of `start` if there is one, and a fresh head."""
    encoder_key, head_key = jax.random.split(key)
    base = start['encoder'] if start else init_encoder(self.encoder, encoder_key)['encoder']
    fresh = self.head.init(head_key, jnp.zeros((1, self.encoder.hidden_size)))['params']
    return {'encoder': jax.tree.map(jnp.asarray, base), 'classifier': fresh}

  def outputs(self, params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
    """[B, C]; with dropout if there is a key."""
    keys = (None, None) if key is None else jax.random.split(key)
    rows = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    return self.read(params, encode(params, self.encoder, *rows, dropout_key=keys[0]), keys[1])

  def read(self, params: Params, out: EncoderOutput, key: jax.Array | None) -> jax.Array:
    """[B, C]: the head on what the encoder returned; with dropout if there is a key."""
    vector_BD = out.pooled_BD if self.config.pooled else out.last_BTD[:, 0]
    return jnp.asarray(self.head.apply({'params': params['classifier']}, vector_BD, key))

  def losses(self, outputs_BC: jax.Array, batch: Batch) -> jax.Array:
    """[B]: cross-entropy, or squared error of scores in units of training."""
    labels_B = jnp.asarray(batch.labels)
    if self.classes:
      return cross_entropy(outputs_BC, labels_B)
    return squared_error(outputs_BC[:, 0], labels_B / self.scale)

  def distillation(self, outputs_BC: jax.Array, teacher_BC: jax.Array) -> jax.Array:
    """Towards a teacher's outputs, which are in the units of the labels."""
    teacher_BC = jax.lax.stop_gradient(teacher_BC)
    if self.classes:
      return soft_kl(teacher_BC, outputs_BC, self.config.temperature)
    return squared_error(outputs_BC[:, 0], teacher_BC[:, 0] / self.scale)


def classify(params: Params, encoder: EncoderConfig, batch: Batch) -> jax.Array:
  """Outputs [B, C] of a finished model ('encoder' and 'classifier'), without dropout.

  Its head reads the pooler if the encoder has one, else the first token (`interop.bundle.Bundle`).
  """
  out = encode(params, encoder, batch.input_ids, batch.attention_mask, batch.token_type_ids)
  vector_BD = out.pooled_BD if encoder.pooler else out.last_BTD[:, 0]
  head = Classifier(params['classifier']['bias'].shape[-1], encoder)
  return jnp.asarray(head.apply({'params': params['classifier']}, vector_BD))


def check_head(params: Params, width: int, field: str) -> None:
  """Raises ConfigError unless the model that `field` names has a head of `width` outputs."""
  if 'classifier' not in params:
    raise ConfigError(f'{field}: this model has no classifier; fine-tune it for the same task first')
  found = params['classifier']['bias'].shape[-1]
  if found != width:
    raise ConfigError(
      f'{field}: its head has {found} output(s), the task needs {width}; use a model that was fine-tuned for the same '
      'labels'
    )
