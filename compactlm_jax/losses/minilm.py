"""MiniLM's losses on the queries, keys and values of one teacher layer and one student layer, one value per example."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from compactlm_jax.config import DistillConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.ops.relations import relation_kl, split_heads
from compactlm_jax.types import QKV

VALUE_MSE = 'value_mse'
"""Name of the part that replaces 'vv' under `value_loss='mse'`."""


def part_names(config: DistillConfig) -> tuple[str, ...]:
  """Names of the parts that `relation_loss` returns, in order."""
  return tuple(VALUE_MSE if r == 'vv' and config.value_loss == 'mse' else r for r in config.relations)


def relation_loss(
  teacher: QKV,
  student: QKV,
  mask_BT: Int[Array, 'B T'],
  config: DistillConfig,
  weights_B: Float[Array, ' B'] | None = None,
) -> tuple[dict[str, Float[Array, ' B']], Float[Array, ' B']]:
  """The parts of MiniLM's loss per example, and how much each example weighs in their mean.

  Masked keys take no part. The loss is the sum of the parts (weights 1:1), averaged over examples with the returned
  weights, which makes the three normalisations:
    'tokens': mean over heads and valid query rows of the whole batch;
    'examples': mean over heads and valid rows of each example, then over examples;
    'padded': mean over heads and all rows of the padded length, pad query rows included.

  Args:
    teacher: queries, keys and values before scaling, masking and dropout. No gradient reaches it.
    student: likewise; its own head size, and its own head count under `config.relation_heads`.
    mask_BT: 1 for real tokens.
    config: relations, relation heads, normalisation, value loss.
    weights_B: 1 for real rows, 0 for rows that fill up a batch; None means ones.

  Returns:
    ({name: KL in nats per head and row, or squared error per value element}, weights). Names are `part_names`.

  Raises:
    ConfigError: head counts or widths that do not fit; `tasks.distill` refuses them before training.

  Source: Wang et al. 2020, MiniLM, equations 1-5; Wang et al. 2021, MiniLMv2.
  """
  teacher = jax.lax.stop_gradient(teacher)
  real_BT = mask_BT.astype(jnp.float32)
  rows_BT = jnp.ones_like(real_BT) if config.normalize == 'padded' else real_BT
  count_B = rows_BT.sum(-1)
  weights_B = jnp.ones_like(count_B) if weights_B is None else weights_B.astype(jnp.float32)
  weights_B = weights_B * (count_B if config.normalize == 'tokens' else (count_B > 0).astype(jnp.float32))
  per_row_B = 1.0 / jnp.maximum(count_B, 1.0)
  operands = {
    side: {
      name: split_heads(x_BTHK, config.relation_heads)
      for name, x_BTHK in (('q', qkv.q_BTHK), ('k', qkv.k_BTHK), ('v', qkv.v_BTHK))
    }
    for side, qkv in (('teacher', teacher), ('student', student))
  }
  parts = {}
  for relation, name in zip(config.relations, part_names(config), strict=True):
    if name == VALUE_MSE:
      parts[name] = per_row_B * _value_mse(teacher.v_BTHK, student.v_BTHK, rows_BT)
      continue
    x, y = relation[0], relation[1]
    taught, learner = operands['teacher'], operands['student']
    sums_B = relation_kl(taught[x], taught[y], learner[x], learner[y], mask_BT, rows_BT)
    parts[name] = per_row_B / taught[x].shape[2] * sums_B
  return parts, weights_B


def _value_mse(
  teacher_BTHK: Float[Array, 'B T H K'], student_BTHK: Float[Array, 'B T I J'], rows_BT: Float[Array, 'B T']
) -> Float[Array, ' B']:
  """Sum over rows of the mean squared difference of the concatenated values."""
  (batch, length, *teacher_heads), student_heads = teacher_BTHK.shape, student_BTHK.shape[2:]
  if teacher_heads[0] * teacher_heads[1] != student_heads[0] * student_heads[1]:
    raise ConfigError(
      f"config.distill.value_loss: 'mse' compares values of equal width, the teacher's are {tuple(teacher_heads)} and "
      f"the student's {student_heads} (heads, size); use 'relation'"
    )
  teacher_BTD, student_BTD = (x.reshape(batch, length, -1).astype(jnp.float32) for x in (teacher_BTHK, student_BTHK))
  return (jnp.square(teacher_BTD - student_BTD).mean(-1) * rows_BT).sum(-1)
