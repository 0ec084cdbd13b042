"""Exports a pruned model so that its zeros take next to no room on disk."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import safetensors.numpy
from etils import epath

from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle, export_files
from compactlm_jax.interop.folder import SPARSE_WEIGHTS, WEIGHTS
from compactlm_jax.interop.sparse_file import SPARSE_KEY, description, kind, matrix_shapes
from compactlm_jax.interop.sparse_matrix import VALUES, Packed, pack
from compactlm_jax.interop.writing import write_export


@dataclasses.dataclass(frozen=True)
class Size:
  """What one tensor, or several, take in the file; headers are not counted.

  Attributes:
    bytes: stored, with indices and scales.
    dense_bytes: as float32.
    elements: of the tensors.
    nonzeros: those that the file does not give back as zero.
    encodings: how they are stored ('dense', 'bitmask', 'columns', 'gaps') -> number of tensors.
  """

  bytes: int
  dense_bytes: int
  elements: int
  nonzeros: int
  encodings: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class SizeReport:
  """What a sparse export takes on disk.

  Attributes:
    bytes: of model.sparse.safetensors.
    dense_bytes: of the same tensors as float32 in one safetensors file.
    tensors: name in the file -> size.
    kinds: name with '{i}' for the layer, without the model's prefix -> size over all layers.
    layers: the encoder's layers with their biases and LayerNorms: what pruning can shrink, without the embeddings.
  """

  bytes: int
  dense_bytes: int
  tensors: Mapping[str, Size]
  kinds: Mapping[str, Size]
  layers: Size


def save_sparse(bundle: Bundle, folder: epath.PathLike, values: str = 'float32') -> SizeReport:
  """Writes the folder of `save_pretrained` with model.sparse.safetensors in place of model.safetensors.

  Only `from_pretrained` reads it. The same bundle always gives the same bytes; the folder appears whole or not at all.
  Needs about three times the memory of the dense file while it runs.

  Args:
    bundle: the model; masks must be baked into its weights.
    folder: where to; an earlier export there is replaced, anything else is not touched.
    values: how the matrices of the encoder (kernels, embedding tables, pooler) are stored: 'float32' (exact; negative
      zeros may come back as +0.0), 'bfloat16' (rounded to nearest), 'int8' (rounded to a multiple of the row's largest
      magnitude / 127; rows are outputs of a kernel and entries of a table). Biases, LayerNorms and heads stay float32.

  Raises:
    ConfigError, NumericsError, StorageError: as `save_pretrained`; or `values` that do not exist or do not fit.
  """
  if values not in VALUES:
    raise ConfigError(f'values {values!r}: unknown; use one of {", ".join(map(repr, VALUES))}')
  files = export_files(bundle, folder, also={SPARSE_KEY: description(values)})
  dense_bytes = len(files[WEIGHTS])
  tensors = safetensors.numpy.load(files.pop(WEIGHTS))
  matrices = matrix_shapes(bundle.config)
  stored: dict[str, np.ndarray] = {}
  sizes: dict[str, Size] = {}
  for name in sorted(tensors):
    tensor = tensors.pop(name)
    if kind(name, bundle.config) in matrices:
      packed = pack(name, tensor, values)
    else:
      packed = Packed('dense', {'': tensor}, int(np.count_nonzero(tensor)))
    sizes[name] = Size(packed.bytes, tensor.nbytes, tensor.size, packed.nonzeros, {packed.encoding: 1})
    stored |= {f'{name}/{part}' if part else name: array for part, array in packed.parts.items()}
  files[SPARSE_WEIGHTS] = safetensors.numpy.save(stored)
  write_export(files, folder)
  kinds: dict[str, list[Size]] = {}
  for name, size in sizes.items():
    kinds.setdefault(kind(name, bundle.config), []).append(size)
  by_kind = {name: _sum(parts) for name, parts in kinds.items()}
  layers = _sum(size for name, size in by_kind.items() if '{i}' in name)
  return SizeReport(len(files[SPARSE_WEIGHTS]), dense_bytes, sizes, by_kind, layers)


def _sum(sizes: Iterable[Size]) -> Size:
  def add(a: Size, b: Size) -> Size:
    return Size(
      a.bytes + b.bytes,
      a.dense_bytes + b.dense_bytes,
      a.elements + b.elements,
      a.nonzeros + b.nonzeros,
      dict(Counter(a.encodings) + Counter(b.encodings)),
    )

  return functools.reduce(add, sizes, Size(0, 0, 0, 0, {}))
