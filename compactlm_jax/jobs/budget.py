"""The best sub-network within a budget of milliseconds, parameters or FLOPs, and what else was close."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from compactlm_jax.errors import ConfigError
from compactlm_jax.report.aligned import aligned
from compactlm_jax.report.grid import TITLES, GridRow, over_runs, shown
from compactlm_jax.report.summary import lower_is_better

_PART = re.compile(r'(latency|params|flops)\s*(<=?)\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-zA-Z]*)')
_UNITS = {
  'latency': {'us': 1e-3, 'ms': 1.0, 's': 1e3},
  'params': {'': 1.0, 'k': 1e3, 'K': 1e3, 'M': 1e6, 'B': 1e9, 'G': 1e9},
  'flops': {'': 1.0, 'M': 1e6, 'G': 1e9, 'T': 1e12},
}
_FIELDS = {'latency': 'latency_ms', 'params': 'params', 'flops': 'flops'}
_CLOSE = 4
"""Sub-networks that are shown beside the chosen one, of those that fit and of those that do not."""


@dataclasses.dataclass(frozen=True)
class Budget:
  """One limit.

  Attributes:
    text: as it was written.
    quantity: 'latency_ms', 'params' or 'flops'.
    limit: in the unit of `GridRow`.
    inclusive: whether the limit itself fits.
  """

  text: str
  quantity: str
  limit: float
  inclusive: bool

  def fits(self, row: GridRow) -> bool:
    """Whether a sub-network is within the limit."""
    cost = self.cost(row)
    return cost <= self.limit if self.inclusive else cost < self.limit

  def cost(self, row: GridRow) -> float:
    """What a sub-network takes of it; infinity if that is not known."""
    value = getattr(row, self.quantity)
    return math.inf if value is None else float(value)


@dataclasses.dataclass(frozen=True)
class Choice:
  """What a budget chose.

  Attributes:
    row: the sub-network.
    metric: what it was chosen by.
    others: those that fit too, the best first.
    missed: those that do not fit, the nearest to the budget first.
    budgets: the limits.
  """

  row: GridRow
  metric: str
  others: tuple[GridRow, ...]
  missed: tuple[GridRow, ...]
  budgets: tuple[Budget, ...]


def parse_budgets(text: str) -> tuple[Budget, ...]:
  """'latency<5ms', 'params<20e6', 'flops<3e9', or several of them with commas between.

  Raises:
    ConfigError: anything else, a unit that is not known, a limit of zero, or a quantity twice.
  """
  found = []
  for part in (part.strip() for part in text.split(',')):
    match = _PART.fullmatch(part)
    if match is None:
      raise ConfigError(
        f'--budget={text}: {part!r} is none of latency<5ms, params<20e6 and flops<3e9; several have commas between'
      )
    name, sign, value, unit = match.groups()
    if unit not in _UNITS[name]:
      units = ', '.join(f'{part.removesuffix(unit)}{u}' for u in _UNITS[name])
      raise ConfigError(f'--budget={text}: write the unit as in {units}')
    limit = float(value) * _UNITS[name][unit]
    if not 0 < limit < math.inf:
      raise ConfigError(f'--budget={text}: {part} leaves no sub-network, or all of them; write a limit above 0')
    found.append(Budget(part, _FIELDS[name], limit, sign == '<='))
  if len({budget.quantity for budget in found}) < len(found):
    raise ConfigError(f'--budget={text}: names a quantity twice')
  return tuple(found)


def choose(rows: Sequence[GridRow], budgets: Sequence[Budget], metric: str) -> Choice:
  """The sub-network with the best metric among those within all limits; of equal ones the one that costs less.

  Args:
    rows: sub-networks with their scores and costs; a row without the metric, or with NaN, is not chosen.
    budgets: the limits.
    metric: its name, which says whether low values are good.

  Raises:
    ConfigError: none fits (the message says which came nearest), or none has the metric.
  """
  sign = 1.0 if lower_is_better(metric) else -1.0
  scored = [row for row in rows if math.isfinite(row.metrics.get(metric, math.nan))]
  if not scored:
    raise ConfigError(f'--budget: no sub-network has a score ({metric}) to choose by')

  def place(row: GridRow) -> tuple[float, ...]:
    return (sign * row.metrics[metric], *(budget.cost(row) for budget in budgets), float(row.params or 0))

  def excess(row: GridRow) -> float:
    return max(budget.cost(row) / budget.limit for budget in budgets)

  fitting = sorted((row for row in scored if all(b.fits(row) for b in budgets)), key=place)
  others = [row for row in scored if row not in fitting]
  if not fitting:
    nearest = min(others, key=excess)
    costs = ', '.join(_said(budget, nearest) for budget in budgets)
    raise ConfigError(
      f'--budget={",".join(b.text for b in budgets)}: no sub-network fits; the nearest is {nearest.cell.name} with '
      f'{costs}'
    )
  missed = sorted(others, key=excess)
  return Choice(fitting[0], metric, tuple(fitting[1:]), tuple(missed), tuple(budgets))


def as_text(choice: Choice, note: str = '') -> str:
  """The chosen sub-network and those that were close, as a table.

  Args:
    choice: from `choose`.
    note: what latencies are of.
  """
  shown_rows = [choice.row, *choice.others[: _CLOSE // 2], *choice.missed[: _CLOSE - min(len(choice.others), 2)]]
  columns = [name for name in TITLES if any(getattr(row, name) is not None for row in shown_rows)]
  lines = [['sub-network', choice.metric, *(TITLES[name] for name in columns), 'budget']]
  for row in shown_rows:
    found = over_runs([[row]]).found
    cells = [shown(name, found.get(name, {}).get(row.cell))[0] for name in (choice.metric, *columns)]
    lines.append([row.cell.name, *cells, _verdict(choice, row)])
  table = aligned(lines, left=len(lines[0]))
  head = f'{choice.row.cell.name} is the best sub-network by {choice.metric} with {" and ".join(_limits(choice))}.'
  return '\n\n'.join([head, table, *([note] if note else [])])


def _limits(choice: Choice) -> list[str]:
  return [re.sub(r'\s*(<=?)\s*', r' \1 ', budget.text) for budget in choice.budgets]


def _verdict(choice: Choice, row: GridRow) -> str:
  if row == choice.row:
    return 'chosen'
  over = [b for b in choice.budgets if not b.fits(row)]
  return 'fits' if not over else ', '.join(f'{_over(b, row)} {_name(b)}' for b in over)


def _over(budget: Budget, row: GridRow) -> str:
  excess = 100 * (budget.cost(row) / budget.limit - 1)
  return f'{excess:.3g} % too much'


def _name(budget: Budget) -> str:
  return {'latency_ms': 'latency'}.get(budget.quantity, budget.quantity)


def _said(budget: Budget, row: GridRow) -> str:
  cost = budget.cost(row)
  return f'{cost:.3g} ms' if budget.quantity == 'latency_ms' else f'{cost:.4g} {budget.quantity}'
