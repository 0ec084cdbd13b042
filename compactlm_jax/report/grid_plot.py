"""The grid of an adaptive network's sub-networks as heat maps: rows are depths, columns widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from compactlm_jax.report.grid import COSTS, Grid, shown, title_of
from compactlm_jax.report.plot import MAX_PANELS, new_figure
from compactlm_jax.report.summary import lower_is_better

_SCORES, _COSTS = 'viridis', 'cividis'
_COLUMNS = 3


def draw_grid(grids: Mapping[str, Grid]) -> Any:
  """Heat maps of each metric and cost with the number in each cell, grid below grid.

  Bright is good everywhere: high scores, low losses and costs. Of several runs a cell has the mean, and below it the
  standard deviation.

  Args:
    grids: name -> grid; the names are their titles.

  Returns:
    A matplotlib Figure.

  Raises:
    ConfigError: matplotlib is not installed.
  """
  most = max(len(_panels(grid)) for grid in grids.values())
  columns = 2 if most == 4 else min(_COLUMNS, most)
  rows = [-(-len(_panels(grid)) // columns) for grid in grids.values()]
  width = 1.85 + 0.72 * max(len(grid.columns) for grid in grids.values())
  heights = [0.3 + n * (0.95 + 0.52 * len(grid.depths)) for n, grid in zip(rows, grids.values())]
  figure = new_figure((columns * width, sum(heights)))
  parts = figure.subfigures(len(grids), 1, squeeze=False, height_ratios=heights)[:, 0]
  for part, n, (name, grid) in zip(parts, rows, grids.items()):
    part.suptitle(_title(name, grid), fontsize=11, parse_math=False)
    axes = list(part.subplots(n, columns, squeeze=False).flat)
    panels = _panels(grid)
    for ax, quantity in zip(axes, panels):
      _panel(part, ax, grid, quantity)
    for ax in axes[len(panels) :]:
      ax.set_axis_off()
  return figure


def _panels(grid: Grid) -> list[str]:
  """Scores, losses only where there is no score, and costs."""
  scores = [name for name in grid.metrics if not lower_is_better(name)] or list(grid.metrics)
  return scores[:MAX_PANELS] + [name for name in grid.found if name in COSTS]


def _title(name: str, grid: Grid) -> str:
  spread = any(s.std for by_cell in grid.found.values() for s in by_cell.values())
  return name + (f' (mean ± standard deviation over {grid.runs} runs)' if spread else '')


def _panel(figure: Any, ax: Any, grid: Grid, quantity: str) -> None:
  places = [[grid.at(quantity, depth, column) for column in grid.columns] for depth in grid.depths]
  means = np.array([[np.nan if s is None else s.mean for s in row] for row in places])
  unit = {'params': 1e6, 'flops': 1e9}.get(quantity, 1.0)
  good = -means if quantity in COSTS or lower_is_better(quantity) else means
  image = ax.imshow(good / unit, cmap=_COSTS if quantity in COSTS else _SCORES, aspect='auto')
  low, high = np.nanmin(good), np.nanmax(good)
  for i, row in enumerate(places):
    for j, summary in enumerate(row):
      mean, spread = shown(quantity, summary)
      dark = not good[i, j] > low + 0.6 * (high - low)
      text = f'{mean}\n± {spread}' if spread else mean
      ax.text(j, i, text, ha='center', va='center', fontsize=8, color='white' if dark else 'black')
  ax.set_xticks(range(len(grid.columns)), grid.column_labels(), fontsize=8)
  ax.set_yticks(range(len(grid.depths)), [f'{depth:.3g}' for depth in grid.depths], fontsize=8)
  ax.set_ylabel(grid.names[0], fontsize=9)
  ax.set_xlabel(grid.names[1], fontsize=9)
  ax.set_title(title_of(quantity), fontsize=9, parse_math=False)
  bar = figure.colorbar(image, ax=ax, shrink=0.9, pad=0.03)
  bar.ax.tick_params(labelsize=7)
  if quantity in COSTS or lower_is_better(quantity):
    bar.ax.yaxis.set_major_formatter(lambda value, _: f'{-value:g}')
