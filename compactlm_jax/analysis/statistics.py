"""One pass over a text: attention of each head, and how alike the layers of two models are.

Everything is a sum over real tokens, added up on the device batch by batch: a long file takes no more memory than a
short one. Heads may differ in number: relations of two models are compared after the mean over each model's heads,
which is again a distribution over keys. Relation heads of MiniLMv2 would need no mean, but are not heads of either
model.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from compactlm_jax.analysis.concentration import RADIUS, attention_probabilities, near_and_far, require_attention
from compactlm_jax.analysis.similarity import Moments, entropy, linear_cka, moments, pairwise_kl
from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.nn.encoder import encode
from compactlm_jax.types import QKV, Params, struct

Rows = tuple[np.ndarray, np.ndarray]
"""Token ids and mask, each int32 [B, T]; a row may be all padding."""


@struct
class Heads:
  """Sums over queries for each head of each layer: attention near and far (`concentration`), entropy in nats."""

  near_NH: Float[Array, 'N H']
  far_NH: Float[Array, 'N H']
  entropy_NH: Float[Array, 'N H']


@struct
class Statistics:
  """Sums over the real tokens of a text. The second model is the first itself if only one is analysed.

  Attributes:
    queries: number of real tokens.
    heads: of the first model.
    other_heads: of the second model.
    attention_kl_MN: KL(second || first) of self-attention per pair of layers, heads averaged.
    value_kl_MN: the same of value relations.
    moments: of the first and the second model's hidden states, embeddings first.
  """

  queries: Float[Array, '']
  heads: Heads
  other_heads: Heads
  attention_kl_MN: Float[Array, 'M N']
  value_kl_MN: Float[Array, 'M N']
  moments: Moments


@dataclasses.dataclass(frozen=True)
class Findings:
  """Means of `Statistics`, as NumPy arrays.

  Attributes:
    tokens: real tokens read.
    heads: sums over queries of the first model.
    other_heads: of the second.
    attention_kl_MN: mean KL per query, nats.
    value_kl_MN: mean KL per query, nats.
    cka_MN: linear CKA, rows of the second and columns of the first model, embeddings first.
  """

  tokens: int
  heads: Heads
  other_heads: Heads
  attention_kl_MN: np.ndarray
  value_kl_MN: np.ndarray
  cka_MN: np.ndarray


@dataclasses.dataclass(frozen=True)
class Model:
  """Parameters and configuration of an encoder with self-attention."""

  params: Params
  config: EncoderConfig


def analysed(params: Params, config: EncoderConfig) -> Model:
  """A model as it is analysed: each row as if it stood alone, not padded.

  A ConvBERT in parity mode lets padding into its convolutions; here it does not, so that nothing depends on how rows
  are batched.

  Raises:
    ConfigError: the encoder has no self-attention, or layers of different sizes.
  """
  require_attention(config)
  if config.ragged:
    raise ConfigError(
      'config.encoder.heads_per_layer, neurons_per_layer: layers of different sizes cannot be compared head by head; '
      'analyse the run itself, or its export with --layout=padded, where removed heads are zeros and attend evenly'
    )
  return Model(params, dataclasses.replace(config, conv_sees_padding=False, scan_unroll=1, remat=False))


def examine(model: Model, other: Model | None, batches: Iterable[Rows]) -> Findings:
  """Reads all batches and returns the means.

  Args:
    model: the first model, from `analysed`.
    other: the second, with the same vocabulary; None compares the layers of the first with each other.
    batches: of the few shapes that the caller chooses; each shape is compiled once.

  Raises:
    DataError: no batch, or not a single real token.
  """
  batches = iter(batches)
  first = next(batches, None)
  if first is None or not first[1].any():
    raise DataError('the text has no tokens to analyse')
  configs = (model.config, other.config if other else None)
  params = (model.params, other.params if other else None)
  shifts = _zero_shifts(*configs)
  shapes = jax.eval_shape(functools.partial(statistics, *configs), *params, shifts, *first)
  zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  # The means of the first batch are the shifts of all: close enough for float32, and the same program finds them.
  seen = _add(*configs, *params, shifts, zeros(), *first).moments
  shifts = (np.asarray(seen.x_ND / seen.count), np.asarray(seen.y_ME / seen.count))
  del seen
  total = zeros()
  for rows in itertools.chain([first], batches):
    total = _add(*configs, *params, shifts, total, *rows)
  return _findings(total)


def _zero_shifts(config: EncoderConfig, other: EncoderConfig | None) -> tuple[np.ndarray, np.ndarray]:
  x, y = (np.zeros((c.num_layers + 1, c.hidden_size), np.float32) for c in (config, other or config))
  return x, y


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _add(config, other, params, other_params, shifts, total, ids_BT, mask_BT) -> Statistics:
  new = statistics(config, other, params, other_params, shifts, ids_BT, mask_BT)
  return jax.tree.map(jnp.add, total, new)


def statistics(
  config: EncoderConfig,
  other: EncoderConfig | None,
  params: Params,
  other_params: Params | None,
  shifts: tuple[Float[Array, 'N D'], Float[Array, 'M E']],
  ids_BT: Int[Array, 'B T'],
  mask_BT: Int[Array, 'B T'],
) -> Statistics:
  """The sums of one batch. Pure; under `jax.jit` the configurations are static.

  Args:
    config: of the first model.
    other: of the second; None takes the first again.
    params: of the first model.
    other_params: of the second; None with `other`.
    shifts: see `moments`.
    ids_BT: token ids.
    mask_BT: 1 for real tokens.
  """
  weight_BT = mask_BT.astype(jnp.float32)
  heads, attention_NBTS, value_NBTS, hidden_NBTD = _layers(params, config, ids_BT, mask_BT)
  mine = heads, attention_NBTS, value_NBTS, hidden_NBTD
  theirs = mine if other is None or other_params is None else _layers(other_params, other, ids_BT, mask_BT)
  states, other_states = (h.reshape(h.shape[0], -1, h.shape[-1]) for h in (hidden_NBTD, theirs[3]))
  return Statistics(
    weight_BT.sum(),
    heads,
    theirs[0],
    pairwise_kl(theirs[1], attention_NBTS, weight_BT),
    pairwise_kl(theirs[2], value_NBTS, weight_BT),
    moments(states, other_states, weight_BT.reshape(-1), *shifts),
  )


def _layers(params: Params, config: EncoderConfig, ids_BT: Array, mask_BT: Array) -> tuple[Heads, Array, Array, Array]:
  """(sums of heads, attention and value relations with heads averaged [N, B, T, S], hidden states [N + 1, B, T, D])."""
  everything = tuple(range(1, config.num_layers + 1))
  out = encode(params, config, ids_BT, mask_BT, all_hidden=True, qkv_layers=everything)
  assert out.hidden_NBTD is not None
  weight_BT, sums, attention, values = mask_BT.astype(jnp.float32), [], [], []
  for qkv in out.qkv:
    probs_BHTS = attention_probabilities(qkv, mask_BT, causal=config.causal)
    near_BH, far_BH = near_and_far(probs_BHTS, mask_BT, RADIUS)
    sums.append(Heads(near_BH.sum(0), far_BH.sum(0), entropy(probs_BHTS, weight_BT)))
    attention.append(probs_BHTS.mean(1))
    values.append(value_relation(qkv, mask_BT, causal=config.causal).mean(1))
  heads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums)
  return heads, jnp.stack(attention), jnp.stack(values), out.hidden_NBTD


def value_relation(qkv: QKV, mask_BS: Int[Array, 'B S'], *, causal: bool = False) -> Float[Array, 'B H T S']:
  """softmax(v v^T / sqrt(K)) over real keys, in float32 (MiniLM, equation 3).

  Args:
    qkv: of a layer, from `encode`.
    mask_BS: 1 for real keys.
    causal: keys behind the query get probability 0, as in the model's attention.
  """
  return attention_probabilities(QKV(qkv.v_BTHK, qkv.v_BTHK, qkv.v_BTHK), mask_BS, causal=causal)


def _findings(total: Statistics) -> Findings:
  cka_NM = np.asarray(linear_cka(total.moments))
  host = jax.tree.map(np.asarray, (total.queries, total.heads, total.other_heads))
  queries, heads, other_heads = host
  kl, value_kl = (np.maximum(np.asarray(k / total.queries), 0) for k in (total.attention_kl_MN, total.value_kl_MN))
  return Findings(int(queries), heads, other_heads, kl, value_kl, cka_NM.T)
