"""What DynaBERT's sub-networks learn from their teacher, one value per row (Hou et al. 2020)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def soft_cross_entropy(teacher_BC: Float[Array, 'B C'], student_BC: Float[Array, 'B C']) -> Float[Array, ' B']:
  """-sum_c softmax(teacher)_c log softmax(student)_c, in float32, without a temperature.

  Args:
    teacher_BC: logits of the fixed teacher; no gradient reaches it.
    student_BC: logits of the student.

  Source: DynaBERT, `run_glue.py: soft_cross_entropy`.
  """
  target_BC = jax.nn.softmax(jax.lax.stop_gradient(teacher_BC).astype(jnp.float32))
  return -(target_BC * jax.nn.log_softmax(student_BC.astype(jnp.float32))).sum(-1)


def hidden_mse(
  teacher_NBTD: Float[Array, 'N B T D'],
  student_NBTD: Float[Array, 'N B T D'],
  mask_BT: Int[Array, 'B T'] | None = None,
) -> Float[Array, ' B']:
  """Sum over states of the mean squared error of their elements, in float32.

  Args:
    teacher_NBTD: embedding output and outputs of layers, those that the student's are compared with; no gradient
      reaches it.
    student_NBTD: likewise, of the student.
    mask_BT: 1 for the positions that count in the mean of their row; None counts all, padding too, as published. A row
      without any gives 0.

  Source: DynaBERT, `run_glue.py` (`loss_mse` of each pair of `student_reps` and `teacher_reps`, added up).
  """
  difference_NBTD = student_NBTD.astype(jnp.float32) - jax.lax.stop_gradient(teacher_NBTD).astype(jnp.float32)
  errors_BT = jnp.square(difference_NBTD).mean(-1).sum(0)
  if mask_BT is None:
    return errors_BT.mean(-1)
  counted_BT = mask_BT.astype(jnp.float32)
  return (errors_BT * counted_BT).sum(-1) / jnp.maximum(counted_BT.sum(-1), 1.0)
