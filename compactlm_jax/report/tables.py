"""A report as markdown, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from compactlm_jax.report.grid import COSTS, Grid, as_entries, as_tables
from compactlm_jax.report.pruning import rows_of
from compactlm_jax.report.published import Published, published
from compactlm_jax.report.runs import Group, Report, Run
from compactlm_jax.report.summary import summarize

STATISTICS = ('n', 'median', 'mean', 'std', 'stderr', 'best', 'worst')
_COLUMNS = ('record', 'subject', 'group', 'seed', 'metric', 'statistic', 'value', 'steps', 'seconds', 'config_hash',
            'code', 'folder', 'command', 'source')  # fmt: skip
REMAINING = 'Pruned runs; what remains is a mean over seeds, of the weights of the encoder that can be masked.'
NOT_MEASURED = 'Published by others, not measured here: other encoders, the whole training and dev sets.'


def as_markdown(report: Report, runs: bool = True) -> str:
  """Tables: one of scores for each subject, published ones beside it, then the runs, their commands and notes.

  Args:
    report: what was collected.
    runs: also tell of each run; otherwise the scores only.
  """
  parts = []
  for subject, groups in report.subjects().items():
    parts += [f'## {subject}', _scores(groups)]
    pruned = _pruned(groups)
    if pruned:
      parts += [REMAINING, pruned]
    for group in groups:
      parts += [f'### Sub-networks of {group.name}', as_tables(group.grid)] if group.grid else []
    rows = published(groups[0].benchmark) if runs else ()
    if rows:
      parts += [NOT_MEASURED, _table(('published model', 'metric', 'score', 'spread', 'source'), map(_quoted, rows))]
    if runs:
      parts += ['Runs:', _run_table(groups), 'Commands:', _commands(groups)]
  lines = [f'- left out: {folder}: {why}' for folder, why in report.left_out] + [f'- {n}' for n in report.notes]
  return '\n\n'.join([*parts, *(['\n'.join(lines)] if lines else [])]) + '\n'


def as_csv(report: Report) -> str:
  """One line for each number: scores of runs ('run'), statistics of groups ('summary'), 'published' ones.

  Of adaptive runs also statistics of each sub-network ('cell'), metrics and costs called METRIC@CELL.
  """
  out = io.StringIO()
  writer = csv.DictWriter(out, _COLUMNS, lineterminator='\n')
  writer.writeheader()
  for subject, groups in report.subjects().items():
    for group in groups:
      common = {'subject': subject, 'group': group.name}
      for run in group.runs:
        facts = {**common, 'record': 'run', 'seed': run.config.seed, **_facts(run)}
        measured = {**run.scores, **_sizes(run)}
        writer.writerows({**facts, 'metric': name, 'value': value} for name, value in measured.items())
      for metric in group.metrics:
        found = dataclasses.asdict(summarize(group.values(metric), metric))
        writer.writerows(
          {**common, 'record': 'summary', 'metric': metric, 'statistic': name, 'value': found[name]}
          for name in STATISTICS
        )
      if group.grid:
        writer.writerows({**common, **row} for row in _cells(group.grid))
    for row in published(groups[0].benchmark):
      same = {'subject': subject, 'group': row.model, 'record': 'published', 'metric': row.metric, 'source': row.source}
      spread = {'value': row.value, 'stderr': row.stderr, 'std': row.std}
      writer.writerows(
        {**same, 'statistic': name, 'value': value} for name, value in spread.items() if value is not None
      )
  return out.getvalue()


def as_json(report: Report) -> str:
  """Everything, nested; a figure that is not known or not finite is null."""
  subjects = {group.name: subject for subject, members in report.subjects().items() for group in members}
  groups = [
    {
      'name': group.name,
      'subject': subjects[group.name],
      'task': group.runs[0].config.task,
      'metrics': {
        metric: {k: _finite(v) for k, v in dataclasses.asdict(summarize(group.values(metric), metric)).items()}
        for metric in group.metrics
      },
      'runs': [
        {
          'seed': run.config.seed,
          'metrics': {k: _finite(v) for k, v in run.scores.items()},
          **_sizes(run),
          **_facts(run),
          **({'grid': as_entries(run.grid)} if run.grid else {}),
        }
        for run in group.runs
      ],
      **({'grid': _grid(group.grid)} if group.grid else {}),
    }
    for group in report.groups
  ]
  names = dict.fromkeys(group.benchmark for group in report.groups)
  rows = [{'benchmark': name, **dataclasses.asdict(row)} for name in names for row in published(name)]
  left_out = [{'folder': folder, 'why': why} for folder, why in report.left_out]
  pruned = [
    {
      'subject': subject,
      **dataclasses.asdict(row),
      'scores': {k: _finite(v) for k, v in dataclasses.asdict(row.scores).items()},
    }
    for subject, members in report.subjects().items()
    for row in rows_of(members)
  ]
  whole: dict[str, Any] = {
    'groups': groups,
    **({'pruned': pruned} if pruned else {}),
    'published': rows,
    'left_out': left_out,
  }
  whole |= {'notes': list(report.notes)}
  return json.dumps(whole, indent=2, allow_nan=False) + '\n'


def number(value: float | None) -> str:
  """Four digits after the point, or four in all for a very small number; '-' for None."""
  if value is None:
    return '-'
  return f'{value:.4f}' if value == 0 or not math.isfinite(value) or abs(value) >= 5e-4 else f'{value:.3e}'


def _finite(value: float | None) -> float | None:
  return value if value is not None and math.isfinite(value) else None


def _facts(run: Run) -> dict[str, Any]:
  return {name: getattr(run, name) for name in ('steps', 'seconds', 'config_hash', 'code', 'folder', 'command')}


def _sizes(run: Run) -> dict[str, float]:
  """What remains of a pruned encoder, by names of results.json."""
  known = {'density': run.remaining, 'nonzero': run.nonzero}
  return {name: value for name, value in known.items() if value is not None}


def _cells(grid: Grid) -> list[dict[str, Any]]:
  """Lines of the CSV for sub-networks."""
  return [
    {'record': 'cell', 'metric': f'{quantity}@{cell.name}', 'statistic': name, 'value': value}
    for quantity, by_cell in grid.found.items()
    for cell, summary in by_cell.items()
    for name, value in dataclasses.asdict(summary).items()
    if value is not None
  ]


def _grid(grid: Grid) -> list[dict[str, Any]]:
  """Statistics of each sub-network: those of metrics, and means of costs."""
  out = []
  for cell in grid.cells:
    having = {name: by_cell[cell] for name, by_cell in grid.found.items() if cell in by_cell}
    metrics = {
      name: {k: _finite(v) for k, v in dataclasses.asdict(s).items()} for name, s in having.items() if name not in COSTS
    }
    costs = {name: having[name].mean if name in having else None for name in COSTS}
    out.append({**dataclasses.asdict(cell), 'metrics': metrics, **costs})
  return out


def _pruned(groups: Sequence[Group]) -> str:
  """The table of pruned groups; '' if there are none."""
  rows = []
  for row in rows_of(groups):
    s = row.scores
    remains = f'{100 * row.remaining:.2f} %', '-' if row.nonzero is None else f'{row.nonzero:,.0f}'
    spread = number(s.std), '-' if s.n == 1 else f'{number(min(s.best, s.worst))} to {number(max(s.best, s.worst))}'
    of_dense = '-' if row.of_dense is None else f'{100 * row.of_dense:.1f} %'
    settings = (row.method, 'weights' if row.structure == 'none' else row.structure, row.teacher or '-', row.asked)
    rows.append((*settings, *remains, row.metric, str(s.n), number(s.mean), *spread, of_dense, row.group))
  head = ('method', 'pruned', 'teacher', 'asked', 'remaining', 'non-zero weights', 'metric', 'n', 'mean',
          'standard deviation', 'range', 'of dense', 'runs')  # fmt: skip
  return _table(head, rows) if rows else ''


def _scores(groups: Sequence[Group]) -> str:
  rows = []
  for group in groups:
    for metric in group.metrics:
      s = summarize(group.values(metric), metric)
      seeds = {run.scores[metric]: f' (seed {run.config.seed})' for run in reversed(group.runs) if metric in run.scores}
      best, worst = (number(x) + (seeds.get(x, '') if s.n > 1 else '') for x in (s.best, s.worst))
      rows.append((group.name, metric, str(s.n), *map(number, (s.median, s.mean, s.stderr, s.std)), best, worst))
  head = ('runs', 'metric', 'n', 'median', 'mean', 'standard error', 'standard deviation', 'best', 'worst')
  return _table(head, rows)


def _quoted(row: Published) -> tuple[str, ...]:
  spread = f'± {number(row.stderr)}' if row.stderr is not None else f'std {number(row.std)}' if row.std else '-'
  return row.model, row.metric or 'not stated', number(row.value), spread, row.source


def _run_table(groups: Sequence[Group]) -> str:
  metrics = tuple(dict.fromkeys(metric for group in groups for metric in group.metrics))
  rows = []
  for group in groups:
    for run in group.runs:
      scores = (number(run.scores.get(metric)) for metric in metrics)
      facts = (f'{run.steps:,}', f'{run.seconds:,.1f}', run.config_hash, run.code, run.folder)
      rows.append((group.name, str(run.config.seed), *scores, *facts))
  return _table(('runs', 'seed', *metrics, 'steps', 'seconds', 'config', 'code', 'folder'), rows)


def _commands(groups: Sequence[Group]) -> str:
  """Each command once, with the seeds that it made."""
  made: dict[tuple[str, str], list[str]] = {}
  for group in groups:
    for run in group.runs:
      made.setdefault((group.name, run.command or 'not recorded'), []).append(str(run.config.seed))
  lines = [f'# {name}, seed {", ".join(seeds)}\n{command}' for (name, command), seeds in made.items()]
  return '\n'.join(['```', *lines, '```'])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Columns of equal width, so that it reads on a terminal too."""
  cells = [tuple(head), *(tuple(cell.replace('|', '\\|') for cell in row) for row in rows)]
  widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
  lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in cells]
  return '\n'.join([lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:]])
