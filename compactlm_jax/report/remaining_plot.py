"""What pruning left of each layer and kind of matrix, as heat maps; `compactlm analyze` draws that of one model."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from compactlm_jax.report.plot import MAX_PANELS, new_figure
from compactlm_jax.report.pruning import lines_of, remaining_of
from compactlm_jax.report.runs import Group, Report


def has_matrices(report: Report) -> bool:
  """Whether `draw_remaining` has anything to draw."""
  return bool(_panels(report))


def draw_remaining(report: Report) -> Any:
  """Remaining weights of each layer and kind of matrix in per cent, means over seeds: a panel for each pruned group.

  All panels have one scale of colours. The first MAX_PANELS groups are drawn, line by line of
  `report.pruning.lines_of`, and the title says of how many.

  Args:
    report: with pruned runs that say what remains of each matrix (`has_matrices`).

  Returns:
    A matplotlib Figure.

  Raises:
    ConfigError: matplotlib is not installed.
  """
  found = _panels(report)
  panels = found[:MAX_PANELS]
  columns = min(2, len(panels))
  rows = -(-len(panels) // columns)
  layers, kinds = (max(share_NM.shape[axis] for *_, share_NM in panels) for axis in (0, 1))
  wide = max(4.4, 1.2 + 0.62 * kinds)
  figure = new_figure((columns * wide + 1.1, rows * (1.6 + 0.3 * layers) + 0.5))
  axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  highest = max(1e-3, *(100 * float(share_NM.max()) for *_, share_NM in panels))
  for ax, (title, names, share_NM) in zip(axes, panels):
    image = _panel(ax, names, 100 * share_NM, highest)
    filled = '\n'.join(textwrap.fill(line, int(13 * wide)) for line in title.splitlines())
    ax.set_title(filled, loc='left', fontsize=9, parse_math=False)
  for ax in axes[len(panels) :]:
    ax.set_axis_off()
  bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 0.9 if rows == 1 else 0.6), aspect=30, pad=0.015)
  bar.set_label('remaining weights (%)', fontsize=9)
  bar.ax.tick_params(labelsize=8)
  count = '' if len(panels) == len(found) else f', the first {len(panels)} of {len(found)}'
  figure.suptitle(f'What remains of each layer and matrix (mean over seeds){count}', fontsize=11)
  return figure


def _panels(report: Report) -> list[tuple[str, tuple[str, ...], np.ndarray]]:
  """(title, kinds of matrices, fractions [layers, kinds]) of each pruned group, line by line."""
  out = []
  subjects = report.subjects()
  for subject, groups in subjects.items():
    for line in lines_of(groups):
      for group in line.groups:
        names, share_NM = _shares(group)
        of = f'{subject}: ' if len(subjects) > 1 else ''
        title = f'{of}{group.name} (n={len(group.runs)})\n{line.label}: {100 * remaining_of(group):.3g} % in all'
        out += [(title, names, share_NM)] if share_NM.size else []
  return out


def _shares(group: Group) -> tuple[tuple[str, ...], np.ndarray]:
  """(kinds of matrices, mean fractions [layers, kinds]); empty unless every run says them of the same matrices."""
  found = [run.by_matrix for run in group.runs]
  names = tuple(found[0])
  tables = [np.array(list(own.values()), np.float64).T for own in found]
  alike = all(tuple(own) == names and table.shape == tables[0].shape for own, table in zip(found, tables))
  return (names, np.mean(tables, 0)) if names and alike else ((), np.zeros((0, 0)))


def _panel(ax: Any, names: tuple[str, ...], percent_NM: np.ndarray, highest: float) -> Any:
  """A heat map with a number in each cell."""
  image = ax.imshow(percent_NM, cmap='viridis', vmin=0.0, vmax=highest, aspect='auto')
  labels = [name.removeprefix('attention/').replace('conv/', 'conv\n') for name in names]
  ax.set_xticks(range(len(names)), labels, fontsize=8)
  ax.set_yticks(range(len(percent_NM)), range(1, len(percent_NM) + 1), fontsize=8)
  ax.set_ylabel('layer', fontsize=9)
  for (row, column), value in np.ndenumerate(percent_NM):
    colour = 'black' if value > highest / 2 else 'white'
    ax.text(column, row, _short(value), ha='center', va='center', fontsize=7.5, color=colour)
  return image


def _short(percent: float) -> str:
  """Three digits at most."""
  if percent == 0:
    return '0'
  return f'{percent:.0f}' if percent >= 99.95 else f'{percent:.1f}' if percent >= 9.995 else f'{percent:.2f}'
