"""Files and pictures of a report."""

import sys

import numpy as np
import pytest
from finished_runs import finished, series

from compactlm_jax.config import FinetuneConfig, OptimizerConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.report import as_csv, as_json, as_markdown, collect, write_report
from compactlm_jax.report.plot import draw_curves, draw_scores, on_one_grid
from compactlm_jax.train.rundir import read_run


@pytest.fixture
def report(tmp_path):
  """Two groups on SST-2, one of them with losses."""
  finetune = FinetuneConfig(benchmark='sst2')
  one = series(tmp_path / 'one', [0.81, 0.79, 0.86], finetune=finetune)
  two = tmp_path / 'two'
  two.mkdir()
  finished(two, {'accuracy': 0.7}, finetune=finetune, losses=[3, 2, 1], optimizer=OptimizerConfig(learning_rate=1e-5))
  return collect([str(one), str(two)], read_run)


@pytest.mark.parametrize('suffix', ['.md', '.csv', '.json', '.png'])
def test_the_ending_says_what_is_written(report, tmp_path, suffix):
  """Mutation: write all kinds always."""
  out = tmp_path / 'out'
  out.mkdir()
  assert write_report(report, f'{out}/report{suffix}') == (f'{out}/report{suffix}',)
  assert [p.name for p in out.iterdir()] == [f'report{suffix}']
  if suffix == '.png':
    assert (out / 'report.png').read_bytes().startswith(b'\x89PNG')
  else:
    make = {'.md': as_markdown, '.csv': as_csv, '.json': as_json}[suffix]
    assert (out / f'report{suffix}').read_text() == make(report)


def test_a_prefix_gives_all_kinds(report, tmp_path):
  """Mutation: forget the curves."""
  written = write_report(report, f'{tmp_path}/all')
  assert {w.rpartition('/')[2] for w in written} == {'all.md', 'all.csv', 'all.json', 'all.png', 'all-curves.png'}
  assert write_report(report, '') == ()


@pytest.mark.parametrize(
  ('output', 'curves', 'message'),
  [
    ('none/report', False, '--output: the folder of .*none/report is not there'),
    ('report.mkd', False, r'ends in .mkd; use .md'),
    ('', True, '--curves: name the picture'),
    ('report.md', True, '--curves: name the picture'),
    ('one', False, 'one is a folder; name a file, or a prefix as .*one/report'),
  ],
)
def test_outputs_that_cannot_be_are_refused(report, tmp_path, output, curves, message):
  """Mutation: take any ending for a prefix."""
  with pytest.raises(ConfigError, match=message):
    write_report(report, f'{tmp_path}/{output}' if output else '', curves)


def test_plots_without_matplotlib_name_the_extra(report, tmp_path, monkeypatch):
  """Tables need none. Mutation: import it at the top."""
  monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
  write_report(report, f'{tmp_path}/r.md')
  for output, curves in (('r.png', False), ('c.png', True), ('all', False)):
    with pytest.raises(ConfigError, match=r"pip install 'compactlm-jax\[plots\]'"):
      write_report(report, f'{tmp_path}/{output}', curves)
  assert not (tmp_path / 'all.md').exists()


def test_scores_show_every_seed_and_the_published_rows(report):
  """Mutation: draw the medians only, or published rows of another metric."""
  figure = draw_scores(report)
  panels = {ax.get_title(loc='left'): ax for ax in figure.axes}
  assert list(panels) == ['sst2: accuracy', 'sst2: loss (lower is better)']
  ax = panels['sst2: accuracy']
  drawn = np.concatenate([np.atleast_1d(line.get_xdata()) for line in ax.lines]).tolist()
  assert all(value in drawn for value in (0.81, 0.79, 0.86, 0.7))
  labels = [tick.get_text() for tick in ax.get_yticklabels()]
  assert labels[:2] == ['one (n=3)', 'two (n=1)'] and 'BERT-base (109M), published' in labels
  assert [t.get_text() for t in panels['sst2: loss (lower is better)'].get_yticklabels()] == ['one (n=3)']


def test_curves_show_median_and_band(tmp_path, report):
  """Mutations: draw the mean; take the band of one seed."""
  with pytest.raises(ConfigError, match='no run has losses'):
    draw_curves(collect([str(tmp_path / 'one')], read_run))
  (ax,) = draw_curves(report).axes
  assert ax.get_title(loc='left') == 'sst2: training loss'
  np.testing.assert_array_equal(ax.lines[0].get_ydata(), [3, 2, 1])
  parent = tmp_path / 'three'
  for seed, losses in enumerate(([9, 1], [4, float('nan')], [5, 3])):
    (parent / f'seed-{seed}').mkdir(parents=True)
    finished(parent / f'seed-{seed}', {'accuracy': 0.5}, seed=seed, losses=losses)
  (ax,) = draw_curves(collect([str(parent)], read_run)).axes
  np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[1, 5], [2, 2]])
  corners = {tuple(point) for point in ax.collections[0].get_paths()[0].vertices}
  assert corners == {(1, 4), (1, 9), (2, 1), (2, 3)}


@pytest.mark.parametrize('value', ['[1]', '"abc"', 'true', '{}', 'null', '"NaN"'])
def test_what_is_no_loss_is_not_drawn(report, tmp_path, value):
  """As lines that are torn. Mutations: take whatever the line holds; take booleans for numbers."""
  log = tmp_path / 'two' / 'metrics.jsonl'
  log.write_text(log.read_text() + f'{{"step": 4, "loss": {value}}}\n{{"step": true, "loss": 9}}\n')
  (ax,) = draw_curves(report).axes
  np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[1, 3], [2, 2], [3, 1]])
  assert f'{tmp_path}/all-curves.png' in write_report(report, f'{tmp_path}/all')


def test_long_curves_are_averaged_over_stretches():
  """1,000 steps, 10 to a stretch, losses equal to their step: the mean is the middle. Mutation: take every tenth."""
  steps = np.arange(1.0, 1001)
  curve = np.stack([steps, steps], 1)
  middles, values = on_one_grid([curve, curve])
  assert values.shape == (2, 100)
  np.testing.assert_allclose(middles, np.arange(100) * 10 + 5.5)
  np.testing.assert_allclose(values, [middles, middles])
  few = np.array([[50.0, 3], [100, 2], [150, 1]])  # points stay where they are
  np.testing.assert_array_equal(on_one_grid([few, few[1:]])[0], few[:, 0])
  np.testing.assert_array_equal(on_one_grid([few, few[1:]])[1], [[3, 2, 1], [np.nan, 2, 1]])
