"""What the parts of a model cost: parameters, FLOPs counted and by XLA, measured latency.

A layer's parts are timed alone, in the shape of the first layer's weights, and stand in the table for all layers: the
query, key and value projections, softmax and its rows of the output projection are attention; the dynamic convolution
and the other rows are the convolution branch, which is given the queries that attention has made. The parts therefore
add up to the model's FLOPs; their times do not quite add up to the encoder's, which is timed as a whole too.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from compactlm_jax.analysis.statistics import Model
from compactlm_jax.config import EncoderConfig
from compactlm_jax.nn import flops
from compactlm_jax.nn.attention import MixedAttention, SpanDynamicConv
from compactlm_jax.nn.encoder import encode
from compactlm_jax.nn.heads import MlmHead, RtdHead
from compactlm_jax.nn.layers import Embeddings, GroupedDense, LayerNorm, MaskedDense
from compactlm_jax.ops.dense import dense, gelu
from compactlm_jax.tree import match_one, named_leaves
from compactlm_jax.types import Params

PARTS = ('embeddings', 'attention', 'convolution', 'feed_forward', 'norms', 'heads', 'encoder')
"""Names of the components; 'encoder' is all but the heads."""

_OWNERS = (
  ('encoder/embeddings/.*', 'embeddings'),
  ('encoder/layers/attention/(query|key|value|output)/.*', 'attention'),
  ('encoder/layers/attention/conv/.*', 'convolution'),
  ('encoder/layers/ffn_(in|out)/.*', 'feed_forward'),
  ('encoder/layers/(attention|ffn)_norm/.*', 'norms'),
  (r'encoder/pooler/.*|(?!encoder/).*', 'heads'),
)


@dataclasses.dataclass(frozen=True)
class Component:
  """One part of a model, in all its layers.

  Attributes:
    name: one of `PARTS`.
    parameters: numbers that it holds.
    flops: of a forward pass of one batch, counted (`nn.flops`).
    xla_flops: of the compiled program, by XLA's own count, which has softmax, GELU and LayerNorm too; None where the
      backend does not count.
    milliseconds: median time of one batch; 0 for parts that are not computed on their own.
  """

  name: str
  parameters: int
  flops: float
  xla_flops: float | None
  milliseconds: float


def components(model: Model, rows: int, seq_len: int, *, repeats: int = 10) -> list[Component]:
  """The parts that the model has, in the order of `PARTS`.

  Args:
    model: from `statistics.analysed`.
    rows: rows of the batch that is timed.
    seq_len: tokens of each.
    repeats: timed runs of each part after two to warm up; the parts take turns, so that a slow moment hits all.
  """
  counted, sizes = _counted(model, rows, seq_len), _parameters(model)
  programs = {name: _compile(*call) for name, call in part_calls(model, rows, seq_len).items()}
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  for i in range(repeats + 2):
    for name, (run, _) in programs.items():
      start = time.perf_counter()
      run()
      if i >= 2:
        seconds[name].append(time.perf_counter() - start)
  found = []
  for name in (part for part in PARTS if sizes.get(part) or part in programs):
    times = 1 if name in ('embeddings', 'heads', 'encoder') else model.config.num_layers
    xla = programs[name][1] if name in programs else None
    took = 1000 * statistics.median(seconds[name]) * times if name in programs else 0.0
    found.append(
      Component(name, sizes.get(name, 0), counted.get(name, 0.0), None if xla is None else xla * times, took)
    )
  return found


def _parameters(model: Model) -> dict[str, int]:
  sizes = dict.fromkeys(PARTS, 0)
  for name, leaf in named_leaves(model.params).items():
    owner = match_one(_OWNERS, name, 'component')
    sizes[owner] += leaf.size
    if model.config.conv_kernel_size and re.fullmatch('.*/attention/output/kernel', name):  # half of the rows each
      sizes['attention'] -= leaf.size // 2
      sizes['convolution'] += leaf.size // 2
  sizes['encoder'] = sum(size for name, size in sizes.items() if name != 'heads')
  return sizes


def _counted(model: Model, rows: int, seq_len: int) -> dict[str, float]:
  config, tokens = model.config, rows * seq_len
  layer = {
    'attention': flops.attention_flops(config, seq_len),
    'convolution': flops.conv_branch_flops(config),
    'feed_forward': flops.feed_forward_flops(config),
  }
  per_token = {name: value * config.num_layers for name, value in layer.items()}
  per_token |= {'embeddings': flops.embedding_flops(config), 'encoder': flops.encoder_flops(config, seq_len)}
  return {name: value * tokens for name, value in per_token.items()} | {'heads': _head_flops(model, rows, seq_len)}


def _head_flops(model: Model, rows: int, seq_len: int) -> float:
  config, params, tokens = model.config, model.params, rows * seq_len
  width = config.hidden_size
  total = 2.0 * rows * width**2 if config.pooler else 0.0
  if 'mlm_head' in params:
    total += tokens * flops.mlm_head_flops(config)
  if 'rtd_head' in params:
    total += tokens * 2.0 * width * (width + 1)
  for name, vectors in (('classifier', rows), ('span', tokens)):
    if 'kernel' in params.get(name, {}):
      total += 2.0 * vectors * params[name]['kernel'].size
  return total


def _compile(fn: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], float | None]:
  """(runs it and waits, FLOPs by XLA)."""
  lowered = jax.jit(fn).lower(*args)
  compiled, costs = lowered.compile(), lowered.cost_analysis()
  found = costs.get('flops') if isinstance(costs, dict) else None
  args = jax.block_until_ready(jax.device_put(args))
  return lambda: jax.block_until_ready(compiled(*args)), None if found is None or found < 0 else float(found)


def part_calls(model: Model, rows: int, seq_len: int) -> dict[str, tuple[Any, ...]]:
  """Name -> (function, arguments) of each part: of the first layer, or the whole for embeddings, heads and encoder.

  Attention and convolution branch together make the layer's mixed attention, but each adds the output's bias.
  """
  config, encoder = model.config, model.params['encoder']
  inner, dtype = config.num_heads * config.head_size, jnp.dtype(config.dtype)
  ids_BT = jnp.ones((rows, seq_len), jnp.int32)
  x_BTD = jax.random.normal(jax.random.key(0), (rows, seq_len, config.hidden_size), dtype)
  layer = jax.tree.map(lambda leaf: leaf[0], encoder['layers'])
  own = layer['attention']
  output = own['output']
  attention = {name: own[name] for name in ('query', 'key', 'value')}
  attention['output'] = {'kernel': output['kernel'][:inner], 'bias': output['bias']}
  plain = dataclasses.replace(config, conv_kernel_size=0, attention_dropout=0.0)

  def embed(params: Params, ids_BT: jax.Array) -> Any:
    return Embeddings(config).apply({'params': params}, ids_BT, jnp.zeros_like(ids_BT), None, 0)

  def attend(params: Params, x_BTD: jax.Array, mask_BT: jax.Array) -> Any:
    return MixedAttention(plain).apply({'params': params}, x_BTD, mask_BT, None, 0)[0]

  def convolve(params: Params, rest: Params, x_BTD: jax.Array, q_BTHK: jax.Array, mask_BT: jax.Array) -> Any:
    mixed = SpanDynamicConv(config).apply({'params': params}, x_BTD, q_BTHK, mask_BT)
    assert isinstance(mixed, jax.Array)
    return dense(mixed.reshape(rows, seq_len, inner), rest['kernel'], rest['bias'])

  def normed(params: Params, x_BTD: jax.Array, y_BTD: jax.Array) -> Any:
    norm = LayerNorm(config.layer_norm_epsilon)
    h_BTD: Any = norm.apply({'params': params['attention_norm']}, x_BTD + y_BTD)
    return norm.apply({'params': params['ffn_norm']}, h_BTD + y_BTD)

  def whole(params: Params, ids_BT: jax.Array) -> Any:
    return encode({'encoder': params}, config, ids_BT, jnp.ones_like(ids_BT)).last_BTD

  body = {name: leaf for name, leaf in encoder.items() if name != 'pooler'}
  config = dataclasses.replace(config, pooler=False, scan_unroll=0)  # XLA counts the body of a loop once
  calls: dict[str, tuple[Any, ...]] = {'embeddings': (embed, encoder['embeddings'], ids_BT)}
  calls['attention'] = (attend, attention, x_BTD, ids_BT)
  if config.conv_kernel_size:
    rest = {'kernel': output['kernel'][inner:], 'bias': output['bias']}
    q_BTHK = x_BTD[..., :inner].reshape(rows, seq_len, config.num_heads, config.head_size)
    calls['convolution'] = (convolve, own['conv'], rest, x_BTD, q_BTHK, ids_BT)
  calls['feed_forward'] = (_feed_forward(config), layer, x_BTD)
  calls['norms'] = (normed, layer, x_BTD, x_BTD)
  if heads := _heads(model):
    calls['heads'] = (heads, model.params, x_BTD)
  return calls | {'encoder': (whole, body, ids_BT)}


def _feed_forward(config: EncoderConfig) -> Callable[[Params, jax.Array], Any]:
  def run(params: Params, x_BTD: jax.Array) -> Any:
    def product(features: int, name: str, x: jax.Array) -> Any:
      grouped = config.num_groups > 1
      module = GroupedDense(features, config.num_groups, config) if grouped else MaskedDense(features, config)
      return module.apply({'params': params[name]}, x)

    return product(config.hidden_size, 'ffn_out', gelu(product(config.intermediate_size, 'ffn_in', x_BTD)))

  return run


def _heads(model: Model) -> Callable[[Params, jax.Array], Any] | None:
  """All heads on the last hidden states: the pooler and a classifier on the first token, the others on every token."""
  config, present = model.config, set(model.params)
  spans = 'kernel' in model.params.get('span', {})
  if not (model.config.pooler or spans or present & {'classifier', 'mlm_head', 'rtd_head'}):
    return None

  def run(params: Params, x_BTD: jax.Array) -> Any:
    out: list[Any] = []
    first_BD = x_BTD[:, 0]
    if config.pooler:
      pooler = params['encoder']['pooler']
      first_BD = jnp.tanh(dense(first_BD, pooler['kernel'], pooler['bias']))
      out.append(first_BD)
    if 'classifier' in present:
      out.append(dense(first_BD, params['classifier']['kernel'], params['classifier']['bias']))
    if 'mlm_head' in present:
      words_VE = params['encoder']['embeddings']['word']['embedding']
      out.append(MlmHead(config).apply({'params': params['mlm_head']}, x_BTD, words_VE))
    if 'rtd_head' in present:
      out.append(RtdHead(config).apply({'params': params['rtd_head']}, x_BTD))
    if spans:
      out.append(dense(x_BTD, params['span']['kernel'], params['span']['bias']))
    return out

  return run
