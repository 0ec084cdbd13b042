"""A report as pictures: scores of seeds beside published ones, and training losses over steps.

Figures are objects of their own (no pyplot): nothing here depends on a display or on other figures of the process.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from compactlm_jax.errors import ConfigError
from compactlm_jax.metrics import read_metrics
from compactlm_jax.report.published import Published, published
from compactlm_jax.report.runs import Group, Report
from compactlm_jax.report.summary import lower_is_better, summarize

MAX_PANELS = 6
MAX_POINTS = 100
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000')
GREY = '#707070'


def draw_scores(report: Report) -> Any:
  """One panel for each metric: a dot for each seed, the median, and the mean with its standard error.

  A row for each group and, in grey, for each published score of the same metric. Counts and thresholds are left to
  the tables, and so are metrics beyond the first MAX_PANELS of a subject.

  Returns:
    A matplotlib Figure.

  Raises:
    ConfigError: matplotlib is not installed.
  """
  panels: list[tuple[str, list[Group], str, list[Published]]] = []
  for subject, groups in report.subjects().items():
    rows = published(groups[0].benchmark)
    names = dict.fromkeys(metric for group in groups for metric in group.metrics)
    drawn = [name for name in names if not name.endswith(('total', 'thresh'))]
    drawn.sort(key=lambda name: (not any(row.metric == name for row in rows), lower_is_better(name)))
    for name in drawn[:MAX_PANELS]:
      having = [group for group in groups if group.values(name)]
      panels.append((subject, having, name, [row for row in rows if row.metric == name]))
  heights = [0.9 + 0.3 * (len(groups) + len(quoted)) for _, groups, _, quoted in panels]
  figure = new_figure((8.5, sum(heights) + 0.7))
  axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
  for ax, (subject, groups, metric, quoted) in zip(axes, panels):
    _score_panel(ax, groups, metric, quoted)
    ax.set_title(f'{subject}: {metric}' + (' (lower is better)' if lower_is_better(metric) else ''), loc='left')
  _legend(figure, any(quoted for *_, quoted in panels))
  return figure


def draw_curves(report: Report) -> Any:
  """Training loss over steps: for each group the median of its seeds, and a band from the lowest to the highest.

  Losses are averaged over up to MAX_POINTS equal stretches of steps, as single batches are noisy. A second column
  shows the held-out loss of evaluations during training, where there were any.

  Returns:
    A matplotlib Figure.

  Raises:
    ConfigError: matplotlib is not installed, or no run has metrics.jsonl.
  """
  drawn: dict[tuple[str, str], list[tuple[Group, np.ndarray, np.ndarray]]] = {}
  for subject, group in ((subject, group) for subject, groups in report.subjects().items() for group in groups):
    logged = [read_metrics(run.folder) for run in group.runs]
    for name in ('loss', 'eval_loss'):
      curves = [points for points in (points_of(lines, name) for lines in logged) if len(points)]
      if curves:
        drawn.setdefault((subject, name), []).append((group, *on_one_grid(curves)))
  if not drawn:
    raise ConfigError('no run has losses in metrics.jsonl: there are no curves to draw')
  subjects = list(dict.fromkeys(subject for subject, _ in drawn))
  names = list(dict.fromkeys(name for _, name in drawn))
  height = max(3.6, 1.2 + 0.2 * max(map(len, drawn.values())))  # the legend has a line for each group
  figure = new_figure((6.5 * len(names) + 0.5, height * len(subjects) + 0.4))
  axes = figure.subplots(len(subjects), len(names), squeeze=False)
  for i, subject in enumerate(subjects):
    for j, name in enumerate(names):
      _curve_panel(axes[i, j], drawn.get((subject, name), []))
      axes[i, j].set_title(f'{subject}: {"training" if name == "loss" else "held-out"} loss', loc='left')
  return figure


def has_curves(report: Report) -> bool:
  """Whether `draw_curves` has anything to draw."""
  return any(len(points_of(read_metrics(run.folder), 'loss')) for group in report.groups for run in group.runs)


def new_figure(size: tuple[float, float]) -> Any:
  """An empty Figure of so many inches.

  Raises:
    ConfigError: matplotlib is not installed.
  """
  try:
    figure = importlib.import_module('matplotlib.figure')
    agg = importlib.import_module('matplotlib.backends.backend_agg')
  except ImportError as e:
    raise ConfigError("plots need matplotlib: pip install 'compactlm-jax[plots]'") from e
  made = figure.Figure(figsize=size, dpi=120, layout='constrained')
  agg.FigureCanvasAgg(made)
  return made


def _score_panel(ax: Any, groups: Sequence[Group], metric: str, rows: Sequence[Published]) -> None:
  labels = []
  for y, group in enumerate(groups):
    values, colour = np.array(group.values(metric)), COLOURS[y % len(COLOURS)]
    labels.append(f'{group.name} (n={values.size})')
    s = summarize(values.tolist(), metric)
    apart = y + 0.16 + np.linspace(-0.07, 0.07, values.size)  # equal scores do not hide each other
    ax.plot(values, apart, 'o', color=colour, alpha=0.55, markersize=5, markeredgewidth=0)
    ax.plot([s.median], [y + 0.16], '|', color=colour, markersize=15, markeredgewidth=2.5)
    ax.errorbar([s.mean], [y - 0.2], xerr=None if s.stderr is None else [s.stderr], fmt='D', color=colour,
                markersize=5, capsize=3)  # fmt: skip
  for y, row in enumerate(rows, len(groups)):
    labels.append(f'{row.model}, published')
    spread = row.stderr if row.stderr is not None else row.std
    ax.errorbar([row.value], [y], xerr=None if spread is None else [spread], fmt='s', color=GREY, markersize=5,
                markerfacecolor='white', capsize=3)  # fmt: skip
  ax.set_yticks(range(len(labels)), labels)
  for tick, _ in zip(ax.get_yticklabels()[len(groups) :], rows):
    tick.set_color(GREY)
  if rows:
    ax.axhline(len(groups) - 0.5, color='#c0c0c0', linewidth=0.8)
  ax.set_ylim(len(labels) - 0.4, -0.6)
  ax.margins(x=0.08)
  ax.grid(axis='x', color='#e0e0e0', linewidth=0.6)
  ax.set_axisbelow(True)
  ax.ticklabel_format(axis='x', useOffset=False)


def _legend(figure: Any, with_published: bool) -> None:
  """What the signs mean, once for all panels."""
  make = importlib.import_module('matplotlib.lines').Line2D
  kinds: list[tuple[dict[str, Any], str]] = [
    ({'marker': 'o', 'alpha': 0.55, 'color': 'black', 'markeredgewidth': 0}, 'one seed'),
    ({'marker': '|', 'color': 'black', 'markersize': 13, 'markeredgewidth': 2.5}, 'median'),
    ({'marker': 'D', 'color': 'black'}, 'mean ± standard error'),
  ]
  if with_published:
    kinds.append(({'marker': 's', 'color': GREY, 'markerfacecolor': 'white'}, 'published, not measured here'))
  handles = [make([], [], linestyle='none', label=label, **style) for style, label in kinds]
  figure.legend(handles=handles, loc='outside upper center', ncols=len(handles), frameon=False, fontsize=9)


def points_of(lines: Sequence[dict[str, Any]], name: str) -> np.ndarray:
  """[(step, value), ...] of the lines that have a finite number there; others are damaged, and left out."""
  pairs = [(line['step'], line.get(name)) for line in lines]
  numbers = [pair for pair in pairs if all(type(value) in (int, float) for value in pair)]
  found = np.array(numbers, np.float64).reshape(-1, 2)
  return found[np.isfinite(found[:, 1])]


def on_one_grid(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """(steps [P], values [runs, P]): means of both over equal stretches of steps; NaN where a run has none."""
  first, last = min(c[:, 0].min() for c in curves), max(c[:, 0].max() for c in curves)
  count = min(MAX_POINTS, max(len(c) for c in curves))
  edges = np.linspace(first, last + 1, count + 1)
  values, total, seen = np.full((len(curves), count), np.nan), np.zeros(count), np.zeros(count)
  for row, curve in zip(values, curves):
    slot = np.clip(np.searchsorted(edges, curve[:, 0], side='right') - 1, 0, count - 1)
    counts = np.bincount(slot, minlength=count)
    row[counts > 0] = np.bincount(slot, curve[:, 1], count)[counts > 0] / counts[counts > 0]
    total, seen = total + np.bincount(slot, curve[:, 0], count), seen + counts
  used = seen > 0
  return total[used] / seen[used], values[:, used]


def _curve_panel(ax: Any, curves: Sequence[tuple[Group, np.ndarray, np.ndarray]]) -> None:
  for i, (group, steps, values) in enumerate(curves):
    colour = COLOURS[i % len(COLOURS)]
    label = f'{group.name}: median of {len(values)}' + (', lowest to highest' if len(values) > 1 else '')
    ax.plot(steps, np.nanmedian(values, 0), color=colour, linewidth=1.6, label=label)
    if len(values) > 1:
      ax.fill_between(steps, np.nanmin(values, 0), np.nanmax(values, 0), color=colour, alpha=0.2, linewidth=0)
  ax.set_xlabel('step')
  ax.set_ylabel('loss')
  ax.grid(color='#e0e0e0', linewidth=0.6)
  ax.set_axisbelow(True)
  if curves:
    ax.legend(frameon=False, fontsize=9)
  else:
    ax.set_axis_off()
