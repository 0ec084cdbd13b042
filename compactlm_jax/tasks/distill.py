"""MiniLM and MiniLMv2: a student learns the relations of a frozen teacher's layer (Wang et al. 2020, 2021).

What is compared are the queries, keys and values of self-attention, before scaling and dropout, so the loss is defined
for every encoder with self-attention: BERT, ELECTRA's discriminator or generator, and ConvBERT, whose self-attention
branch is compared (its head count is the configured one divided by the head ratio, so pairs with BERT mostly need
`relation_heads`). It is not defined for ConvBERT's convolution branch, which has kernels over a span of positions and
no token-to-token matrix; that branch of the lower layers is trained through the self-attention above it.

The loss reads the last layer's queries, keys and values only. What lies above them gets no gradient: that layer's
convolution branch, attention output, feed-forward and LayerNorms, the pooler, and projections that no relation names.
They keep their initial value ('teacher_layers' makes that a trained one): they are marked untrained, so weight decay
does not shrink them either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compactlm_jax.compress.layers import check_same_shapes, encoder_from_layers, spread_layers, take_layers
from compactlm_jax.config import DistillConfig, EncoderConfig, to_json
from compactlm_jax.errors import ConfigError
from compactlm_jax.losses.minilm import VALUE_MSE, part_names, relation_loss
from compactlm_jax.losses.reduce import masked_mean, masked_sum
from compactlm_jax.nn.encoder import encode, init_encoder
from compactlm_jax.types import QKV, Batch, Metrics, Params, Task, Trainable


def make_distill_task(
  student: EncoderConfig,
  teacher: EncoderConfig,
  teacher_params: Params,
  config: DistillConfig,
  *,
  start: Params | None = None,
  student_tokenizer: str = '',
  teacher_tokenizer: str = '',
) -> Task:
  """A task that trains a student encoder on a teacher's relations.

  The teacher runs in the same step: without dropout, without gradient, in `config.teacher_dtype`, and only up to the
  taught layer's queries, keys and values; layers above it are not even kept.

  Args:
    student: configuration of the student.
    teacher: configuration of the teacher.
    teacher_params: its parameters, a tree with 'encoder'.
    config: relations, layers, normalisation, student initialisation.
    start: parameters that hold a trained 'encoder' to continue from (a teacher assistant's, for example); None starts
      as `config.student_init` says.
    student_tokenizer: fingerprint of the tokenizer of the data; '' does not check.
    teacher_tokenizer: fingerprint of the teacher's tokenizer; '' does not check.

  Returns:
    A Task. Its metrics are the parts of the loss ('relation_qk', ..., 'value_mse') and 'weight'; `evaluate` gives
    'loss' and the parts, always as means over heads and valid query rows, so that runs compare.

  Raises:
    ConfigError: a pair or an option that does not fit, before anything is computed.
  """
  check_distill(student, teacher, config)
  _check_start(config, start, student_tokenizer, teacher_tokenizer)
  if config.student_init == 'teacher_layers':
    start = {'encoder': encoder_from_layers(student, teacher, teacher_params['encoder'], config.init_layers)}
  relation_parts = _relation_parts(student, teacher, config)

  def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Metrics]:
    del step
    parts, weights_B = relation_parts(params, frozen, batch, jax.random.fold_in(key, 0), config)
    metrics = {name: masked_mean(part_B, weights_B) for name, part_B in parts.items()}
    return jnp.stack(list(metrics.values())).sum(), {**metrics, 'weight': weights_B.sum()}

  def evaluate(params: Params, frozen: Any, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    comparable = dataclasses.replace(config, normalize='tokens')
    parts, weights_B = relation_parts(params, frozen, batch, None, comparable)
    parts['loss'] = jnp.stack(list(parts.values())).sum(0)
    return {name: masked_sum(part_B, weights_B) for name, part_B in parts.items()}

  return Task(
    name='distill',
    init=_initialiser(student, start),
    loss=loss,
    evaluate=evaluate,
    frozen=_needed(teacher, teacher_params, layer_pairs(student, teacher, config)[0][-1]),
    trainable=_trainable(student, config),
    model={'encoder': to_json(student), 'distill': to_json(config)},
  )


def _check_start(config: DistillConfig, start: Params | None, student_tokenizer: str, teacher_tokenizer: str) -> None:
  if student_tokenizer and teacher_tokenizer and student_tokenizer != teacher_tokenizer:
    raise ConfigError(
      f"config.data.tokenizer: the data's tokenizer {student_tokenizer[:12]} is not the teacher's "
      f"{teacher_tokenizer[:12]}; prepare the data with the teacher's tokenizer"
    )
  if start is not None and config.student_init != 'random':
    raise ConfigError("config.distill.student_init: a model to start from is given; set student_init to 'random'")


def layer_pairs(
  student: EncoderConfig, teacher: EncoderConfig, config: DistillConfig
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """(teacher layers, student layers), 1-based and of equal number: which layer teaches which.

  'last': the taught layer and the student's last. 'uniform': student layer i learns from teacher layer i * L / M,
  rounded up, where L is the taught layer and M the student's depth; their losses are averaged.
  """
  top = config.teacher_layer or teacher.num_layers
  if config.layers == 'last':
    return (top,), (student.num_layers,)
  return spread_layers(student.num_layers, top), tuple(range(1, student.num_layers + 1))


def check_distill(student: EncoderConfig, teacher: EncoderConfig, config: DistillConfig) -> None:
  """Checks that the pair and the options fit; needs no weights.

  Args:
    student: configuration of the student.
    teacher: configuration of the teacher.
    config: what is compared.

  Raises:
    ConfigError: the first field that does not fit, and what to set instead.
  """
  if student.vocab_size != teacher.vocab_size:
    raise ConfigError(
      f'config.encoder.vocab_size: the student has {student.vocab_size} and the teacher {teacher.vocab_size}; both '
      f"must read the same tokens: use the teacher's tokenizer and set vocab_size={teacher.vocab_size}"
    )
  if config.teacher_layer > teacher.num_layers:
    raise ConfigError(
      f"config.distill.teacher_layer: {config.teacher_layer} is above the teacher's {teacher.num_layers} layers; use 1 "
      f'to {teacher.num_layers}, or 0 for the last'
    )
  for side, encoder in (('encoder', student), ('teacher', teacher)):
    if encoder.causal:
      raise ConfigError(
        f'config.{side}.causal: relations are those of all real tokens, and a left-to-right model attends to earlier '
        'ones only; take one that reads both directions'
      )
    if not encoder.self_attention:
      raise ConfigError(
        f'config.{side}.self_attention: relations compare queries, keys and values, and with False there are no keys '
        'and values; use an encoder with self-attention'
      )
    if encoder.ragged:
      raise ConfigError(
        f'config.{side}: its layers differ in size (heads_per_layer, neurons_per_layer), and relations compare heads '
        'of equal number; export it with --layout=padded and use that'
      )
  if config.layers == 'uniform' and student.num_layers > (config.teacher_layer or teacher.num_layers):
    raise ConfigError(
      f"config.distill.layers: 'uniform' needs at least as many taught layers as the student's {student.num_layers}; "
      "use 'last'"
    )
  if config.init_layers and config.student_init != 'teacher_layers':
    raise ConfigError(
      "config.distill.init_layers: is read only with student_init='teacher_layers'; set that or empty it"
    )
  if config.student_init == 'teacher_layers':
    check_same_shapes(student, teacher, 'distill.student_init')
  _check_heads(student, teacher, config)


def _check_heads(student: EncoderConfig, teacher: EncoderConfig, config: DistillConfig) -> None:
  widths = {'teacher': teacher.num_heads * teacher.head_size, 'student': student.num_heads * student.head_size}
  compared = [name for name in part_names(config) if name != VALUE_MSE]
  if compared and not config.relation_heads and student.num_heads != teacher.num_heads:
    common = math.gcd(*widths.values())
    raise ConfigError(
      f'config.distill.relation_heads: 0 compares attention heads one to one, and the teacher has {teacher.num_heads} '
      f'and the student {student.num_heads}; set relation_heads to a divisor of {common}'
    )
  for side, width in widths.items():
    if config.relation_heads and width % config.relation_heads:
      raise ConfigError(
        f"config.distill.relation_heads: {config.relation_heads} does not divide the {side}'s width {width} "
        f'(heads times head size); use a divisor of {math.gcd(*widths.values())}'
      )
  if config.value_loss == 'mse' and 'vv' not in config.relations:
    raise ConfigError("config.distill.value_loss: 'mse' replaces the relation vv; add vv to relations")
  if config.value_loss == 'mse' and widths['teacher'] != widths['student']:
    raise ConfigError(
      f"config.distill.value_loss: 'mse' compares values of equal width, the teacher's have {widths['teacher']} and "
      f"the student's {widths['student']}; use 'relation'"
    )


PartsFn = Callable[..., tuple[dict[str, jax.Array], jax.Array]]


def _relation_parts(student: EncoderConfig, teacher: EncoderConfig, config: DistillConfig) -> PartsFn:
  """(params, frozen, batch, dropout key, config) -> (parts per example, weight of each example)."""
  taught, learning = layer_pairs(student, teacher, config)
  limit = min(student.max_positions, teacher.max_positions)
  teacher = dataclasses.replace(
    teacher, num_layers=taught[-1], pooler=False, dtype=config.teacher_dtype or student.dtype, remat=False
  )

  def parts_of(params: Params, frozen: Any, batch: Batch, key: jax.Array | None, config: DistillConfig) -> Any:
    if batch.input_ids.shape[1] > limit:
      raise ConfigError(
        f'config.data.seq_len: rows have {batch.input_ids.shape[1]} tokens, teacher and student have positions for '
        f'{limit}; prepare shorter rows or raise encoder.max_positions'
      )
    inputs = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    target = encode(jax.lax.stop_gradient(frozen), teacher, *inputs, qkv_layers=taught, skip_above=True)
    own = encode(params, student, *inputs, dropout_key=key, qkv_layers=learning, skip_above=True)
    return compare(target.qkv, own.qkv, batch, config)

  return parts_of


def compare(
  teacher: Sequence[QKV], student: Sequence[QKV], batch: Batch, config: DistillConfig
) -> tuple[dict[str, jax.Array], jax.Array]:
  """MiniLM's losses of pairs of layers: (parts per example, means over the pairs; weight of each example).

  Args:
    teacher: of the layers that teach.
    student: of the layers that learn, in the same order.
    batch: its mask, and the weights of its rows.
    config: what is compared.
  """
  pairs = zip(teacher, student, strict=True)
  layers = [relation_loss(t, s, batch.attention_mask, config, batch.weights) for t, s in pairs]
  parts: Any = {_metric(name): sum(p[name] for p, _ in layers) / len(layers) for name in part_names(config)}
  return parts, layers[0][1]


def _metric(part: str) -> str:
  return part if part == VALUE_MSE else f'relation_{part}'


def _trainable(student: EncoderConfig, config: DistillConfig) -> Trainable:
  """All but the pooler, what lies above the last layer's projections, and those of them that no relation names."""
  named = set(''.join(config.relations))
  unread = ''.join(rf'|attention/{name}/.*' for name in ('query', 'key', 'value') if name[0] not in named)
  above = rf'encoder/layers/(attention/(output|conv)/.*|attention_norm/.*|ffn_.*{unread})'
  below_last = (True,) * (student.num_layers - 1) + (False,)
  rest = rf'(?!encoder/pooler/)(?!{above}).*'
  return ((r'encoder/pooler/.*', False), (above, below_last), (rest, True))


def _needed(teacher: EncoderConfig, params: Params, top: int) -> Params:
  """The teacher's embeddings and its layers 1 to `top`."""
  encoder = params['encoder']
  depth = jax.tree.leaves(encoder['layers'])[0].shape[0]
  if depth != teacher.num_layers:
    raise ConfigError(f'config.teacher: its weights have {depth} layers and its configuration {teacher.num_layers}')
  kept = {name: tree for name, tree in encoder.items() if name != 'pooler'}
  return {'encoder': kept if top == depth else take_layers(kept, tuple(range(1, top + 1)))}


def _initialiser(student: EncoderConfig, start: Params | None) -> Callable[[jax.Array], Params]:
  """key -> parameters: random, with the sub-trees of `start` in their place."""

  def init(key: jax.Array) -> Params:
    fresh = init_encoder(student, key)['encoder']
    given = start['encoder'] if start else {}
    return {'encoder': {name: jax.tree.map(jnp.asarray, given.get(name, tree)) for name, tree in fresh.items()}}

  return init
