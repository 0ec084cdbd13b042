"""Losses of spans, one value per row."""

from __future__ import annotations

import optax
from jaxtyping import Array, Float, Int

from compactlm_jax.losses.classification import cross_entropy, soft_kl


def span_cross_entropy(
  start_BT: Float[Array, 'B T'], end_BT: Float[Array, 'B T'], labels_B3: Int[Array, 'B c']
) -> Float[Array, ' B']:
  """Mean of the cross-entropies of the start and the end place, in nats. A place outside the row gives NaN.

  Args:
    start_BT, end_BT: logits of the places.
    labels_B3: right start and end place, in the first two columns.
  """
  return (cross_entropy(start_BT, labels_B3[:, 0]) + cross_entropy(end_BT, labels_B3[:, 1])) / 2


def impossible_loss(logits_B: Float[Array, ' B'], impossible_B: Int[Array, ' B']) -> Float[Array, ' B']:
  """Binary cross-entropy of "there is no answer" in nats.

  Args:
    logits_B: log odds of no answer.
    impossible_B: 1 if the question has none.
  """
  return optax.sigmoid_binary_cross_entropy(logits_B, impossible_B.astype(logits_B.dtype))


def span_soft_kl(
  teacher: tuple[Float[Array, 'B T'], Float[Array, 'B T']],
  student: tuple[Float[Array, 'B T'], Float[Array, 'B T']],
  temperature: float,
  mask_BT: Float[Array, 'B T'],
) -> Float[Array, ' B']:
  """Mean over start and end of T^2 KL(teacher || student) of the softened places.

  Args:
    teacher: start and end logits.
    student: likewise.
    temperature: T.
    mask_BT: 1 for real tokens, the places compared.

  Source: huggingface/transformers `examples/research_projects/movement-pruning/masked_run_squad.py`.
  """
  parts = [soft_kl(t, s, temperature, mask_BT) for t, s in zip(teacher, student, strict=True)]
  return (parts[0] + parts[1]) / 2
