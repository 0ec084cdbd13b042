"""Sub-networks of adaptive runs in reports: tables, CSV, JSON, heat maps; means and spreads over seeds."""

import csv
import io
import itertools
import json
import math

import numpy as np
import pytest
from finished_runs import finished

from compactlm_jax.config import AdaptConfig, Cell
from compactlm_jax.errors import ConfigError
from compactlm_jax.report import as_csv as report_csv
from compactlm_jax.report import as_json as report_json
from compactlm_jax.report import as_markdown, collect, write_report
from compactlm_jax.report.grid import (
  GridRow,
  as_csv,
  as_entries,
  as_tables,
  first_metric,
  over_runs,
  read_rows,
  shown,
)
from compactlm_jax.report.grid_plot import draw_grid
from compactlm_jax.report.summary import summarize
from compactlm_jax.train.rundir import FREE_FIELDS, read_run

DEPTHS, WIDTHS = (1.0, 0.5), (1.0, 0.75, 0.25)


def rows(shift=0.0, latency=None):
  """A grid whose numbers name their cell: accuracy 0.d w, parameters in millions 10 d + w."""
  return [
    GridRow(
      Cell(w, d),
      {'loss': 1 - d * w, 'accuracy': 0.5 + 0.4 * d * w + shift},
      int(1e6 * (10 * d + w)),
      2e9 * d * w,
      None if latency is None else latency * d * w,
    )
    for d, w in itertools.product(DEPTHS, WIDTHS)
  ]


@pytest.fixture
def seeds(tmp_path):
  """PARENT/seed-0, ...: three adaptive runs."""
  for seed, shift in enumerate((0.0, 0.02, 0.01)):
    folder = tmp_path / 'adapted' / f'seed-{seed}'
    folder.mkdir(parents=True)
    finished(folder, {'accuracy': 0.9 + shift, 'loss': 0.0}, task='adapt', adapt=AdaptConfig(), seed=seed)
    results = json.loads((folder / 'results.json').read_text())
    (folder / 'results.json').write_text(json.dumps({**results, 'grid': as_entries(rows(shift))}))
  return tmp_path / 'adapted'


def test_rows_survive_json():
  """Mutations: leave out the hidden size; NaN as it is; order by width alone."""
  tall = [GridRow(Cell(h / 96, d, h), {'loss': math.nan}, 5, None, 1.5) for d in (1.0, 2 / 3) for h in (96, 32)]
  for before in (rows(latency=8.0), tall):
    entries = json.loads(json.dumps(as_entries(before), allow_nan=False))
    back = read_rows(entries, 'results.json')
    assert [(r.cell, r.params, r.flops, r.latency_ms) for r in back] == [
      (r.cell, r.params, r.flops, r.latency_ms) for r in before
    ]
    np.testing.assert_equal([dict(r.metrics) for r in back], [dict(r.metrics) for r in before])
  assert set(entries[0]) == {'width', 'depth', 'hidden', 'metrics', 'params', 'flops', 'latency_ms'}
  assert entries[0]['metrics'] == {'loss': None}


@pytest.mark.parametrize(
  'entries', [[{'width': 1}], [7], {'a': 1}, [{'width': 'x', 'depth': 1, 'metrics': {}}], 2 * as_entries(rows())]
)
def test_damaged_grids_are_refused(entries):
  """Mutation: skip what cannot be read."""
  with pytest.raises(ConfigError, match=r'runs/a/results.json: grid .*delete the file'):
    read_rows(entries, 'runs/a/results.json')


def test_tables_have_depths_as_rows_and_widths_as_columns():
  """The full network first. Mutations: transpose; ascending order; parameters without their unit."""
  shuffled = [rows(latency=8.0)[i] for i in (4, 0, 5, 2, 1, 3)]
  text = as_tables(over_runs([shuffled]))
  accuracy, params = text[text.index('accuracy') :].split('\n'), text[text.index('parameters') :].split('\n')
  assert accuracy[0] == 'accuracy:' and params[0] == 'parameters (millions):'
  cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in (*accuracy[2:6], *params[4:6])]
  assert cells[0] == ['depth \\ width', '1', '0.75', '0.25'] and set(cells[1][0]) == {'-', ':'}
  assert cells[2:4] == [['1', '0.9000', '0.8000', '0.6000'], ['0.5', '0.7000', '0.6500', '0.5500']]
  assert cells[4:] == [['1', '11.00', '10.75', '10.25'], ['0.5', '6.000', '5.750', '5.250']]
  assert 'loss (lower is better):' in text and 'GFLOPs of one row' in text and 'latency (ms):' in text
  assert as_tables(over_runs([shuffled]), ['accuracy']) == '\n'.join(accuracy[:6])
  tall = [GridRow(Cell(h / 96, d, h), {}, 5 * h) for d in (1.0, 2 / 3) for h in (32, 96)]
  lines = as_tables(over_runs([tall])).split('\n')
  assert lines[2].split() == ['|', 'depth', '\\', 'hidden', 'size', '|', '96', '|', '32', '|']
  assert lines[5].split()[1] == '0.667'


def test_over_seeds_each_cell_has_a_mean_and_a_spread():
  """Costs that never vary have no spread; a cell that one run lacks says so. Mutations: std of a population; the spread
  of the whole grid in each cell."""
  shifts = (0.0, 0.03, 0.01)
  runs = [rows(shift) for shift in shifts]
  runs[1] = runs[1][:-1]
  grid = over_runs(runs)
  assert grid.runs == 3 and grid.cells[0] == Cell() and grid.cells[-1] == Cell(0.25, 0.5)
  for cell, found in grid.found['accuracy'].items():
    own = [0.5 + 0.4 * cell.depth * cell.width + s for i, s in enumerate(shifts) if i != 1 or cell != Cell(0.25, 0.5)]
    assert (found.n, found.mean) == (len(own), pytest.approx(np.mean(own)))
    assert found.std == pytest.approx(np.std(own, ddof=1))
  assert shown('accuracy', grid.found['accuracy'][Cell()]) == ('0.9133', '0.0153')
  assert shown('params', grid.found['params'][Cell()]) == ('11.00', '') and shown('params', None) == ('-', '')
  assert 'accuracy, mean ± standard deviation over 3 runs:' in as_tables(
    grid
  ) and 'parameters (millions):' in as_tables(grid)
  lines = list(csv.DictReader(io.StringIO(as_csv(grid))))
  assert [(line['depth'], line['width'], line['accuracy_n']) for line in lines][:2] == [
    ('1.0', '1.0', '3'),
    ('1.0', '0.75', '3'),
  ]
  assert lines[-1]['accuracy_n'] == '2' and float(lines[0]['accuracy_std']) == pytest.approx(np.std(shifts, ddof=1))


def test_the_csv_of_one_run_holds_the_numbers_of_results_json():
  """Mutations: rounded numbers; millions of parameters."""
  lines = list(csv.DictReader(io.StringIO(as_csv(over_runs([rows(latency=8.0)])))))
  assert list(lines[0]) == ['depth', 'width', 'hidden', 'loss', 'accuracy', 'params', 'flops', 'latency_ms']
  for line, row in zip(lines, rows(latency=8.0), strict=True):
    assert Cell(float(line['width']), float(line['depth'])) == row.cell and line['hidden'] == ''
    assert {name: float(line[name]) for name in row.values()} == row.values()


def test_the_first_score_chooses():
  """Mutation: the first metric, a loss too."""
  assert first_metric(rows()) == 'accuracy'
  assert first_metric([GridRow(Cell(), {'mlm_loss': 2.0})]) == 'mlm_loss' and first_metric([GridRow(Cell())]) is None


def test_heat_maps_show_every_cell():
  """Bright is good, of costs too. Mutations: transpose the picture; draw losses beside scores; costs bright if high."""
  pytest.importorskip('matplotlib')
  figure = draw_grid({'one': over_runs([rows(latency=8.0)]), 'three': over_runs([rows(s) for s in (0, 0.01, 0.03)])})
  panels = [ax for ax in figure.axes if ax.get_title()]
  assert [ax.get_title() for ax in panels] == [
    'accuracy', 'parameters (millions)', 'GFLOPs of one row, forward', 'latency (ms)',
    'accuracy', 'parameters (millions)', 'GFLOPs of one row, forward',
  ]  # fmt: skip
  texts = {t.get_position(): t.get_text() for t in panels[0].texts}
  assert texts == {(j, i): f'{0.5 + 0.4 * d * w:.4f}' for i, d in enumerate(DEPTHS) for j, w in enumerate(WIDTHS)}
  assert panels[4].texts[0].get_text() == '0.9133\n± 0.0153'
  assert [label.get_text() for label in panels[0].get_xticklabels()] == ['1', '0.75', '0.25']
  assert [label.get_text() for label in panels[0].get_yticklabels()] == ['1', '0.5']
  scores, sizes = (np.asarray(ax.images[0].get_array()) for ax in panels[:2])
  assert scores.argmax() == 0 and sizes.argmin() == 0
  assert [part.get_suptitle() for part in figure.subfigs] == ['one', 'three (mean ± standard deviation over 3 runs)']
  losses = draw_grid({'pre-training': over_runs([[GridRow(Cell(), {'loss': 1.0}), GridRow(Cell(0.5), {'loss': 2.0})]])})
  (panel,) = [ax for ax in losses.axes if ax.get_title()]
  assert panel.get_title() == 'loss (lower is better)' and np.asarray(panel.images[0].get_array()).argmax() == 0


def test_reports_have_the_grid_over_seeds(seeds, tmp_path):
  """Mutations: the grid of the first seed alone; grids left out of one of the files."""
  report = collect([str(seeds)], read_run, FREE_FIELDS)
  text = as_markdown(report)
  assert '### Sub-networks of adapted' in text and '0.9100 ± 0.0100' in text
  assert '### Sub-networks' in as_markdown(report, runs=False)
  lines = [line for line in csv.DictReader(io.StringIO(report_csv(report))) if line['record'] == 'cell']
  own = {line['statistic']: float(line['value']) for line in lines if line['metric'] == 'accuracy@0.25x0.5'}
  expected = summarize([0.55, 0.57, 0.56], 'accuracy')
  assert own == pytest.approx({k: getattr(expected, k) for k in own}) and own['n'] == 3
  (group,) = json.loads(report_json(report))['groups']
  assert [entry['accuracy'] for entry in (e['metrics'] for e in group['runs'][1]['grid'])][0] == pytest.approx(0.92)
  last = group['grid'][-1]
  assert (last['width'], last['depth'], last['params'], last['latency_ms']) == (0.25, 0.5, 5.25e6, None)
  assert last['metrics']['accuracy']['mean'] == pytest.approx(0.56)
  pytest.importorskip('matplotlib')
  assert f'{tmp_path}/all-grid.png' in write_report(report, f'{tmp_path}/all')
  assert (tmp_path / 'all-grid.png').read_bytes().startswith(b'\x89PNG')


def test_a_damaged_grid_is_no_score(seeds):
  """Mutation: read it as an empty one."""
  path = seeds / 'seed-1' / 'results.json'
  results = json.loads(path.read_text())
  path.write_text(json.dumps({**results, 'grid': [{'width': 1.0}]}))
  with pytest.raises(ConfigError, match=r'seed-1/results.json: grid is damaged \(KeyError'):
    collect([str(seeds)], read_run, FREE_FIELDS)
