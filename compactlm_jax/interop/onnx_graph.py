"""The encoder and its heads as an ONNX graph: standard operators of opset 20, float32, any batch size and length.

Written out here because no library makes it: jax2onnx 0.17 asks for an Orbax that excludes ours, cannot trace Flax's
scan, and fails where the length is not known. The plain form below was chosen by CPU time in onnxruntime 1.31 (6 layers
of 384, 12 heads): the operators Attention (opset 23) and MultiHeadAttention, or one product for query, key and value,
stay within 6 % of it. SkipLayerNormalization, into which onnxruntime fuses where it can follow shapes, is 10 % slower.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compactlm_jax.config import EncoderConfig, to_json
from compactlm_jax.types import Params

INPUTS = ('input_ids', 'attention_mask', 'token_type_ids')
"""Names of the inputs, int64 [batch, length] each."""

OPSET, IR_VERSION = 20, 9  # the first with Gelu; onnxruntime 1.17 and later
_END = np.iinfo(np.int64).max


class _Graph:
  """Nodes and constants in the order in which they are made; a value is known by its name."""

  def __init__(self) -> None:
    self.nodes: list[Any] = []
    self.constants: dict[str, Any] = {}

  def op(self, kind: str, *inputs: str, name: str = '', **attributes: Any) -> str:
    """The only output of a new node, under `name` or a name of its own."""
    name = name or f'{kind}_{len(self.nodes)}'
    self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
    return name

  def split(self, x: str, parts: int) -> list[str]:
    """x in equal parts along its last axis."""
    names = [f'Split_{len(self.nodes)}_{i}' for i in range(parts)]
    self.nodes.append(helper.make_node('Split', [x], names, axis=-1, num_outputs=parts))
    return names

  def array(self, name: str, value: Any) -> str:
    """A constant array."""
    self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name)
    return name

  def ints(self, *values: int) -> str:
    """A constant vector of int64, made once."""
    name = f'ints({", ".join(map(str, values))})'
    self.constants[name] = numpy_helper.from_array(np.array(values, np.int64), name)
    return name

  def index(self, value: int) -> str:
    """A constant int64 without axes, made once."""
    name = f'int({value})'
    self.constants[name] = numpy_helper.from_array(np.array(value, np.int64), name)
    return name

  def number(self, value: float) -> str:
    """A constant float32 without axes, made once."""
    name = f'float({value!r})'
    self.constants[name] = numpy_helper.from_array(np.array(value, np.float32), name)
    return name


@dataclasses.dataclass(frozen=True)
class _Shared:
  """What all layers read; empty where none does.

  Attributes:
    bias: [B, 1, 1, S], 0 for real keys, the most negative float32 for padded ones.
    real: [B, T, 1], 1 for real tokens.
    reads: [B, T, 1, W], `real` at the position that each tap reads.
  """

  bias: str = ''
  real: str = ''
  reads: str = ''


def build_model(params: Params, config: EncoderConfig, labels: Sequence[str] = ()) -> onnx.ModelProto:
  """An ONNX model of a checked tree.

  Args:
    params: 'encoder' and any of 'classifier' and 'span' (the independent head), float32. Sizes of layers are those of
      their arrays, so that layers may differ and be empty.
    config: its configuration; not causal.
    labels: class names, for the metadata.

  Returns:
    A model of the inputs `INPUTS` and the outputs 'logits' [batch, classes]; 'start_logits' and 'end_logits' [batch,
    length]; or, without these heads, 'last_hidden_state' [batch, length, D] and 'pooler_output' [batch, D] if there is
    a pooler.
  """
  graph, encoder = _Graph(), params['encoder']
  x_BTD = _embeddings(graph, encoder['embeddings'], config)
  shared = _shared(graph, config)
  for index, layer in enumerate(layer_trees(encoder)):
    x_BTD = _layer(graph, f'encoder/layers/{index}', layer, config, x_BTD, shared)
  outputs = _outputs(graph, params, config, x_BTD)
  inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ['batch', 'length']) for name in INPUTS]
  infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
  made = helper.make_graph(graph.nodes, config.architecture, inputs, infos, list(graph.constants.values()))
  model = helper.make_model(
    made, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION, producer_name='compactlm-jax'
  )
  helper.set_model_props(model, {'encoder': json.dumps(to_json(config)), 'labels': json.dumps(list(labels))})
  return model


def layer_trees(encoder: Params) -> Iterator[Params]:
  """Each layer's own tree, NumPy, from the stack of all or from the stacks of runs ('layers_0', 'layers_1', ...)."""
  stacks = [name for name in encoder if name.split('_')[0] == 'layers']
  for name in sorted(stacks, key=lambda name: int(name.partition('_')[2] or 0)):
    stack = jax.tree.map(np.asarray, encoder[name])
    for index in range(jax.tree.leaves(stack)[0].shape[0]):
      yield jax.tree.map(lambda leaf: leaf[index], stack)  # noqa: B023 (used at once)


def _embeddings(graph: _Graph, tree: Params, config: EncoderConfig) -> str:
  """[B, T, D]: word + position + token type, LayerNorm, and a projection if the sizes differ."""
  path = 'encoder/embeddings'
  tables = {name: graph.array(f'{path}/{name}', tree[name]['embedding']) for name in ('word', 'position', 'token_type')}
  length = graph.op('Squeeze', graph.op('Shape', 'input_ids', start=1, end=2))
  positions = graph.op('Range', graph.index(0), length, graph.index(1))
  words = graph.op('Gather', tables['word'], 'input_ids')
  x_BTE = graph.op('Add', words, graph.op('Gather', tables['position'], positions))
  x_BTE = graph.op('Add', x_BTE, graph.op('Gather', tables['token_type'], 'token_type_ids'))
  x_BTE = _norm(graph, f'{path}/norm', tree['norm'], config, x_BTE)
  return _dense(graph, f'{path}/projection', tree['projection'], x_BTE) if 'projection' in tree else x_BTE


def _shared(graph: _Graph, config: EncoderConfig) -> _Shared:
  real_BT = graph.op('Cast', 'attention_mask', to=TensorProto.FLOAT)
  bias = real = reads = ''
  if config.self_attention:
    padded_B11S = graph.op(
      'Unsqueeze', graph.op('Not', graph.op('Cast', real_BT, to=TensorProto.BOOL)), graph.ints(1, 2)
    )
    lowest = graph.number(float(np.finfo(np.float32).min))
    bias = graph.op('Where', padded_B11S, lowest, graph.number(0.0))
  if config.conv_kernel_size and not config.conv_sees_padding:
    real = graph.op('Unsqueeze', real_BT, graph.ints(2))
    taps_BTW = graph.op('Concat', *_shifted(graph, real, config.conv_kernel_size), axis=2)
    reads = graph.op('Unsqueeze', taps_BTW, graph.ints(2))
  return _Shared(bias, real, reads)


def _layer(graph: _Graph, path: str, tree: Params, config: EncoderConfig, x_BTD: str, shared: _Shared) -> str:
  """[B, T, D]: `nn.encoder.EncoderLayer`."""
  attended_BTD = _attention(graph, f'{path}/attention', tree['attention'], config, x_BTD, shared)
  x_BTD = _norm(graph, f'{path}/attention_norm', tree['attention_norm'], config, graph.op('Add', x_BTD, attended_BTD))
  if 'ffn_in' in tree and tree['ffn_in']['bias'].size:
    h_BTF = graph.op('Gelu', _dense(graph, f'{path}/ffn_in', tree['ffn_in'], x_BTD))
    out_BTD = _dense(graph, f'{path}/ffn_out', tree['ffn_out'], h_BTF)
  else:
    out_BTD = graph.array(f'{path}/ffn_out/bias', tree['ffn_out']['bias'])
  return _norm(graph, f'{path}/ffn_norm', tree['ffn_norm'], config, graph.op('Add', x_BTD, out_BTD))


def _attention(graph: _Graph, path: str, tree: Params, config: EncoderConfig, x_BTD: str, shared: _Shared) -> str:
  """[B, T, D]: `nn.attention.MixedAttention`; the output's bias alone if the layer has no heads."""
  if 'query' not in tree or not tree['query']['bias'].size:
    return graph.array(f'{path}/output/bias', tree['output']['bias'])
  q_BTA, mixed = _dense(graph, f'{path}/query', tree['query'], x_BTD), []
  if config.self_attention:
    k_BTA, v_BTA = (_dense(graph, f'{path}/{name}', tree[name], x_BTD) for name in ('key', 'value'))
    # onnxruntime takes the scale into the product that follows.
    q_BHTK = graph.op('Mul', _heads(graph, q_BTA, config, (0, 2, 1, 3)), graph.number(config.head_size**-0.5))
    logits_BHTS = graph.op('MatMul', q_BHTK, _heads(graph, k_BTA, config, (0, 2, 3, 1)))
    probs_BHTS = graph.op('Softmax', graph.op('Add', logits_BHTS, shared.bias), axis=-1)
    out_BHTK = graph.op('MatMul', probs_BHTS, _heads(graph, v_BTA, config, (0, 2, 1, 3)))
    mixed.append(_merged(graph, graph.op('Transpose', out_BHTK, perm=[0, 2, 1, 3]), tree))
  if config.conv_kernel_size:
    mixed.append(_convolution(graph, f'{path}/conv', tree['conv'], config, x_BTD, q_BTA, shared))
  both = graph.op('Concat', *mixed, axis=2) if len(mixed) > 1 else mixed[0]
  return _dense(graph, f'{path}/output', tree['output'], both)


def _convolution(
  graph: _Graph, path: str, tree: Params, config: EncoderConfig, x_BTD: str, q_BTA: str, shared: _Shared
) -> str:
  """[B, T, A]: `nn.attention.SpanDynamicConv`."""
  taps, merged = config.conv_kernel_size, q_BTA
  if config.conv_kind == 'span':
    seen = x_BTD if config.conv_sees_padding else graph.op('Mul', x_BTD, shared.real)
    kernel_D1W = graph.array(f'{path}/depthwise', tree['depthwise']['kernel'].T[:, None])
    span_BDT = graph.op(
      'Conv',
      graph.op('Transpose', seen, perm=[0, 2, 1]),
      kernel_D1W,
      group=config.hidden_size,
      kernel_shape=[taps],
      pads=[taps // 2] * 2,
    )
    span = _dense(graph, f'{path}/pointwise', tree['pointwise'], graph.op('Transpose', span_BDT, perm=[0, 2, 1]))
    merged = graph.op('Mul', span, q_BTA)
  logits = _dense(graph, f'{path}/taps', tree['taps'], merged)
  taps_BTHW = graph.op('Softmax', graph.op('Reshape', logits, graph.ints(0, 0, -1, taps)), axis=-1)
  if not config.conv_sees_padding:
    taps_BTHW = graph.op('Mul', taps_BTHW, shared.reads)
  v_BTHK = _heads(graph, _dense(graph, f'{path}/value', tree['value'], x_BTD), config)
  kernels = graph.split(taps_BTHW, taps)
  terms = [graph.op('Mul', v, tap) for v, tap in zip(_shifted(graph, v_BTHK, taps), kernels, strict=True)]
  return _merged(graph, graph.op('Sum', *terms), tree)


def _shifted(graph: _Graph, x: str, taps: int) -> list[str]:
  """What each tap of each position reads: x, moved along its second axis, with zeros from outside the row."""
  back = taps // 2
  padded = graph.op('Pad', x, graph.ints(back, back), '', graph.ints(1)) if back else x
  # Counted from the end, because the length is not known: the last tap - 1 positions belong to the others.
  ends = [j - 2 * back or _END for j in range(taps)]
  return [graph.op('Slice', padded, graph.ints(j), graph.ints(end), graph.ints(1)) for j, end in enumerate(ends)]


def _heads(graph: _Graph, x_BTA: str, config: EncoderConfig, order: Sequence[int] = ()) -> str:
  """[B, T, H, K], or its transpose."""
  x_BTHK = graph.op('Reshape', x_BTA, graph.ints(0, 0, -1, config.head_size))
  return graph.op('Transpose', x_BTHK, perm=list(order)) if order else x_BTHK


def _merged(graph: _Graph, x_BTHK: str, tree: Params) -> str:
  """[B, T, A]; A as in 'value'."""
  return graph.op('Reshape', x_BTHK, graph.ints(0, 0, tree['value']['bias'].size))


def _dense(graph: _Graph, path: str, tree: Params, x: str, name: str = '') -> str:
  """x @ kernel + bias; a kernel of three axes is that of `nn.layers.GroupedDense`."""
  kernel, bias = tree['kernel'], graph.array(f'{path}/bias', tree['bias'])
  if kernel.ndim == 2:
    return graph.op('Add', graph.op('MatMul', x, graph.array(f'{path}/kernel', kernel)), bias, name=name)
  parts = graph.split(x, len(kernel))
  products = [graph.op('MatMul', part, graph.array(f'{path}/kernel/{i}', kernel[i])) for i, part in enumerate(parts)]
  return graph.op('Add', graph.op('Concat', *products, axis=-1), bias, name=name)


def _norm(graph: _Graph, path: str, tree: Params, config: EncoderConfig, x: str) -> str:
  scale, bias = (graph.array(f'{path}/{name}', tree[name]) for name in ('scale', 'bias'))
  return graph.op('LayerNormalization', x, scale, bias, axis=-1, epsilon=config.layer_norm_epsilon)


def _outputs(graph: _Graph, params: Params, config: EncoderConfig, x_BTD: str) -> dict[str, list[Any]]:
  """Name -> shape of the outputs, whose nodes are added."""
  encoder, heads = params['encoder'], [name for name in ('classifier', 'span') if name in params]
  found: dict[str, list[Any]] = {}
  if 'classifier' in heads or ('pooler' in encoder and not heads):
    first_BD = graph.op('Gather', x_BTD, graph.index(0), axis=1)
    if 'pooler' in encoder:
      pooled = _dense(graph, 'encoder/pooler', encoder['pooler'], first_BD)
      first_BD = graph.op('Tanh', pooled, name='' if heads else 'pooler_output')
  if 'classifier' in heads:
    _dense(graph, 'classifier', params['classifier'], first_BD, name='logits')
    found['logits'] = ['batch', params['classifier']['bias'].shape[-1]]
  if 'span' in heads:
    both_BT2 = _dense(graph, 'span', params['span'], x_BTD)
    for index, name in enumerate(('start_logits', 'end_logits')):
      graph.op('Gather', both_BT2, graph.index(index), axis=2, name=name)
      found[name] = ['batch', 'length']
  if not heads:
    graph.op('Identity', x_BTD, name='last_hidden_state')
    found['last_hidden_state'] = ['batch', 'length', config.hidden_size]
    found |= {'pooler_output': ['batch', config.hidden_size]} if 'pooler' in encoder else {}
  return found
