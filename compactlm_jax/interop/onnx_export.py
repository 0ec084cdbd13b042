"""Export to ONNX, to be run without JAX."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from etils import epath

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop import hf_config, names
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.interop.folder import ONNX
from compactlm_jax.interop.tokenizer_files import matched
from compactlm_jax.interop.writing import json_bytes, write_export
from compactlm_jax.tree import named_leaves
from compactlm_jax.types import Params

log = logging.getLogger(__name__)

MAX_BYTES = (1 << 31) - (1 << 24)
"""Most weights in one file: protobuf ends at 2 GiB, and nodes and names take room too."""

_HEADS = ('classifier', 'span')


def export_onnx(bundle: Bundle, folder: epath.PathLike) -> None:
  """Writes model.onnx, config.json, a model card and the tokenizer; the same bundle always gives the same bytes.

  The graph has standard operators only (opset 20), float32 whatever `config.dtype` says, for any batch size and for any
  length up to the positions of the model. Its outputs are those of `encode` and the head up to rounding; layers that
  were pruned to sizes of their own, or away, are that small in the graph too. Rows that are too long and ids beyond a
  table are errors of the runtime; a negative id counts from the table's end, as ONNX defines.

  Args:
    bundle: the model. Inputs are input_ids, attention_mask and token_type_ids, int64 [batch, length]. A classifier
      gives 'logits' [batch, classes] (one score for a regression), a span head 'start_logits' and 'end_logits'
      [batch, length]; without them the outputs are 'last_hidden_state' [batch, length, hidden_size] and, if there is a
      pooler, 'pooler_output' [batch, hidden_size]. Heads of pre-training are left out, which is logged.
    folder: where to; an earlier export there is replaced, anything else is not touched.

  Raises:
    ConfigError: onnx is not installed, a causal encoder, ELECTRA's joint span head, weights of more than 2 GB, a tree
      that does not agree with its configuration or still holds scores, a tokenizer of another model, or `folder` is not
      an export.
    NumericsError: parameters that are not finite.
    StorageError: the disk is full or not writable.
  """
  if bundle.tokenizer is None:
    log.warning('%s: exported without a tokenizer; whoever runs it must bring the right one', folder)
  config, heads = matched(bundle.config, bundle.tokenizer), [name for name in _HEADS if name in bundle.params]
  left = sorted(set(bundle.params) & set(names.HEADS) - set(heads))
  if left:
    log.warning('%s: left out of the graph: %s; the default format keeps it', folder, ', '.join(left))
  model = onnx_model(bundle)
  outputs = {output.name: _shape(output) for output in model.graph.output}
  described = _described(config, bundle, heads) | {'onnx': {'file': ONNX, 'outputs': outputs}}
  files = {
    ONNX: model.SerializeToString(deterministic=True),
    'config.json': json_bytes(described),
    'README.md': _card(config, names.count_parameters(_read(bundle)), outputs, bundle).encode(),
    **(bundle.tokenizer.files if bundle.tokenizer else {}),
  }
  write_export(files, folder)


def onnx_model(bundle: Bundle) -> Any:
  """The onnx.ModelProto of a bundle, see `export_onnx`.

  Raises:
    ConfigError, NumericsError: see `export_onnx`.
  """
  config, params = bundle.config, _read(bundle)
  if config.causal:
    raise ConfigError('config.encoder.causal: a left-to-right model is not written as ONNX; use --format=hf')
  if names.is_joint(named_leaves(params)):
    raise ConfigError(
      "span: ELECTRA's joint head looks for ends after it has chosen starts, which the graph has no outputs for; use "
      "--format=hf, or fine-tune with span.head='independent'"
    )
  size = sum(leaf.nbytes for leaf in named_leaves(params).values())
  if size > MAX_BYTES:
    raise ConfigError(f'model: {size} bytes of weights; one ONNX file holds {MAX_BYTES} at most; use --format=hf')
  names.export_tensors(params, config)  # checks names, shapes and values
  try:
    from compactlm_jax.interop.onnx_graph import build_model
  except ImportError as e:
    raise ConfigError("--format=onnx needs the package onnx: pip install 'compactlm-jax[onnx]'") from e
  return build_model(params, config, bundle.labels)


def _read(bundle: Bundle) -> Params:
  """The part of the tree that the graph computes with; what is no part of any model is left in, to be refused."""
  unread = set(names.HEADS) - set(_HEADS)
  return {name: tree for name, tree in bundle.params.items() if name not in unread}


def _described(config: EncoderConfig, bundle: Bundle, heads: list[str]) -> dict[str, Any]:
  """config.json: transformers' where it has such a model, so that its tools find sizes and labels; ours elsewhere."""
  # The graph hides padding as the model does; what transformers' own convolution reads does not matter here.
  shown = dataclasses.replace(config, conv_sees_padding=config.conv_sees_padding or config.architecture == 'convbert')
  classes = bundle.params['classifier']['bias'].shape[-1] if 'classifier' in heads else 0
  try:
    hf_config.require_expressible(shown)
  except ConfigError:
    named = {'id2label': {str(i): label for i, label in enumerate(bundle.labels)}} if bundle.labels else {}
    return hf_config.to_native(config) | named
  return hf_config.to_hf(shown, heads, classes, bundle.labels)


def _shape(output: Any) -> list[str | int]:
  return [axis.dim_param or axis.dim_value for axis in output.type.tensor_type.shape.dim]


def _card(config: EncoderConfig, parameters: int, outputs: dict[str, list[str | int]], bundle: Bundle) -> str:
  """What the folder holds and how to run it; no dates, no paths."""
  lines = [
    '---',
    'library_name: onnx',
    'tags: [compactlm-jax, onnx]',
    '---',
    '',
    f'# {config.architecture}, {config.num_layers} layers, {config.hidden_size} wide, as ONNX',
    '',
    f'{parameters:,} parameters, float32, exported by compactlm-jax; opset 20, onnxruntime 1.17 or later.',
    '',
    '| | |',
    '|---|---|',
    '| inputs, int64 [batch, length] | input_ids, attention_mask, token_type_ids |',
    *(f'| output {name} | {shape} |' for name, shape in outputs.items()),
    f'| longest row | {config.max_positions} tokens |',
  ]
  if config.heads_per_layer:
    lines.append(f'| attention heads of each layer | {", ".join(map(str, config.heads_per_layer))} |')
  if config.neurons_per_layer:
    lines.append(f'| feed-forward neurons of each layer | {", ".join(map(str, config.neurons_per_layer))} |')
  if bundle.labels:
    lines.append(f'| classes | {", ".join(bundle.labels)} |')
  lines += [
    '',
    '```python',
    'import onnxruntime',
    'from transformers import AutoTokenizer',
    "tokenizer = AutoTokenizer.from_pretrained('this folder')",
    "session = onnxruntime.InferenceSession('this folder/model.onnx')",
    "rows = tokenizer(['a text', 'another'], padding=True, return_token_type_ids=True, return_tensors='np')",
    "outputs = session.run(None, {i.name: rows[i.name].astype('int64') for i in session.get_inputs()})",
    '```',
    '',
  ]
  return '\n'.join(lines)
