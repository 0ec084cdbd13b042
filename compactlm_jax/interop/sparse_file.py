"""model.sparse.safetensors: which tensors are stored by `sparse_matrix`, under which names, and how they are read back.

A tensor that is stored densely keeps its name; the arrays of one that is not are called 'name/bitmask', 'name/rows'
and so on. config.json says under `SPARSE_KEY` which version of this format the file has and how values are stored.
That holds for the matrices of the encoder: embedding tables, kernels, BERT's pooler. Biases, LayerNorms and heads are
float32 and dense.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import DataError
from compactlm_jax.interop import folder as folder_module
from compactlm_jax.interop import names
from compactlm_jax.interop.folder import SPARSE_WEIGHTS, WEIGHTS, Folder, read_tensor_file
from compactlm_jax.interop.sparse_matrix import VALUES, declared_shape, unpack

SPARSE_KEY = 'compactlm_sparse'
"""Key of config.json."""

VERSION = 1


def description(values: str) -> dict[str, Any]:
  """What config.json says under `SPARSE_KEY`."""
  return {'version': VERSION, 'values': values}


def matrix_shapes(config: EncoderConfig) -> dict[str, set[tuple[int, ...]]]:
  """The matrices of an encoder as transformers lays them out.

  Args:
    config: the encoder; layers may have different sizes.

  Returns:
    Name as `kind` gives it -> the shapes that its layers have. BERT's pooler is there in any case: config.json does not
    say whether it is in the file.
  """
  config = dataclasses.replace(config, pooler=True)
  shapes, out = names.leaf_shapes(config, ('encoder',)), dict[str, set[tuple[int, ...]]]()
  for row in names.table(config):
    if row.part == 'encoder' and row.path.endswith(('/kernel', '/embedding')):
      leaf = np.broadcast_to(np.float32(0), shapes[row.path][row.stacked :])  # of no size in memory
      out.setdefault(row.name, set()).add(row.transform.to_hf(leaf).shape)
  return out


def kind(name: str, config: EncoderConfig) -> str:
  """A tensor's name without the model's prefix, '{i}' for its layer: 'encoder.layer.{i}.output.dense.weight'."""
  return re.sub(r'^(encoder\.layer)\.\d+\.', r'\1.{i}.', name.removeprefix(f'{config.architecture}.'))


def read_sparse(folder: Folder, raw: Mapping[str, Any], config: EncoderConfig) -> dict[str, np.ndarray]:
  """Every tensor of a folder that `save_sparse` wrote, which is not trusted.

  Args:
    folder: the folder.
    raw: its config.json, with `SPARSE_KEY`.
    config: the encoder of config.json. No matrix of another shape is unpacked: a small file may claim huge ones.

  Returns:
    Name -> float32 array, as in the dense file.

  Raises:
    DataError: an unknown version, a dense file beside this one, or tensors that are damaged, contradict each other or
      do not belong to this encoder; the message names the tensor.
  """
  values = _values(raw[SPARSE_KEY])
  if folder.has(WEIGHTS):
    raise DataError(f'{folder.path}: holds both {WEIGHTS} and {SPARSE_WEIGHTS}; which one is meant? Remove the other')
  grouped: dict[str, dict[str, np.ndarray]] = {}
  for stored, array in read_tensor_file(folder, SPARSE_WEIGHTS).items():
    name, _, part = stored.partition('/')
    grouped.setdefault(name, {})[part] = array
  shapes, total = _checked_shapes(grouped, config), 0
  for name, shape in shapes.items():
    total += 4 * math.prod(shape)
    if total > folder_module.MAX_TOTAL_BYTES:
      raise DataError(f'tensor {name}: the matrices up to it unpack to {total} bytes, more than are ever read')
  out: dict[str, np.ndarray] = {}
  for name in list(grouped):
    parts = grouped.pop(name)  # so that the packed arrays are freed on the way
    out[name] = unpack(name, parts, shapes[name], values) if name in shapes else parts['']
  return out


def _values(described: Any) -> str:
  """How values are stored, of the format's description in config.json."""
  where = f'config.json: {SPARSE_KEY}'
  if not isinstance(described, dict) or type(described.get('version')) is not int:
    raise DataError(f'{where} {described!r} does not say which version of the format {SPARSE_WEIGHTS} has')
  if described['version'] != VERSION:
    raise DataError(
      f'{where}: version {described["version"]} is unknown, this release reads version {VERSION}; '
      'use the release that wrote the folder, or a newer one'
    )
  if set(described) != {'version', 'values'} or described['values'] not in VALUES:
    raise DataError(f'{where} {described!r} must hold version and values ({", ".join(VALUES)}), nothing else')
  return described['values']


def _checked_shapes(
  grouped: Mapping[str, Mapping[str, np.ndarray]], config: EncoderConfig
) -> dict[str, tuple[int, ...]]:
  """Name -> declared shape of the matrices that `unpack` reads; everything else must be a plain float32 tensor."""
  expected, out = matrix_shapes(config), {}
  for name, parts in grouped.items():
    allowed = expected.get(kind(name, config))
    if allowed is None:
      if set(parts) != {''}:
        part = min(set(parts) - {''})
        raise DataError(f'tensor {name}/{part}: unexpected: {name} is no matrix of the encoder of config.json')
      if parts[''].dtype != np.float32:
        raise DataError(f'tensor {name}: found dtype {parts[""].dtype}, expected float32')
      continue
    out[name] = declared_shape(name, parts)
    if out[name] not in allowed:
      fine = ' or '.join(map(str, sorted(allowed)))
      raise DataError(f'tensor {name}: found shape {out[name]}, expected {fine} from config.json')
  return out
