"""Encoders whose layers stock classes of transformers cannot hold, and the modelling file that goes out with them.

Stock classes know one number of heads, which fill the hidden size, and one number of neurons. The file is PyTorch code
for whoever loads the folder with transformers. It is written here and never run: `from_pretrained` reads config.json.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError

FILE = 'modeling_compactlm.py'
"""Name of the modelling file in an exported folder."""

PREFIX = 'Compact'
"""Of the file's classes, before the name of the stock class."""

CLASSES = {
  'bert': ('Model', 'ForMaskedLM', 'ForSequenceClassification', 'ForQuestionAnswering'),
  'electra': ('Model', 'ForMaskedLM', 'ForPreTraining', 'ForSequenceClassification', 'ForQuestionAnswering'),
  'convbert': ('Model', 'ForMaskedLM', 'ForSequenceClassification', 'ForQuestionAnswering'),
}
"""What the file has a class for, by architecture."""

STOCK = {'bert': 'Bert', 'electra': 'Electra', 'convbert': 'ConvBert'}
"""What the names of transformers' classes begin with, by architecture."""

_REFERENCE = re.compile(rf'(?:[\w./-]+--)?{FILE.removesuffix(".py")}\.{PREFIX}\w+')
"""A class of the file as transformers writes it; what it loaded from the hub begins with 'owner/name--'."""


def needed(config: EncoderConfig) -> bool:
  """Whether an encoder needs the file: its layers have sizes of their own, or heads do not fill the hidden size."""
  return config.ragged or config.branches * config.num_heads * config.head_size != config.hidden_size


def source() -> bytes:
  """The modelling file."""
  return (importlib.resources.files('compactlm_jax.interop') / f'{FILE}.txt').read_bytes()


def auto_class(architecture: str) -> str:
  """The AutoModel class that loads one of the file's classes: 'CompactBertModel' -> 'AutoModel'."""
  _, task, rest = architecture.partition('For')
  return 'AutoModel' + task + rest


def described(config: EncoderConfig, stock: Mapping[str, Any]) -> dict[str, Any]:
  """config.json of an encoder that needs the file.

  Args:
    config: the encoder.
    stock: what a stock config.json says of it.
  """
  name = PREFIX + STOCK[config.architecture]
  module = FILE.removesuffix('.py')
  out = dict(stock) | {
    'architectures': [PREFIX + cls for cls in stock['architectures']],
    'auto_map': {auto_class(name + cls): f'{module}.{name}{cls}' for cls in CLASSES[config.architecture]},
    'head_size': config.head_size,
  }
  for field in ('heads_per_layer', 'neurons_per_layer'):
    if getattr(config, field):
      out[field] = list(getattr(config, field))
  return out


def with_empty(tensors: Mapping[str, np.ndarray], config: EncoderConfig) -> dict[str, np.ndarray]:
  """Adds empty output weights [D, 0] where a layer lost all heads or neurons.

  Without them a stock class of transformers would load the folder, with random weights in their place and no more than
  a warning; so it raises an error about shapes. `without_empty` is the inverse.

  Args:
    tensors: what is exported, by name.
    config: the encoder.
  """
  out = dict(tensors)
  lost = {'attention.output.dense': config.heads_per_layer, 'output.dense': config.neurons_per_layer}
  for part, sizes in lost.items():
    for layer in (i for i, size in enumerate(sizes) if not size):
      (bias,) = (name for name in tensors if name.endswith(f'encoder.layer.{layer}.{part}.bias'))
      out[f'{bias.removesuffix("bias")}weight'] = np.zeros((config.hidden_size, 0), np.float32)
  return out


def without_empty(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors that have elements."""
  return {name: tensor for name, tensor in tensors.items() if tensor.size}


def read_by(auto_map: Any) -> bool:
  """Whether an `auto_map` names classes of our file alone, so that the encoder is one of ours and needs no code."""
  return isinstance(auto_map, dict) and all(
    isinstance(value, str) and _REFERENCE.fullmatch(value) for value in auto_map.values()
  )


def sizes(raw: Mapping[str, Any], stock: Mapping[str, int]) -> dict[str, Any]:
  """Fields of EncoderConfig that `described` adds to a stock config.json.

  Args:
    raw: the parsed config.json.
    stock: the fields 'num_layers', 'num_heads' (of one branch) and 'intermediate_size' from the same file.

  Returns:
    Those of 'head_size', 'heads_per_layer' and 'neurons_per_layer' that it names.

  Raises:
    ConfigError: a wrong type or length, a negative number, or more than the stock number.
  """
  out: dict[str, Any] = {}
  if raw.get('head_size') is not None:
    out['head_size'] = raw['head_size']
    if not _whole(raw['head_size']) or raw['head_size'] < 1:
      raise ConfigError(f'config.json: head_size {raw["head_size"]!r} must be a whole number above 0')
  limits = {'heads_per_layer': ('num_heads', 'num_attention_heads'), 'neurons_per_layer': ('intermediate_size',) * 2}
  for key, (field, theirs) in limits.items():
    value, most = raw.get(key), stock[field]
    if value is None:
      continue
    if not isinstance(value, list) or len(value) != stock['num_layers'] or not all(map(_whole, value)):
      raise ConfigError(
        f'config.json: {key} {value!r} must be a list of {stock["num_layers"]} whole numbers, one for each layer'
      )
    for layer, size in enumerate(value):
      if not 0 <= size <= most:
        raise ConfigError(
          f'config.json: {key} {value!r}: {size} in layer {layer} is not between 0 and {most}, which {theirs} gives'
        )
    out[key] = tuple(value)
  return out


def _whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)
