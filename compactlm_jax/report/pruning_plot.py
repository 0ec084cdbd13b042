"""Pruned runs as pictures: scores over what remains of the encoder, and how it came to that over the steps."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from compactlm_jax.metrics import read_metrics
from compactlm_jax.report.plot import COLOURS, GREY, MAX_PANELS, new_figure, on_one_grid, points_of
from compactlm_jax.report.pruning import (
  NAMES,
  Line,
  common_weights,
  dense_groups,
  is_pruned,
  lines_of,
  points_beside,
  remaining_of,
)
from compactlm_jax.report.published import published
from compactlm_jax.report.runs import Group, Report
from compactlm_jax.report.summary import lower_is_better, summarize

_LOGGED = {
  'density': 'remaining of what is masked (%)',
  'threshold': 'threshold of the scores',
  'regularization': 'weight of the penalty',
  'penalty': 'penalty',
}
"""Metrics of pruning in metrics.jsonl, and what they are called in a picture."""

_MARKERS = 'osD^vP*X'
_POINTS = '<>phd8'
_DARK = '#303030'
_TICKS = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
_LEAST = 0.01  # per cent; a log scale has no place for encoders that lost everything


def has_pruned(report: Report) -> bool:
  """Whether `draw_pruning` has anything to draw."""
  return any(map(is_pruned, report.groups))


def has_schedules(report: Report) -> bool:
  """Whether `draw_schedules` has anything to draw."""
  return any(len(curve) for group in report.groups if is_pruned(group) for curve in _curves(group, 'density'))


def draw_pruning(report: Report) -> Any:
  """Scores over the remaining weights of the encoder, on a log scale, as in the paper's figures.

  A line for each method (and structure, teacher and other settings, see `report.pruning.lines_of`): means over seeds
  with their standard deviations, and a pale dot for each seed. Dashed: the dense runs. Marks of their own: LayerDrop
  and smaller dense models (`report.pruning.points_beside`). The upper scale, where it is known, is the number of
  weights that are not zero. A row for each subject, panels for its metrics; losses are drawn only where nothing else
  was measured.

  Args:
    report: with pruned runs (`has_pruned`).

  Returns:
    A matplotlib Figure.

  Raises:
    ConfigError: matplotlib is not installed.
  """
  panels = []
  for subject, groups in report.subjects().items():
    lines = lines_of(groups)
    panels += [(subject, groups, lines, metric) for metric in _metrics(groups, lines)]
  columns = min(2, len(panels))
  rows = -(-len(panels) // columns)
  entries = max(len(lines) + len(dense_groups(groups)) + len(points_beside(groups)) for _, groups, lines, _ in panels)
  figure = new_figure((max(8.2, 6.2 * columns + 0.4), 4.6 * rows + 0.22 * -(-entries // 3)))
  axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  for ax, (subject, groups, lines, metric) in zip(axes, panels):
    _panel(ax, groups, lines, metric)
    ax.set_title(f'{subject}: {metric}' + (' (lower is better)' if lower_is_better(metric) else ''), loc='left')
  for ax in axes[len(panels) :]:
    ax.set_axis_off()
  handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
  _legend(figure, list(handles.values()), list(handles))
  return figure


def draw_schedules(report: Report) -> Any:
  """Density, threshold, weight of the penalty and penalty over steps, where runs logged them.

  A line for each group, the median of its seeds; groups that `draw_pruning` joins by a line share colour and style.

  Args:
    report: with logged densities (`has_schedules`).

  Returns:
    A matplotlib Figure.

  Raises:
    ConfigError: matplotlib is not installed.
  """
  styled = {subject: _styled(lines_of(groups)) for subject, groups in report.subjects().items()}
  drawn: list[tuple[str, str, list[tuple[Line, tuple[str, str, str], Any]]]] = []
  for subject, lines in styled.items():
    for name in _LOGGED:
      curves = [(line, style, on_one_grid(found)) for line, style in lines for found in _of_line(line, name)]
      drawn += [(subject, name, curves)] if curves else []
  columns = min(2, len(drawn))
  rows = -(-len(drawn) // columns)
  labels = {line.label: style for _, _, curves in drawn for line, style, _ in curves}
  figure = new_figure((max(8.2, 6.2 * columns + 0.4), 3.5 * rows + 0.22 * -(-len(labels) // 3)))
  axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  for ax, (subject, name, curves) in zip(axes, drawn):
    _schedule_panel(ax, name, curves)
    ax.set_title(subject, loc='left')
  for ax in axes[len(drawn) :]:
    ax.set_axis_off()
  make = importlib.import_module('matplotlib.lines').Line2D
  handles = [make([], [], color=c, linestyle=dash, marker=m, markersize=5) for c, dash, m in labels.values()]
  _legend(figure, handles, list(labels))
  return figure


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
  columns = min(3, len(labels))
  figure.legend(handles, labels, loc='outside lower center', ncols=columns, frameon=False, fontsize=8.5, handlelength=3)


def _metrics(groups: Sequence[Group], lines: Sequence[Line]) -> list[str]:
  """What is drawn of a subject: published metrics first, no counts, losses only if there is nothing else."""
  known = {row.metric for row in published(groups[0].benchmark)}
  names = dict.fromkeys(metric for line in lines for group in line.groups for metric in group.metrics)
  kept = [name for name in names if not name.endswith(('total', 'thresh'))]
  scores = [name for name in kept if not lower_is_better(name)] or kept
  return sorted(scores, key=lambda name: name not in known)[:MAX_PANELS]


def _styled(lines: Sequence[Line]) -> list[tuple[Line, tuple[str, str, str]]]:
  """(colour by method, dash-dotted with a teacher, a marker of its own among lines of the same colour and dash)."""
  seen: dict[tuple[str, str], int] = {}
  out = []
  for line in lines:
    look = (COLOURS[list(NAMES).index(line.config.method)], '-.' if line.teacher else '-')
    seen[look] = seen.get(look, -1) + 1
    out.append((line, (*look, _MARKERS[seen[look] % len(_MARKERS)])))
  return out


def _panel(ax: Any, groups: Sequence[Group], lines: Sequence[Line], metric: str) -> None:
  shares = []
  for line, (colour, dash, marker) in _styled(lines):
    having = [group for group in line.groups if group.values(metric)]
    if not having:
      continue
    x = [max(100 * remaining_of(group), _LEAST) for group in having]
    found = [summarize(group.values(metric), metric) for group in having]
    spread = [s.std or 0.0 for s in found]
    label = f'{line.label} (n={_counts([s.n for s in found])})'
    ax.errorbar(x, [s.mean for s in found], yerr=spread, color=colour, linestyle=dash, marker=marker, markersize=5,
                capsize=3, linewidth=1.5, elinewidth=1.1, label=label)  # fmt: skip
    for group in having:
      runs = [run for run in group.runs if metric in run.scores]
      seeds = [(max(100 * (run.remaining or 0.0), _LEAST), run.scores[metric]) for run in runs]
      ax.plot(*zip(*seeds), 'o', color=colour, alpha=0.35, markersize=3.5, markeredgewidth=0)
      shares += [share for share, _ in seeds]
  for i, group in enumerate(group for group in dense_groups(groups) if group.values(metric)):
    s = summarize(group.values(metric), metric)
    dashes = (0, (5, 2 + 2 * i))
    ax.axhline(s.mean, color=GREY, linestyle=dashes, linewidth=1.2, label=f'dense: {group.name} (n={s.n})')
    if s.std:
      ax.axhspan(s.mean - s.std, s.mean + s.std, color=GREY, alpha=0.12, linewidth=0)
  shares += _draw_points(ax, groups, metric)
  _scale(ax, shares, common_weights(groups))
  ax.set_ylabel(metric)
  ax.grid(color='#e0e0e0', linewidth=0.6)
  ax.set_axisbelow(True)


def _draw_points(ax: Any, groups: Sequence[Group], metric: str) -> list[float]:
  """Base lines that have one size each; returns their places in per cent."""
  having = [point for point in points_beside(groups) if point.group.values(metric)]
  for i, point in enumerate(having):
    s = summarize(point.group.values(metric), metric)
    label, place = f'{point.kind}: {point.group.name} (n={s.n})', max(100 * point.remaining, _LEAST)
    ax.errorbar([place], [s.mean], yerr=[s.std] if s.std else None, color=_DARK, linestyle='none', capsize=3,
                marker=_POINTS[i % len(_POINTS)], markersize=7, markeredgewidth=0, label=label)  # fmt: skip
  return [max(100 * point.remaining, _LEAST) for point in having]


def _scale(ax: Any, shares: Sequence[float], weights: float | None) -> None:
  """A log scale of per cent, and above it one of weights if all groups have the same number of them in all."""
  low, high = min([*shares, 50.0]) / 1.3, max([*shares, 50.0]) * 1.3
  _log_axis(ax, 'x', low, high)
  ax.set_xlabel('non-zero weights of the encoder (% of those that can be masked)')
  if weights:
    unit, name = (1e6, 'millions') if weights >= 1e6 else (1e3, 'thousands')
    ticks = _ticks(low, high)
    top = ax.secondary_xaxis('top')
    top.set_xticks(ticks, [f'{tick / 100 * weights / unit:.3g}' for tick in ticks], fontsize=8)
    top.minorticks_off()
    top.set_xlabel(f'non-zero weights, {name}', fontsize=9)


def _ticks(low: float, high: float) -> list[float]:
  return [tick for tick in _TICKS if low <= tick <= high]


def _log_axis(ax: Any, which: str, low: float, high: float) -> None:
  """A log scale of per cent whose ticks are plain numbers."""
  ticks = _ticks(low, high)
  getattr(ax, f'set_{which}scale')('log')
  getattr(ax, f'set_{which}lim')(low, high)
  getattr(ax, f'set_{which}ticks')(ticks, [f'{tick:g}' for tick in ticks])
  ax.minorticks_off()


def _counts(counts: Sequence[int]) -> str:
  return str(counts[0]) if len(set(counts)) == 1 else f'{min(counts)} to {max(counts)}'


def _curves(group: Group, name: str) -> list[np.ndarray]:
  """[(step, value), ...] of each seed that logged it."""
  found = (points_of(read_metrics(run.folder), name) for run in group.runs)
  return [points for points in found if len(points)]


def _of_line(line: Line, name: str) -> list[list[np.ndarray]]:
  """For each group of a line that logged it, the curves of its seeds."""
  return [curves for group in line.groups if (curves := _curves(group, name))]


def _schedule_panel(ax: Any, name: str, curves: Sequence[tuple[Line, tuple[str, str, str], Any]]) -> None:
  low = 100.0
  for i, (_, (colour, dash, marker), (steps, values)) in enumerate(curves):
    middle = np.nanmedian(values, 0) * (100 if name == 'density' else 1)
    low = min(low, float(np.min(middle[middle > 0], initial=100.0)))
    wide = 1.2 + 2.4 * (1 - i / len(curves))  # equal schedules do not hide each other
    every = ((i % 8) / 64, 0.125)
    ax.plot(steps, middle, color=colour, linestyle=dash, linewidth=wide, marker=marker, markersize=5, markevery=every)
  if name == 'density':
    _log_axis(ax, 'y', low / 1.3, 130.0)
  ax.set_xlabel('step')
  ax.set_ylabel(_LOGGED[name])
  ax.grid(color='#e0e0e0', linewidth=0.6)
  ax.set_axisbelow(True)
