"""FLOPs that a model needs, counted from its configuration: what MFU divides by.

Matrix products only, two FLOPs per multiplication and addition, whatever the compiler makes of them: recomputation,
padding and one-hot tricks do not count. A trained product counts three times (forward, and two in the backward pass),
a frozen one once. Table look-ups, LayerNorms, softmax and the optimiser count nothing. For a plain encoder at short
length this is the usual 6 * weights * tokens (PaLM, Chowdhery et al. 2022, appendix B), plus attention and heads.
"""

from __future__ import annotations

import dataclasses

from compactlm_jax.config import EncoderConfig, RunConfig
from compactlm_jax.tasks.distill import layer_pairs

TRAINED = 3
"""Forward pass, gradient of the inputs, gradient of the weights."""


def layer_flops(config: EncoderConfig, seq_len: int) -> float:
  """Forward FLOPs of one layer for one token.

  Args:
    config: the encoder.
    seq_len: length of its row. Causal attention reads (seq_len + 1) / 2 positions on average.
  """
  inner, branches = config.num_heads * config.head_size, 0
  total = 2.0 * config.hidden_size * inner  # queries
  if config.self_attention:
    branches += 1
    read = (seq_len + 1) / 2 if config.causal else seq_len
    total += 2 * 2 * config.hidden_size * inner + 2 * 2 * read * inner
  if config.conv_kernel_size:
    branches += 1
    total += conv_flops(config)
  total += 2 * branches * inner * config.hidden_size
  return total + 2 * 2 * config.hidden_size * config.intermediate_size / config.num_groups


def conv_flops(config: EncoderConfig) -> float:
  """Forward FLOPs of the dynamic convolution of one layer for one token: span, taps, values, mixing."""
  inner, taps = config.num_heads * config.head_size, config.conv_kernel_size
  span = 2 * taps * config.hidden_size + 2 * config.hidden_size * inner if config.conv_kind == 'span' else 0
  return span + 2 * inner * config.num_heads * taps + 2 * config.hidden_size * inner + 2 * taps * inner


def encoder_flops(config: EncoderConfig, seq_len: int) -> float:
  """Forward FLOPs of an encoder for one token, without pooler and heads."""
  projection = 2 * config.embedding_size * config.hidden_size if config.embedding_size != config.hidden_size else 0
  return projection + config.num_layers * layer_flops(config, seq_len)


def mlm_head_flops(config: EncoderConfig) -> float:
  """Forward FLOPs of the masked-language-model head for one position: Dense, then the word table."""
  return 2.0 * config.embedding_size * (config.hidden_size + config.vocab_size)


def model_flops(config: RunConfig, teacher: EncoderConfig | None = None) -> float:
  """FLOPs of one training step of the whole batch.

  Args:
    config: the run; its `encoder` is the trained one.
    teacher: of distillation.
  """
  rows, length, encoder = config.batch_size, config.data.seq_len, config.encoder
  own = length * encoder_flops(encoder, length)
  if config.task == 'electra':
    small, width = config.electra.generator_encoder(encoder), encoder.hidden_size
    generator = length * encoder_flops(small, length) + config.mask.slots(length) * mlm_head_flops(small)
    return TRAINED * rows * (own + length * 2 * width * (width + 1) + generator)
  if config.task == 'mlm':
    return TRAINED * rows * (own + config.mask.slots(length) * mlm_head_flops(encoder))
  if config.task == 'lm':
    return TRAINED * rows * (own + (length - 1) * mlm_head_flops(encoder))
  if config.task == 'finetune':
    pooled = encoder.hidden_size if config.finetune.pooled else 0
    return TRAINED * rows * (own + 2 * encoder.hidden_size * (pooled + config.finetune.num_classes))
  assert config.task == 'distill' and teacher is not None
  taught, learning = layer_pairs(encoder, teacher, config.distill)
  return rows * (
    TRAINED * _relations_flops(encoder, config, learning) + _relations_flops(teacher, config, tuple(taught))
  )


def _relations_flops(encoder: EncoderConfig, config: RunConfig, layers: tuple[int, ...]) -> float:
  """Forward FLOPs of a row up to the compared projections of the last of `layers`, and of the relations of all."""
  length, inner = config.data.seq_len, encoder.num_heads * encoder.head_size
  below = length * encoder_flops(dataclasses.replace(encoder, num_layers=max(layers)), length)
  below -= length * layer_flops(encoder, length)
  pairs = [pair for pair in config.distill.relations if not (pair == 'vv' and config.distill.value_loss == 'mse')]
  projections = len(set(''.join(config.distill.relations)))
  return (
    below + length * projections * 2 * encoder.hidden_size * inner + len(layers) * len(pairs) * 2 * length**2 * inner
  )
