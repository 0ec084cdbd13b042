"""One parameter in our tree and among the tensors of Hugging Face transformers: names, shapes, layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
  """How one layer's array is laid out by transformers, and back."""

  to_hf: Callable[[np.ndarray], np.ndarray]
  to_ours: Callable[[np.ndarray], np.ndarray]


COPY = Transform(lambda a: a, lambda a: a)
TRANSPOSE = Transform(lambda a: a.T, lambda a: a.T)
DEPTHWISE = Transform(lambda a_WD: a_WD.T[:, None, :], lambda a_D1W: a_D1W[:, 0, :].T)
POINTWISE = Transform(lambda a_DA: a_DA.T[:, :, None], lambda a_AD1: a_AD1[:, :, 0].T)
COLUMN = Transform(lambda a_A: a_A[:, None], lambda a_A1: a_A1[:, 0])


@dataclasses.dataclass(frozen=True)
class Row:
  """One parameter in both worlds.

  Attributes:
    path: our leaf, as `tree.named_leaves` names it; its first component is its part.
    name: transformers' tensor without the model's prefix; `{i}` stands for the layer.
    shape: our shape without the layer axis, in the symbols of `names._sizes`.
    transform: between the two layouts.
    tied: other names that transformers may store the same tensor under, complete.
    layers: first and last + 1 of the layers that are stacked in it, counted from 0; of a stack's rows only.
  """

  path: str
  name: str
  shape: str
  transform: Transform = COPY
  tied: tuple[str, ...] = ()
  layers: tuple[int, int] = (0, 0)

  @property
  def part(self) -> str:
    """'encoder' or the head that it belongs to."""
    return self.path.split('/')[0]

  @property
  def stacked(self) -> bool:
    """Whether our leaf has a leading axis of layers."""
    return '{i}' in self.name


def dense_rows(path: str, name: str, inputs: str, outputs: str) -> list[Row]:
  """Kernel and bias of a Dense layer; sizes in symbols."""
  return [
    Row(f'{path}/kernel', f'{name}.weight', f'{inputs} {outputs}', TRANSPOSE),
    Row(f'{path}/bias', f'{name}.bias', outputs),
  ]


def norm_rows(path: str, name: str, size: str) -> list[Row]:
  """Scale and bias of a LayerNorm; its size in a symbol."""
  return [Row(f'{path}/scale', f'{name}.weight', size), Row(f'{path}/bias', f'{name}.bias', size)]
