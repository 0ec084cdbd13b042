"""Pruned runs in reports: which share a line, their table, their pictures."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from finished_runs import IDENTITY, finished

from compactlm_jax.config import EncoderConfig, FinetuneConfig, OptimizerConfig, PruneConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.report import as_csv, as_json, as_markdown, collect, write_report
from compactlm_jax.report.pruning import dense_groups, lines_of, points_beside, rows_of
from compactlm_jax.report.pruning_plot import draw_pruning, draw_schedules, has_pruned, has_schedules
from compactlm_jax.report.remaining_plot import draw_remaining, has_matrices
from compactlm_jax.train.rundir import FREE_FIELDS, read_run

SST = {'finetune': FinetuneConfig(benchmark='sst2')}
WEIGHTS = 1_000_000
SOFT = PruneConfig(method='soft_movement', regularization=100.0)


def pruned(parent, prune, remaining, accuracies, *, logged=True, nonzero=True, **fields):
  """PARENT/seed-0, ...: runs of task 'prune' of which `remaining` (one number, or one for each) is left."""
  for seed, (share, accuracy) in enumerate(zip(np.broadcast_to(remaining, len(accuracies)), accuracies)):
    folder = parent / f'seed-{seed}'
    folder.mkdir(parents=True)
    finished(folder, {'accuracy': accuracy, 'loss': 1 - accuracy}, task='prune', prune=prune, seed=seed, **SST | fields)
    results = json.loads((folder / 'results.json').read_text()) | {'density': float(share)}
    results |= {'nonzero': round(share * WEIGHTS)} if nonzero else {}
    (folder / 'results.json').write_text(json.dumps(results))
    density = np.linspace(1, share, 5)
    lines = [{'step': 2 * i, 'loss': 1.0, 'density': d} for i, d in enumerate(density, 1)]
    if prune.method == 'soft_movement':
      lines = [line | {'threshold': 0.02 * i, 'regularization': 20.0 * i} for i, line in enumerate(lines, 1)]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) if logged else '')
  return parent


def dense(folder, accuracy=0.9, share=None, whole=WEIGHTS, **fields):
  """A fine-tuned run; with `share` it says how much of its `whole` weights is left."""
  folder.mkdir(parents=True)
  finished(folder, {'accuracy': accuracy, 'loss': 1 - accuracy}, **SST | fields)
  if share is not None:
    path = folder / 'results.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'density': share, 'nonzero': round(share * whole)}))
  return folder


def layers(parent, shares):
  """Adds what is left of each matrix, a table of fractions [layers, kinds] for each seed, to the runs of `pruned`."""
  kinds = ('attention/query', 'attention/conv/taps', 'ffn_in')
  for seed, table in enumerate(shares):
    path = parent / f'seed-{seed}' / 'results.json'
    found = dict(zip(kinds, np.array(table, float).T.tolist()))
    path.write_text(json.dumps(json.loads(path.read_text()) | {'by_matrix': found}))
  return parent


def gather(*folders):
  return collect([str(folder) for folder in folders], read_run, FREE_FIELDS)


@pytest.fixture
def report(tmp_path):
  """Magnitude at two densities, soft movement at two lambdas (measured densities differ by seed), and a dense run."""
  low = pruned(tmp_path / 'map3', PruneConfig(method='magnitude', density=0.03), 0.03, [0.6, 0.62])
  high = pruned(tmp_path / 'map10', PruneConfig(method='magnitude', density=0.1), 0.1, [0.7, 0.8, 0.78])
  weak = pruned(tmp_path / 'soft100', SOFT, [0.09, 0.11, 0.16], [0.85, 0.83, 0.84])
  strong = pruned(tmp_path / 'soft400', dataclasses.replace(SOFT, regularization=400.0), 0.04, [0.81])
  return gather(high, weak, low, strong, dense(tmp_path / 'dense'))


def test_runs_that_differ_in_how_much_they_prune_share_a_line(report):
  """Mutations: order by density asked; a line for each lambda; take the dense run for a pruned one."""
  lines = lines_of(report.groups)
  assert {line.label: [group.name for group in line.groups] for line in lines} == {
    'soft movement': ['soft400', 'soft100'],
    'magnitude': ['map3', 'map10'],
  }


@pytest.mark.parametrize(
  ('prune', 'fields', 'label'),
  [
    ({'structure': 'heads'}, {}, 'magnitude, heads'),
    ({'scope': 'global'}, {}, 'magnitude (scope=global)'),
    ({'final_warmup': 3.0}, {}, 'magnitude (final_warmup=3)'),
    ({'method': 'post_hoc_magnitude'}, {}, 'magnitude, post hoc'),
    ({}, {'teacher': 'runs/big'}, 'magnitude, distilled'),
    ({}, {'optimizer': OptimizerConfig(learning_rate=1e-5)}, 'magnitude (learning_rate=1e-05)'),
    ({}, {'identity': {**IDENTITY, 'data': 'others'}}, 'magnitude (data=others)'),
  ],
)
def test_runs_of_other_settings_never_share_a_line(tmp_path, prune, fields, label):
  """Even at another density. Mutation: make lines by method."""
  base = PruneConfig(method='magnitude', density=0.1)
  one = pruned(tmp_path / 'a', base, 0.1, [0.7])
  two = pruned(tmp_path / 'b', dataclasses.replace(base, density=0.03, **prune), 0.03, [0.6], **fields)
  lines = lines_of(gather(one, two).groups)
  assert len(lines) == 2 and {len(line.groups) for line in lines} == {1}
  assert label in {line.label for line in lines}


def test_what_decides_how_much_remains(tmp_path):
  """With the controller it is the density, and the weight to begin with is a setting as any other; without a penalty
  it is the threshold. Mutation: the weight of the penalty always."""
  controlled = dataclasses.replace(SOFT, control='density', density=0.1)
  thresholds = dataclasses.replace(SOFT, regularization=0.0)
  runs = {
    'a': controlled,
    'b': dataclasses.replace(controlled, density=0.03),
    'c': dataclasses.replace(controlled, density=0.03, regularization=7.0),
    'd': dataclasses.replace(thresholds, threshold=0.3),
    'e': thresholds,
  }
  report = gather(*(pruned(tmp_path / name, prune, 0.1, [0.7]) for name, prune in runs.items()))
  assert {frozenset(group.name for group in line.groups) for line in lines_of(report.groups)} == {
    frozenset('ab'), frozenset('c'), frozenset('de'),
  }  # fmt: skip
  asked = {row.group: row.asked for row in rows_of(report.groups)}
  assert asked == {
    'a': 'density 0.1',
    'b': 'density 0.03',
    'c': 'density 0.03',
    'd': 'threshold 0.3',
    'e': 'threshold 0.1',
  }


def test_rows_hold_what_numpy_computes(report):
  """Mutations: the median; a spread that divides by n; the share of the loss of the dense run."""
  rows = {(row.group, row.metric): row for row in rows_of(report.groups)}
  assert len(rows) == 8
  row, values = rows['map10', 'accuracy'], np.array([0.7, 0.8, 0.78])
  assert (row.method, row.structure, row.teacher, row.asked) == ('magnitude', 'none', '', 'density 0.1')
  assert row.scores.mean == pytest.approx(values.mean()) and row.scores.std == pytest.approx(values.std(ddof=1))
  assert row.of_dense == pytest.approx(values.mean() / 0.9) and rows['map10', 'loss'].of_dense is None
  soft = rows['soft100', 'accuracy']
  assert (soft.remaining, soft.nonzero, soft.asked) == (pytest.approx(0.12), 120_000, 'lambda 100')


def test_the_table_stands_in_every_text(report):
  """Mutation: leave what remains out of one of them."""
  text = as_markdown(report)
  line = next(
    line for line in text.splitlines() if line.startswith('| magnitude') and 'accuracy' in line and '0.1 ' in line
  )
  assert [c.strip() for c in line[1:-1].split('|')] == [
    'magnitude', 'weights', '-', 'density 0.1', '10.00 %', '100,000', 'accuracy', '3', '0.7600', '0.0529',
    '0.7000 to 0.8000', '84.4 %', 'map10',
  ]  # fmt: skip
  rows = [row for row in csv.DictReader(io.StringIO(as_csv(report))) if row['group'] == 'soft100']
  assert [float(r['value']) for r in rows if r['metric'] == 'density'] == [0.09, 0.11, 0.16]
  assert [float(r['value']) for r in rows if r['metric'] == 'nonzero'] == [90_000, 110_000, 160_000]
  found = json.loads(as_json(report))
  assert {row['group'] for row in found['pruned']} == {'map3', 'map10', 'soft100', 'soft400'}
  runs = {group['name']: group['runs'] for group in found['groups']}
  assert runs['soft100'][1]['density'] == 0.11 and 'density' not in runs['dense'][0]


def test_reports_without_pruned_runs_are_as_before(tmp_path):
  """Mutation: an empty table, or empty pictures."""
  report = gather(dense(tmp_path / 'dense'))
  assert not has_pruned(report) and not has_schedules(report) and 'Pruned runs' not in as_markdown(report)
  assert 'pruned' not in json.loads(as_json(report))
  assert [w.rpartition('/')[2] for w in write_report(report, f'{tmp_path}/r')] == ['r.md', 'r.csv', 'r.json', 'r.png']


def test_a_prefix_gives_pictures_of_pruning(report, tmp_path):
  """Mutation: forget one."""
  written = {w.rpartition('/')[2] for w in write_report(report, f'{tmp_path}/r')}
  assert written >= {'r-pruning.png', 'r-pruning-steps.png'}


def test_scores_stand_over_what_remains(report):
  """Mutations: the density asked for; the spread of the mean; a linear scale; a solid line of the dense run."""
  figure = draw_pruning(report)
  (ax,) = figure.axes
  assert ax.get_xscale() == 'log' and ax.get_title(loc='left') == 'sst2: accuracy'
  drawn = {bar.get_label(): bar for bar in ax.containers}
  assert set(drawn) == {'magnitude (n=2 to 3)', 'soft movement (n=1 to 3)'}
  line, _, (bars,) = drawn['magnitude (n=2 to 3)']
  np.testing.assert_allclose(line.get_xydata(), [[3, 0.61], [10, 0.76]])
  np.testing.assert_allclose(bars.get_segments()[1][:, 1], [0.76 - 0.0028**0.5, 0.76 + 0.0028**0.5])
  soft = drawn['soft movement (n=1 to 3)'][0]
  np.testing.assert_allclose(soft.get_xydata(), [[4, 0.81], [12, 0.84]])
  flat = next(line for line in ax.lines if line.get_label() == 'dense: dense (n=1)')
  assert flat.get_linestyle() == '--' and set(flat.get_ydata()) == {0.9}
  (top,) = ax.child_axes
  assert top.get_xlabel() == 'non-zero weights, millions'
  ticks = dict(zip(ax.get_xticks().tolist(), (tick.get_text() for tick in top.get_xticklabels())))
  assert ticks[3] == '0.03' and ticks[10] == '0.1'


def test_encoders_of_different_sizes_have_no_common_scale(tmp_path):
  """Mutation: the scale of the first."""
  one = pruned(tmp_path / 'a', PruneConfig(density=0.1), 0.1, [0.7])
  two = pruned(tmp_path / 'b', PruneConfig(density=0.03), 0.03, [0.6], nonzero=False)
  assert draw_pruning(gather(one, two)).axes[0].child_axes
  path = two / 'seed-0' / 'results.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'nonzero': 60_000}))
  assert not draw_pruning(gather(one, two)).axes[0].child_axes


def test_layer_drop_and_smaller_models_are_points(tmp_path):
  """Over their weights, beside the one dense line. Mutations: LayerDrop as a dense run; a fraction of the smaller
  model's own weights; points of runs as large as the pruned one."""
  magnitude = PruneConfig(method='magnitude', density=0.1)
  drop = {'encoder': EncoderConfig(layer_drop=0.2), 'model': 'big'}
  keep = FinetuneConfig(benchmark='sst2', keep_layers=(1, 3))
  report = gather(
    pruned(tmp_path / 'pruned', magnitude, 0.1, [0.7], model='big'),
    dense(tmp_path / 'dense', share=1.0, model='big'),
    dense(tmp_path / 'drop', 0.8, share=0.5, finetune=keep, **drop),
    dense(tmp_path / 'all', 0.85, share=1.0, **drop),
    dense(tmp_path / 'kept', 0.82, share=0.5, finetune=keep, model='big'),
    dense(tmp_path / 'mini', 0.75, share=1.0, whole=WEIGHTS // 5, model='mini'),
    dense(tmp_path / 'other', 0.7, share=1.0, model='other'),
    dense(tmp_path / 'older', 0.7, **drop, batch_size=3),
  )
  assert [group.name for group in dense_groups(report.groups)] == ['dense']
  (row,) = (row for row in rows_of(report.groups) if row.metric == 'accuracy')
  assert row.of_dense == pytest.approx(0.7 / 0.9)
  (ax,) = draw_pruning(report).axes
  drawn = {bar.get_label(): bar[0].get_xydata().tolist() for bar in ax.containers if bar[0].get_linestyle() == 'None'}
  expected = {
    'LayerDrop: drop (n=1)': [[50, 0.8]],
    'LayerDrop: all (n=1)': [[100, 0.85]],
    'fewer layers: kept (n=1)': [[50, 0.82]],
    'smaller model: mini (n=1)': [[20, 0.75]],
  }
  assert drawn == {label: pytest.approx(np.array(place)) for label, place in expected.items()}
  legend = [text.get_text() for text in draw_pruning(report).legends[0].get_texts()]
  assert set(legend) == {*drawn, 'magnitude (n=1)', 'dense: dense (n=1)'}


def test_smaller_models_need_one_encoder_to_be_smaller_than(tmp_path):
  """LayerDrop is a part of its own encoder. Mutation: the mean of both."""
  path = pruned(tmp_path / 'b', PruneConfig(density=0.03), 0.03, [0.6], model='large') / 'seed-0' / 'results.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'nonzero': 60_000}))
  mini = dense(tmp_path / 'mini', share=1.0, whole=1000, model='mini')
  drop = dense(tmp_path / 'drop', share=0.5, encoder=EncoderConfig(layer_drop=0.2))
  one = pruned(tmp_path / 'a', PruneConfig(density=0.1), 0.1, [0.7])
  found = points_beside(gather(one, tmp_path / 'b', mini, drop).groups)
  assert [(point.kind, point.group.name, point.remaining) for point in found] == [('LayerDrop', 'drop', 0.5)]


def test_what_remains_of_each_layer_and_matrix_is_drawn(tmp_path):
  """A panel for each pruned group that says it, means over seeds, one scale. Mutations: the last seed; a panel for runs
  of older versions; layers as columns."""
  prune = PruneConfig(method='magnitude', density=0.1)
  high = layers(pruned(tmp_path / 'high', prune, 0.1, [0.7, 0.8]), [np.eye(2, 3), np.zeros((2, 3))])
  low = layers(pruned(tmp_path / 'low', dataclasses.replace(prune, density=0.03), 0.03, [0.6]), [[[0, 0.03, 0.06]] * 2])
  old = pruned(tmp_path / 'old', SOFT, 0.1, [0.7])
  report = gather(high, low, old, dense(tmp_path / 'dense'))
  figure = draw_remaining(report)
  panels = [ax for ax in figure.axes if ax.images]
  assert [ax.get_title(loc='left').split('\n')[0] for ax in panels] == ['low (n=1)', 'high (n=2)']
  np.testing.assert_allclose(panels[1].images[0].get_array(), 50 * np.eye(2, 3))
  assert {ax.images[0].get_clim() for ax in panels} == {(0, 50)}
  assert [text.get_text() for text in panels[0].texts] == ['0', '3.00', '6.00'] * 2
  assert [label.get_text() for label in panels[0].get_xticklabels()] == ['query', 'conv\ntaps', 'ffn_in']
  assert 'r-pruning-layers.png' in {w.rpartition('/')[2] for w in write_report(report, f'{tmp_path}/r')}
  assert not has_matrices(gather(old))


def test_no_more_panels_than_can_be_read(tmp_path):
  """The title says how many there are. Mutation: draw all."""
  runs = [
    layers(pruned(tmp_path / f'{i}', PruneConfig(density=i / 10), i / 10, [0.7]), [np.full((3, 3), i / 10)])
    for i in range(1, 9)
  ]
  figure = draw_remaining(gather(*runs))
  assert sum(bool(ax.images) for ax in figure.axes) == 6 and 'the first 6 of 8' in figure.get_suptitle()


@pytest.mark.parametrize(
  'by_matrix', [[0.1], {'ffn_in': 0.1}, {'ffn_in': [0.1], 'ffn_out': [0.1, 0.2]}, {'ffn_in': ['x']}]
)
def test_damaged_matrices_are_named(tmp_path, by_matrix):
  path = pruned(tmp_path / 'a', SOFT, 0.1, [0.7]) / 'seed-0' / 'results.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'by_matrix': by_matrix}))
  with pytest.raises(ConfigError, match=r'results\.json is damaged .* delete it'):
    gather(tmp_path / 'a')


def test_an_encoder_that_lost_everything_is_drawn(tmp_path):
  """At the end of the scale. Mutation: take the logarithm of 0."""
  report = gather(pruned(tmp_path / 'a', SOFT, [0.0, 0.0], [0.5, 0.5]))
  (ax,) = draw_pruning(report).axes
  assert ax.containers[0][0].get_xdata().tolist() == [0.01] and ax.get_xlim()[0] > 0
  assert draw_schedules(report).axes[0].get_ylim()[0] > 0


def test_schedules_show_the_median_over_steps(report):
  """Mutations: the mean; fractions for per cent; a panel for what nobody logged."""
  figure = draw_schedules(report)
  names = [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]
  assert names == ['remaining of what is masked (%)', 'threshold of the scores', 'weight of the penalty']
  density = figure.axes[0]
  assert len(density.lines) == 4 and density.get_yscale() == 'log'
  of_soft = [line.get_xydata() for line in density.lines if len(line.get_xdata()) == 5]
  ends = sorted(float(points[-1, 1]) for points in of_soft)
  np.testing.assert_allclose(ends, [3, 4, 10, 11])
  np.testing.assert_array_equal(of_soft[0][:, 0], [2, 4, 6, 8, 10])
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == ['soft movement', 'magnitude']


def test_lines_without_a_curve_stand_in_no_legend(tmp_path):
  """Post-hoc magnitude logs no density. Mutation: a legend of all lines."""
  one = pruned(tmp_path / 'a', SOFT, 0.1, [0.7])
  two = pruned(tmp_path / 'b', PruneConfig(method='post_hoc_magnitude'), 0.1, [0.7], logged=False)
  figure = draw_schedules(gather(one, two))
  assert [text.get_text() for text in figure.legends[0].get_texts()] == ['soft movement']


def test_runs_without_a_log_have_no_schedule(tmp_path):
  """Mutation: draw an empty picture."""
  report = gather(pruned(tmp_path / 'a', PruneConfig(), 0.1, [0.7], logged=False))
  assert has_pruned(report) and not has_schedules(report)


def test_pruned_runs_stand_beside_dense_ones_of_their_own_files(tmp_path):
  """They are of two tasks and one subject. Mutation: refuse them as runs of different tasks."""
  from compactlm_jax.config import DataConfig

  own = {'finetune': FinetuneConfig(), 'data': DataConfig(train='a.tsv', dev='b.tsv')}
  report = gather(pruned(tmp_path / 'a', PruneConfig(), 0.1, [0.7], **own), dense(tmp_path / 'd', **own))
  assert list(report.subjects()) == ['finetune on b.tsv']


def test_dense_runs_of_other_encoders_are_no_measure(tmp_path):
  """Of another model, another size, or other weights at the same place. Mutations: any dense run of the subject; only
  one for all pruned ones; dashed lines of all."""
  magnitude = PruneConfig(method='magnitude', density=0.1)
  small, large = (pruned(tmp_path / f'pruned-{m}', magnitude, 0.1, [0.6], model=m) for m in ('small', 'large'))
  other = dense(tmp_path / 'dense-large', 0.8, model='large/')
  shares = {r.group: r.of_dense for r in rows_of(gather(small, large, other).groups) if r.metric == 'accuracy'}
  assert shares == {'pruned-small': None, 'pruned-large': pytest.approx(0.75)}
  lines = {str(line.get_label()) for line in draw_pruning(gather(small, large, other)).axes[0].lines}
  assert 'dense: dense-large (n=1)' in lines
  assert not any('dense' in str(line.get_label()) for line in draw_pruning(gather(small, other)).axes[0].lines)
  fresh = pruned(tmp_path / 'fresh', magnitude, 0.1, [0.6])
  wide = dense(tmp_path / 'wide', encoder=EncoderConfig(hidden_size=1024, num_heads=16))
  again = dense(tmp_path / 'again', 0.8, model='large', batch_size=8, identity={**IDENTITY, 'start': 'b'})
  recorded = pruned(tmp_path / 'recorded', magnitude, 0.1, [0.6], model='large', identity={**IDENTITY, 'start': 'a'})
  assert {row.of_dense for row in rows_of(gather(fresh, wide).groups)} == {None}
  assert {row.of_dense for row in rows_of(gather(recorded, again).groups)} == {None}
  line = next(line for line in as_markdown(gather(recorded, again)).splitlines() if line.startswith('| magnitude'))
  assert [cell.strip() for cell in line[1:-1].split('|')][-2:] == ['-', 'recorded']
