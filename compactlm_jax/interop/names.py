"""The one table between our parameter tree and the tensor names of Hugging Face transformers, read in both directions.

Documented additions of ours, which transformers ignores on load:
  `discriminator_predictions.*` (ELECTRA's own names) holds the replaced-token head of every architecture;
  `compactlm_classifier.*` holds a classifier on the first token of more classes than the head of transformers has room
  for; otherwise it is rewritten as that head (`first_token`). With BERT's pooler it is `classifier.*` there as here;
  `compactlm_span.*` holds ELECTRA's joint head for answers, for which transformers has no class.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from compactlm_jax.config import EncoderConfig, runs, stack_names
from compactlm_jax.errors import ConfigError, DataError, NumericsError
from compactlm_jax.interop import first_token
from compactlm_jax.interop.rows import COLUMN, COPY, DEPTHWISE, POINTWISE, Row, dense_rows, norm_rows
from compactlm_jax.nn.span import HIDDEN
from compactlm_jax.tree import named_leaves, nested
from compactlm_jax.types import Params

log = logging.getLogger(__name__)

_SPAN = 'compactlm_span'
HEADS = ('mlm_head', 'rtd_head', 'classifier', 'span')
"""Optional parts of a tree beside 'encoder'."""


def _embedding_rows(config: EncoderConfig) -> list[Row]:
  ours, decoder = 'encoder/embeddings', _mlm_names(config)[2]
  word = Row(f'{ours}/word/embedding', 'embeddings.word_embeddings.weight', 'V E', tied=(f'{decoder}.weight',))
  rows = [
    word,
    Row(f'{ours}/position/embedding', 'embeddings.position_embeddings.weight', 'P E'),
    Row(f'{ours}/token_type/embedding', 'embeddings.token_type_embeddings.weight', 'Y E'),
    *norm_rows(f'{ours}/norm', 'embeddings.LayerNorm', 'E'),
  ]
  if config.embedding_size != config.hidden_size:
    rows += dense_rows(f'{ours}/projection', 'embeddings_project', 'E', 'D')
  return rows


def _layer_rows(config: EncoderConfig) -> list[Row]:
  rows = []
  for i, (stack, (start, stop, run)) in enumerate(zip(stack_names(config), runs(config))):
    for row in _stack_rows(run, f'encoder/{stack}'):
      shape = row.shape
      if config.ragged:  # sizes of a run are symbols of their own
        shape = ' '.join(f'{symbol}@{i}' if symbol in _OF_RUNS else symbol for symbol in shape.split())
      rows.append(dataclasses.replace(row, shape=shape, layers=(start, stop)))
  return rows


def _stack_rows(config: EncoderConfig, ours: str) -> list[Row]:
  """Rows of a stack of equal layers; those that lost all heads or neurons keep the output's bias."""
  attention, ffn_in, ffn_out = f'{ours}/attention', f'{ours}/ffn_in', f'{ours}/ffn_out'
  theirs = 'encoder.layer.{i}'
  rows = _head_projection_rows(config, attention, f'{theirs}.attention.self') if config.num_heads else []
  output = dense_rows(f'{attention}/output', f'{theirs}.attention.output.dense', 'O', 'D')
  rows += output if config.num_heads else output[1:]
  rows += norm_rows(f'{ours}/attention_norm', f'{theirs}.attention.output.LayerNorm', 'D')
  feed_forward = []
  for path, name, inputs, outputs in (
    (ffn_in, f'{theirs}.intermediate.dense', 'D', 'F'),
    (ffn_out, f'{theirs}.output.dense', 'F', 'D'),
  ):
    kernel, bias = dense_rows(path, name, inputs, outputs)
    if config.num_groups > 1:  # transformers keeps grouped kernels as [groups, in, out], like ours
      kernel = dataclasses.replace(kernel, shape=f'G {inputs}/G {outputs}/G', transform=COPY)
    feed_forward += [kernel, bias]
  rows += feed_forward if config.intermediate_size else feed_forward[3:]
  return rows + norm_rows(f'{ours}/ffn_norm', f'{theirs}.output.LayerNorm', 'D')


def _head_projection_rows(config: EncoderConfig, attention: str, self_attention: str) -> list[Row]:
  rows = []
  for name in ('query', 'key', 'value') if config.self_attention else ('query',):
    rows += dense_rows(f'{attention}/{name}', f'{self_attention}.{name}', 'D', 'A')
  if config.conv_kernel_size and config.conv_kind == 'span':
    span = f'{self_attention}.key_conv_attn_layer'
    rows += [
      Row(f'{attention}/conv/depthwise/kernel', f'{span}.depthwise.weight', 'W D', DEPTHWISE),
      Row(f'{attention}/conv/pointwise/kernel', f'{span}.pointwise.weight', 'D A', POINTWISE),
      Row(f'{attention}/conv/pointwise/bias', f'{span}.bias', 'A', COLUMN),
    ]
  if config.conv_kernel_size:
    rows += [
      *dense_rows(f'{attention}/conv/taps', f'{self_attention}.conv_kernel_layer', 'A', 'X'),
      *dense_rows(f'{attention}/conv/value', f'{self_attention}.conv_out_layer', 'D', 'A'),
    ]
  return rows


def _mlm_names(config: EncoderConfig) -> tuple[str, str, str]:
  """Names of the MLM head's dense layer, LayerNorm and decoder."""
  if config.architecture == 'bert':
    return 'cls.predictions.transform.dense', 'cls.predictions.transform.LayerNorm', 'cls.predictions.decoder'
  return 'generator_predictions.dense', 'generator_predictions.LayerNorm', 'generator_lm_head'


def _head_rows(config: EncoderConfig) -> list[Row]:
  dense, norm, decoder = _mlm_names(config)
  bias = Row('mlm_head/output_bias', f'{decoder}.bias', 'V')
  if config.architecture == 'bert':
    bias = dataclasses.replace(bias, name='cls.predictions.bias', tied=(f'{decoder}.bias',))
  return [
    *dense_rows('mlm_head/dense', dense, 'D', 'E'),
    *norm_rows('mlm_head/norm', norm, 'E'),
    bias,
    *dense_rows('rtd_head/dense', 'discriminator_predictions.dense', 'D', 'D'),
    *dense_rows('rtd_head/output', 'discriminator_predictions.dense_prediction', 'D', '1'),
    *dense_rows('classifier', 'classifier' if reads_pooler(config) else first_token.OURS, 'D', 'C'),
  ]


_SPAN_LAYERS = {
  'start': ('D', '1'),
  'end_hidden': ('2D', 'J'),
  'end_output': ('J', '1'),
  'answerable_hidden': ('2D', 'J'),
  'answerable_output': ('J', '1'),
}
"""Layers of `nn.span.JointSpanHead` and their sizes; the last two are there if it decides about answers (v2.0)."""


def is_joint(names: Collection[str]) -> bool:
  """Whether leaves or tensors of these names hold ELECTRA's joint span head, not the independent one."""
  return any(name.startswith(('span/start/', f'{_SPAN}.')) for name in names)


def _span_rows(names: Collection[str]) -> list[Row]:
  """Rows of the span head that is among the leaves or tensors; of the independent one if there is none."""
  if not is_joint(names):
    return dense_rows('span', 'qa_outputs', 'D', '2')
  found = {name.replace('.', '/').split('/')[1] for name in names if name.startswith(('span/', f'{_SPAN}.'))}
  layers = [name for name in _SPAN_LAYERS if not name.startswith('answerable') or name in found]
  return [row for name in layers for row in dense_rows(f'span/{name}', f'{_SPAN}.{name}', *_SPAN_LAYERS[name])]


def reads_pooler(config: EncoderConfig) -> bool:
  """Whether a bundle's classifier reads the pooled vector: if the encoder has a pooler, else the first token."""
  return config.pooler


def table(config: EncoderConfig, names: Collection[str] = ()) -> list[Row]:
  """Every row of an encoder and of the heads that may stand beside it; `names` say which span head."""
  pooler = dense_rows('encoder/pooler', 'pooler.dense', 'D', 'D') if config.pooler else []
  return _embedding_rows(config) + _layer_rows(config) + pooler + _head_rows(config) + _span_rows(names)


_OF_RUNS = ('A', 'O', 'X', 'F', 'F/G')


def _sizes(config: EncoderConfig, num_classes: int) -> dict[str, int]:
  """Values of the symbols in `Row.shape`; those of run i of a ragged encoder end in '@i'."""
  out = {
    'V': config.vocab_size,
    'P': config.max_positions,
    'Y': config.type_vocab_size,
    'D': config.hidden_size,
    'E': config.embedding_size,
    'W': config.conv_kernel_size,
    'G': config.num_groups,
    'D/G': config.hidden_size // config.num_groups,
    'C': num_classes,
    '1': 1,
    '2': 2,
    '2D': 2 * config.hidden_size,
    'J': HIDDEN,
  }
  for i, (_, _, run) in enumerate(runs(config)):
    suffix = f'@{i}' if config.ragged else ''
    out |= {symbol + suffix: size for symbol, size in zip(_OF_RUNS, _run_sizes(run))}
  return out


def _run_sizes(config: EncoderConfig) -> tuple[int, ...]:
  """Of `_OF_RUNS`: A is the width of the heads of one branch, O of all branches, X heads * taps, F neurons."""
  heads, neurons = config.num_heads, config.intermediate_size
  width = heads * config.head_size
  return width, width * config.branches, heads * config.conv_kernel_size, neurons, neurons // config.num_groups


def _shape(row: Row, sizes: Mapping[str, int]) -> tuple[int, ...]:
  return tuple(sizes[symbol] for symbol in row.shape.split())


def leaf_shapes(
  config: EncoderConfig, parts: Collection[str], num_classes: int = 0, names: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
  """Name -> shape of every leaf of a tree with these parts ('encoder' and any of `HEADS`); `names` as in `table`."""
  sizes = _sizes(config, num_classes)
  rows = [row for row in table(config, names) if row.part in parts]
  return {row.path: ((row.layers[1] - row.layers[0],) if row.stacked else ()) + _shape(row, sizes) for row in rows}


def _hf_shape(row: Row, sizes: Mapping[str, int]) -> tuple[int, ...]:
  return row.transform.to_hf(np.broadcast_to(np.float32(0), _shape(row, sizes))).shape


def _prefix(row: Row, config: EncoderConfig) -> str:
  return f'{config.architecture}.' if row.part == 'encoder' else ''


def _layers(row: Row) -> Iterator[int | None]:
  return iter(range(*row.layers)) if row.stacked else iter((None,))


def _name(row: Row, layer: int | None) -> str:
  return row.name.replace('{i}', str(layer))


def has_pooler(names: Iterator[str] | Mapping[str, Any]) -> bool:
  """Whether a file of BERT weights contains its pooler."""
  return any(name.removeprefix('bert.') == 'pooler.dense.weight' for name in names)


def export_tensors(params: Params, config: EncoderConfig, *, stock_head: bool = True) -> dict[str, np.ndarray]:
  """Our tree as transformers' tensors.

  Args:
    params: a tree with 'encoder' and any of `HEADS`, float32.
    config: its configuration.
    stock_head: write a classifier on the first token as the head that transformers has (`first_token`).

  Returns:
    Name -> contiguous float32 array. Names carry the model's prefix ('bert.') if there is a head, as transformers
    writes them.

  Raises:
    ConfigError: a leaf that the table lacks, a missing leaf, a wrong shape or dtype.
    NumericsError: a value that is not finite.
  """
  leaves = named_leaves(params)
  classes = leaves['classifier/bias'].shape[-1] if 'classifier/bias' in leaves else 0
  parts, out = {'encoder', *params}, {}
  shapes = leaf_shapes(config, parts, classes, leaves)
  unknown = sorted(set(leaves) - set(shapes))
  if unknown:
    raise ConfigError(
      f'parameter {unknown[0]}: transformers has no tensor for it in this configuration; '
      'export a tree of encoder and heads only (scores of pruning are baked into the weights first)'
    )
  for row in (row for row in table(config, leaves) if row.part in parts):
    if row.path not in leaves:
      raise ConfigError(f'parameter {row.path}: missing from the tree; the configuration asks for it')
    array = np.asarray(leaves[row.path])
    expected = shapes[row.path]
    if array.shape != expected or array.dtype != np.float32:
      raise ConfigError(f'parameter {row.path}: found {array.dtype}{array.shape}, expected float32{expected}')
    if not np.isfinite(array).all():
      raise NumericsError(f'parameter {row.path}: holds values that are not finite; nothing was exported')
    prefix = _prefix(row, config) if set(params) & set(HEADS) else ''
    for layer in _layers(row):
      value = array if layer is None else array[layer - row.layers[0]]
      out[prefix + _name(row, layer)] = np.ascontiguousarray(row.transform.to_hf(value))
  return first_token.widened(out, config) if stock_head and first_token.fits(config, classes) else out


def import_tensors(tensors: Mapping[str, np.ndarray], config: EncoderConfig) -> Params:
  """transformers' tensors as our tree.

  Args:
    tensors: name -> array, with or without the model's prefix; half precision is cast up to float32.
    config: the configuration that the shapes must agree with.

  Returns:
    The tree: 'encoder' and those of `HEADS` that the file holds, NumPy float32.

  Raises:
    DataError: a tensor that the table lacks, a missing one, a wrong dtype, a value that is not finite, tied tensors
      that differ.
    ConfigError: a shape that does not agree with the configuration.
  """
  rows, tensors = table(config, tensors), first_token.narrowed(tensors, config)
  classes = next((t.shape[0] for n, t in tensors.items() if n.endswith('classifier.weight') and t.ndim == 2), 0)
  sizes, accepted = _sizes(config, classes), _accepted(rows, config)
  found: dict[tuple[str, int | None], tuple[str, np.ndarray]] = {}
  halves = 0
  for name, tensor in tensors.items():
    modern = _modern(name)
    if _unused(modern, config):
      continue
    if modern not in accepted:
      raise DataError(f'tensor {name}: {_unexpected(modern, config)}')
    row, layer = accepted[modern]
    halves += tensor.dtype != np.float32
    value = row.transform.to_ours(_checked(name, tensor, _hf_shape(row, sizes)))
    if (row.path, layer) not in found:
      found[row.path, layer] = (name, value)
    elif not np.array_equal(found[row.path, layer][1], value):
      raise DataError(
        f'tensor {name}: differs from {found[row.path, layer][0]}, which must hold the same values '
        '(an untied decoder cannot be expressed; tie the weights and save again)'
      )
  if halves:
    log.warning('cast %d half-precision tensors to float32', halves)
  parts = {'encoder'} | {path.split('/')[0] for path, _ in found}
  return _stack([row for row in rows if row.part in parts], found, config)


def _accepted(rows: list[Row], config: EncoderConfig) -> dict[str, tuple[Row, int | None]]:
  out: dict[str, tuple[Row, int | None]] = {}
  for row in rows:
    for layer in _layers(row):
      name = _name(row, layer)
      for alias in (name, _prefix(row, config) + name, *row.tied):
        out[alias] = (row, layer)
  return out


def _modern(name: str) -> str:
  """Names of checkpoints converted from TensorFlow: LayerNorm.gamma and .beta."""
  if name.endswith('LayerNorm.gamma'):
    return name.removesuffix('gamma') + 'weight'
  return name.removesuffix('beta') + 'bias' if name.endswith('LayerNorm.beta') else name


def _unused(name: str, config: EncoderConfig) -> bool:
  """Known tensors that carry nothing for us: index buffers, and BERT's next-sentence head (logged)."""
  if name.removeprefix(f'{config.architecture}.') in ('embeddings.position_ids', 'embeddings.token_type_ids'):
    return True
  if config.architecture == 'bert' and name in ('cls.seq_relationship.weight', 'cls.seq_relationship.bias'):
    log.warning('left out %s: the next-sentence head has no place in our tree', name)
    return True
  return False


def _unexpected(name: str, config: EncoderConfig) -> str:
  if name.split('.')[0] in ('classifier', 'sequence_summary'):
    return (
      "unexpected: this task head of transformers is not one of ours (BertForSequenceClassification's is); "
      'save the encoder without it: AutoModel.from_pretrained(folder).save_pretrained(new_folder)'
    )
  return f'unexpected in a {config.architecture} model of {config.num_layers} layers; check config.json against it'


def _checked(name: str, tensor: np.ndarray, expected: tuple[int, ...]) -> np.ndarray:
  if tensor.dtype not in (np.float32, np.float16, np.dtype(ml_dtypes.bfloat16)):
    raise DataError(f'tensor {name}: found dtype {tensor.dtype}, expected float32, float16 or bfloat16')
  if tensor.shape != expected:
    raise ConfigError(
      f'tensor {name}: found shape {tensor.shape}, expected {expected} from config.json; take both files of one model'
    )
  value = tensor.astype(np.float32)
  if not np.isfinite(value).all():
    raise DataError(f'tensor {name}: holds values that are not finite; the file is damaged')
  return value


def _stack(
  rows: list[Row], found: Mapping[tuple[str, int | None], tuple[str, np.ndarray]], config: EncoderConfig
) -> Params:
  wanted = [(row, layer) for row in rows for layer in _layers(row)]
  missing = [_prefix(row, config) + _name(row, layer) for row, layer in wanted if (row.path, layer) not in found]
  if missing:
    more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
    raise DataError(f'tensor {missing[0]}{more}: missing; the file is incomplete or config.json is of another model')
  leaves = {}
  for row in rows:
    values = [found[row.path, layer][1] for layer in _layers(row)]
    leaves[row.path] = np.stack(values) if row.stacked else np.ascontiguousarray(values[0])
  return nested(leaves)


def count_parameters(params: Params) -> int:
  """Number of parameters of a tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
