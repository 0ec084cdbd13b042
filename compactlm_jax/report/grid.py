"""The grid of an adaptive network's sub-networks: what each scores and costs, over seeds; tables and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from compactlm_jax.config import Cell
from compactlm_jax.errors import ConfigError
from compactlm_jax.report.aligned import aligned
from compactlm_jax.report.summary import Summary, lower_is_better, summarize

COSTS = ('params', 'flops', 'latency_ms')
"""What a sub-network costs: parameters, FLOPs of a row in a forward pass, milliseconds of a call."""

TITLES = {'params': 'parameters (millions)', 'flops': 'GFLOPs of one row, forward', 'latency_ms': 'latency (ms)'}
"""What costs are called in tables and pictures, in the units of `shown`."""

_UNITS = {'params': 1e6, 'flops': 1e9, 'latency_ms': 1.0}


@dataclasses.dataclass(frozen=True)
class GridRow:
  """One sub-network of one run: an entry of `grid` in results.json.

  Attributes:
    cell: which one.
    metrics: its scores, by name.
    params: number of parameters.
    flops: of a row in a forward pass; None if not counted.
    latency_ms: of one call; None if not measured.
  """

  cell: Cell
  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
  params: int | None = None
  flops: float | None = None
  latency_ms: float | None = None

  def values(self) -> dict[str, float]:
    """Metrics and known costs, by name."""
    costs = {name: getattr(self, name) for name in COSTS}
    return {**self.metrics, **{name: float(cost) for name, cost in costs.items() if cost is not None}}


@dataclasses.dataclass(frozen=True)
class Grid:
  """The sub-networks of one run, or of several that differ in their seed.

  Attributes:
    cells: the full network first; by depth, then by width or hidden size.
    found: metric or cost -> sub-network -> its values over runs.
    runs: how many.
  """

  cells: tuple[Cell, ...]
  found: Mapping[str, Mapping[Cell, Summary]]
  runs: int

  @property
  def depths(self) -> tuple[float, ...]:
    """Shares of layers, the rows: all layers first."""
    return tuple(dict.fromkeys(cell.depth for cell in self.cells))

  @property
  def columns(self) -> tuple[tuple[float, int], ...]:
    """(width, hidden size or 0) of the columns: the widest first."""
    return tuple(sorted({(cell.width, cell.hidden) for cell in self.cells}, reverse=True))

  @property
  def names(self) -> tuple[str, str]:
    """What rows and columns are called."""
    return 'depth', 'hidden size' if any(cell.hidden for cell in self.cells) else 'width'

  @property
  def metrics(self) -> tuple[str, ...]:
    """Names of the metrics, without costs."""
    return tuple(name for name in self.found if name not in COSTS)

  def column_labels(self) -> list[str]:
    """The columns by name."""
    return [str(hidden) if hidden else f'{width:.3g}' for width, hidden in self.columns]

  def at(self, quantity: str, depth: float, column: tuple[float, int]) -> Summary | None:
    """Values of a metric or cost of one sub-network; None if it has none."""
    return self.found[quantity].get(Cell(column[0], depth, column[1]))


def read_rows(entries: Any, where: str) -> tuple[GridRow, ...]:
  """The rows of `grid` in a results.json.

  Args:
    entries: what stands there.
    where: name of the file, for messages.

  Raises:
    ConfigError: something else than a list of sub-networks.
  """
  try:
    rows = tuple(_row(entry) for entry in entries)
  except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as e:
    raise ConfigError(
      f'{where}: grid is damaged ({type(e).__name__}: {e}); delete the file and start the run again: it only evaluates'
    ) from e
  if len({row.cell for row in rows}) < len(rows):
    raise ConfigError(f'{where}: grid names a sub-network twice; delete the file and start the run again')
  return rows


def as_entries(rows: Sequence[GridRow]) -> list[dict[str, Any]]:
  """Rows as `grid` of results.json; a figure that is not known or not finite is null."""
  return [
    {
      'width': row.cell.width,
      'depth': row.cell.depth,
      **({'hidden': row.cell.hidden} if row.cell.hidden else {}),
      'metrics': {name: value if math.isfinite(value) else None for name, value in row.metrics.items()},
      **{name: getattr(row, name) for name in COSTS},
    }
    for row in rows
  ]


def first_metric(rows: Sequence[GridRow]) -> str | None:
  """The metric that sub-networks are chosen by: the first score, a loss if there is no score, None without either."""
  names = list(dict.fromkeys(name for row in rows for name in row.metrics))
  return next((name for name in names if not lower_is_better(name)), names[0] if names else None)


def over_runs(runs: Sequence[Sequence[GridRow]]) -> Grid:
  """The grid of runs that differ in their seed.

  Args:
    runs: rows of each.
  """
  values: dict[str, dict[Cell, list[float]]] = {}
  for rows in runs:
    for row in rows:
      for name, value in row.values().items():
        values.setdefault(name, {}).setdefault(row.cell, []).append(value)
  cells = {row.cell for rows in runs for row in rows}
  ordered = tuple(sorted(cells, key=lambda c: (-c.depth, -c.width, -c.hidden)))
  found = {name: {c: summarize(own, name) for c, own in by_cell.items()} for name, by_cell in values.items()}
  scores = [name for name in found if name not in COSTS]
  return Grid(ordered, {name: found[name] for name in (*scores, *COSTS) if name in found}, len(runs))


def shown(quantity: str, summary: Summary | None) -> tuple[str, str]:
  """(mean, spread) of a cell as text: in the units of `TITLES`, to four digits; '-' and '' for what is not known.

  The spread is the standard deviation of a sample, '' of one run, and of costs that are the same in all runs.
  """
  if summary is None or not math.isfinite(summary.mean):
    return '-', ''
  unit = _UNITS.get(quantity, 1.0)
  mean, std = summary.mean / unit, None if summary.std is None else summary.std / unit
  digits = 4 if quantity not in COSTS else min(6, max(0, 3 - math.floor(math.log10(abs(mean))))) if mean else 0
  same = std is None or (quantity in COSTS and std <= 1e-9 * abs(mean))
  return f'{mean:.{digits}f}', '' if same else f'{std:.{digits}f}'


def title_of(quantity: str) -> str:
  """What a metric or cost is called, with its unit."""
  return TITLES.get(quantity, quantity + (' (lower is better)' if lower_is_better(quantity) else ''))


def as_tables(grid: Grid, quantities: Sequence[str] = ()) -> str:
  """A markdown table for each metric and cost: rows are depths, columns widths (or hidden sizes).

  Args:
    grid: of one run, or means and standard deviations over several.
    quantities: which; () for all but those that the full network alone has.
  """
  corner = ' \\ '.join(grid.names)
  parts = []
  for quantity in quantities or [name for name in grid.found if len(grid.found[name]) > 1 or len(grid.cells) == 1]:
    cells = [[_text(quantity, grid.at(quantity, depth, column)) for column in grid.columns] for depth in grid.depths]
    lines = [[corner, *grid.column_labels()], *([f'{d:.3g}', *row] for d, row in zip(grid.depths, cells))]
    spread = any('±' in text for row in cells for text in row)
    over = f', mean ± standard deviation over {grid.runs} runs' if spread else ''
    parts.append(f'{title_of(quantity)}{over}:\n\n{aligned(lines)}')
  return '\n\n'.join(parts)


def as_csv(grid: Grid) -> str:
  """A line for each sub-network; of several runs means, with standard deviations and counts in columns of their own.

  Units are those of results.json: parameters, FLOPs, milliseconds.
  """
  several = grid.runs > 1
  columns = [part for name in grid.found for part in ((name, f'{name}_std', f'{name}_n') if several else (name,))]
  out = io.StringIO()
  writer = csv.DictWriter(out, ['depth', 'width', 'hidden', *columns], lineterminator='\n')
  writer.writeheader()
  for cell in grid.cells:
    line: dict[str, Any] = {'depth': cell.depth, 'width': cell.width, 'hidden': cell.hidden or ''}
    for name, by_cell in grid.found.items():
      s = by_cell.get(cell)
      line[name] = '' if s is None else s.mean
      if several:
        line |= {f'{name}_std': '' if s is None or s.std is None else s.std, f'{name}_n': 0 if s is None else s.n}
    writer.writerow(line)
  return out.getvalue()


def _row(entry: Mapping[str, Any]) -> GridRow:
  costs = {name: None if entry.get(name) is None else float(entry[name]) for name in COSTS}
  metrics = {str(k): math.nan if v is None else float(v) for k, v in entry['metrics'].items()}
  cell = Cell(float(entry['width']), float(entry['depth']), int(entry.get('hidden') or 0))
  params = None if costs['params'] is None else int(costs['params'])
  return GridRow(cell, metrics, params, costs['flops'], costs['latency_ms'])


def _text(quantity: str, summary: Summary | None) -> str:
  mean, spread = shown(quantity, summary)
  return f'{mean} ± {spread}' if spread else mean
