"""Heads that find a span: where the answer starts and ends. Logits are products in float32, whatever comes in."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from compactlm_jax.config import EncoderConfig
from compactlm_jax.nn.layers import kernel_init
from compactlm_jax.ops.corruption import take_positions
from compactlm_jax.ops.dense import dense, gelu

HIDDEN = 512
"""Units of the joint head's hidden layers (ELECTRA)."""

CLOSED = -1000.0
"""Added by the joint head to logits of tokens that cannot start or end an answer (ELECTRA)."""


class DenseWeights(nn.Module):
  """Kernel and bias of a Dense layer, to be applied by the module that owns it."""

  rows: int
  columns: int
  stddev: float

  @nn.compact
  def __call__(self) -> tuple[Float[Array, 'i o'], Float[Array, ' o']]:
    kernel = self.param('kernel', kernel_init(self.stddev), (self.rows, self.columns))
    return kernel, self.param('bias', nn.initializers.zeros, (self.columns,))


class SpanHead(nn.Module):
  """One Dense layer: a start logit and an end logit for each token, independent of one another (BERT)."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D']) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
    kernel = self.param('kernel', kernel_init(self.config.initializer_range), (x_BTD.shape[-1], 2))
    bias = self.param('bias', nn.initializers.zeros, (2,))
    logits_BT2 = dense(x_BTD.astype(jnp.float32), kernel, bias)
    return logits_BT2[..., 0], logits_BT2[..., 1]


class JointSpanHead(nn.Module):
  """Start logits, end logits that depend on the start, and whether there is no answer at all (ELECTRA).

  Source: google-research/electra `finetune/qa/qa_tasks.py` (joint_prediction, answerable_uses_start_logits).
  """

  config: EncoderConfig
  answerable: bool = True

  def setup(self) -> None:
    width, stddev = self.config.hidden_size, self.config.initializer_range
    self.start = DenseWeights(width, 1, stddev)
    self.end_hidden, self.end_output = DenseWeights(2 * width, HIDDEN, stddev), DenseWeights(HIDDEN, 1, stddev)
    if self.answerable:
      self.answerable_hidden = DenseWeights(2 * width, HIDDEN, stddev)
      self.answerable_output = DenseWeights(HIDDEN, 1, stddev)

  def __call__(self, x_BTD: Float[Array, 'B T D'], open_BT: Bool[Array, 'B T']) -> Float[Array, 'B T']:
    """Start logits, after a pass through everything: for `init`, which must meet each parameter."""
    start_BT = self.starts(x_BTD, open_BT)
    self.ends(x_BTD, open_BT, jnp.zeros((len(x_BTD), 1), jnp.int32))
    if self.answerable:
      self.impossible(x_BTD, start_BT)
    return start_BT

  def starts(self, x_BTD: Float[Array, 'B T D'], open_BT: Bool[Array, 'B T']) -> Float[Array, 'B T']:
    """A start logit for each token; `open_BT` is False where no answer can start or end."""
    logits_BT = dense(x_BTD.astype(jnp.float32), *self.start())[..., 0]
    return logits_BT + jnp.where(open_BT, 0.0, CLOSED)

  def ends(
    self, x_BTD: Float[Array, 'B T D'], open_BT: Bool[Array, 'B T'], starts_BK: Int[Array, 'B K']
  ) -> Float[Array, 'B K T']:
    """An end logit for each token, given each of K start places: Dense of [start, token], GELU, Dense.

    The kernel is applied in its two halves, so that the product over tokens is done once for all starts, and starts
    go one by one, so that memory does not grow with their number.
    """
    (kernel, bias), output, width = self.end_hidden(), self.end_output(), x_BTD.shape[-1]
    start_BKF = dense(take_positions(x_BTD, starts_BK), kernel[:width], bias)
    token_BTF = dense(x_BTD, kernel[width:], jnp.zeros_like(bias))

    def one(start_BF: jax.Array) -> jax.Array:
      return dense(gelu(start_BF[:, None] + token_BTF).astype(jnp.float32), *output)[..., 0]

    logits_KBT = jax.lax.map(one, start_BKF.swapaxes(0, 1))
    return logits_KBT.swapaxes(0, 1) + jnp.where(open_BT, 0.0, CLOSED)[:, None]

  def impossible(self, x_BTD: Float[Array, 'B T D'], start_BT: Float[Array, 'B T']) -> Float[Array, ' B']:
    """Log odds that there is no answer, from the first token and the mean token under the start probabilities."""
    hidden, output = self.answerable_hidden(), self.answerable_output()
    probs_BT = jax.nn.softmax(start_BT).astype(x_BTD.dtype)
    expected_BD = jnp.einsum('bt,btd->bd', probs_BT, x_BTD)
    both_BD = jnp.concatenate([x_BTD[:, 0], expected_BD], axis=-1)
    return dense(gelu(dense(both_BD, *hidden)).astype(jnp.float32), *output)[..., 0]
