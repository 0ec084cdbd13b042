"""The grid of an adaptive network: what each sub-network scores, and its size. Metrics of a cell are METRIC@CELL."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compactlm_jax.compress.subnet import subnet, subnet_config
from compactlm_jax.config import Cell, EncoderConfig
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.nn.flops import encoder_flops
from compactlm_jax.types import Params, Score

MARK = '@'
"""Between the name of a metric, or of what evaluation gathers, and that of a cell."""


def cell_scores(score: Score, cells: Sequence[Cell]) -> Score:
  """A score of each cell's outputs: those of the full network under their own names, of a cell as METRIC@CELL.

  Args:
    score: of 'outputs' and 'labels'.
    cells: the full network first; of the others, rows 'outputs@CELL' are gathered.
  """

  def scores(rows: Mapping[str, np.ndarray]) -> Mapping[str, float]:
    shared = {name: values for name, values in rows.items() if MARK not in name}
    found = dict(score(shared))
    for cell in cells[1:]:
      own = score({**shared, 'outputs': rows[f'outputs{MARK}{cell.name}']})
      found |= {f'{name}{MARK}{cell.name}': value for name, value in own.items()}
    return found

  return scores


def metrics_of_cells(scores: Mapping[str, float], cells: Sequence[Cell]) -> dict[Cell, dict[str, float]]:
  """Metrics of each cell that has any, by their own names.

  Args:
    scores: METRIC of the full network and METRIC@CELL of the others, of one or several evaluations.
    cells: the full network first.
  """
  found: dict[str, dict[str, float]] = {}
  for name, value in scores.items():
    metric, _, cell = name.partition(MARK)
    found.setdefault(cell or cells[0].name, {})[metric] = value
  return {cell: found[cell.name] for cell in cells if cell.name in found}


def grid_rows(
  scores: Mapping[str, float], cells: Sequence[Cell], encoder: EncoderConfig, params: Params, seq_len: int
) -> list[dict[str, Any]]:
  """The grid as results.json has it, a row for each cell; latencies are measured by whoever wants them.

  Args:
    scores: see `metrics_of_cells`.
    cells: the full network first.
    encoder: of the full network.
    params: its parameters, or their shapes: the trees that belong to the finished model.
    seq_len: tokens of a row whose FLOPs are counted.

  Returns:
    {'width', 'depth', 'hidden' (where it is chosen), 'metrics', 'params' (with heads), 'flops' (forward pass of the
    encoder for one row, two per multiplication and addition), 'latency_ms': None}.

  Raises:
    ConfigError: a cell that the encoder does not have.
  """
  metrics, rows = metrics_of_cells(scores, cells), []
  for cell in cells:
    params_of_cell, flops = size_of(cell, encoder, params, seq_len)
    row: dict[str, Any] = {'width': cell.width, 'depth': cell.depth}
    if cell.hidden:
      row['hidden'] = cell.hidden
    sizes = {'params': params_of_cell, 'flops': flops, 'latency_ms': None}
    rows.append({**row, 'metrics': metrics.get(cell, {}), **sizes})
  return rows


def size_of(cell: Cell, encoder: EncoderConfig, params: Params, seq_len: int) -> tuple[int, float]:
  """(parameters, forward FLOPs of the encoder for a row of `seq_len` tokens) of a cell; see `grid_rows`."""
  shapes = jax.eval_shape(lambda tree: subnet(tree, encoder, cell), params)
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  return count, seq_len * encoder_flops(subnet_config(encoder, cell), seq_len)


def cell_bundle(bundle: Bundle, cell: Cell) -> Bundle:
  """One sub-network as a model of its own.

  Args:
    bundle: the full network; a generator is no part of it.
    cell: which one.

  Raises:
    ConfigError: see `compress.subnet.subnet_config`.
  """
  config, host = subnet_config(bundle.config, cell), jax.tree.map(np.asarray, bundle.params)
  if config == bundle.config:
    return bundle
  # Cut on the host, without a program for each shape; what stays whole (embeddings) is shared by all sub-networks.
  cut = subnet(host, bundle.config, cell)
  params = jax.tree.map(lambda own, of, whole: whole if own is of else jnp.asarray(own), cut, host, bundle.params)
  return dataclasses.replace(bundle, params=params, config=config)
