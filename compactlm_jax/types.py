"""Structs and the shape legend that every module shares.

Arrays of rank two or more carry their shape as a suffix, `x_BTD`:

  B  batch              T  length (queries)     S  length (keys)
  V  vocabulary         D  hidden size          E  embedding size
  N  layers             H  heads                K  head size
  F  feed-forward size  G  groups               W  convolution taps
  R  relation heads     C  classes
  P  prediction slots of a masked language model
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np
from jaxtyping import Array, Float, Int

Params = dict[str, Any]
"""A plain nested dict of arrays."""

Metrics = dict[str, jax.Array]
"""Name -> scalar."""

_T = TypeVar('_T')


@dataclass_transform(frozen_default=True)
def struct(cls: type[_T]) -> type[_T]:
  """Makes `cls` a frozen dataclass that is also a JAX pytree (every field a child)."""
  return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@struct
class Batch:
  """One batch of rows. `labels` and `weights` are absent (None) where a task has none.

  Attributes:
    input_ids: token ids, 0 <= id < V.
    attention_mask: 1 for real tokens, 0 for padding.
    token_type_ids: segment of each token.
    labels: class index or score per row, or (start, end, 1 if there is no answer) of a span.
    weights: 1 for real rows, 0 for the rows that fill up a last batch.
  """

  input_ids: Int[Array, 'B T']
  attention_mask: Int[Array, 'B T']
  token_type_ids: Int[Array, 'B T']
  labels: Array | None = None
  weights: Float[Array, ' B'] | None = None


@struct
class QKV:
  """Queries, keys and values of one layer, before scaling, masking and dropout."""

  q_BTHK: Float[Array, 'B T H K']
  k_BTHK: Float[Array, 'B T H K']
  v_BTHK: Float[Array, 'B T H K']


@struct
class EncoderOutput:
  """What the encoder returns.

  Attributes:
    last_BTD: hidden states after the last layer that was run.
    pooled_BD: tanh of a Dense layer on the first token, if the model has a pooler.
    hidden_NBTD: embedding output and each layer's output (N = layers + 1), if asked for.
    qkv: queries, keys and values of the asked layers, in the order asked.
  """

  last_BTD: Float[Array, 'B T D']
  pooled_BD: Float[Array, 'B D'] | None = None
  hidden_NBTD: Float[Array, 'N B T D'] | None = None
  qkv: tuple[QKV, ...] = ()


@struct
class Masked:
  """What a masked language model reads and must predict. Unused slots have position 0 and weight 0.

  Attributes:
    input_ids_BT: the row with some tokens hidden.
    positions_BP: positions of the slots.
    ids_BP: the original tokens there.
    weights_BP: 1 for real slots.
  """

  input_ids_BT: Int[Array, 'B T']
  positions_BP: Int[Array, 'B P']
  ids_BP: Int[Array, 'B P']
  weights_BP: Float[Array, 'B P']


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Ids of the special tokens of a vocabulary."""

  pad: int
  cls: int
  sep: int
  mask: int


@struct
class TrainState:
  """Everything that must survive a kill, and nothing else. `step` is the only clock.

  Attributes:
    step: number of optimiser steps done, int32.
    params: trained parameters, nested dicts.
    opt_state: state of the optimiser.
  """

  step: Int[Array, '']
  params: Params
  opt_state: Any


Trainable = tuple[tuple[str, bool | tuple[bool, ...]], ...]
"""Rows of (regex over parameter names, trained?)."""

LossFn = Callable[[Params, Any, Batch, jax.Array, jax.Array], tuple[jax.Array, Metrics]]
"""loss(params, frozen, batch, key, step) -> (value, metrics)."""

EvaluateFn = Callable[[Params, Any, Batch], Mapping[str, tuple[jax.Array, jax.Array] | jax.Array]]
"""evaluate(params, frozen, batch) -> {name: (sum, count) or rows [B, ...]}.

Pairs are added up over batches and become means. Rows are gathered, without those of weight 0, for a `Score`.
"""

Spread = Callable[[Params], Params]
"""Places every array of a named tree in equal slices over all devices, for work that each would otherwise repeat."""

View = Callable[[Params, jax.Array, jax.Array, Spread], tuple[Params, jax.Array, Metrics]]
"""view(params, key, step, spread) -> (what the forward pass reads, a penalty on the parameters, metrics)."""

Score = Callable[[Mapping[str, np.ndarray]], Mapping[str, float]]
"""What `evaluate` gathered, in the order of the rows -> metrics that are no sums (F1, correlations, exact match)."""

Files = Callable[[Mapping[str, np.ndarray]], Mapping[str, str]]
"""What `evaluate` gathered, in the order of the rows -> files of predictions: name -> text."""


@dataclasses.dataclass(frozen=True)
class Group:
  """Parameters that are trained otherwise than the rest: at a rate of their own, without weight decay.

  Attributes:
    pattern: regex over parameter names.
    learning_rate: peak, in place of the optimiser's; warm-up and decay are shared.
  """

  pattern: str
  learning_rate: float


@dataclasses.dataclass(frozen=True)
class Task:
  """What a run optimises: a bundle of pure functions that the loop receives.

  Attributes:
    name: 'distill', 'finetune', ...
    init: key -> freshly initialised parameters.
    loss: the training loss; `value` is a mean over `metrics['weight']` units (rows, tokens), so that gradient
      accumulation can weigh its micro-batches.
    evaluate: sums and counts of held-out metrics, and outputs of rows.
    frozen: parameters that are read but never trained or saved (a teacher); None if there are none.
    trainable: (regex, trained?) rows over parameter names such as 'encoder/layers/attention/query/kernel'; every
      name must match exactly one. For stacked layers the value may be a tuple with one entry per layer: layers that
      get no gradient then do not decay either.
    groups: parameters with learning rates of their own, by a name for each group.
    view: what `loss` is given in place of the parameters (masked weights, a sub-network), and a penalty; None for the
      parameters as they are. It is differentiated once per step, whatever the number of micro-batches, and runs before
      slices of parameters are gathered.
    after: (old parameters, updated ones, metrics of the step, number of the next step, spread) -> parameters: what
      follows each update (a proximal step, state that the view has computed); None for nothing.
    finished: parameters -> what `evaluate` and exports are given in place of them (masks baked in); None for the
      parameters as they are.
    results: finished parameters -> further entries of results.json.
    summarize: means of `evaluate` -> further metrics that are functions of them (perplexity).
    model: description of the trained model that is written into checkpoints and exports (JSON-able).
  """

  name: str
  init: Callable[[jax.Array], Params]
  loss: LossFn
  evaluate: EvaluateFn
  frozen: Any = None
  trainable: Trainable = (('.*', True),)
  groups: Mapping[str, Group] = dataclasses.field(default_factory=dict)
  view: View | None = None
  after: Callable[[Params, Params, Metrics, jax.Array, Spread], Params] | None = None
  finished: Callable[[Params], Params] | None = None
  results: Callable[[Params], Mapping[str, Any]] = lambda params: {}
  summarize: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda means: {}
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
