"""Choosing layers of a stacked tree: a shallower encoder that starts from a deeper one's weights."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from compactlm_jax.config import LAYER_FIELDS, TABLE_FIELDS, EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.types import Params


def spread_layers(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
  """Evenly spread 1-based layer numbers that end with the last: 3 of 6 are 2, 4, 6; 4 of 6 are 2, 3, 5, 6.

  Args:
    student_layers: how many to choose.
    teacher_layers: from how many.

  Raises:
    ConfigError: more are asked for than there are.
  """
  if student_layers > teacher_layers:
    raise ConfigError(
      f'config.encoder.num_layers: {student_layers} layers cannot be chosen from {teacher_layers}; use a deeper '
      'teacher or fewer layers'
    )
  return tuple(-(-i * teacher_layers // student_layers) for i in range(1, student_layers + 1))


def take_layers(encoder: Params, layers: tuple[int, ...]) -> Params:
  """An encoder tree with only the given layers of its stack, in the given order.

  Args:
    encoder: the tree under 'encoder': 'embeddings', 'layers' with a leading layer axis, perhaps 'pooler'.
    layers: 1-based layer numbers; one may repeat.

  Raises:
    ConfigError: a number outside the stack, or layers of different sizes.
  """
  if 'layers' not in encoder:
    raise ConfigError(f'layers {layers}: cannot be chosen from layers of different sizes; use the padded export of it')
  depth = jax.tree.leaves(encoder['layers'])[0].shape[0]
  wrong = [layer for layer in layers if not 1 <= layer <= depth]
  if wrong or not layers:
    raise ConfigError(f'layers {layers}: choose from 1 to {depth}')
  index = np.array(layers) - 1
  stacked: Any = jax.tree.map(lambda leaf: leaf[index], encoder['layers'])
  return {**encoder, 'layers': stacked}


def check_same_shapes(student: EncoderConfig, teacher: EncoderConfig, field: str) -> None:
  """Checks that the student's layers have the teacher's shapes.

  Args:
    student: configuration of the shallower encoder.
    teacher: configuration of the encoder that it starts from.
    field: the configuration field that asks for it, for the message.

  Raises:
    ConfigError: a size that differs.
  """
  for name in (*LAYER_FIELDS, *TABLE_FIELDS):
    ours, theirs = getattr(student, name), getattr(teacher, name)
    if ours != theirs:
      raise ConfigError(
        f'config.{field}: the student has {name} {ours} and the teacher {theirs}; weights can be taken over only at '
        f"equal sizes: set encoder.{name}={theirs} or start at 'random'"
      )


def encoder_from_layers(
  student: EncoderConfig, teacher: EncoderConfig, teacher_encoder: Params, layers: tuple[int, ...] = ()
) -> Params:
  """The student's encoder tree made of the teacher's embeddings and some of its layers.

  The pooler is the teacher's if both have one; a student's pooler that the teacher lacks is left out, for the caller
  to initialise.

  Args:
    student: configuration of the student.
    teacher: configuration of the teacher.
    teacher_encoder: the teacher's tree under 'encoder'.
    layers: 1-based teacher layers, one for each of the student's; () spreads them evenly.

  Raises:
    ConfigError: sizes that differ, or layers that do not fit.
  """
  check_same_shapes(student, teacher, 'distill.student_init')
  layers = layers or spread_layers(student.num_layers, teacher.num_layers)
  if len(layers) != student.num_layers:
    raise ConfigError(
      f'config.distill.init_layers: {layers} names {len(layers)} layers and the student has {student.num_layers}; '
      'name one for each, or leave it empty'
    )
  if any(not 1 <= layer <= teacher.num_layers for layer in layers):
    raise ConfigError(
      f'config.distill.init_layers: {layers} must be between 1 and the teacher depth {teacher.num_layers}'
    )
  chosen = take_layers(teacher_encoder, layers)
  return {name: tree for name, tree in chosen.items() if name != 'pooler' or student.pooler}
