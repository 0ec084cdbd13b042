"""Forward FLOPs of an encoder and its parts, counted from the configuration.

Matrix products only, two FLOPs per multiplication and addition, whatever the compiler makes of them: padding and
one-hot tricks do not count. Table look-ups, LayerNorms and softmax count nothing.
"""

from __future__ import annotations

from compactlm_jax.config import EncoderConfig, runs
from compactlm_jax.nn.span import HIDDEN as SPAN_HIDDEN


def layer_flops(config: EncoderConfig, seq_len: int) -> float:
  """Forward FLOPs of one layer for one token: attention, convolution branch and feed-forward.

  Args:
    config: the encoder, or one of its `runs` if its layers differ.
    seq_len: length of its row.
  """
  return attention_flops(config, seq_len) + conv_branch_flops(config) + feed_forward_flops(config)


def attention_flops(config: EncoderConfig, seq_len: int) -> float:
  """Forward FLOPs of the self-attention of one layer for one token, with its rows of the output projection.

  The queries, which a convolution branch reads too, count here.

  Args:
    config: the encoder.
    seq_len: length of its row. Causal attention reads (seq_len + 1) / 2 positions on average.
  """
  inner = config.num_heads * config.head_size
  queries = 2.0 * config.hidden_size * inner
  if not config.self_attention:
    return queries
  read = (seq_len + 1) / 2 if config.causal else seq_len
  return queries + 2 * 2 * config.hidden_size * inner + 2 * 2 * read * inner + 2 * inner * config.hidden_size


def conv_branch_flops(config: EncoderConfig) -> float:
  """Forward FLOPs of the convolution branch of one layer for one token, with its rows of the output projection."""
  if not config.conv_kernel_size or not config.num_heads:
    return 0.0
  return conv_flops(config) + 2.0 * config.num_heads * config.head_size * config.hidden_size


def conv_flops(config: EncoderConfig) -> float:
  """Forward FLOPs of the dynamic convolution of one layer for one token: span, taps, values, mixing."""
  inner, taps = config.num_heads * config.head_size, config.conv_kernel_size
  span = 2 * taps * config.hidden_size + 2 * config.hidden_size * inner if config.conv_kind == 'span' else 0
  return span + 2 * inner * config.num_heads * taps + 2 * config.hidden_size * inner + 2 * taps * inner


def feed_forward_flops(config: EncoderConfig) -> float:
  """Forward FLOPs of the (grouped) feed-forward of one layer for one token."""
  return 2 * 2 * config.hidden_size * config.intermediate_size / config.num_groups


def encoder_flops(config: EncoderConfig, seq_len: int) -> float:
  """Forward FLOPs of an encoder for one token, without pooler and heads."""
  layers = sum((stop - start) * layer_flops(run, seq_len) for start, stop, run in runs(config))
  return embedding_flops(config) + layers


def embedding_flops(config: EncoderConfig) -> float:
  """Forward FLOPs of the embeddings for one token: their projection, if the sizes differ."""
  return 2.0 * config.embedding_size * config.hidden_size if config.embedding_size != config.hidden_size else 0.0


def mlm_head_flops(config: EncoderConfig) -> float:
  """Forward FLOPs of the masked-language-model head for one position: Dense, then the word table."""
  return 2.0 * config.embedding_size * (config.hidden_size + config.vocab_size)


def span_head_flops(width: int, seq_len: int, *, joint: bool = False, answerable: bool = False) -> float:
  """Forward FLOPs of a span head for one row in training, where the joint head is given the one right start.

  Args:
    width: hidden size.
    seq_len: length of the row.
    joint: ends depend on the start (two Dense layers, the first in two halves); else two independent logits.
    answerable: the joint head also says whether there is an answer, from the first and the mean token.
  """
  if not joint:
    return 2.0 * seq_len * width * 2
  starts = 2.0 * seq_len * width
  ends = 2.0 * (seq_len + 1) * width * SPAN_HIDDEN + 2.0 * seq_len * SPAN_HIDDEN
  impossible = 2.0 * seq_len * width + 2.0 * (2 * width * SPAN_HIDDEN + SPAN_HIDDEN) if answerable else 0.0
  return starts + ends + impossible
